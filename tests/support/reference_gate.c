/* The gates, forward. */
#include "tests/support/reference_formulas.h"

#include <float.h>
#include <stdlib.h>

/* ---- a row of logits ---- */

reference_row_t reference_flat_row(const reference_input_t *in, const reference_result_t *r, int64_t t)
{
    const int64_t E = in->experts, H = in->hidden_size;
    return (reference_row_t){
        .n = E,
        .k = in->top_k,
        .noise = noise_on(in),
        .x = in->x + t * H,
        .w_gate = in->w_gate,
        .w_noise = in->w_noise,
        .normal = noise_on(in) ? in->noise + t * E : NULL,
        .bias = in->gate_bias,
        .clean = r->clean + t * E,
        .std = r->std + t * E,
        .noisy = r->noisy + t * E,
        .probability = r->probability + t * E,
        .threshold = r->threshold + t * E,
        .dclean = r->dclean + t * E,
        .draw = r->draw + t * E,
        .dw_gate = r->dw_gate,
        .dw_noise = r->dw_noise,
        .dw_gate_size = r->dw_gate_size,
        .dw_noise_size = r->dw_noise_size,
    };
}

reference_row_t reference_primary_row(const reference_input_t *in, const reference_result_t *r, int64_t t)
{
    const int64_t G = in->groups;
    return (reference_row_t){
        .n = G,
        .k = in->top_k_groups,
        .noise = noise_on(in),
        .x = in->x + t * in->hidden_size,
        .w_gate = in->w_gate_primary,
        .w_noise = in->w_noise_primary,
        .normal = noise_on(in) ? in->noise_primary + t * G : NULL,
        .clean = r->primary_clean + t * G,
        .std = r->primary_std + t * G,
        .noisy = r->primary_noisy + t * G,
        .probability = r->primary_probability + t * G,
        .threshold = r->primary_threshold + t * G,
        .dclean = r->primary_dclean + t * G,
        .draw = r->primary_draw + t * G,
        .dw_gate = r->dw_gate_primary,
        .dw_noise = r->dw_noise_primary,
        .dw_gate_size = r->dw_gate_primary_size,
        .dw_noise_size = r->dw_noise_primary_size,
    };
}

/* Expert b of the group is expert group * B + b. */
reference_row_t reference_inner_row(const reference_input_t *in, const reference_result_t *r, int64_t t,
                                    int64_t group)
{
    const int64_t B = group_size(in), first = group * B, H = in->hidden_size;
    reference_row_t row = reference_flat_row(in, r, t);
    row.n = B;
    row.k = top_k_inside(in);
    row.w_gate += first * H;
    row.dw_gate += first * H, row.dw_noise += first * H;
    row.dw_gate_size += first * H, row.dw_noise_size += first * H;
    if (row.noise) row.w_noise += first * H, row.normal += first;
    row.clean += first, row.std += first, row.noisy += first;
    row.probability += first, row.threshold += first;
    row.dclean += first, row.draw += first;
    return row;
}

/* The score that decides: v of eq. 4, or sigmoid(c) + bias. */
static double score(const reference_input_t *in, const reference_row_t *row, int64_t i)
{
    if (row->noise) return row->clean[i] + row->normal[i] * row->std[i];
    if (in->gate != CUMOE_GATE_SIGMOID_TOPK || row->clean[i] == -(double)INFINITY) return row->clean[i];
    return sigmoid(row->clean[i]) + (row->bias ? row->bias[i] : 0);
}

int64_t reference_logits(const reference_input_t *in, const reference_row_t *row)
{
    const int64_t H = in->hidden_size;
    int64_t refusals = 0;
    for (int64_t i = 0; i < row->n; i++) {
        row->clean[i] = dot(H, row->x, row->w_gate + i * H);
        if (row->noise) {
            const double std = softplus(dot(H, row->x, row->w_noise + i * H)) + in->noise_epsilon;
            row->std[i] = std < (double)FLT_MIN ? (double)FLT_MIN : std;
        }
        row->noisy[i] = score(in, row, i);
        if (refused(row->clean[i]) || refused(row->noisy[i])) {
            refusals++;
            row->noisy[i] = -INFINITY;
        }
    }
    return refusals;
}

