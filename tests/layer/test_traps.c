/* The known ways to get this layer wrong, one test each. Every test computes the right numbers and the wrong ones,
 * makes sure that they differ far beyond rounding, and that the library gives the right ones. */
#include "tests/suite.h"

#include <math.h>
#include <string.h>

static const layer_case_t CASE = {"trap", 61, 12, 10, 9, 3, .pattern = PATTERN_RANDOM};

static problem_options_t training_options(const char *test)
{
    return (problem_options_t){.dtype = CUMOE_F32,
                               .activation = CUMOE_ACTIVATION_RELU,
                               .variant = GATE_VARIANTS[VARIANT_NOISY],
                               .seed = random_seed(test, 11)};
}

/* A problem in noisy training after its forward and backward calls. */
static void start(problem_t *problem, const char *test, report_t *report)
{
    const problem_options_t options = training_options(test);
    cr_assert(problem_create(problem, suite_handle(), &CASE, &options, report), "%s", report->text);
    cr_assert(problem_run_forward(problem, report), "%s", report->text);
    cr_assert(problem_run_backward(problem, report), "%s", report->text);
}

static void stop(problem_t *problem, report_t *report)
{
    EXPECT_EMPTY(*report);
    cumoe_handle_t *handle = (cumoe_handle_t *)problem->handle;
    problem_destroy(problem);
    cumoe_handle_destroy(handle);
}

static double distance(int64_t n, const double *a, const double *b)
{
    double error = 0, norm = 0;
    for (int64_t i = 0; i < n; i++) {
        error += (a[i] - b[i]) * (a[i] - b[i]);
        norm += b[i] * b[i];
    }
    return sqrt(error / norm);
}

static void expect(const char *what, const void *actual, int64_t n, const double *right, const double *wrong,
                   report_t *report)
{
    compare_vector(report, what, actual, CUMOE_F32, n, right, 1e-5);
    if (distance(n, wrong, right) < 1e-3) report_fail(report, "%s: the test cannot tell right from wrong", what);
}

static double cdf(double z)
{
    return 0.5 * erfc(-z / sqrt(2));
}

/* The k-th largest (from 0) of v[n], leaving one out (-1 = none). All values differ. */
static double kth(const double *v, int64_t n, int64_t k, int64_t out)
{
    for (int64_t i = 0; i < n; i++) {
        int64_t above = 0;
        for (int64_t j = 0; j < n; j++) above += j != out && v[j] > v[i];
        if (i != out && above == k) return v[i];
    }
    return NAN;
}

/* Trap 1: softmax over all experts before the selection: weights too small, thresholds that are probabilities. */
Test(traps, trap_1_softmax_before_selection)
{
    report_t report = {0};
    problem_t p;
    start(&p, "trap 1", &report);
    const int64_t T = p.tokens, E = p.experts, K = p.top_k;
    double weight[64 * 3], load[9] = {0};
    for (int64_t t = 0; t < T; t++) {
        double probability[9], sum = 0;
        for (int64_t e = 0; e < E; e++) sum += probability[e] = exp(p.expected.noisy[t * E + e]);
        for (int64_t e = 0; e < E; e++) probability[e] /= sum;
        for (int64_t j = 0; j < K; j++) weight[t * K + j] = probability[p.expected.expert[t * K + j]];
        for (int64_t e = 0; e < E; e++)
            load[e] +=
                cdf((p.expected.clean[t * E + e] - kth(probability, E, K - 1, e)) / p.expected.std[t * E + e]);
    }
    expect("chosen_weight", p.forward.chosen_weight, T * K, p.expected.weight, weight, &report);
    expect("load", p.forward.load, E, p.expected.load, load, &report);
    stop(&p, &report);
}

/* The load with a numerator and thresholds that may be wrong. leave_out: component i is left out for its threshold.
 */
static void other_load(const problem_t *p, const double *numerator, const double *threshold, bool leave_out,
                       double *load)
{
    const int64_t E = p->experts, K = p->top_k;
    for (int64_t e = 0; e < E; e++) load[e] = 0;
    for (int64_t t = 0; t < p->tokens; t++)
        for (int64_t e = 0; e < E; e++)
            load[e] += cdf((numerator[t * E + e] - kth(threshold + t * E, E, K - 1, leave_out ? e : -1)) /
                           p->expected.std[t * E + e]);
}

