#include "inspect.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static int descending(const void *left, const void *right)
{
    const double a = *(const double *)left, b = *(const double *)right;
    return (a < b) - (a > b);
}

balance_t measure_balance(model_t *model, const text_t *text)
{
    const int experts = model->kind->experts;
    balance_t balance = {0};
    batch_t batch = batch_create(BATCH);
    int32_t *order = text_shuffled(text, model->seed + 1000000);
    const int64_t batches = steps_per_epoch(text) < NOISY_BATCHES ? steps_per_epoch(text) : NOISY_BATCHES;
    for (int64_t i = 0; i < batches; i++) {
        batch_fill(&batch, text, order + i * BATCH, BATCH);
        model_route(model, &batch, UINT64_C(1) << 40 | (uint64_t)i); /* noise that no training step has seen */
        const cumoe_statistics_t *statistics = model->statistics.host;
        balance.cv_importance += statistics->cv_importance / (double)batches;
        balance.cv_load += statistics->cv_load / (double)batches;
        balance.max_over_mean_load += statistics->max_over_mean_load / (double)batches;
        for (int e = 0; e < experts; e++)
            balance.load[e] += ((float *)model->load.host)[e] / ((double)batches * BATCH * TOP_K / experts);
    }
    qsort(balance.load, (size_t)experts, sizeof *balance.load, descending);
    free(order);
    batch_free(&batch);
    return balance;
}

/* Rows of every expert by text, and of the first text by halves: its blocks in turn. */
typedef struct counts {
    const text_t *text;
    usage_t *usage;
    double text_rows[MAX_EXPERTS][MAX_TEXTS], half_rows[MAX_EXPERTS][2];
} counts_t;

static bool same_ending(const text_t *text, int32_t a, int32_t b)
{
    enum { ENDING = 4 };
    return memcmp(text->symbol + a - ENDING, text->symbol + b - ENDING, ENDING) == 0;
}

/* Insert into the expert's list of highest gates. Of contexts with one ending the highest stays. */
static void offer(expert_view_t *view, const text_t *text, int32_t position, float gate)
{
    if (view->found == HIGHEST && gate <= view->gate[HIGHEST - 1]) return;
    int place = 0;
    while (place < view->found && !same_ending(text, view->position[place], position)) place++;
    if (place < view->found && gate <= view->gate[place]) return;
    if (place == view->found) place = view->found < HIGHEST ? view->found++ : HIGHEST - 1;
    for (; place > 0 && view->gate[place - 1] < gate; place--) {
        view->gate[place] = view->gate[place - 1];
        view->position[place] = view->position[place - 1];
    }
    view->gate[place] = gate;
    view->position[place] = position;
}

static void count_batch(void *context, const model_t *model, const int32_t *position, int64_t size)
{
    counts_t *counts = context;
    const int32_t *expert = model->expert.host;
    const float *gate = model->gate.host;
    for (int64_t row = 0; row < size * TOP_K; row++) {
        if (expert[row] < 0) continue;
        const int32_t here = position[row / TOP_K];
        const int text = text_of(counts->text, here);
        counts->text_rows[expert[row]][text]++;
        if (text == 0) counts->half_rows[expert[row]][here / BLOCK / HELD_OUT_EVERY % 2]++;
        offer(&counts->usage->view[expert[row]], counts->text, here, gate[row]);
    }
}

static double column_sum(int experts, int columns, const double *table, int column)
{
    double sum = 0;
    for (int e = 0; e < experts; e++) sum += table[e * columns + column];
    return sum > 0 ? sum : 1;
}

/* Half the sum of |a - b| over the experts, where a and b are the first two columns divided by their sums. */
static double total_variation(int experts, int columns, const double *table)
{
    const double first = column_sum(experts, columns, table, 0), second = column_sum(experts, columns, table, 1);
    double sum = 0;
    for (int e = 0; e < experts; e++) sum += fabs(table[e * columns] / first - table[e * columns + 1] / second);
    return sum / 2;
}

double preference(const expert_view_t *view)
{
    const double both = view->share[0] + view->share[1];
    return both > 0 ? view->share[0] / both : 0.5;
}

static int by_preference(const void *left, const void *right)
{
    const double a = preference(left), b = preference(right);
    if (a != b) return a < b ? 1 : -1;
    return ((const expert_view_t *)left)->expert - ((const expert_view_t *)right)->expert;
}

void inspect_experts(model_t *model, const text_t *text, int64_t stride, usage_t *usage)
{
    const int experts = model->kind->experts;
    *usage = (usage_t){.experts = experts};
    counts_t *counts = host_alloc(1, sizeof *counts);
    counts->text = text;
    counts->usage = usage;
    held_out_perplexity(model, text, stride, count_batch, counts);

    for (int i = 0; i < text->num_texts; i++) {
        const double all = column_sum(experts, MAX_TEXTS, counts->text_rows[0], i);
        for (int e = 0; e < experts; e++) {
            usage->view[e].expert = e;
            usage->view[e].rows += counts->text_rows[e][i];
            usage->view[e].share[i] = counts->text_rows[e][i] / all;
        }
    }
    usage->distance = total_variation(experts, MAX_TEXTS, counts->text_rows[0]);
    usage->distance_within = total_variation(experts, 2, counts->half_rows[0]);
    qsort(usage->view, (size_t)experts, sizeof *usage->view, by_preference);
    free(counts);
}
