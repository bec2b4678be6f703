/* combine. Its backward pass is inside experts_down_backward. */
#include "tests/stage/stage_buffers.h"

static void body(problem_t *p, report_t *report)
{
    report->context = p->name;
    const cumoe_rows_t rows = stage_rows(p);
    const cumoe_combine_args_t a = {
        .struct_size = sizeof a,
        .num_tokens = p->tokens,
        .routing = stage_routing(p),
        .rows = rows,
        .output = stage_pack(p, &rows, p->expected.output, NULL, p->hidden_size),
        .y = p->forward.y,
        .y_stride = p->forward.y_stride,
    };
    if (!stage_succeeded(p, cumoe_combine(p->layer, &a, NULL), report)) return;
    problem_check_rows(p, "y", problem_rows_view(p, a.y, a.y_stride), p->expected.y, NULL, problem_limit(p),
                       report);
}

Test(combine, forward)
{
    for (int v = 0; v < NUM_GATE_VARIANTS; v++) suite_all_cases("combine", &GATE_VARIANTS[v], body);
}

Test(combine, forward_pairwise)
{
    suite_pairwise("combine", body);
}
