/* experts_down and experts_down_backward. */
#include "tests/stage/stage_buffers.h"

static void body(problem_t *p, report_t *report)
{
    report->context = p->name;
    const cumoe_rows_t rows = stage_rows(p);
    cumoe_down_args_t a = {
        .struct_size = sizeof a,
        .num_tokens = p->tokens,
        .weights = &p->weights,
        .rows = rows,
        .hidden = stage_pack(p, &rows, p->expected.hidden, NULL, p->intermediate_size),
        .output = stage_empty(p, p->hidden_size),
    };
    a.workspace = stage_workspace(p, CUMOE_STAGE_DOWN, &a.workspace_size, report);
    if (!stage_succeeded(p, cumoe_experts_down(p->layer, &a, NULL), report)) return;
    stage_compare(p, &rows, "output", a.output, p->expected.output, NULL, p->hidden_size, report);
}

Test(down, forward)
{
    for (int v = 0; v < NUM_GATE_VARIANTS; v++) suite_all_cases("down", &GATE_VARIANTS[v], body);
}

Test(down, forward_pairwise)
{
    suite_pairwise("down", body);
}

static void body_backward(problem_t *p, report_t *report)
{
    report->context = p->name;
    const cumoe_rows_t rows = stage_rows(p);
    const int64_t I = p->intermediate_size, slots = p->tokens * p->top_k;
    const double *glu = stage_glu(p, p->expected.glu);
    cumoe_down_backward_args_t a = {
        .struct_size = sizeof a,
        .num_tokens = p->tokens,
        .weights = &p->weights,
        .routing = stage_routing(p),
        .rows = rows,
        .z = stage_pack(p, &rows, p->expected.up, glu, I),
        .dy = p->backward.dy,
        .dy_stride = p->backward.dy_stride,
        .dz = stage_empty(p, glu ? 2 * I : I),
        .dweight = buffer_get(&p->buffers, (size_t)slots * real_size(p->gate_type)),
        .gradients = &p->gradients,
        .gradient_mode = p->layer_case.mode,
    };
    a.workspace = stage_workspace(p, CUMOE_STAGE_DOWN_BACKWARD, &a.workspace_size, report);
    problem_reset_gradients(p);
    if (!stage_succeeded(p, cumoe_experts_down_backward(p->layer, &a, NULL), report)) return;
    stage_compare(p, &rows, "dz", a.dz, p->expected.dup, stage_glu(p, p->expected.dglu), I, report);
    compare_vector(report, "dweight", a.dweight, p->gate_type, slots, p->expected.dweight, stage_sum_limit(p));
    problem_check_gradients(p, MATRIX_DOWN, MATRIX_DOWN_BIAS, report);
}

Test(down, backward)
{
    for (int v = 0; v < NUM_GATE_VARIANTS; v++) suite_all_cases("down_backward", &GATE_VARIANTS[v], body_backward);
}

Test(down, backward_far_from_zero)
{
    suite_activations("down, far from zero", &LARGE_CASE, CUMOE_F32, body_backward);
}

Test(down, backward_pairwise)
{
    suite_pairwise("down_backward", body_backward);
}
