/* permute, bit for bit, and permute_backward. */
#include "tests/stage/stage_buffers.h"

static void body(problem_t *p, report_t *report)
{
    report->context = p->name;
    const size_t slots = (size_t)(p->tokens * p->top_k) * sizeof(int32_t);
    const cumoe_rows_t expected = stage_rows(p);
    cumoe_permute_args_t a = {
        .struct_size = sizeof a, .num_tokens = p->tokens, .routing = stage_routing(p), .rows = stage_empty_rows(p)};
    a.workspace = stage_workspace(p, CUMOE_STAGE_PERMUTE, &a.workspace_size, report);
    if (!stage_succeeded(p, cumoe_permute(p->layer, &a, NULL), report)) return;
    compare_bits(report, "offset", a.rows.offset, expected.offset, (size_t)(p->experts + 1) * sizeof(int32_t));
    compare_bits(report, "row_token", a.rows.row_token, expected.row_token, slots);
    compare_bits(report, "row_slot", a.rows.row_slot, expected.row_slot, slots);
    compare_bits(report, "slot_row", a.rows.slot_row, expected.slot_row, slots);
}

Test(permute, forward)
{
    for (int v = 0; v < NUM_GATE_VARIANTS; v++) suite_all_cases("permute", &GATE_VARIANTS[v], body);
}

static void body_backward(problem_t *p, report_t *report)
{
    report->context = p->name;
    const cumoe_rows_t rows = stage_rows(p);
    const bool gated = p->options.variant.gate != CUMOE_GATE_EXTERNAL;
    const int64_t elements = p->tokens * p->hidden_size;
    void *dx_gate = buffer_get(&p->buffers, (size_t)elements * real_size(p->gate_type));
    for (int64_t i = 0; i < p->live_tokens * p->hidden_size; i++)
        real_set(dx_gate, p->gate_type, i, p->expected.dx_gate[i]);
    const cumoe_permute_backward_args_t a = {
        .struct_size = sizeof a,
        .num_tokens = p->tokens,
        .routing = stage_routing(p),
        .rows = rows,
        .drows = stage_pack(p, &rows, p->expected.drows, NULL, p->hidden_size),
        .dx_gate = gated ? dx_gate : NULL,
        .dx = p->backward.dx,
        .dx_stride = p->backward.dx_stride,
    };
    if (!stage_succeeded(p, cumoe_permute_backward(p->layer, &a, NULL), report)) return;
    problem_check_rows(p, "dx", problem_rows_view(p, a.dx, a.dx_stride), problem_expected_dx(p, p->expected.dx),
                       p->expected.dx_size, problem_limit(p), report);
}

Test(permute, backward)
{
    for (int v = 0; v < NUM_GATE_VARIANTS; v++)
        suite_all_cases("permute_backward", &GATE_VARIANTS[v], body_backward);
}

Test(permute, backward_pairwise)
{
    suite_pairwise("permute_backward", body_backward);
}
