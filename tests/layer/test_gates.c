/* Properties of the gates over softmax and sigmoid of all logits, and what all kinds have in common. */
#include "tests/suite.h"

#include <math.h>
#include <string.h>

static void start(problem_t *p, const cumoe_handle_t *handle, const layer_case_t *layer_case, int variant,
                  uint64_t seed, report_t *report)
{
    const problem_options_t options = {.dtype = CUMOE_F32,
                                       .activation = CUMOE_ACTIVATION_SWIGLU,
                                       .variant = GATE_VARIANTS[variant],
                                       .seed = seed,
                                       .without_reference = true};
    cr_assert(problem_create(p, handle, layer_case, &options, report), "%s", report->text);
}

/* Give b the tokens of a, and those of its weights that b has too. */
static void same_numbers(problem_t *b, const problem_t *a)
{
    const size_t rows = (size_t)(a->tokens * a->forward.x_stride) * sizeof(float);
    memcpy((void *)b->forward.x, a->forward.x, rows);
    memcpy((void *)b->backward.dy, a->backward.dy, rows);
    for (problem_matrix_t m = 0; m < NUM_MATRICES; m++)
        if (problem_has_matrix(a, m) && problem_has_matrix(b, m))
            problem_matrix_set(b, &b->weights, m, a->values[m]);
    b->input_hash = problem_input_hash(b);
}

/* Over what was taken: the softmax of all logits, renormalised, is the softmax of what was taken. */
Test(gates, softmax_topk_renormalized_has_the_bits_of_noisy_topk_without_noise)
{
    static const layer_case_t layer_case = {"same", 67, 23, 29, 11, 3, .mask_period = 5};
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    problem_t noisy, softmax;
    const uint64_t seed = random_seed("softmax top-k", 101);
    start(&noisy, handle, &layer_case, VARIANT_NOISY_INFERENCE, seed, &report);
    start(&softmax, handle, &layer_case, VARIANT_SOFTMAX_TOPK, seed, &report);
    same_numbers(&softmax, &noisy);
    const float losses[CUMOE_NUM_LOSSES] = {0.5F}; /* the importance alone: no loss that the other has not */
    noisy.backward.loss_gradient = softmax.backward.loss_gradient =
        memcpy(buffer_get(&noisy.buffers, sizeof losses), losses, sizeof losses);
    cr_assert(problem_run_forward(&noisy, &report) && problem_run_backward(&noisy, &report), "%s", report.text);
    cr_assert(problem_run_forward(&softmax, &report) && problem_run_backward(&softmax, &report), "%s", report.text);
    const size_t rows = (size_t)(noisy.tokens * noisy.hidden_size) * sizeof(float), E = 11 * sizeof(float);
    const size_t slots = (size_t)noisy.max_slots * sizeof(float);
    compare_bits(&report, "y", softmax.forward.y, noisy.forward.y, rows);
    compare_bits(&report, "chosen_expert", softmax.forward.chosen_expert, noisy.forward.chosen_expert, slots);
    compare_bits(&report, "chosen_weight", softmax.forward.chosen_weight, noisy.forward.chosen_weight, slots);
    compare_bits(&report, "importance", softmax.forward.importance, noisy.forward.importance, E);
    compare_bits(&report, "load", softmax.forward.load, noisy.forward.load, E);
    compare_bits(&report, "dx", softmax.backward.dx, noisy.backward.dx, rows);
    compare_bits(&report, "w_gate", softmax.gradients.w_gate, noisy.gradients.w_gate,
                 noisy.gradient_bytes[MATRIX_GATE]);
    EXPECT_EMPTY(report);
    problem_destroy(&softmax);
    problem_destroy(&noisy);
    cumoe_handle_destroy(handle);
}

/* Weights that are normalised sum to 1, p of some to less; BALANCED: to 1, or to 0 where nobody took the token. */
Test(gates, sums_of_weights)
{
    static const layer_case_t layer_case = {"sums", 200, 17, 5, 24, 2, .mask_period = 7, .dead_tokens = 3};
    cumoe_handle_t *handle = suite_handle();
    for (int v = 0; v < NUM_GATE_VARIANTS; v++) {
        if (v == VARIANT_EXTERNAL) continue;
        report_t report = {0};
        problem_t p;
        int64_t left_out = 0;
        start(&p, handle, &layer_case, v, random_seed("sums of weights", 102), &report);
        cr_assert(problem_run_forward(&p, &report), "%s", report.text);
        const bool whole = v != VARIANT_SOFTMAX_TOPK_PLAIN && v != VARIANT_SIGMOID_PLAIN;
        for (int64_t t = 0; t < p.live_tokens; t++) {
            const int32_t *offset = p.forward.chosen_offset;
            const int64_t first = offset ? offset[t] : t * p.top_k, end = offset ? offset[t + 1] : first + p.top_k;
            double sum = 0;
            for (int64_t s = first; s < end; s++) sum += (double)((float *)p.forward.chosen_weight)[s];
            if (!p.forward.token_mask[t]) {
                report_check(&report, sum == 0 && (!offset || first == end));
            } else if (offset && first == end) {
                left_out++;
            } else {
                report_check(&report, whole ? fabs(sum - 1) < 1e-6 : sum > 0);
                report_check(&report, whole || v == VARIANT_SIGMOID_PLAIN || sum < 1);
            }
        }
        report_check(&report, (left_out > 0) == (p.options.variant.gate == CUMOE_GATE_BALANCED));
        EXPECT_EMPTY(report);
        problem_destroy(&p);
    }
    cumoe_handle_destroy(handle);
}

