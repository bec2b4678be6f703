/* The gradients of the gates by hand; tests/unit/test_reference.c holds them to central differences. */
#include "tests/support/reference_formulas.h"

#include <stdlib.h>

/* What the gradients of tokens share: of the losses by their sums. */
typedef struct sums {
    double *dimportance; /* [E] */
    double *dload;       /* [E] by the load of a flat gate, or by Load_i(X^(i))_j */
    double *dprimary;    /* [G] by Load_primary(X)_i */
    double *dshare;      /* [E] of SWITCH by p of one token */
    double dlog_sum;     /* of Z by log_sum of one token, over that log_sum */
} sums_t;

/* Both smooth loads of eq. 14, where they are smooth; |X^(i)| is a count. */
static void hierarchical_sums(const reference_input_t *in, const reference_result_t *r, sums_t *s)
{
    const int64_t B = group_size(in);
    for (int64_t e = 0; e < in->experts; e++) {
        const double tokens = (double)r->primary_count[e / B];
        const double dload =
            in->loss_gradient[CUMOE_LOSS_LOAD] * reference_cv_squared_gradient(in->experts, r->load, e);
        if (tokens == 0) continue;
        s->dprimary[e / B] += dload * r->level_load[e] / tokens;
        s->dload[e] = dload * r->primary_load[e / B] / tokens;
    }
}

static void find_sums(const reference_input_t *in, const reference_result_t *r, sums_t *s)
{
    const int64_t E = in->experts;
    const double tokens = (double)r->statistics.tokens;
    for (int64_t e = 0; e < E; e++) {
        s->dimportance[e] =
            in->loss_gradient[CUMOE_LOSS_IMPORTANCE] * reference_cv_squared_gradient(E, r->importance, e);
        s->dload[e] = in->loss_gradient[CUMOE_LOSS_LOAD] * reference_cv_squared_gradient(E, r->load, e);
        s->dshare[e] = in->loss_gradient[CUMOE_LOSS_SWITCH] * (double)E * ((double)r->count[e] / tokens) / tokens;
    }
    s->dlog_sum = 2 * in->loss_gradient[CUMOE_LOSS_Z] / tokens;
    if (in->gate == CUMOE_GATE_HIERARCHICAL) hierarchical_sums(in, r, s);
}

static void add_noisy(const reference_row_t *row, int64_t i, double dnoisy, double *dstd)
{
    row->dclean[i] += dnoisy;
    if (row->noise) dstd[i] += dnoisy * row->normal[i];
}

/* Through the softmax over what was taken. */
void reference_softmax_backward(const reference_row_t *row, const int32_t *taken, const double *weight,
                                const double *dweight, double *dstd)
{
    double mean = 0;
    for (int64_t j = 0; j < row->k; j++)
        if (taken[j] >= 0) mean += weight[j] * dweight[j];
    for (int64_t j = 0; j < row->k; j++)
        if (taken[j] >= 0) add_noisy(row, taken[j], weight[j] * (dweight[j] - mean), dstd);
}

/* Through P(x, i): clean logit, standard deviation, and the noisy logit that is the threshold. */
void reference_load_backward(const reference_row_t *row, const double *dload, double *dstd)
{
    for (int64_t i = 0; i < row->n; i++) {
        const int64_t k = row->threshold[i];
        if (k < 0) continue;
        const double z = (row->clean[i] - row->noisy[k]) / row->std[i];
        const double g = dload[i] * normal_density(z) / row->std[i];
        row->dclean[i] += g;
        dstd[i] -= g * z;
        add_noisy(row, k, -g, dstd);
    }
}

/* From the logits to the matrices and to x. */
void reference_logits_backward(const reference_input_t *in, const reference_row_t *row, const double *dstd,
                               double *dx)
{
    const int64_t H = in->hidden_size;
    for (int64_t i = 0; i < row->n; i++) {
        if (row->dclean[i] != 0) {
            add_scaled(H, row->dclean[i], row->x, row->dw_gate + i * H);
            add_scaled(H, row->dclean[i], row->w_gate + i * H, dx);
        }
        if (row->noise && dstd[i] != 0) {
            row->draw[i] = dstd[i] * sigmoid(dot(H, row->x, row->w_noise + i * H));
            add_scaled(H, row->draw[i], row->x, row->dw_noise + i * H);
            add_scaled(H, row->draw[i], row->w_noise + i * H, dx);
        }
    }
}

/* ---- tokens ---- */

/* Weights that are p, or sigmoids, of all logits, renormalised or not. */
static void all_logits_backward(const reference_input_t *in, reference_result_t *r, int64_t t,
                                const double *dweight)
{
    const int64_t E = in->experts, first = t * in->top_k;
    const bool sigmoids = in->gate == CUMOE_GATE_SIGMOID_TOPK;
    const double *softmax = r->softmax + t * E;
    double *dclean = r->dclean + t * E, mean = 0;
    for (int64_t j = 0; j < in->top_k; j++)
        if (r->expert[first + j] >= 0) mean += r->weight[first + j] * dweight[j];
    for (int64_t e = 0; e < E && !sigmoids; e++) dclean[e] -= softmax[e] * mean;
    for (int64_t j = 0; j < in->top_k; j++) {
        const int64_t e = r->expert[first + j];
        if (e < 0) continue;
        if (sigmoids) {
            const double slope = r->weight[first + j] * (1 - sigmoid(r->clean[t * E + e]));
            dclean[e] += slope * (dweight[j] - (in->renormalize ? mean : 0));
        } else {
            dclean[e] += softmax[e] * dweight[j];
        }
    }
}

