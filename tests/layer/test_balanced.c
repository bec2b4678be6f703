/* Properties of the strictly balanced gate. */
#include "tests/suite.h"

#include <math.h>
#include <string.h>

static const layer_case_t CASE = {"balanced", 61, 12, 10, 9, 3, .pattern = PATTERN_RANDOM, .mask_period = 6};

static void start(problem_t *p, const cumoe_handle_t *handle, const layer_case_t *layer_case,
                  const gate_variant_t *variant, const char *test, report_t *report)
{
    const problem_options_t options = {.dtype = CUMOE_F32,
                                       .activation = CUMOE_ACTIVATION_SWIGLU,
                                       .variant = *variant,
                                       .seed = random_seed(test, 121),
                                       .without_reference = true};
    cr_assert(problem_create(p, handle, layer_case, &options, report), "%s", report->text);
}

static void stop(problem_t *p, report_t *report)
{
    EXPECT_EMPTY(*report);
    problem_destroy(p);
}

/* m = max(1, K * tokens / E) for every expert, whatever the logits are. */
Test(balanced, every_expert_gets_exactly_m_rows)
{
    static const layer_case_t cases[] = {
        {"m = 1", 5, 6, 4, 16, 2},
        {"one token", 1, 6, 4, 5, 2},
        {"rounded down", 50, 6, 4, 7, 3},
        {"ties", 41, 6, 4, 7, 3, .pattern = PATTERN_TIES},
        {"one expert", 64, 6, 4, 8, 2, .pattern = PATTERN_ONE_EXPERT},
        {"padding", 100, 6, 4, 9, 4, .mask_period = 3, .dead_tokens = 17},
        {"all experts", 23, 6, 4, 5, 5},
    };
    cumoe_handle_t *handle = suite_handle();
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        report_t report = {0};
        problem_t p;
        start(&p, handle, &cases[i], &GATE_VARIANTS[VARIANT_BALANCED], "m rows", &report);
        cr_assert(problem_run_forward(&p, &report), "%s", report.text);
        const int64_t tokens = p.forward.statistics->tokens, average = p.top_k * tokens / p.experts;
        const int64_t m = average < 1 ? 1 : average;
        for (int64_t e = 0; e < p.experts; e++)
            if (p.forward.expert_count[e] != m)
                report_fail(&report, "%s: expert %d has %d rows, not %d", cases[i].name, (int)e,
                            p.forward.expert_count[e], (int)m);
        report_check(&report, p.forward.statistics->rows == m * p.experts);
        report_check(&report, p.forward.statistics->dropped_rows == 0);
        report_check(&report, ((float *)p.forward.losses)[CUMOE_LOSS_LOAD] == 0);
        stop(&p, &report);
    }
    cumoe_handle_destroy(handle);
}

/* Ties across tokens go to the lowest: experts that see equal logits all take the first m tokens. */
Test(balanced, ties_go_to_the_lowest_tokens)
{
    enum { TOKENS = 21, EXPERTS = 7, K = 3, M = 9 };
    static const layer_case_t layer_case = {"ties", TOKENS, 6, 4, EXPERTS, K, .pattern = PATTERN_TIES};
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    problem_t p;
    start(&p, handle, &layer_case, &GATE_VARIANTS[VARIANT_BALANCED], "ties", &report);
    cr_assert(problem_run_forward(&p, &report), "%s", report.text);
    for (int t = 0; t <= TOKENS; t++)
        report_check(&report, p.forward.chosen_offset[t] == EXPERTS * (t < M ? t : M));
    for (int s = 0; s < M * EXPERTS; s++) report_check(&report, p.forward.chosen_expert[s] == s % EXPERTS);
    stop(&p, &report);
    cumoe_handle_destroy(handle);
}

/* Thresholds just below the smallest g that each expert took: they let the same tokens through, and there is
 * nothing that their loss or its gradient could ask for. */
Test(balanced, thresholds_below_the_batch_take_what_the_batch_took)
{
    static const gate_variant_t inference = {"balanced, all rows", CUMOE_GATE_BALANCED, .training = 0,
                                             .max_rows = 400};
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    problem_t batch, threshold;
    start(&batch, handle, &CASE, &GATE_VARIANTS[VARIANT_BALANCED], "thresholds", &report);
    start(&threshold, handle, &CASE, &inference, "thresholds", &report);
    cr_assert(problem_run_forward(&batch, &report), "%s", report.text);
    for (int64_t e = 0; e < batch.experts; e++) {
        const float taken = ((float *)batch.forward.batch_threshold)[e];
        ((float *)batch.weights.thresholds)[e] = ((float *)threshold.weights.thresholds)[e] = nextafterf(taken, 0);
    }
    batch.input_hash = problem_input_hash(&batch), threshold.input_hash = problem_input_hash(&threshold);
    cr_assert(problem_run_forward(&batch, &report) && problem_run_backward(&batch, &report), "%s", report.text);
    cr_assert(problem_run_forward(&threshold, &report), "%s", report.text);
    const size_t rows = (size_t)(CASE.tokens * CASE.hidden_size) * sizeof(float);
    const size_t slots = (size_t)batch.forward.chosen_offset[CASE.tokens] * sizeof(float);
    compare_bits(&report, "chosen_offset", threshold.forward.chosen_offset, batch.forward.chosen_offset,
                 (size_t)(CASE.tokens + 1) * sizeof(int32_t));
    compare_bits(&report, "chosen_expert", threshold.forward.chosen_expert, batch.forward.chosen_expert, slots);
    compare_bits(&report, "chosen_weight", threshold.forward.chosen_weight, batch.forward.chosen_weight, slots);
    compare_bits(&report, "y", threshold.forward.y, batch.forward.y, rows);
    report_check(&report, ((float *)batch.forward.losses)[CUMOE_LOSS_THRESHOLD] == 0);
    for (int64_t e = 0; e < batch.experts; e++)
        report_check(&report, ((float *)batch.gradients.thresholds)[e] == 0);

    /* At the threshold is not above it: with the smallest g itself every expert takes one token less. */
    memcpy(threshold.weights.thresholds, batch.forward.batch_threshold, threshold.weight_bytes[MATRIX_THRESHOLDS]);
    threshold.input_hash = problem_input_hash(&threshold);
    cr_assert(problem_run_forward(&threshold, &report), "%s", report.text);
    for (int64_t e = 0; e < batch.experts; e++)
        report_check(&report, threshold.forward.expert_count[e] == batch.forward.expert_count[e] - 1);
    problem_destroy(&threshold);
    stop(&batch, &report);
    cumoe_handle_destroy(handle);
}