/* Trap 2: the noisy logit in the numerator of P, or thresholds of the clean logits. */
Test(traps, trap_2_noisy_numerator_or_clean_threshold)
{
    report_t report = {0};
    problem_t p;
    start(&p, "trap 2", &report);
    double right[9], wrong[9];
    other_load(&p, p.expected.clean, p.expected.noisy, true, right);
    other_load(&p, p.expected.noisy, p.expected.noisy, true, wrong);
    expect("load", p.forward.load, p.experts, right, wrong, &report);
    other_load(&p, p.expected.clean, p.expected.clean, true, wrong);
    expect("load", p.forward.load, p.experts, right, wrong, &report);
    stop(&p, &report);
}

/* Trap 3: the k-th value as threshold for chosen experts too. It must be the (k+1)-th for them. */
Test(traps, trap_3_kth_value_as_threshold_of_chosen_experts)
{
    report_t report = {0};
    problem_t p;
    start(&p, "trap 3", &report);
    double wrong[9];
    other_load(&p, p.expected.clean, p.expected.noisy, false, wrong);
    expect("load", p.forward.load, p.experts, p.expected.load, wrong, &report);
    stop(&p, &report);
}

/* Gradients of the load loss alone into w_gate and w_noise, with or without two of its paths. */
static void load_gradients(const problem_t *p, bool threshold_path, bool std_path, double *dw_gate,
                           double *dw_noise)
{
    const int64_t E = p->experts, H = p->hidden_size;
    const reference_result_t *r = &p->expected;
    for (int64_t i = 0; i < E * H; i++) dw_gate[i] = dw_noise[i] = 0;
    for (int64_t te = 0; te < p->tokens * E; te++) {
        const int64_t t = te / E, e = te % E, k = r->threshold[te];
        const double z = (r->clean[te] - r->noisy[t * E + k]) / r->std[te];
        const double g =
            reference_cv_squared_gradient(E, r->load, e) * exp(-z * z / 2) / sqrt(2 * acos(-1)) / r->std[te];
        for (int64_t h = 0; h < H; h++) {
            const double x = p->input.x[t * H + h];
            const double slope = 1 - exp(-(r->std[te] - p->input.noise_epsilon)); /* of softplus */
            const double slope_k = 1 - exp(-(r->std[t * E + k] - p->input.noise_epsilon));
            dw_gate[e * H + h] += g * x;
            if (std_path) dw_noise[e * H + h] -= g * z * slope * x;
            if (threshold_path) {
                dw_gate[k * H + h] -= g * x;
                dw_noise[k * H + h] -= g * p->input.noise[t * E + k] * slope_k * x;
            }
        }
    }
}

/* Trap 4: no gradient through the threshold, or none through the standard deviation. */
Test(traps, trap_4_forgotten_paths_of_the_load_gradient)
{
    report_t report = {0};
    problem_t p;
    start(&p, "trap 4", &report);
    const int64_t n = p.experts * p.hidden_size;
    const double upstream[CUMOE_NUM_LOSSES] = {0, 1, 0, 0, 0};
    for (int l = 0; l < CUMOE_NUM_LOSSES; l++)
        real_set((void *)p.backward.loss_gradient, CUMOE_F32, l, upstream[l]);
    memset((void *)p.backward.dy, 0, (size_t)(p.tokens * p.hidden_size) * sizeof(float));
    p.input_hash = problem_input_hash(&p);
    cr_assert(problem_run_backward(&p, &report), "%s", report.text);

    double gate[9 * 12], noise[9 * 12], wrong_gate[9 * 12], wrong_noise[9 * 12];
    load_gradients(&p, true, true, gate, noise);
    load_gradients(&p, false, true, wrong_gate, wrong_noise);
    expect("dw_gate", p.gradients.w_gate, n, gate, wrong_gate, &report);
    expect("dw_noise", p.gradients.w_noise, n, noise, wrong_noise, &report);
    load_gradients(&p, true, false, wrong_gate, wrong_noise);
    expect("dw_noise", p.gradients.w_noise, n, noise, wrong_noise, &report);
    stop(&p, &report);
}

