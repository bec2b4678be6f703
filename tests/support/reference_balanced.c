/* BALANCED, forward (App. F): experts take tokens, column by column. */
#include "tests/support/reference_formulas.h"

#include <stdlib.h>

typedef struct candidate {
    double g;
    int64_t te; /* token * E + expert */
} candidate_t;

static bool usable(const reference_input_t *in, const reference_result_t *r, int64_t te)
{
    return active(in, te / in->experts) && r->noisy[te] > -(double)INFINITY;
}

/* Largest g first, ties to the lowest token, then to the lowest expert. */
static int better(const void *a, const void *b)
{
    const candidate_t *x = a, *y = b;
    return x->g != y->g ? (x->g > y->g ? -1 : 1) : x->te < y->te ? -1 : 1;
}

/* Training: the expert's m best tokens (all that it can have, if there are fewer). */
static void take_column(const reference_input_t *in, reference_result_t *r, int64_t e, int64_t m, bool *taken)
{
    const int64_t E = in->experts;
    candidate_t *column = calloc((size_t)in->tokens + 1, sizeof *column);
    int64_t n = 0;
    for (int64_t t = 0; t < in->tokens; t++)
        if (usable(in, r, t * E + e)) column[n++] = (candidate_t){r->softmax[t * E + e], t * E + e};
    qsort(column, (size_t)n, sizeof *column, better);
    for (int64_t i = 0; i < n && i < m; i++) {
        taken[column[i].te] = true;
        r->batch_threshold[e] = column[i].g;
    }
    r->runner_up[e] = n > m ? column[m].g : -1;
    free(column);
}

/* Eq. 20, one expert. Only where the masks differ is there anything to add. */
static void threshold_loss(const reference_input_t *in, reference_result_t *r, int64_t e, const bool *taken)
{
    const int64_t E = in->experts;
    const double threshold = in->thresholds[e];
    double size = 0;
    for (int64_t te = e; te < in->tokens * E; te += E) {
        if (!usable(in, r, te)) continue;
        const int difference = (r->softmax[te] > threshold) - taken[te];
        r->excess[e] += difference;
        if (difference == 0) continue;
        r->losses[CUMOE_LOSS_THRESHOLD] += difference * (r->softmax[te] - threshold);
        size += r->softmax[te];
    }
    r->threshold_loss_size += size + fabs(threshold * (double)r->excess[e]);
}

/* Inference: who is above the threshold, and of those the best that there is room for. */
static void take_above_thresholds(const reference_input_t *in, reference_result_t *r, bool *taken)
{
    const int64_t E = in->experts, wanted = in->max_rows > 0 ? in->max_rows : in->tokens * in->top_k;
    candidate_t *all = calloc((size_t)(in->tokens * E) + 1, sizeof *all);
    int64_t n = 0;
    for (int64_t te = 0; te < in->tokens * E; te++)
        if (usable(in, r, te) && r->softmax[te] > in->thresholds[te % E])
            all[n++] = (candidate_t){r->softmax[te], te};
    qsort(all, (size_t)n, sizeof *all, better);
    for (int64_t i = 0; i < n && i < wanted; i++) taken[all[i].te] = true;
    r->last_kept = r->first_dropped = -1;
    if (n > wanted) {
        r->last_kept = all[wanted - 1].g, r->first_dropped = all[wanted].g;
        r->statistics.dropped_rows = n - wanted;
    }
    free(all);
}

/* The slots of a token: its experts ascending, or one without an expert for a token that is NaN. */
static void give_slots(const reference_input_t *in, reference_result_t *r, int64_t t, bool nan, const bool *taken)
{
    const int64_t E = in->experts, first = r->token_slot[t];
    int64_t next = first;
    double sum = 0;
    for (int64_t e = 0; e < E; e++) {
        if (!taken[t * E + e]) continue;
        r->expert[next] = (int32_t)e;
        sum += r->weight[next++] = r->softmax[t * E + e];
    }
    for (int64_t s = first; s < next && sum > 0; s++) r->weight[s] /= sum;
    if (nan) r->weight[next++] = NAN;
    for (int64_t s = first; s < next; s++) r->slot_token[s] = (int32_t)t;
    r->token_slot[t + 1] = (int32_t)next;
}

void reference_balanced_forward(const reference_input_t *in, reference_result_t *r)
{
    const int64_t T = in->tokens, E = in->experts;
    bool *taken = calloc((size_t)(T * E) + 1, sizeof *taken), *nan = calloc((size_t)T + 1, sizeof *nan);
    for (int64_t t = 0; t < T; t++) {
        if (!active(in, t)) continue;
        const reference_row_t row = reference_flat_row(in, r, t);
        const int64_t refusals = reference_logits(in, &row);
        reference_softmax(in, r, t);
        nan[t] = refusals > 0 && reference_kth_excluding(E, row.noisy, 1, -1) < 0;
        r->statistics.tokens++;
        r->statistics.nan_logits += refusals;
        r->statistics.nan_tokens += nan[t];
    }
    const int64_t tokens = r->statistics.tokens, average = in->top_k * tokens / E;
    const int64_t m = tokens == 0 ? 0 : average < 1 ? 1 : average;
    for (int64_t e = 0; e < E && in->training; e++) {
        take_column(in, r, e, m, taken);
        threshold_loss(in, r, e, taken);
    }
    if (!in->training) take_above_thresholds(in, r, taken);
    for (int64_t t = 0; t < T; t++) give_slots(in, r, t, nan[t], taken);
    free(taken);
    free(nan);
}
