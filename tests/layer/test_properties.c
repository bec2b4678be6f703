/* Properties that hold without a reference. */
#include "tests/suite.h"

#include <math.h>
#include <string.h>

static void start(problem_t *problem, const cumoe_handle_t *handle, const layer_case_t *layer_case, int variant,
                  uint64_t seed, report_t *report)
{
    const problem_options_t options = {.dtype = CUMOE_F32,
                                       .activation = CUMOE_ACTIVATION_SWIGLU,
                                       .variant = GATE_VARIANTS[variant],
                                       .seed = seed,
                                       .without_reference = true};
    cr_assert(problem_create(problem, handle, layer_case, &options, report), "%s", report->text);
}

/* Give expert e the place permutation[e], weights and all. */
static void relabel(problem_t *p, const int64_t *permutation)
{
    for (problem_matrix_t m = 0; m < NUM_MATRICES; m++)
        for (int64_t e = 0; e < p->experts && problem_has_matrix(p, m); e++) {
            const int64_t n = problem_matrix_elements(p, m) / p->experts;
            real_scatter(problem_matrix_view(p, &p->weights, m, permutation[e]), p->values[m] + e * n);
        }
    p->input_hash = problem_input_hash(p);
}

/* With the noise off the names of the experts mean nothing: everything is permuted, down to the bits. */
Test(properties, relabelling_experts_permutes_everything)
{
    enum { E = 11, K = 3 };
    static const layer_case_t layer_case = {"relabelling", 67, 23, 29, E, K, .pattern = PATTERN_RANDOM};
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    const uint64_t seed = random_seed("relabelling", 5);
    random_state_t random = random_start(seed);
    int64_t permutation[E];
    random_permutation(&random, E, permutation);
    problem_t a, b;
    start(&a, handle, &layer_case, 1, seed, &report);
    start(&b, handle, &layer_case, 1, seed, &report);
    relabel(&b, permutation);
    cr_assert(problem_run_forward(&a, &report) && problem_run_forward(&b, &report), "%s", report.text);
    cr_assert(problem_run_backward(&a, &report) && problem_run_backward(&b, &report), "%s", report.text);

    const size_t rows = (size_t)(a.tokens * a.hidden_size) * sizeof(float);
    compare_bits(&report, "y", b.forward.y, a.forward.y, rows);
    compare_bits(&report, "chosen_weight", b.forward.chosen_weight, a.forward.chosen_weight,
                 (size_t)(a.tokens * K) * sizeof(float));
    for (int64_t s = 0; s < a.tokens * K; s++)
        report_check(&report, b.forward.chosen_expert[s] == permutation[a.forward.chosen_expert[s]]);
    for (int64_t e = 0; e < E; e++) {
        const int64_t to = permutation[e];
        report_check(&report, b.forward.expert_count[to] == a.forward.expert_count[e]);
        report_check(&report, ((float *)b.forward.importance)[to] == ((float *)a.forward.importance)[e]);
        report_check(&report, ((float *)b.forward.load)[to] == ((float *)a.forward.load)[e]);
    }
    for (problem_matrix_t m = MATRIX_UP; m < NUM_MATRICES; m++)
        for (int64_t e = 0; e < E; e++)
            compare_bits(&report, PROBLEM_MATRIX_NAMES[m],
                         problem_matrix_view(&b, &b.gradients, m, permutation[e]).data,
                         problem_matrix_view(&a, &a.gradients, m, e).data, a.gradient_bytes[m] / E);
    /* Sums over experts are taken in another order: the gate's share of dx and the losses are equal up to rounding.
     */
    for (int64_t i = 0; i < a.tokens * a.hidden_size; i++)
        report_check(&report,
                     fabs((double)((float *)b.backward.dx)[i] - (double)((float *)a.backward.dx)[i]) < 1e-4);
    for (int l = 0; l < 2; l++)
        report_check(&report,
                     fabs((double)((float *)b.forward.losses)[l] - (double)((float *)a.forward.losses)[l]) < 1e-6);
    EXPECT_EMPTY(report);
    problem_destroy(&a);
    problem_destroy(&b);
    cumoe_handle_destroy(handle);
}

Test(properties, weights_of_a_token_sum_to_one)
{
    static const layer_case_t layer_case = {"sum", 500, 17, 5, 23, 4, .pattern = PATTERN_RANDOM};
    cumoe_handle_t *handle = suite_handle();
    for (int variant = 0; variant < 3; variant++) {
        report_t report = {0};
        problem_t p;
        start(&p, handle, &layer_case, variant, random_seed("sum of weights", 6), &report);
        cr_assert(problem_run_forward(&p, &report), "%s", report.text);
        double total = 0;
        for (int64_t t = 0; t < p.tokens; t++) {
            double sum = 0;
            for (int64_t j = 0; j < p.top_k; j++) {
                const double weight = (double)((float *)p.forward.chosen_weight)[t * p.top_k + j];
                report_check(&report, weight > 0 && p.forward.chosen_expert[t * p.top_k + j] >= 0);
                if (j > 0 && variant < 2) /* descending */
                    report_check(&report,
                                 weight <= (double)((float *)p.forward.chosen_weight)[t * p.top_k + j - 1]);
                sum += weight;
            }
            report_check(&report, fabs(sum - 1) < 1e-6);
        }
        for (int64_t e = 0; e < p.experts; e++) total += (double)((float *)p.forward.importance)[e];
        report_check(&report, fabs(total - (double)p.tokens) < 1e-3);
        EXPECT_EMPTY(report);
        problem_destroy(&p);
    }
    cumoe_handle_destroy(handle);
}