/* Trap 5: CV in place of CV^2, or the variance of a sample (n - 1). */
Test(traps, trap_5_cv_not_squared_or_sample_variance)
{
    report_t report = {0};
    problem_t p;
    start(&p, "trap 5", &report);
    for (int l = 0; l < 2; l++) {
        const double right = p.expected.losses[l], root = sqrt(right), sample = right * 9 / 8;
        const float *actual = (const float *)p.forward.losses + l;
        expect("loss", actual, 1, &right, &root, &report);
        expect("loss", actual, 1, &right, &sample, &report);
    }
    stop(&p, &report);
}

/* Trap 8: fresh noise in the backward pass or in its recomputation. Between forward and backward everything that
 * the noise came from changes; only saved stays. */
Test(traps, trap_8_fresh_noise_in_backward)
{
    for (int recompute = 0; recompute < 2; recompute++) {
        report_t report = {0};
        problem_options_t options = training_options("trap 8");
        options.recompute = recompute;
        layer_case_t layer_case = CASE;
        layer_case.dead_tokens = 3;
        problem_t p;
        cr_assert(problem_create(&p, suite_handle(), &layer_case, &options, &report), "%s", report.text);
        cr_assert(problem_run_forward(&p, &report), "%s", report.text);

        const cumoe_call_t call = *p.call;
        *p.call = (cumoe_call_t){call.seed + 1, call.offset + 1, call.first_token + 1, 1};
        cumoe_forward_args_t other = p.forward; /* another call in between, with other noise */
        other.saved = buffer_get(&p.buffers, p.saved_size);
        cr_assert(device_layer_forward(p.handle, p.layer, &other) == CUMOE_SUCCESS);
        cr_assert(problem_run_backward(&p, &report), "%s", report.text);
        problem_check_backward(&p, &report);

        /* The gradient that other noise gives is another one. */
        reference_result_t wrong;
        reference_input_t input = p.input;
        double noise[64 * 9];
        random_state_t random = random_start(options.seed);
        for (int64_t i = 0; i < p.tokens * p.experts; i++) noise[i] = random_normal(&random);
        input.noise = noise;
        cr_assert(reference_create(&input, &wrong));
        reference_forward(&input, &wrong);
        reference_backward(&input, &wrong);
        report_check(&report, distance(p.experts * p.hidden_size, wrong.dw_noise, p.expected.dw_noise) > 1e-3);
        reference_destroy(&wrong);
        stop(&p, &report);
    }
}

/* A problem whose numbers the test writes itself: x and the weights of the gate are 0. */
static void blank(problem_t *p, const layer_case_t *layer_case, int32_t training, report_t *report)
{
    problem_options_t options = training_options("blank");
    options.without_reference = true;
    options.variant.training = training;
    cr_assert(problem_create(p, suite_handle(), layer_case, &options, report), "%s", report->text);
    memset((void *)p->forward.x, 0, (size_t)(p->tokens * p->hidden_size) * sizeof(float));
    memset(p->weights.w_gate, 0, p->weight_bytes[MATRIX_GATE]);
    memset(p->weights.w_noise, 0, p->weight_bytes[MATRIX_NOISE]);
}

/* Trap 9: Phi as 1 + erf in F32 loses small probabilities: here each is 1.9e-8, below half a unit in the last place
 * of 1. */
Test(traps, trap_9_small_probabilities)
{
    enum { T = 64, H = 4, E = 2 };
    report_t report = {0};
    const layer_case_t layer_case = {"trap 9", T, H, 3, E, 1, .pattern = PATTERN_RANDOM};
    problem_t p;
    blank(&p, &layer_case, 1, &report);
    float *x = (float *)p.forward.x;
    const double std = log1p(exp(-2.0)) + (double)p.config.noise_epsilon;
    double probability = 0;
    for (int t = 0; t < T; t++) { /* clean logits 0 and x[0]; threshold of expert 1: the noisy logit of expert 0 */
        x[t * H] = (float)((p.input.noise[t * E] - 5.5) * std);
        x[t * H + 1] = 1;
        probability += cdf(((double)x[t * H] - p.input.noise[t * E] * std) / std);
    }
    ((float *)p.weights.w_gate)[H] = 1;
    ((float *)p.weights.w_noise)[1] = ((float *)p.weights.w_noise)[H + 1] = -2;
    p.input_hash = problem_input_hash(&p);
    cr_assert(problem_run_forward(&p, &report), "%s", report.text);
    compare_vector(&report, "load", (float *)p.forward.load + 1, CUMOE_F32, 1, &probability, 0.02);
    stop(&p, &report);
}

