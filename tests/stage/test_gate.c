/* gate and gate_backward alone. */
#include "tests/stage/stage_buffers.h"

#include <math.h>

/* The fixed-point sums, and the numbers of the call as all later stages read them. */
static void check_routing(const problem_t *p, const cumoe_routing_t *routing, report_t *report)
{
    const int bits = CUMOE_FIXED_POINT_BITS(p->options.dtype);
    for (int64_t e = 0; e < p->experts; e++) {
        const double importance = ldexp((double)routing->importance[e], -bits);
        const double load = ldexp((double)routing->load[e], -bits);
        const double room = problem_sum_limit(p) * (double)(1 + p->tokens);
        if (fabs(importance - p->expected.importance[e]) > room || fabs(load - p->expected.load[e]) > room)
            report_fail(report, "expert %d: importance %g, load %g in fixed point, expected %g, %g", (int)e,
                        importance, load, p->expected.importance[e], p->expected.load[e]);
    }
    report_check(report, routing->call->seed == p->options.seed);
    report_check(report, routing->call->offset == (p->call ? p->call->offset : p->forward.offset));
    report_check(report, routing->call->first_token == p->layer_case.first_token);
    report_check(report, routing->call->live_tokens == p->live_tokens);
}

static cumoe_gate_args_t gate_args(problem_t *p, report_t *report)
{
    const cumoe_forward_args_t *f = &p->forward;
    cumoe_gate_args_t a = {
        .struct_size = sizeof a,
        .num_tokens = f->num_tokens,
        .weights = f->weights,
        .x = f->x,
        .x_stride = f->x_stride,
        .token_mask = f->token_mask,
        .training = f->training,
        .seed = f->seed,
        .offset = f->offset,
        .first_token = f->first_token,
        .call = f->call,
        .index = f->index,
        .index_dtype = f->index_dtype,
        .index_weight = f->index_weight,
        .index_weight_dtype = f->index_weight_dtype,
        .routing = stage_empty_routing(p),
        .expert_count = f->expert_count,
        .importance = f->importance,
        .load = f->load,
        .losses = f->losses,
        .statistics = f->statistics,
    };
    a.workspace = stage_workspace(p, CUMOE_STAGE_GATE, &a.workspace_size, report);
    return a;
}

static void body(problem_t *p, report_t *report)
{
    report->context = p->name;
    const cumoe_gate_args_t a = gate_args(p, report);
    if (!stage_succeeded(p, cumoe_gate(p->layer, &a, NULL), report)) return;
    p->forward.chosen_expert = a.routing.expert;
    p->forward.chosen_weight = a.routing.weight;
    problem_check_gate(p, report);
    check_routing(p, &a.routing, report);
}

/* Later stages read live_tokens without a look at T. */
static void body_clamped(problem_t *p, report_t *report)
{
    report->context = p->name;
    if (!p->call) return;
    const cumoe_gate_args_t a = gate_args(p, report);
    const int64_t given[] = {-5, p->tokens + 100, INT64_MIN, INT64_MAX};
    const int64_t taken[] = {0, p->tokens, 0, p->tokens};
    for (int i = 0; i < 4; i++) {
        p->call->live_tokens = given[i];
        if (stage_succeeded(p, cumoe_gate(p->layer, &a, NULL), report))
            report_check(report, a.routing.call->live_tokens == taken[i]);
    }
}

Test(gate, live_tokens_are_clamped)
{
    suite_all_cases("live tokens", &GATE_VARIANTS[0], body_clamped);
}

Test(gate, noisy_topk_in_training)
{
    suite_all_cases("gate", &GATE_VARIANTS[0], body);
}

Test(gate, noisy_topk_at_inference)
{
    suite_all_cases("gate", &GATE_VARIANTS[1], body);
}

Test(gate, softmax)
{
    suite_all_cases("gate", &GATE_VARIANTS[2], body);
}

Test(gate, external)
{
    suite_all_cases("gate", &GATE_VARIANTS[3], body);
}

Test(gate, pairwise)
{
    suite_pairwise("gate", body);
}

static void body_backward(problem_t *p, report_t *report)
{
    report->context = p->name;
    const size_t real = real_size(p->gate_type), slots = (size_t)(p->tokens * p->top_k);
    void *dweight = buffer_get(&p->buffers, slots * real);
    void *dx_gate = buffer_get(&p->buffers, (size_t)(p->tokens * p->hidden_size) * real);
    for (size_t s = 0; s < slots; s++) real_set(dweight, p->gate_type, (int64_t)s, p->expected.dweight[s]);
    cumoe_gate_backward_args_t a = {
        .struct_size = sizeof a,
        .num_tokens = p->tokens,
        .weights = &p->weights,
        .x = p->backward.x,
        .x_stride = p->backward.x_stride,
        .token_mask = p->backward.token_mask,
        .training = p->backward.training,
        .routing = stage_routing(p),
        .dweight = dweight,
        .loss_gradient = p->backward.loss_gradient,
        .dx_gate = dx_gate,
        .gradients = &p->gradients,
        .gradient_mode = p->layer_case.mode,
    };
    a.workspace = stage_workspace(p, CUMOE_STAGE_GATE_BACKWARD, &a.workspace_size, report);
    problem_reset_gradients(p);
    if (!stage_succeeded(p, cumoe_gate_backward(p->layer, &a, NULL), report)) return;
    real_view_t rows = problem_rows_view(p, dx_gate, p->hidden_size);
    rows.dtype = p->gate_type;
    problem_check_rows(p, "dx_gate", rows, problem_expected_dx(p, p->expected.dx_gate), p->expected.dx_gate_size,
                       problem_sum_limit(p), report);
    problem_check_gradients(p, MATRIX_GATE, MATRIX_NOISE, report);
}

Test(gate, backward)
{
    for (int v = 0; v < 3; v++) suite_all_cases("gate_backward", &GATE_VARIANTS[v], body_backward);
}

static void body_backward_gated(problem_t *p, report_t *report)
{
    if (p->options.variant.gate != CUMOE_GATE_EXTERNAL) body_backward(p, report);
}

Test(gate, backward_pairwise)
{
    suite_pairwise("gate_backward", body_backward_gated);
}