/* Of more rows than there is room for those with the largest g stay, and every other one is counted. The same
 * weights without a bound say which they are. */
Test(balanced, rows_beyond_the_bound_are_dropped_by_g)
{
    enum { TOKENS = 40, EXPERTS = 8, K = 2 };
    static const layer_case_t layer_case = {"dropped", TOKENS, 9, 4, EXPERTS, K, .pattern = PATTERN_LOW_THRESHOLDS};
    static const int32_t percents[] = {5, 50, 100, 399, 400};
    cumoe_handle_t *handle = suite_handle();
    for (size_t i = 0; i < sizeof percents / sizeof *percents; i++) {
        report_t report = {0};
        problem_t p;
        bool kept[TOKENS * EXPERTS] = {false};
        double g[TOKENS * EXPERTS], lowest = 2, highest = -1;
        gate_variant_t variant = GATE_VARIANTS[VARIANT_BALANCED_INFERENCE];
        variant.max_rows = percents[i];
        start(&p, handle, &layer_case, &variant, "dropped rows", &report);
        cr_assert(problem_run_forward(&p, &report), "%s", report.text);
        const int64_t room = (TOKENS * K * percents[i] + 99) / 100;
        report_check(&report, p.forward.statistics->rows == room);
        report_check(&report, p.forward.statistics->dropped_rows == TOKENS * EXPERTS - room);
        report_check(&report, p.forward.chosen_offset[TOKENS] == room);
        for (int64_t t = 0; t < TOKENS; t++) {
            double sum = 0;
            for (int64_t e = 0; e < EXPERTS; e++) {
                double logit = 0;
                for (int64_t h = 0; h < 9; h++) logit += p.input.x[t * 9 + h] * p.input.w_gate[e * 9 + h];
                sum += g[t * EXPERTS + e] = exp(logit);
            }
            for (int64_t e = 0; e < EXPERTS; e++) g[t * EXPERTS + e] /= sum;
            for (int64_t s = p.forward.chosen_offset[t]; s < p.forward.chosen_offset[t + 1]; s++)
                kept[t * EXPERTS + p.forward.chosen_expert[s]] = true;
        }
        for (int te = 0; te < TOKENS * EXPERTS; te++) {
            if (kept[te] && g[te] < lowest) lowest = g[te];
            if (!kept[te] && g[te] > highest) highest = g[te];
        }
        report_check(&report, lowest > highest - 1e-6);
        stop(&p, &report);
    }
    cumoe_handle_destroy(handle);
}

/* A NaN threshold lets nobody through at inference, and in training leaves the loss NaN and everything else alone.
 */
Test(balanced, nan_threshold)
{
    cumoe_handle_t *handle = suite_handle();
    for (int training = 0; training < 2; training++) {
        report_t report = {0};
        problem_t p;
        start(&p, handle, &CASE, &GATE_VARIANTS[training ? VARIANT_BALANCED : VARIANT_BALANCED_INFERENCE], "nan",
              &report);
        cr_assert(problem_run_forward(&p, &report), "%s", report.text);
        const int32_t before = p.forward.expert_count[0];
        ((float *)p.weights.thresholds)[0] = NAN;
        p.input_hash = problem_input_hash(&p);
        cr_assert(problem_run_forward(&p, &report) && problem_run_backward(&p, &report), "%s", report.text);
        report_check(&report, p.forward.expert_count[0] == (training ? before : 0));
        report_check(&report, p.forward.statistics->nan_tokens == 0 && p.forward.statistics->nan_logits == 0);
        report_check(&report, (bool)isnan(((float *)p.forward.losses)[CUMOE_LOSS_THRESHOLD]) == (training == 1));
        for (int64_t i = 0; i < p.tokens * p.hidden_size; i++)
            report_check(&report, isfinite(((float *)p.forward.y)[i]));
        const float gradient = ((float *)p.gradients.thresholds)[0]; /* minus upstream times (0 - m) */
        report_check(&report, training ? gradient == 1.5F * (float)before : gradient == 0);
        stop(&p, &report);
    }
    cumoe_handle_destroy(handle);
}