/* A standard deviation that underflows is clamped: probabilities, losses and gradients stay finite. */
Test(traps, trap_9_standard_deviation_that_underflows)
{
    enum { T = 16, H = 4, E = 4 };
    report_t report = {0};
    const layer_case_t layer_case = {"trap 9", T, H, 3, E, 2, .pattern = PATTERN_RANDOM};
    problem_t p;
    blank(&p, &layer_case, 1, &report);
    cumoe_layer_destroy(p.layer);
    p.config.noise_epsilon = 0;
    cr_assert(cumoe_layer_create(&p.layer, p.handle, &p.config) == CUMOE_SUCCESS, "%s", cumoe_last_error());
    for (int t = 0; t < T; t++) {
        ((float *)p.forward.x)[t * H] = t % 2 ? 1.0f : -1.0f;
        ((float *)p.forward.x)[t * H + 1] = 1;
    }
    for (int e = 0; e < E; e++) {
        ((float *)p.weights.w_gate)[e * H] = (float)(e / 2); /* two pairs of equal logits */
        ((float *)p.weights.w_noise)[e * H + 1] = -200;
    }
    p.input_hash = problem_input_hash(&p);
    cr_assert(problem_run_forward(&p, &report) && problem_run_backward(&p, &report), "%s", report.text);
    for (int i = 0; i < E; i++) report_check(&report, isfinite(((float *)p.forward.load)[i]));
    for (int l = 0; l < CUMOE_NUM_LOSSES; l++) report_check(&report, isfinite(((float *)p.forward.losses)[l]));
    for (int i = 0; i < E * H; i++) {
        report_check(&report, isfinite(((float *)p.gradients.w_gate)[i]));
        report_check(&report, isfinite(((float *)p.gradients.w_noise)[i]));
    }
    for (int i = 0; i < T * H; i++) report_check(&report, isfinite(((float *)p.backward.dx)[i]));
    stop(&p, &report);
}

/* Trap 10: a weight that underflows to 0 is taken for "not routed". */
Test(traps, trap_10_weight_zero_is_still_routed)
{
    enum { T = 5, H = 4, E = 3, K = 2 };
    report_t report = {0};
    const layer_case_t layer_case = {"trap 10", T, H, 3, E, K, .pattern = PATTERN_RANDOM};
    problem_t p;
    blank(&p, &layer_case, 0, &report);
    for (int t = 0; t < T; t++) ((float *)p.forward.x)[t * H] = 1;
    ((float *)p.weights.w_gate)[1 * H] = 500;
    ((float *)p.weights.w_gate)[2 * H] = -500;
    p.input_hash = problem_input_hash(&p);
    cr_assert(problem_run_forward(&p, &report), "%s", report.text);
    const int32_t count[E] = {T, T, 0};
    compare_bits(&report, "expert_count", p.forward.expert_count, count, sizeof count);
    report_check(&report, p.forward.statistics->rows == T * K);
    for (int t = 0; t < T; t++) {
        report_check(&report, p.forward.chosen_expert[t * K] == 1 && p.forward.chosen_expert[t * K + 1] == 0);
        report_check(&report, ((float *)p.forward.chosen_weight)[t * K] == 1.0f);
        report_check(&report, ((float *)p.forward.chosen_weight)[t * K + 1] == 0.0f);
    }
    stop(&p, &report);
}

/* Trap 11: experts without tokens, and a call without tokens: gradients of 0, written. */
Test(traps, trap_11_experts_without_tokens)
{
    static const layer_case_t cases[] = {{"trap 11", 20, 6, 5, 40, 1, .pattern = PATTERN_EMPTY_EXPERTS},
                                         {"trap 11", 0, 6, 5, 40, 1, .pattern = PATTERN_RANDOM}};
    for (int i = 0; i < 2; i++) {
        report_t report = {0};
        problem_t p;
        const problem_options_t options = training_options("trap 11");
        cr_assert(problem_create(&p, suite_handle(), &cases[i], &options, &report), "%s", report.text);
        cr_assert(problem_run_forward(&p, &report), "%s", report.text);
        cr_assert(problem_run_backward(&p, &report), "%s", report.text);
        int64_t empty = 0;
        for (int64_t e = 0; e < p.experts; e++) empty += p.expected.count[e] == 0;
        report_check(&report, empty >= 20);
        problem_check_forward(&p, &report);
        problem_check_backward(&p, &report);
        stop(&p, &report);
    }
}
