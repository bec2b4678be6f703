/* experts_up and experts_up_backward. */
#include "tests/stage/stage_buffers.h"

static void body(problem_t *p, report_t *report)
{
    report->context = p->name;
    const int64_t I = p->intermediate_size, R = stage_num_rows(p);
    const double *glu = stage_glu(p, p->expected.glu);
    const int64_t width = glu ? 2 * I : I;
    cumoe_up_args_t a = {
        .struct_size = sizeof a,
        .num_tokens = p->tokens,
        .weights = &p->weights,
        .rows = stage_rows(p),
        .x = p->forward.x,
        .x_stride = p->forward.x_stride,
        .z = stage_empty(p, width),
        .hidden = stage_empty(p, I),
    };
    a.workspace = stage_workspace(p, CUMOE_STAGE_UP, &a.workspace_size, report);
    if (!stage_succeeded(p, cumoe_experts_up(p->layer, &a, NULL), report)) return;
    stage_compare(p, &a.rows, "z", a.z, p->expected.up, glu, I, report);
    stage_compare(p, &a.rows, "hidden", a.hidden, p->expected.hidden, NULL, I, report);

    cumoe_up_args_t z_only = a;
    z_only.z = stage_empty(p, width);
    z_only.hidden = NULL;
    if (stage_succeeded(p, cumoe_experts_up(p->layer, &z_only, NULL), report))
        compare_bits(report, "z alone", z_only.z, a.z, (size_t)(R * width) * real_size(p->options.dtype));
    if (glu) return;

    cumoe_up_args_t in_place = a;
    in_place.z = in_place.hidden = stage_empty(p, I);
    if (stage_succeeded(p, cumoe_experts_up(p->layer, &in_place, NULL), report))
        compare_bits(report, "hidden in place of z", in_place.hidden, a.hidden,
                     (size_t)(R * I) * real_size(p->options.dtype));
}

Test(up, forward)
{
    for (int v = 0; v < NUM_GATE_VARIANTS; v++) suite_all_cases("up", &GATE_VARIANTS[v], body);
}

Test(up, forward_far_from_zero)
{
    suite_activations("up, far from zero", &LARGE_CASE, CUMOE_F32, body);
}

Test(up, forward_pairwise)
{
    suite_pairwise("up", body);
}

static void body_backward(problem_t *p, report_t *report)
{
    report->context = p->name;
    const cumoe_rows_t rows = stage_rows(p);
    cumoe_up_backward_args_t a = {
        .struct_size = sizeof a,
        .num_tokens = p->tokens,
        .weights = &p->weights,
        .rows = rows,
        .x = p->backward.x,
        .x_stride = p->backward.x_stride,
        .dz = stage_pack(p, &rows, p->expected.dup, stage_glu(p, p->expected.dglu), p->intermediate_size),
        .drows = stage_empty(p, p->hidden_size),
        .gradients = &p->gradients,
        .gradient_mode = p->layer_case.mode,
    };
    a.workspace = stage_workspace(p, CUMOE_STAGE_UP_BACKWARD, &a.workspace_size, report);
    problem_reset_gradients(p);
    if (!stage_succeeded(p, cumoe_experts_up_backward(p->layer, &a, NULL), report)) return;
    stage_compare(p, &rows, "drows", a.drows, p->expected.drows, NULL, p->hidden_size, report);
    problem_check_gradients(p, MATRIX_UP, MATRIX_GLU_BIAS, report);

    a.drows = NULL;
    problem_reset_gradients(p);
    if (stage_succeeded(p, cumoe_experts_up_backward(p->layer, &a, NULL), report))
        problem_check_gradients(p, MATRIX_UP, MATRIX_GLU_BIAS, report);
}

Test(up, backward)
{
    for (int v = 0; v < NUM_GATE_VARIANTS; v++) suite_all_cases("up_backward", &GATE_VARIANTS[v], body_backward);
}

Test(up, backward_pairwise)
{
    suite_pairwise("up_backward", body_backward);
}
