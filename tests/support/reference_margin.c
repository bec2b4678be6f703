/* How far a token is from the next kink of the function. */
#include "tests/support/reference_formulas.h"

/* A limit of SWIGLU_CLAMPED that a rounded pre-activation meets is no kink: both sides meet it. */
static double activation_margin(const reference_input_t *in, double up, double glu)
{
    const double limit = in->swiglu_limit;
    if (in->activation == CUMOE_ACTIVATION_RELU) return fabs(up);
    if (in->activation != CUMOE_ACTIVATION_SWIGLU_CLAMPED || in->round) return INFINITY;
    return fmin(fabs(fabs(up) - limit), fabs(glu - limit));
}

static double row_margin(const reference_row_t *row)
{
    double margin = INFINITY;
    int64_t previous = reference_kth_excluding(row->n, row->noisy, 1, -1);
    for (int64_t k = 2; k <= row->k + 2 && previous >= 0; k++) {
        const int64_t next = reference_kth_excluding(row->n, row->noisy, k, -1);
        if (next >= 0) margin = fmin(margin, row->noisy[previous] - row->noisy[next]);
        previous = next;
    }
    return margin;
}

static double hierarchical_margin(const reference_input_t *in, const reference_result_t *r, int64_t t)
{
    const reference_row_t primary = reference_primary_row(in, r, t);
    double margin = row_margin(&primary);
    for (int64_t j = t * in->top_k_groups; j < (t + 1) * in->top_k_groups; j++) {
        if (r->primary_group[j] < 0) continue;
        const reference_row_t inner = reference_inner_row(in, r, t, r->primary_group[j]);
        margin = fmin(margin, row_margin(&inner));
    }
    return margin;
}

/* Distance of log g from log other. */
static double log_distance(double log_g, double g, double other)
{
    return other > 0 && other != g ? fabs(log_g - log(other)) : INFINITY;
}

static double balanced_margin(const reference_input_t *in, const reference_result_t *r, int64_t t)
{
    double margin = INFINITY;
    for (int64_t e = 0; e < in->experts; e++) {
        const int64_t te = t * in->experts + e;
        const double g = r->softmax[te], log_g = r->clean[te] - r->log_sum[t];
        if (r->noisy[te] == -(double)INFINITY) continue;
        margin = fmin(margin, log_distance(log_g, g, in->thresholds[e]));
        if (in->training) {
            margin =
                fmin(margin,
                     log_distance(log_g, g, g < r->batch_threshold[e] ? r->batch_threshold[e] : r->runner_up[e]));
        } else if (g > in->thresholds[e] && r->first_dropped >= 0) {
            margin = fmin(margin, log_distance(log_g, g, g < r->last_kept ? r->last_kept : r->first_dropped));
        }
    }
    return margin;
}

static double gate_margin(const reference_input_t *in, const reference_result_t *r, int64_t t)
{
    const reference_row_t row = reference_flat_row(in, r, t);
    switch (in->gate) {
    case CUMOE_GATE_NOISY_TOPK:
    case CUMOE_GATE_SOFTMAX_TOPK:
    case CUMOE_GATE_SIGMOID_TOPK:
        return row_margin(&row);
    case CUMOE_GATE_HIERARCHICAL:
        return hierarchical_margin(in, r, t);
    case CUMOE_GATE_BALANCED:
        return balanced_margin(in, r, t);
    default:
        return INFINITY;
    }
}

double reference_margin(const reference_input_t *in, const reference_result_t *r, int64_t t)
{
    const int64_t I = in->intermediate_size;
    if (!active(in, t)) return INFINITY;
    double margin = gate_margin(in, r, t);
    for (int64_t s = r->token_slot[t]; s < r->token_slot[t + 1]; s++)
        for (int64_t i = s * I; i < (s + 1) * I && r->expert[s] >= 0; i++)
            margin = fmin(margin, activation_margin(in, r->up[i], r->glu[i]));
    return margin;
}
