/* The whole case table, backward, against the reference. */
#include "tests/suite.h"

static void body(problem_t *problem, report_t *report)
{
    if (!problem_run_forward(problem, report) || !problem_run_backward(problem, report)) return;
    problem_check_backward(problem, report);
}

Test(backward, noisy_topk_in_training)
{
    suite_all_cases("backward", VARIANT_NOISY, body);
}

Test(backward, noisy_topk_at_inference)
{
    suite_all_cases("backward", VARIANT_NOISY_INFERENCE, body);
}

Test(backward, softmax)
{
    suite_all_cases("backward", VARIANT_SOFTMAX, body);
}

Test(backward, external)
{
    suite_all_cases("backward", VARIANT_EXTERNAL, body);
}

Test(backward, softmax_topk)
{
    suite_all_cases("backward", VARIANT_SOFTMAX_TOPK, body);
    suite_all_cases("backward", VARIANT_SOFTMAX_TOPK_PLAIN, body);
}

Test(backward, sigmoid_topk)
{
    suite_all_cases("backward", VARIANT_SIGMOID, body);
    suite_all_cases("backward", VARIANT_SIGMOID_PLAIN, body);
}

Test(backward, hierarchical)
{
    suite_all_cases("backward", VARIANT_HIERARCHICAL, body);
    suite_all_cases("backward", VARIANT_HIERARCHICAL_INFERENCE, body);
}

Test(backward, balanced)
{
    suite_all_cases("backward", VARIANT_BALANCED, body);
    suite_all_cases("backward", VARIANT_BALANCED_INFERENCE, body);
    suite_all_cases("backward", VARIANT_BALANCED_FEW_ROWS, body);
}

/* One output at a time gives the bits that all together have. */
static void body_parts(problem_t *problem, report_t *report)
{
    if (suite_spares(problem)) return;
    if (!problem_run_forward(problem, report) || !problem_run_backward(problem, report)) return;
    problem_bits_t all = problem_outputs(problem, true);
    const size_t dx_bytes =
        (size_t)(problem->tokens * problem->backward.dx_stride) * real_size(problem->options.dtype);
    void *dx = buffer_get(&problem->buffers, dx_bytes);
    cumoe_backward_args_t part = problem->backward;
    part.dindex_weight = NULL;
    part.gradients = NULL;
    part.dx = dx;
    report_check(report, device_layer_backward(problem->handle, problem->layer, &part) == CUMOE_SUCCESS);
    compare_bits(report, "dx alone", dx, problem->backward.dx, dx_bytes);

    cumoe_weights_t one = problem->gradients;
    part = problem->backward;
    part.dx = NULL;
    part.dindex_weight = NULL;
    part.gradients = &one;
    void **const pointers[NUM_MATRICES] = {
        &one.w_gate, &one.w_noise, &one.w_gate_primary, &one.w_noise_primary, &one.thresholds, &one.gate_bias,
        &one.w_up,   &one.w_glu,   &one.b_up,           &one.b_glu,           &one.w_down,     &one.b_down};
    problem_reset_gradients(problem);
    for (problem_matrix_t m = 0; m < NUM_MATRICES; m++) {
        if (!problem->gradient_bytes[m]) continue;
        one = problem->gradients;
        for (problem_matrix_t other = 0; other < NUM_MATRICES; other++)
            if (other != m) *pointers[other] = NULL;
        if (device_layer_backward(problem->handle, problem->layer, &part) != CUMOE_SUCCESS)
            report_fail(report, "%s alone: %s", PROBLEM_MATRIX_NAMES[m], cumoe_last_error());
    }
    problem_compare_outputs(problem, true, &all, report);
    problem_bits_free(&all);
    report_check(report, buffer_guards_intact(&problem->buffers));
}

Test(backward, each_output_alone)
{
    suite_all_gates_alone("parts", body_parts);
    suite_pairwise_alone("parts", body_parts);
}

/* So many experts and tokens that a gate that works through blocks of tokens has more than one of them: sums over
 * all tokens (importance, load, gradients of the gate) are those of the whole call. */
Test(backward, blocks_of_tokens)
{
    static const layer_case_t layer_case = {"blocks of tokens", 530, 4, 3, 1024, 1, .mask_period = 9,
                                            .dead_tokens = 3};
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    for (int f64 = 0; f64 < 2; f64++) {
        const problem_options_t options = {.dtype = f64 ? CUMOE_F64 : CUMOE_F32,
                                           .activation = CUMOE_ACTIVATION_RELU,
                                           .variant = GATE_VARIANTS[VARIANT_NOISY],
                                           .seed = random_seed("blocks of tokens", 1)};
        problem_t p;
        if (problem_create(&p, handle, &layer_case, &options, &report) && problem_run_forward(&p, &report)) {
            problem_check_forward(&p, &report);
            body(&p, &report);
        }
        problem_destroy(&p);
    }
    cumoe_handle_destroy(handle);
    EXPECT_EMPTY(report);
}
