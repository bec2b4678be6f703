#include "balanced.h"

#include <stdlib.h>
#include <string.h>

enum { BATCHES = 16 };

/* [BATCH, E] who is taken; the choices stand on the host. */
static void mark(const model_t *model, const batch_t *batch, char *taken)
{
    const int32_t *expert = model->expert.host, *offset = model->expert_offset.host;
    memset(taken, 0, (size_t)BATCH * (size_t)model->kind->experts);
    for (int64_t t = 0; t < batch->size; t++)
        for (int32_t slot = offset[t]; slot < offset[t + 1]; slot++)
            taken[t * model->kind->experts + expert[slot]] = 1;
}

void start_thresholds(model_t *model, const text_t *text)
{
    batch_t batch = batch_create(BATCH);
    int32_t *order = text_shuffled(text, model->seed * 1000);
    batch_fill(&batch, text, order, BATCH);
    model_route(model, &batch, 0);
    check(cumoe_memory_copy(model->device->handle, model->weights.thresholds, model->threshold.device,
                            (size_t)model->kind->experts * sizeof(float), CUMOE_COPY_ON_DEVICE, NULL));
    free(order);
    batch_free(&batch);
}

static void compare(const model_t *model, const char *by_batch, const char *by_threshold, agreement_t *a)
{
    const int experts = model->kind->experts;
    int64_t both = 0, either = 0, all = 0, above_all = 0;
    for (int64_t i = 0; i < (int64_t)BATCH * experts; i++) {
        both += by_batch[i] && by_threshold[i];
        either += by_batch[i] || by_threshold[i];
    }
    for (int e = 0; e < experts; e++) {
        int rows = 0, above = 0;
        for (int64_t t = 0; t < BATCH; t++) {
            rows += by_batch[t * experts + e];
            above += by_threshold[t * experts + e];
        }
        if (rows < a->fewest) a->fewest = rows;
        if (rows > a->most) a->most = rows;
        if ((double)above / rows < a->least_rows) a->least_rows = (double)above / rows;
        if ((double)above / rows > a->most_rows) a->most_rows = (double)above / rows;
        all += rows;
        above_all += above;
    }
    for (int64_t t = 0; t < BATCH; t++) a->alone += !memchr(by_threshold + t * experts, 1, (size_t)experts);
    a->both += (double)both / (double)either / BATCHES;
    a->rows += (double)above_all / (double)all / BATCHES;
}

agreement_t measure_agreement(model_t *model, const text_t *text)
{
    agreement_t agreement = {.fewest = BATCH, .least_rows = BATCH};
    const size_t size = (size_t)BATCH * (size_t)model->kind->experts;
    char *by_batch = host_alloc(size, 1), *by_threshold = host_alloc(size, 1);
    batch_t batch = batch_create(BATCH);
    int32_t *order = text_shuffled(text, model->seed + 1000000);
    for (int i = 0; i < BATCHES; i++) {
        batch_fill(&batch, text, order + i % steps_per_epoch(text, BATCH) * BATCH, BATCH);
        model_route(model, &batch, 0);
        mark(model, &batch, by_batch);
        model_evaluate(model, &batch);
        mark(model, &batch, by_threshold);
        compare(model, by_batch, by_threshold, &agreement);
    }
    free(order);
    free(by_batch);
    free(by_threshold);
    batch_free(&batch);
    return agreement;
}

static void report_row(report_t *report, const char *name, const agreement_t *a)
{
    say(report, "| %-6s | %5.1f %% | %.3f | %.2f to %.2f | %d to %d | %.2f %% |\n", name, 100 * a->both, a->rows,
        a->least_rows, a->most_rows, a->fewest, a->most, 100.0 * a->alone / (BATCHES * BATCH));
    note(report, "agreement", name, "both", a->both);
    note(report, "agreement", name, "rows", a->rows);
    note(report, "agreement", name, "least_rows", a->least_rows);
    note(report, "agreement", name, "most_rows", a->most_rows);
    note(report, "agreement", name, "fewest", a->fewest);
    note(report, "agreement", name, "most", a->most);
    note(report, "agreement", name, "alone", a->alone);
}

void report_agreement(report_t *report, const agreement_t *before, const agreement_t *after)
{
    say(report, "| training | pairs that both masks take | rows by thresholds / by batch | the same of an expert | "
                "rows of an "
                "expert by batch | characters without expert |\n|---|--:|--:|--:|--:|--:|\n");
    report_row(report, "before", before);
    report_row(report, "after", after);
    say(report,
        "\nMeans over %d batches of %d training characters; pairs of a character and an expert, of those that "
        "either mask "
        "takes.\nBefore: every threshold is the smallest gate that its expert took in the first batch.\n\n",
        BATCHES, BATCH);
}

bool report_balanced_verdict(report_t *report, const summary_t *summary, const agreement_t *before,
                             const agreement_t *after, bool quick)
{
    const double noisy = summary[MOE_32].perplexity.mean, balanced = summary[MOE_32_BALANCED].perplexity.mean;
    const bool exact = before->fewest == before->most && after->fewest == after->most;
    say(report, "| layer | held-out perplexity |\n|---|--:|\n| %s | %.3f |\n| %s, by thresholds | %.3f |\n\n",
        kinds[MOE_32].name, noisy, kinds[MOE_32_BALANCED].name, balanced);
    if (quick) {
        say(report, "A quick run: too short to judge by.\n\n");
        return exact;
    }
    const bool good = exact && after->both >= MASKS_AGREE;
    say(report,
        "Every expert took the same number of rows of every batch: %s. The masks agree on %.1f %%; asked for: %g "
        "%%.\n"
        "**%s.**\n\n",
        exact ? "yes" : "no", 100 * after->both, 100 * MASKS_AGREE, good ? "Reached" : "Not reached");
    return good;
}
