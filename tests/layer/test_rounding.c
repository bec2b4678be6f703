/* What is rounded to 16 bits, and that nothing else is: with small integers every other operation is exact, and the
 * reference, which rounds in the same places, has the same numbers to the last bit. */
#include "tests/suite.h"

#include <math.h>

static const layer_case_t INTEGERS[] = {
    {"integers", 45, 37, 19, 5, 3, .pattern = PATTERN_INTEGERS},
    {"integers, add", 45, 37, 19, 5, 3, .pattern = PATTERN_INTEGERS, .mode = CUMOE_GRADIENT_ADD},
};

static void body(problem_t *problem, report_t *report)
{
    if (!problem_run_forward(problem, report)) return;
    problem_check_forward(problem, report);
    if (problem_run_backward(problem, report)) problem_check_backward(problem, report);
}

/* With F32 and F64 nothing is rounded at all. */
Test(rounding, integers_have_the_bits_of_the_reference)
{
    static const cumoe_activation_t activations[] = {CUMOE_ACTIVATION_RELU, CUMOE_ACTIVATION_IDENTITY};
    const uint64_t seed = random_seed("rounding", 71);
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    for (cumoe_dtype_t dtype = CUMOE_F64; dtype <= CUMOE_F16; dtype++)
        for (int i = 0; i < 2 * 2 * 2 * 2; i++) {
            const bool wide_gradients = i & 8;
            if (wide_gradients && dtype <= CUMOE_F32) continue;
            const problem_options_t options = {.dtype = dtype,
                                               .gradient_dtype = wide_gradients ? CUMOE_F32 : CUMOE_DTYPE_DEFAULT,
                                               .activation = activations[i & 1],
                                               .bias = i & 2,
                                               .variant = GATE_VARIANTS[VARIANT_EXTERNAL],
                                               .seed = seed + (uint64_t)i};
            suite_one_case(handle, &INTEGERS[i >> 2 & 1], &options, body, &report);
        }
    cumoe_handle_destroy(handle);
    EXPECT_EMPTY(report);
}

static void body_forward(problem_t *problem, report_t *report)
{
    if (problem_run_forward(problem, report)) problem_check_forward(problem, report);
}

/* A token that is NaN has an output that is NaN, whatever the activation, and no other token has. */
Test(rounding, nan_comes_through)
{
    static const layer_case_t layer_case = {"nan", 23, 9, 11, 4, 2, .pattern = PATTERN_NONFINITE_TOKENS};
    suite_activations("nan", &layer_case, CUMOE_F16, body_forward);
}

/* The largest number of F16 is 65504; from 65520 on, infinity is nearer than it. */
Test(rounding, f16_overflows_to_infinity)
{
    enum { T = 2, H = 2 };
    static const layer_case_t layer_case = {"overflow", T, H, 1, 1, 1, .pattern = PATTERN_RANDOM};
    static const double x[T * H] = {65504, 15, 65504, 16}, expected[T * H] = {65504, -65504, INFINITY, -INFINITY};
    static const double w_down[H * H] = {1, 1, -1, -1};
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    const problem_options_t options = {.dtype = CUMOE_F16,
                                       .activation = CUMOE_ACTIVATION_IDENTITY,
                                       .variant = GATE_VARIANTS[VARIANT_EXTERNAL],
                                       .without_reference = true};
    problem_t p;
    cr_assert(problem_create(&p, handle, &layer_case, &options, &report), "%s", report.text);
    for (int i = 0; i < T * H; i++) real_set((void *)p.forward.x, CUMOE_F16, i, x[i]);
    for (int t = 0; t < T; t++) {
        ((int32_t *)p.forward.index)[t] = 0;
        real_set((void *)p.forward.index_weight, CUMOE_F32, t, 1);
    }
    problem_matrix_set(&p, &p.weights, MATRIX_DOWN, w_down);
    p.input_hash = problem_input_hash(&p);
    cr_assert(problem_run_forward(&p, &report), "%s", report.text);
    compare_vector(&report, "y", p.forward.y, CUMOE_F16, T * H, expected, 0);
    EXPECT_EMPTY(report);
    problem_destroy(&p);
    cumoe_handle_destroy(handle);
}
