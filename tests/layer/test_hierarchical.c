/* Properties of the hierarchical gate, and the known ways to get its two levels wrong. */
#include "tests/suite.h"

#include <math.h>
#include <string.h>

static const layer_case_t CASE = {"hierarchical", 61, 12, 10, 20, 4, .groups = 5, .top_k_groups = 2};

static void start(problem_t *p, const cumoe_handle_t *handle, const layer_case_t *layer_case, int variant,
                  bool reference, const char *test, report_t *report)
{
    const problem_options_t options = {.dtype = CUMOE_F32,
                                       .activation = CUMOE_ACTIVATION_SWIGLU,
                                       .variant = GATE_VARIANTS[variant],
                                       .seed = random_seed(test, 111),
                                       .without_reference = !reference};
    cr_assert(problem_create(p, handle, layer_case, &options, report), "%s", report->text);
}

static void stop(problem_t *p, report_t *report)
{
    EXPECT_EMPTY(*report);
    problem_destroy(p);
}

/* One group that everybody chooses: the flat gate inside it, with the same noise, and weights that are multiplied
 * by exactly 1. */
Test(hierarchical, one_group_is_the_flat_gate)
{
    static const layer_case_t layer_case = {"one group",      67, 23, 29, 11, 3, .mask_period = 5, .groups = 1,
                                            .top_k_groups = 1};
    cumoe_handle_t *handle = suite_handle();
    for (int training = 0; training < 2; training++) {
        report_t report = {0};
        problem_t flat, one;
        start(&flat, handle, &layer_case, training ? VARIANT_NOISY : VARIANT_NOISY_INFERENCE, false, "one group",
              &report);
        start(&one, handle, &layer_case, training ? VARIANT_HIERARCHICAL : VARIANT_HIERARCHICAL_INFERENCE, false,
              "one group", &report);
        const size_t rows = (size_t)(flat.tokens * flat.hidden_size) * sizeof(float);
        memcpy((void *)one.forward.x, flat.forward.x, rows);
        memcpy((void *)one.backward.dy, flat.backward.dy, rows);
        for (problem_matrix_t m = 0; m < NUM_MATRICES; m++)
            if (problem_has_matrix(&flat, m)) problem_matrix_set(&one, &one.weights, m, flat.values[m]);
        one.input_hash = problem_input_hash(&one);
        cr_assert(problem_run_forward(&flat, &report) && problem_run_backward(&flat, &report), "%s", report.text);
        cr_assert(problem_run_forward(&one, &report) && problem_run_backward(&one, &report), "%s", report.text);
        const size_t slots = (size_t)flat.max_slots * sizeof(float);
        compare_bits(&report, "y", one.forward.y, flat.forward.y, rows);
        compare_bits(&report, "chosen_expert", one.forward.chosen_expert, flat.forward.chosen_expert, slots);
        compare_bits(&report, "chosen_weight", one.forward.chosen_weight, flat.forward.chosen_weight, slots);
        compare_bits(&report, "importance", one.forward.importance, flat.forward.importance, 11 * sizeof(float));
        for (int64_t i = 0; i < flat.tokens * flat.hidden_size; i++)
            report_check(&report, fabs((double)((float *)one.backward.dx)[i] -
                                       (double)((float *)flat.backward.dx)[i]) < 1e-5);
        for (int64_t e = 0; e < 11; e++)
            report_check(&report, fabs((double)((float *)one.forward.load)[e] -
                                       (double)((float *)flat.forward.load)[e]) < 1e-5);
        for (size_t i = 0; i < one.gradient_bytes[MATRIX_GATE_PRIMARY] / sizeof(float); i++)
            report_check(&report, fabs((double)((float *)one.gradients.w_gate_primary)[i]) < 1e-5);
        problem_destroy(&flat);
        stop(&one, &report);
    }
    cumoe_handle_destroy(handle);
}

