/* The noise is named by (seed, noise_stream, offset, token, expert) and by nothing else. */
#include "tests/suite.h"

/* Pre-activations kept or computed again: every output has the same bits, and saved is smaller by what the headers
 * say, R * I values (2I with glu), up to the alignment of an array. */
static void body_recompute(problem_t *problem, report_t *report)
{
    if (suite_spares(problem)) return;
    problem_options_t options = problem->options;
    options.recompute = !options.recompute;
    problem_t other;
    if (problem_create(&other, problem->handle, &problem->layer_case, &options, report)) {
        suite_compare_runs(problem, &other, report);
        const size_t columns = (size_t)problem->intermediate_size * (problem_has_glu(problem) ? 2 : 1);
        const size_t z = (size_t)problem->max_rows * columns * real_size(options.dtype);
        const size_t kept = options.recompute ? problem->saved_size : other.saved_size;
        const size_t recomputed = options.recompute ? other.saved_size : problem->saved_size;
        report_check(report, kept - recomputed >= z && kept - recomputed < z + 64);
    }
    problem_destroy(&other);
}

Test(noise, recomputed_pre_activations_have_the_same_bits)
{
    suite_all_gates_alone("recompute", body_recompute);
    suite_pairwise_alone("recompute", body_recompute);
}

static void start(problem_t *problem, const cumoe_handle_t *handle, int variant, report_t *report)
{
    static const layer_case_t layer_case = {"noise", 61, 12, 10, 9, 3, .pattern = PATTERN_RANDOM};
    const problem_options_t options = {.dtype = CUMOE_F32,
                                       .variant = GATE_VARIANTS[variant],
                                       .seed = random_seed("noise", 51),
                                       .without_reference = true};
    cr_assert(problem_create(problem, handle, &layer_case, &options, report), "%s", report->text);
}

/* Do the chosen weights change when this part of the name does? */
static bool weights_change(problem_t *p, uint64_t *part, report_t *report)
{
    const size_t size = (size_t)p->max_slots * sizeof(float);
    cr_assert(problem_run_forward(p, report), "%s", report->text);
    void *before = memcpy(buffer_get(&p->buffers, size), p->forward.chosen_weight, size);
    *part += 1;
    cr_assert(problem_run_forward(p, report), "%s", report->text);
    *part -= 1;
    return memcmp(before, p->forward.chosen_weight, size) != 0;
}

Test(noise, every_part_of_the_name_counts_in_training_only)
{
    cumoe_handle_t *handle = suite_handle();
    for (int variant = 0; variant < NUM_GATE_VARIANTS; variant++) {
        if (variant == VARIANT_EXTERNAL) continue;
        report_t report = {0};
        problem_t p;
        start(&p, handle, variant, &report);
        const bool noisy = variant == VARIANT_NOISY || variant == VARIANT_HIERARCHICAL;
        cr_expect_eq(weights_change(&p, &p.forward.seed, &report), noisy);
        cr_expect_eq(weights_change(&p, &p.forward.offset, &report), noisy);
        cr_assert(problem_run_forward(&p, &report), "%s", report.text);
        problem_bits_t before = problem_outputs(&p, false);
        p.forward.first_token += 1;
        cr_assert(problem_run_forward(&p, &report), "%s", report.text);
        report_t differences = {0};
        problem_compare_outputs(&p, false, &before, &differences);
        cr_expect_eq(differences.failures > 0, noisy);
        problem_bits_free(&before);
        EXPECT_EMPTY(report);
        problem_destroy(&p);
    }
    cumoe_handle_destroy(handle);
}

/* Layers with one seed but another noise_stream differ. */
Test(noise, layers_differ_by_their_stream)
{
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    problem_t p;
    start(&p, handle, 0, &report);
    cr_assert(problem_run_forward(&p, &report), "%s", report.text);
    problem_bits_t before = problem_outputs(&p, false);
    cumoe_layer_destroy(p.layer);
    p.config.noise_stream++;
    cr_assert_eq(cumoe_layer_create(&p.layer, handle, &p.config), CUMOE_SUCCESS, "%s", cumoe_last_error());
    cr_assert(problem_run_forward(&p, &report), "%s", report.text);
    report_t differences = {0};
    problem_compare_outputs(&p, false, &before, &differences);
    cr_expect(differences.failures > 0);
    EXPECT_EMPTY(report);
    problem_bits_free(&before);
    problem_destroy(&p);
    cumoe_handle_destroy(handle);
}
