#include "inspect.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static int descending(const void *left, const void *right)
{
    const double a = *(const double *)left, b = *(const double *)right;
    return (a < b) - (a > b);
}

/* Importance and load are sums over the characters of a batch: they may be taken from its parts. */
typedef struct sums {
    double importance[MAX_EXPERTS], load[MAX_EXPERTS]; /* [E] */
} sums_t;

static void add_part(model_t *model, const batch_t *part, int64_t index, sums_t *sums)
{
    model_route(model, part, UINT64_C(1) << 40 | (uint64_t)index); /* noise that no training step has seen */
    for (int e = 0; e < model->kind->experts; e++) {
        sums->importance[e] += (double)((float *)model->importance.host)[e];
        sums->load[e] += (double)((float *)model->load.host)[e];
    }
}

static double mean_of(const double *value, int count)
{
    double sum = 0;
    for (int e = 0; e < count; e++) sum += value[e];
    return sum / count;
}

/* The standard deviation divided by the mean. */
static double variation(const double *value, int count)
{
    const double mean = mean_of(value, count);
    double squares = 0;
    for (int e = 0; e < count; e++) squares += (value[e] - mean) * (value[e] - mean);
    return sqrt(squares / count) / mean;
}

static void add_batch(balance_t *balance, const sums_t *sums, int experts)
{
    const double mean = mean_of(sums->load, experts);
    double most = 0;
    for (int e = 0; e < experts; e++) {
        balance->load[e] += sums->load[e] / mean / NOISY_BATCHES;
        most = fmax(most, sums->load[e]);
    }
    balance->cv_importance += variation(sums->importance, experts) / NOISY_BATCHES;
    balance->cv_load += variation(sums->load, experts) / NOISY_BATCHES;
    balance->max_over_mean_load += most / mean / NOISY_BATCHES;
}

balance_t measure_balance(model_t *model, const text_t *text, int64_t characters)
{
    int64_t parts = characters / BATCH;
    if (parts > steps_per_epoch(text, BATCH) / NOISY_BATCHES) parts = steps_per_epoch(text, BATCH) / NOISY_BATCHES;
    balance_t balance = {.characters = parts * BATCH};
    batch_t part = batch_create(BATCH);
    int32_t *order = text_shuffled(text, model->seed + 1000000);
    for (int64_t i = 0, index = 0; i < NOISY_BATCHES; i++) {
        sums_t sums = {0};
        for (int64_t j = 0; j < parts; j++, index++) {
            batch_fill(&part, text, order + index * BATCH, BATCH);
            add_part(model, &part, index, &sums);
        }
        add_batch(&balance, &sums, model->kind->experts);
    }
    qsort(balance.load, (size_t)model->kind->experts, sizeof *balance.load, descending);
    free(order);
    batch_free(&part);
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
