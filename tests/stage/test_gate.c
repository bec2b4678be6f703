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
    suite_all_cases("live tokens", VARIANT_NOISY, body_clamped);
}

Test(gate, noisy_topk_in_training)
{
    suite_all_cases("gate", VARIANT_NOISY, stage_check_gate);
}

Test(gate, noisy_topk_at_inference)
{
    suite_all_cases("gate", VARIANT_NOISY_INFERENCE, stage_check_gate);
}

Test(gate, softmax)
{
    suite_all_cases("gate", VARIANT_SOFTMAX, stage_check_gate);
}

Test(gate, external)
{
    suite_all_cases("gate", VARIANT_EXTERNAL, stage_check_gate);
}

Test(gate, softmax_topk)
{
    suite_all_cases("gate", VARIANT_SOFTMAX_TOPK, stage_check_gate);
    suite_all_cases("gate", VARIANT_SOFTMAX_TOPK_PLAIN, stage_check_gate);
}

Test(gate, sigmoid_topk)
{
    suite_all_cases("gate", VARIANT_SIGMOID, stage_check_gate);
    suite_all_cases("gate", VARIANT_SIGMOID_PLAIN, stage_check_gate);
}

Test(gate, hierarchical)
{
    suite_all_cases("gate", VARIANT_HIERARCHICAL, stage_check_gate);
    suite_all_cases("gate", VARIANT_HIERARCHICAL_INFERENCE, stage_check_gate);
}

Test(gate, balanced)
{
    suite_all_cases("gate", VARIANT_BALANCED, stage_check_gate);
    suite_all_cases("gate", VARIANT_BALANCED_INFERENCE, stage_check_gate);
    suite_all_cases("gate", VARIANT_BALANCED_FEW_ROWS, stage_check_gate);
}

Test(gate, pairwise)
{
    suite_pairwise("gate", stage_check_gate);
}

Test(gate, backward)
{
    for (int v = 0; v < NUM_GATE_VARIANTS; v++)
        if (v != VARIANT_EXTERNAL) suite_all_cases("gate_backward", v, stage_check_gate_backward);
}

static void body_backward_gated(problem_t *p, report_t *report)
{
    if (p->options.variant.gate != CUMOE_GATE_EXTERNAL) stage_check_gate_backward(p, report);
}

Test(gate, backward_pairwise)
{
    suite_pairwise("gate_backward", body_backward_gated);
}