static void losses_backward(const reference_input_t *in, reference_result_t *r, int64_t t, const sums_t *sums)
{
    const int64_t E = in->experts;
    const double *share = r->share + t * E;
    const double mean = dot(E, share, sums->dshare);
    for (int64_t e = 0; e < E; e++) {
        const int64_t te = t * E + e;
        if (r->noisy[te] == -(double)INFINITY) continue;
        const double slope = in->gate == CUMOE_GATE_SIGMOID_TOPK ? 1 - sigmoid(r->clean[te]) : 1;
        r->dclean[te] += share[e] * slope * (sums->dshare[e] - mean);
        r->dclean[te] += sums->dlog_sum * r->log_sum[t] * r->softmax[te];
    }
}

/* The gradients of the weights of a token's slots. */
static void weight_gradients(const reference_result_t *r, int64_t t, const sums_t *sums, double *dweight)
{
    for (int64_t s = r->token_slot[t]; s < r->token_slot[t + 1]; s++)
        *dweight++ = r->expert[s] < 0 ? 0 : r->dweight[s] + sums->dimportance[r->expert[s]];
}

static void flat(const reference_input_t *in, reference_result_t *r, int64_t t, const sums_t *sums, double *scratch)
{
    const reference_row_t row = reference_flat_row(in, r, t);
    const int64_t first = r->token_slot[t];
    double *dstd = scratch, *dweight = scratch + in->experts;
    weight_gradients(r, t, sums, dweight);
    if (in->gate == CUMOE_GATE_SIGMOID_TOPK || (in->gate == CUMOE_GATE_SOFTMAX_TOPK && !in->renormalize)) {
        all_logits_backward(in, r, t, dweight);
    } else {
        reference_row_t slots = row;
        slots.k = r->token_slot[t + 1] - first;
        reference_softmax_backward(&slots, r->expert + first, r->weight + first, dweight, dstd);
    }
    if (of_all_logits(in)) losses_backward(in, r, t, sums);
    if (smooth(&row)) reference_load_backward(&row, sums->dload, dstd);
    reference_logits_backward(in, &row, dstd, r->dx_gate + t * in->hidden_size);
}

/* weight = primary weight * local weight; the primary gate is used once. */
static void hierarchical(const reference_input_t *in, reference_result_t *r, int64_t t, const sums_t *sums,
                         double *scratch)
{
    const int64_t K1 = in->top_k_groups, K2 = top_k_inside(in), B = group_size(in), G = in->groups;
    double *dx = r->dx_gate + t * in->hidden_size;
    double *dstd = scratch, *dweight = dstd + G + in->experts, *dprimary = dweight + in->top_k;
    weight_gradients(r, t, sums, dweight);
    for (int64_t j1 = 0; j1 < K1; j1++) {
        const int64_t group = r->primary_group[t * K1 + j1], first = t * in->top_k + j1 * K2;
        int32_t inside[64];
        dprimary[j1] = 0;
        if (group < 0) continue;
        for (int64_t j2 = 0; j2 < K2; j2++) {
            const int32_t e = r->expert[first + j2];
            inside[j2] = e < 0 ? -1 : e - (int32_t)(group * B);
            if (e >= 0) dprimary[j1] += r->local_weight[first + j2] * dweight[j1 * K2 + j2];
            dweight[j1 * K2 + j2] *= r->primary_weight[t * K1 + j1];
        }
        const reference_row_t row = reference_inner_row(in, r, t, group);
        reference_softmax_backward(&row, inside, r->local_weight + first, dweight + j1 * K2, dstd + G + group * B);
        if (smooth(&row)) reference_load_backward(&row, sums->dload + group * B, dstd + G + group * B);
        reference_logits_backward(in, &row, dstd + G + group * B, dx);
    }
    const reference_row_t primary = reference_primary_row(in, r, t);
    reference_softmax_backward(&primary, r->primary_group + t * K1, r->primary_weight + t * K1, dprimary, dstd);
    if (smooth(&primary)) reference_load_backward(&primary, sums->dprimary, dstd);
    reference_logits_backward(in, &primary, dstd, dx);
}

void reference_gate_backward(const reference_input_t *in, reference_result_t *r)
{
    const int64_t E = in->experts, G = in->groups, scratch_size = G + 2 * E + in->top_k + in->top_k_groups + 1;
    if (in->gate == CUMOE_GATE_EXTERNAL) return;
    double *memory = calloc((size_t)(3 * E + G + scratch_size), sizeof *memory), *scratch = memory + 3 * E + G;
    sums_t sums = {memory, memory + E, memory + 3 * E, memory + 2 * E, 0};
    find_sums(in, r, &sums);
    for (int64_t t = 0; t < in->tokens; t++) {
        if (!active(in, t)) continue;
        for (int64_t i = 0; i < scratch_size; i++) scratch[i] = 0;
        if (in->gate == CUMOE_GATE_HIERARCHICAL)
            hierarchical(in, r, t, &sums, scratch);
        else
            flat(in, r, t, &sums, scratch);
    }
    for (int64_t e = 0; e < E && in->training && in->gate == CUMOE_GATE_BALANCED; e++)
        r->dthresholds[e] = -in->loss_gradient[CUMOE_LOSS_THRESHOLD] * (double)r->excess[e];
    free(memory);
}