/* With gate weights of 0 nobody is preferred: the mean of P over tokens and experts is K/E, and so is every
 * expert's. */
Test(properties, mean_probability_at_zero_gate_weights)
{
    enum { T = 4000, E = 16, K = 3 };
    static const layer_case_t layer_case = {"zero gate", T, 4, 1, E, K, .pattern = PATTERN_RANDOM};
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    problem_t p;
    start(&p, handle, &layer_case, 0, random_seed("mean probability", 7), &report);
    memset(p.weights.w_gate, 0, p.weight_bytes[MATRIX_GATE]);
    memset(p.weights.w_noise, 0, p.weight_bytes[MATRIX_NOISE]);
    p.input_hash = problem_input_hash(&p);
    cr_assert(problem_run_forward(&p, &report), "%s", report.text);
    double mean = 0;
    const double expected = (double)K / E;
    for (int e = 0; e < E; e++) {
        const double probability = (double)((float *)p.forward.load)[e] / T;
        mean += probability / E;
        /* P of one token lies in 0..1 with a deviation below 0.5 */
        report_check(&report, fabs(probability - expected) < 5 * 0.5 / sqrt(T));
    }
    report_check(&report, fabs(mean - expected) < 5 * 0.5 / sqrt(T)); /* the experts of a token share thresholds */
    EXPECT_EMPTY(report);
    problem_destroy(&p);
    cumoe_handle_destroy(handle);
}

/* Mean 0 and this standard deviation, as far as n numbers tell. */
static void check_normal(const double *values, int64_t n, double std, report_t *report)
{
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < n; i++) {
        sum += values[i];
        squares += values[i] * values[i];
    }
    if (std == 0) {
        report_check(report, squares == 0);
    } else {
        report_check(report, fabs(sum / (double)n) < 5 * std / sqrt((double)n));
        report_check(report, fabs(squares / (double)n / (std * std) - 1) < 5 * sqrt(2 / (double)n));
    }
}

static double initial_std(const problem_t *p, problem_matrix_t m)
{
    const cumoe_gate_kind_t gate = p->options.variant.gate;
    const bool noisy = gate == CUMOE_GATE_NOISY_TOPK || gate == CUMOE_GATE_HIERARCHICAL;
    const real_view_t view = problem_matrix_view(p, &p->weights, m, 0);
    if (m < MATRIX_THRESHOLDS) return noisy ? 0 : 0.02;
    return m == MATRIX_UP || m == MATRIX_GLU || m == MATRIX_DOWN ? 1 / sqrt((double)view.cols) : 0;
}

/* The paper's start: gate weights from cumoe_weights_init() are 0 for noisy top-k, and every expert gets work. */
static void body_initial(problem_t *p, report_t *report)
{
    cumoe_weights_t created = {0}, second = {0};
    cr_assert(cumoe_weights_create(p->layer, CUMOE_DTYPE_DEFAULT, &created) == CUMOE_SUCCESS, "%s",
              cumoe_last_error());
    cr_assert(cumoe_weights_create(p->layer, CUMOE_DTYPE_DEFAULT, &second) == CUMOE_SUCCESS);
    const cumoe_weights_t w = problem_adopt_weights(p, &created), again = problem_adopt_weights(p, &second);
    cr_assert(device_weights_init(p->handle, p->layer, 3, &w) == CUMOE_SUCCESS, "%s", cumoe_last_error());
    for (problem_matrix_t m = 0; m < NUM_MATRICES; m++) {
        const int64_t n = problem_matrix_elements(p, m);
        /* created weights have a selection bias, borrowed ones may */
        if (m != MATRIX_GATE_BIAS)
            report_check(report, (*problem_matrix_pointer(&w, m) != NULL) == problem_has_matrix(p, m));
        if (!problem_has_matrix(p, m)) continue;
        double *values = buffer_get(&p->buffers, (size_t)n * sizeof *values);
        problem_matrix_get(p, &again, m, values);
        check_normal(values, n, 0, report);
        problem_matrix_get(p, &w, m, values);
        check_normal(values, n, initial_std(p, m), report);
    }
    cumoe_weights_destroy(p->layer, &created);
    cumoe_weights_destroy(p->layer, &second);
    report_check(report, created.w_up == NULL && created.allocation == NULL);
}

Test(properties, initial_weights)
{
    static const layer_case_t layer_case = {"initial", 600, 24, 40, 8, 2, .pattern = PATTERN_RANDOM};
    const uint64_t seed = random_seed("initial weights", 8);
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    for (int variant = 0; variant < NUM_GATE_VARIANTS; variant++)
        for (int i = 0; i < NUM_SUITE_OPTIONS; i++) {
            const problem_options_t options = suite_options(i, &GATE_VARIANTS[variant], seed);
            suite_one_case(handle, &layer_case, &options, body_initial, &report);
        }
    cumoe_handle_destroy(handle);
    EXPECT_EMPTY(report);
}