int64_t reference_kth_excluding(int64_t n, const double *v, int64_t k, int64_t out)
{
    int64_t last = -1;
    for (int64_t rank = 0; rank < k; rank++) {
        int64_t best = -1;
        for (int64_t i = 0; i < n; i++) {
            const bool taken = last >= 0 && (v[i] > v[last] || (v[i] == v[last] && i <= last));
            if (i == out || taken || v[i] == -(double)INFINITY) continue;
            if (best < 0 || v[i] > v[best]) best = i;
        }
        if (best < 0) return -1;
        last = best;
    }
    return last;
}

/* Which of the row are taken (eq. 5). SOFTMAX: expert j in slot j. */
static void take(const reference_input_t *in, const reference_row_t *row, int32_t *taken)
{
    for (int64_t j = 0; j < row->k; j++) {
        const bool dense = in->gate == CUMOE_GATE_SOFTMAX;
        taken[j] = (int32_t)(dense ? (row->noisy[j] == -(double)INFINITY ? -1 : j)
                                   : reference_kth_excluding(row->n, row->noisy, j + 1, -1));
    }
}

/* Softmax over what was taken (eq. 3). */
static void weigh(const reference_row_t *row, const int32_t *taken, double *weight)
{
    double max = -INFINITY, sum = 0;
    for (int64_t j = 0; j < row->k; j++)
        if (taken[j] >= 0 && row->noisy[taken[j]] > max) max = row->noisy[taken[j]];
    for (int64_t j = 0; j < row->k; j++) sum += weight[j] = taken[j] < 0 ? 0 : exp(row->noisy[taken[j]] - max);
    for (int64_t j = 0; j < row->k && sum > 0; j++) weight[j] /= sum;
}

static bool none_usable(const reference_row_t *row)
{
    return reference_kth_excluding(row->n, row->noisy, 1, -1) < 0;
}

static void fill(double *values, int64_t n, double value)
{
    for (int64_t i = 0; i < n; i++) values[i] = value;
}

/* P(x, i) for everything in the row (eq. 8-9), added to load. */
static void probabilities(const reference_row_t *row, double *load)
{
    for (int64_t i = 0; i < row->n; i++) {
        row->threshold[i] = -1;
        if (!isfinite(row->clean[i]) || !isfinite(row->noisy[i])) continue;
        const int64_t k = reference_kth_excluding(row->n, row->noisy, row->k, i);
        row->threshold[i] = (int32_t)k;
        row->probability[i] = k < 0 ? 1 : normal_cdf((row->clean[i] - row->noisy[k]) / row->std[i]);
        load[i] += row->probability[i];
    }
}

/* ---- tokens ---- */

static void external(const reference_input_t *in, reference_result_t *r, int64_t t)
{
    for (int64_t s = t * in->top_k; s < (t + 1) * in->top_k; s++) {
        const bool routed = in->index[s] >= 0 && in->index[s] < in->experts;
        r->expert[s] = routed ? (int32_t)in->index[s] : -1;
        r->weight[s] = routed ? in->index_weight[s] : 0;
        r->statistics.bad_indices += in->index[s] < -1 || in->index[s] > in->experts;
    }
}

void reference_softmax(const reference_input_t *in, reference_result_t *r, int64_t t)
{
    const int64_t E = in->experts;
    const double *clean = r->clean + t * E, *noisy = r->noisy + t * E;
    double *softmax = r->softmax + t * E, max = -INFINITY, sum = 0;
    for (int64_t e = 0; e < E; e++)
        if (noisy[e] > -(double)INFINITY && clean[e] > max) max = clean[e];
    if (max == -(double)INFINITY) return;
    for (int64_t e = 0; e < E; e++)
        if (noisy[e] > -(double)INFINITY) sum += softmax[e] = exp(clean[e] - max);
    for (int64_t e = 0; e < E; e++) softmax[e] /= sum;
    r->log_sum[t] = max + log(sum);
}