/* No signal: p = 1 / E for everybody, so that SWITCH is E * K / E and Z log(E)^2. */
Test(gates, losses_without_a_signal)
{
    enum { EXPERTS = 7, K = 3 };
    static const layer_case_t layer_case = {"no signal", 31, 9, 5, EXPERTS, K, .pattern = PATTERN_TIES};
    cumoe_handle_t *handle = suite_handle();
    for (int v = VARIANT_SOFTMAX_TOPK; v <= VARIANT_SIGMOID_PLAIN; v++) {
        report_t report = {0};
        problem_t p;
        start(&p, handle, &layer_case, v, random_seed("no signal", 103), &report);
        if (p.weights.gate_bias) memset(p.weights.gate_bias, 0, p.weight_bytes[MATRIX_GATE_BIAS]);
        p.input_hash = problem_input_hash(&p);
        cr_assert(problem_run_forward(&p, &report), "%s", report.text);
        const double z = log(EXPERTS) * log(EXPERTS), switched = K;
        compare_vector(&report, "switch", (float *)p.forward.losses + CUMOE_LOSS_SWITCH, CUMOE_F32, 1, &switched,
                       1e-6);
        compare_vector(&report, "z", (float *)p.forward.losses + CUMOE_LOSS_Z, CUMOE_F32, 1, &z, 1e-6);
        for (int64_t t = 0; t < p.tokens; t++)
            for (int32_t j = 0; j < K; j++) report_check(&report, p.forward.chosen_expert[t * K + j] == j);
        EXPECT_EMPTY(report);
        problem_destroy(&p);
    }
    cumoe_handle_destroy(handle);
}

/* The selection bias selects and does nothing else: no bias is a bias of 0, and the favourite of all has the weight
 * of its own sigmoid. */
Test(gates, selection_bias_selects_only)
{
    enum { EXPERTS = 8, K = 2, FAVOURITE = 5 };
    static const layer_case_t layer_case = {"bias", 45, 11, 7, EXPERTS, K, .pattern = PATTERN_RANDOM};
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    problem_t p;
    start(&p, handle, &layer_case, VARIANT_SIGMOID, random_seed("selection bias", 104), &report);
    cumoe_config_t config = p.config;
    config.renormalize = 0;
    cumoe_layer_destroy(p.layer);
    cr_assert_eq(cumoe_layer_create(&p.layer, handle, &config), CUMOE_SUCCESS, "%s", cumoe_last_error());
    float *bias = p.weights.gate_bias;
    memset(bias, 0, EXPERTS * sizeof *bias);
    p.input_hash = problem_input_hash(&p);
    cr_assert(problem_run_forward(&p, &report) && problem_run_backward(&p, &report), "%s", report.text);
    problem_bits_t forward = problem_outputs(&p, false), backward = problem_outputs(&p, true);
    p.weights.gate_bias = NULL;
    const size_t bytes = p.weight_bytes[MATRIX_GATE_BIAS];
    p.weight_bytes[MATRIX_GATE_BIAS] = 0;
    p.input_hash = problem_input_hash(&p);
    cr_assert(problem_run_forward(&p, &report), "%s", report.text);
    problem_compare_outputs(&p, false, &forward, &report);
    cr_assert(problem_run_backward(&p, &report), "%s", report.text);
    problem_compare_outputs(&p, true, &backward, &report);

    p.weights.gate_bias = bias, p.weight_bytes[MATRIX_GATE_BIAS] = bytes;
    bias[FAVOURITE] = 2;
    p.input_hash = problem_input_hash(&p);
    cr_assert(problem_run_forward(&p, &report), "%s", report.text);
    for (int64_t t = 0; t < p.tokens; t++) {
        double logit = 0;
        for (int64_t h = 0; h < p.hidden_size; h++)
            logit += p.input.x[t * p.hidden_size + h] * p.input.w_gate[FAVOURITE * p.hidden_size + h];
        report_check(&report, p.forward.chosen_expert[t * K] == FAVOURITE);
        const double weight = (double)((float *)p.forward.chosen_weight)[t * K];
        report_check(&report, fabs(weight - 1 / (1 + exp(-logit))) < 1e-5);
    }
    EXPECT_EMPTY(report);
    problem_bits_free(&forward);
    problem_bits_free(&backward);
    problem_destroy(&p);
    cumoe_handle_destroy(handle);
}
