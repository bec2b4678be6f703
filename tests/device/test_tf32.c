/* Products of F32 matrices with factors rounded to TF32. Activations are smooth: beside a kink the rounding may
 * choose the other side. */
#include "tests/suite.h"

static void body(problem_t *p, report_t *report)
{
    if (!problem_run_forward(p, report)) return;
    problem_check_forward(p, report);
    if (problem_run_backward(p, report)) problem_check_backward(p, report);
}

Test(tf32, against_the_reference)
{
    static const cumoe_activation_t activations[] = {CUMOE_ACTIVATION_GELU, CUMOE_ACTIVATION_SWIGLU,
                                                     CUMOE_ACTIVATION_SILU, CUMOE_ACTIVATION_GEGLU,
                                                     CUMOE_ACTIVATION_IDENTITY};
    const uint64_t seed = random_seed("tf32", 93);
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    for (int i = 0; i < NUM_LAYER_CASES; i++) {
        const gate_variant_t *variant = &GATE_VARIANTS[i % NUM_GATE_VARIANTS];
        if (!case_applies(&LAYER_CASES[i], variant)) continue;
        const problem_options_t options = {.dtype = CUMOE_F32,
                                           .compute = CUMOE_COMPUTE_TF32,
                                           .activation = activations[i % 5],
                                           .bias = i % 2,
                                           .recompute = i % 3 == 0,
                                           .variant = *variant,
                                           .seed = seed + (uint64_t)i};
        suite_one_case(handle, &LAYER_CASES[i], &options, body, &report);
    }
    cumoe_handle_destroy(handle);
    EXPECT_EMPTY(report);
}