/* K1 groups, K2 experts of each, by descending weight at both levels. */
Test(hierarchical, choices_stand_by_groups)
{
    enum { K1 = 2, K2 = 2, SIZE = 4 };
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    problem_t p;
    start(&p, handle, &CASE, VARIANT_HIERARCHICAL, false, "choices", &report);
    cr_assert(problem_run_forward(&p, &report), "%s", report.text);
    for (int64_t t = 0; t < p.tokens; t++) {
        const int32_t *expert = p.forward.chosen_expert + t * K1 * K2;
        const float *weight = (float *)p.forward.chosen_weight + t * K1 * K2;
        report_check(&report, expert[0] / SIZE == expert[1] / SIZE && expert[2] / SIZE == expert[3] / SIZE);
        report_check(&report, expert[0] / SIZE != expert[2] / SIZE && expert[0] != expert[1]);
        report_check(&report, weight[0] >= weight[1] && weight[2] >= weight[3]);
        report_check(&report,
                     (double)weight[0] + (double)weight[1] >= (double)weight[2] + (double)weight[3] - 1e-6);
    }
    stop(&p, &report);
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

/* Trap 7: the primary gate applied twice, or not at all. */
Test(hierarchical, primary_gate_is_applied_once)
{
    enum { SLOTS = 61 * 4 };
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    problem_t p;
    double twice[SLOTS], importance[20] = {0};
    start(&p, handle, &CASE, VARIANT_HIERARCHICAL, true, "trap 7", &report);
    cr_assert(problem_run_forward(&p, &report), "%s", report.text);
    for (int64_t s = 0; s < SLOTS; s++) {
        twice[s] = p.expected.weight[s] * p.expected.primary_weight[s / 2];
        importance[p.expected.expert[s]] += p.expected.local_weight[s];
    }
    expect("chosen_weight", p.forward.chosen_weight, SLOTS, p.expected.weight, twice, &report);
    expect("chosen_weight", p.forward.chosen_weight, SLOTS, p.expected.weight, p.expected.local_weight, &report);
    expect("importance", p.forward.importance, 20, p.expected.importance, importance, &report);
    stop(&p, &report);
    cumoe_handle_destroy(handle);
}

/* Trap 6: the load inside the group alone, or over the smooth load of the group in place of the count of its
 * tokens. */
Test(hierarchical, load_has_both_levels_and_a_count)
{
    enum { EXPERTS = 20, SIZE = 4 };
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    problem_t p;
    double smooth[EXPERTS];
    start(&p, handle, &CASE, VARIANT_HIERARCHICAL, true, "trap 6", &report);
    cr_assert(problem_run_forward(&p, &report), "%s", report.text);
    for (int64_t e = 0; e < EXPERTS; e++) {
        const double tokens = (double)p.expected.primary_count[e / SIZE];
        smooth[e] = tokens * p.expected.level_load[e] / p.expected.primary_load[e / SIZE];
    }
    expect("load", p.forward.load, EXPERTS, p.expected.load, p.expected.level_load, &report);
    expect("load", p.forward.load, EXPERTS, p.expected.load, smooth, &report);
    stop(&p, &report);
    cumoe_handle_destroy(handle);
}

/* A group without tokens divides nothing by 0. */
Test(hierarchical, empty_groups)
{
    static const layer_case_t layer_case = {
        "empty groups", 41, 15, 19, 12, 2, .pattern = PATTERN_EMPTY_EXPERTS, .groups = 4, .top_k_groups = 1};
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    problem_t p;
    start(&p, handle, &layer_case, VARIANT_HIERARCHICAL, true, "empty groups", &report);
    cr_assert(problem_run_forward(&p, &report), "%s", report.text);
    for (int e = 0; e < 3; e++)
        report_check(&report, p.forward.expert_count[e] == 0 && ((float *)p.forward.load)[e] == 0);
    problem_check_forward(&p, &report);
    if (problem_run_backward(&p, &report)) problem_check_backward(&p, &report);
    for (int i = 0; i < 3 * 15; i++)
        report_check(&report, isnan(((float *)p.gradients.w_gate)[i])); /* poison again */
    stop(&p, &report);
    cumoe_handle_destroy(handle);
}