/* Weights of SOFTMAX_TOPK and SIGMOID_TOPK that are not the softmax of what was taken, and p of the loss SWITCH. */
static void weigh_all(const reference_input_t *in, reference_result_t *r, int64_t t)
{
    const int64_t E = in->experts, first = t * in->top_k, end = first + in->top_k;
    const bool sigmoids = in->gate == CUMOE_GATE_SIGMOID_TOPK;
    const double *noisy = r->noisy + t * E;
    double *share = r->share + t * E, all = 0, taken = 0;
    reference_softmax(in, r, t);
    for (int64_t e = 0; e < E; e++) {
        const bool usable = noisy[e] > -(double)INFINITY;
        all += share[e] = !usable ? 0 : sigmoids ? sigmoid(r->clean[t * E + e]) : r->softmax[t * E + e];
    }
    for (int64_t s = first; s < end; s++) {
        const bool by_softmax = !sigmoids && in->renormalize; /* has its weights */
        if (r->expert[s] >= 0 && !by_softmax) taken += r->weight[s] = share[r->expert[s]];
    }
    for (int64_t s = first; s < end && sigmoids && in->renormalize; s++)
        if (r->expert[s] >= 0) r->weight[s] /= taken + 1e-20;
    for (int64_t e = 0; e < E && all > 0; e++) share[e] /= all;
}

static void flat(const reference_input_t *in, reference_result_t *r, int64_t t)
{
    const reference_row_t row = reference_flat_row(in, r, t);
    const int64_t refusals = reference_logits(in, &row);
    int32_t *expert = r->expert + t * in->top_k;
    double *weight = r->weight + t * in->top_k;
    take(in, &row, expert);
    weigh(&row, expert, weight);
    if (of_all_logits(in)) weigh_all(in, r, t);
    if (smooth(&row)) probabilities(&row, r->load);
    const bool unusable = none_usable(&row) && refusals > 0;
    if (unusable) fill(weight, in->top_k, NAN);
    r->statistics.nan_logits += refusals;
    r->statistics.nan_tokens += unusable;
}

/* The slots of one primary choice. */
static void inside_group(const reference_input_t *in, reference_result_t *r, int64_t t, int64_t j1)
{
    const int64_t K2 = top_k_inside(in), first = t * in->top_k + j1 * K2, B = group_size(in);
    const int32_t group = r->primary_group[t * in->top_k_groups + j1];
    const double primary_weight = r->primary_weight[t * in->top_k_groups + j1];
    if (group < 0) {
        fill(r->weight + first, K2, isnan(primary_weight) ? NAN : 0);
        return;
    }
    const reference_row_t row = reference_inner_row(in, r, t, group);
    const int64_t refusals = reference_logits(in, &row);
    take(in, &row, r->expert + first);
    weigh(&row, r->expert + first, r->local_weight + first);
    if (smooth(&row)) probabilities(&row, r->level_load + group * B);
    if (none_usable(&row) && refusals > 0) fill(r->local_weight + first, K2, NAN);
    for (int64_t s = first; s < first + K2; s++) {
        r->weight[s] = primary_weight * r->local_weight[s];
        if (r->expert[s] >= 0) r->expert[s] += (int32_t)(group * B);
    }
    r->statistics.nan_logits += refusals;
    r->primary_count[group]++;
}

static void hierarchical(const reference_input_t *in, reference_result_t *r, int64_t t)
{
    const int64_t K1 = in->top_k_groups;
    const reference_row_t row = reference_primary_row(in, r, t);
    const int64_t refusals = reference_logits(in, &row);
    take(in, &row, r->primary_group + t * K1);
    weigh(&row, r->primary_group + t * K1, r->primary_weight + t * K1);
    if (smooth(&row)) probabilities(&row, r->primary_load);
    if (none_usable(&row) && refusals > 0) fill(r->primary_weight + t * K1, K1, NAN);
    r->statistics.nan_logits += refusals;
    bool nan = false;
    for (int64_t j1 = 0; j1 < K1; j1++) inside_group(in, r, t, j1);
    for (int64_t s = t * in->top_k; s < (t + 1) * in->top_k; s++)
        nan = nan || (r->expert[s] < 0 && isnan(r->weight[s]));
    r->statistics.nan_tokens += nan;
}

