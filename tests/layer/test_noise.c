/* The noise is named by (seed, noise_stream, offset, token, expert) and by nothing else. */
#include "tests/suite.h"

/* Pre-activations computed again: every output has the same bits, and saved is smaller by R * I values (2I with
 * glu). */
static void body_recompute(problem_t *problem, report_t *report)
{
    if (!problem_run_forward(problem, report) || !problem_run_backward(problem, report)) return;
    problem_options_t options = problem->options;
    options.recompute = 1;
    problem_t again;
    if (problem_create(&again, problem->handle, &problem->layer_case, &options, report) &&
        problem_run_forward(&again, report) && problem_run_backward(&again, report)) {
        problem_bits_t kept = problem_outputs(problem, false);
        problem_compare_outputs(&again, false, &kept, report);
        problem_bits_free(&kept);
        kept = problem_outputs(problem, true);
        problem_compare_outputs(&again, true, &kept, report);
        problem_bits_free(&kept);
        const size_t columns =
            (size_t)problem->intermediate_size * (options.activation == CUMOE_ACTIVATION_SWIGLU ? 2 : 1);
        const size_t z = (size_t)(problem->tokens * problem->top_k) * columns * real_size(options.dtype);
        report_check(report, again.saved_size + z <= problem->saved_size);
    }
    problem_destroy(&again);
}

Test(noise, recomputed_pre_activations_have_the_same_bits)
{
    for (int v = 0; v < NUM_GATE_VARIANTS; v++) suite_all_cases("recompute", &GATE_VARIANTS[v], body_recompute);
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
    const size_t size = (size_t)(p->tokens * p->top_k) * sizeof(float);
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
    for (int variant = 0; variant < 3; variant++) {
        report_t report = {0};
        problem_t p;
        start(&p, handle, variant, &report);
        const bool noisy = variant == 0;
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
