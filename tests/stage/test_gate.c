/* gate and gate_backward alone. */
#include "tests/suite.h"
#include "tests/support/stage_buffers.h"
#include "tests/support/stages.h"

/* Later stages read live_tokens without a look at T. */
static void body_clamped(problem_t *p, report_t *report)
{
    report->context = p->name;
    if (!p->call) return;
    const cumoe_gate_args_t a = stage_gate_args(p, report);
    const int64_t given[] = {-5, p->tokens + 100, INT64_MIN, INT64_MAX};
    const int64_t taken[] = {0, p->tokens, 0, p->tokens};
    for (int i = 0; i < 4; i++) {
        p->call->live_tokens = given[i];
        if (stage_succeeded(p, device_gate(p->handle, p->layer, &a), report))
            report_check(report, a.routing.call->live_tokens == taken[i]);
    }
}

Test(gate, live_tokens_are_clamped)
{
    suite_all_cases("live tokens", &GATE_VARIANTS[0], body_clamped);
}

Test(gate, noisy_topk_in_training)
{
    suite_all_cases("gate", &GATE_VARIANTS[0], stage_check_gate);
}

Test(gate, noisy_topk_at_inference)
{
    suite_all_cases("gate", &GATE_VARIANTS[1], stage_check_gate);
}

Test(gate, softmax)
{
    suite_all_cases("gate", &GATE_VARIANTS[2], stage_check_gate);
}

Test(gate, external)
{
    suite_all_cases("gate", &GATE_VARIANTS[3], stage_check_gate);
}

Test(gate, pairwise)
{
    suite_pairwise("gate", stage_check_gate);
}

Test(gate, backward)
{
    for (int v = 0; v < 3; v++) suite_all_cases("gate_backward", &GATE_VARIANTS[v], stage_check_gate_backward);
}

static void body_backward_gated(problem_t *p, report_t *report)
{
    if (p->options.variant.gate != CUMOE_GATE_EXTERNAL) stage_check_gate_backward(p, report);
}

Test(gate, backward_pairwise)
{
    suite_pairwise("gate_backward", body_backward_gated);
}