static void gate_token(const reference_input_t *in, reference_result_t *r, int64_t t)
{
    r->statistics.tokens++;
    if (in->gate == CUMOE_GATE_EXTERNAL)
        external(in, r, t);
    else if (in->gate == CUMOE_GATE_HIERARCHICAL)
        hierarchical(in, r, t);
    else
        flat(in, r, t);
}

/* ---- sums over tokens ---- */

static double max_over_mean(int64_t n, const double *v)
{
    double sum = 0, max = 0;
    for (int64_t i = 0; i < n; i++) sum += v[i];
    for (int64_t i = 0; i < n; i++) max = v[i] > max ? v[i] : max;
    return sum == 0 ? 0 : max * (double)n / sum;
}

static void count_rows(const reference_input_t *in, reference_result_t *r)
{
    for (int64_t s = 0; s < r->token_slot[in->tokens]; s++) {
        if (r->expert[s] < 0) continue;
        r->count[r->expert[s]]++;
        r->statistics.rows++;
        if (in->gate != CUMOE_GATE_EXTERNAL) r->importance[r->expert[s]] += r->weight[s];
    }
    for (int64_t e = 0; e < in->experts; e++)
        if (r->count[e] > r->statistics.max_count) r->statistics.max_count = r->count[e];
}

/* Eq. 14. |X^(i)| is a count. */
static void hierarchical_load(const reference_input_t *in, reference_result_t *r)
{
    const int64_t G = in->groups, B = group_size(in);
    const bool primary_smooth = noise_on(in) && in->top_k_groups < G;
    const bool inner_smooth = noise_on(in) && top_k_inside(in) < B;
    for (int64_t g = 0; g < G && !primary_smooth; g++) r->primary_load[g] = (double)r->primary_count[g];
    for (int64_t e = 0; e < in->experts; e++) {
        const double tokens = (double)r->primary_count[e / B];
        if (!inner_smooth) r->level_load[e] = (double)r->count[e];
        r->load[e] = tokens > 0 ? r->primary_load[e / B] * r->level_load[e] / tokens : 0;
    }
}

static void losses_of_all_logits(const reference_input_t *in, reference_result_t *r)
{
    const int64_t E = in->experts;
    const double tokens = (double)r->statistics.tokens;
    for (int64_t t = 0; t < in->tokens && tokens > 0; t++) {
        r->losses[CUMOE_LOSS_Z] += r->log_sum[t] * r->log_sum[t] / tokens;
        for (int64_t e = 0; e < E; e++)
            r->losses[CUMOE_LOSS_SWITCH] +=
                (double)E * ((double)r->count[e] / tokens) * (r->share[t * E + e] / tokens);
    }
}

void reference_gate_forward(const reference_input_t *in, reference_result_t *r)
{
    const int64_t E = in->experts;
    const bool smooth_load = in->gate == CUMOE_GATE_NOISY_TOPK && noise_on(in) && in->top_k < E;
    for (int64_t t = 0; t < in->tokens && in->gate != CUMOE_GATE_BALANCED; t++)
        if (active(in, t)) gate_token(in, r, t);
    if (in->gate == CUMOE_GATE_BALANCED) reference_balanced_forward(in, r);
    count_rows(in, r);
    double *count = calloc((size_t)E, sizeof *count);
    for (int64_t e = 0; e < E; e++) {
        count[e] = (double)r->count[e];
        if (!smooth_load) r->load[e] = count[e];
    }
    if (in->gate == CUMOE_GATE_HIERARCHICAL)
        hierarchical_load(in, r);
    else
        for (int64_t e = 0; e < E; e++) r->level_load[e] = r->load[e];
    if (of_all_logits(in)) losses_of_all_logits(in, r);
    if (in->gate != CUMOE_GATE_EXTERNAL) {
        r->losses[CUMOE_LOSS_IMPORTANCE] = reference_cv_squared(E, r->importance);
        r->losses[CUMOE_LOSS_LOAD] = reference_cv_squared(E, r->load);
    }
    r->statistics.cv_importance = sqrt(reference_cv_squared(E, r->importance));
    r->statistics.cv_load = sqrt(reference_cv_squared(E, r->load));
    r->statistics.max_over_mean_load = max_over_mean(E, r->load);
    r->statistics.max_over_mean_count = max_over_mean(E, count);
    free(count);
}
