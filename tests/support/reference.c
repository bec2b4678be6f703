#include "tests/support/reference_formulas.h"

#include <float.h>
#include <stdlib.h>
#include <string.h>

/* ---- memory: one block, cut into pieces ---- */

typedef struct cutter {
    double *base; /* NULL while counting */
    size_t used;
} cutter_t;

static double *cut(cutter_t *cutter, int64_t count)
{
    double *piece = cutter->base ? cutter->base + cutter->used : NULL;
    cutter->used += (size_t)count;
    return piece;
}

static void cut_all(const reference_input_t *in, reference_result_t *r, cutter_t *c)
{
    const int64_t T = in->tokens, H = in->hidden_size, I = in->intermediate_size, E = in->experts;
    const int64_t slots = T * in->top_k;
    double **const token_expert[] = {&r->clean, &r->std, &r->noisy, &r->probability, &r->dclean, &r->draw};
    double **const slot_i[] = {&r->up, &r->glu, &r->hidden, &r->dup, &r->dglu};
    double **const matrix[] = {&r->dw_up, &r->dw_glu, &r->dw_down};
    for (size_t i = 0; i < sizeof token_expert / sizeof *token_expert; i++) *token_expert[i] = cut(c, T * E);
    for (size_t i = 0; i < sizeof slot_i / sizeof *slot_i; i++) *slot_i[i] = cut(c, slots * I);
    for (size_t i = 0; i < sizeof matrix / sizeof *matrix; i++) *matrix[i] = cut(c, E * I * H);
    r->threshold = (int32_t *)cut(c, T * E);
    r->expert = (int32_t *)cut(c, slots);
    r->weight = cut(c, slots);
    r->dweight = cut(c, slots);
    r->importance = cut(c, E);
    r->load = cut(c, E);
    r->count = (int64_t *)cut(c, E);
    r->output = cut(c, slots * H);
    r->drows = cut(c, slots * H);
    r->y = cut(c, T * H);
    r->dx_gate = cut(c, T * H);
    r->dx = cut(c, T * H);
    r->dw_gate = cut(c, E * H);
    r->dw_noise = cut(c, E * H);
    r->db_up = cut(c, E * I);
    r->db_glu = cut(c, E * I);
    r->db_down = cut(c, E * H);
    r->dx_gate_size = cut(c, T * H);
    r->dx_size = cut(c, T * H);
    r->dw_gate_size = cut(c, E * H);
    r->dw_noise_size = cut(c, E * H);
}

bool reference_create(const reference_input_t *input, reference_result_t *result)
{
    cutter_t cutter = {NULL, 0};
    memset(result, 0, sizeof *result);
    cut_all(input, result, &cutter);
    cutter.base = calloc(cutter.used + 1, sizeof(double));
    if (!cutter.base) return false;
    result->memory = cutter.base;
    result->memory_size = cutter.used * sizeof(double);
    cutter.used = 0;
    cut_all(input, result, &cutter);
    return true;
}

void reference_destroy(reference_result_t *result)
{
    free(result->memory);
    memset(result, 0, sizeof *result);
}

/* ---- coefficient of variation ---- */

double reference_cv_squared(int64_t n, const double *v)
{
    double sum = 0, variance = 0;
    for (int64_t i = 0; i < n; i++) sum += v[i];
    if (sum == 0) return 0;
    const double mean = sum / (double)n;
    for (int64_t i = 0; i < n; i++) variance += (v[i] - mean) * (v[i] - mean) / (double)n;
    return variance / (mean * mean);
}

/* d/dv_i of n Q / S^2 - 1 with S = sum, Q = sum of squares */
double reference_cv_squared_gradient(int64_t n, const double *v, int64_t i)
{
    double sum = 0, squares = 0;
    for (int64_t j = 0; j < n; j++) sum += v[j];
    for (int64_t j = 0; j < n; j++) squares += v[j] * v[j];
    return sum == 0 ? 0 : 2 * (double)n / (sum * sum) * (v[i] - squares / sum);
}

static double max_over_mean(int64_t n, const double *v)
{
    double sum = 0, max = 0;
    for (int64_t i = 0; i < n; i++) sum += v[i];
    for (int64_t i = 0; i < n; i++) max = v[i] > max ? v[i] : max;
    return sum == 0 ? 0 : max * (double)n / sum;
}

/* ---- gate, forward ---- */

/* The logits of a token; NaN and +Inf become -Inf in noisy and are counted. */
static int64_t logits(const reference_input_t *in, reference_result_t *r, int64_t t)
{
    const int64_t H = in->hidden_size, E = in->experts;
    int64_t refusals = 0;
    for (int64_t e = 0; e < E; e++) {
        const int64_t te = t * E + e;
        r->clean[te] = r->noisy[te] = dot(H, in->x + t * H, in->w_gate + e * H);
        if (noise_on(in)) {
            const double std = softplus(dot(H, in->x + t * H, in->w_noise + e * H)) + in->noise_epsilon;
            r->std[te] = std < (double)FLT_MIN ? (double)FLT_MIN : std;
            r->noisy[te] += in->noise[te] * r->std[te];
        }
        if (refused(r->clean[te]) || refused(r->noisy[te])) {
            refusals++;
            r->noisy[te] = -INFINITY;
        }
    }
    return refusals;
}

/* The k-th largest (k from 1) of v[n] without component out; the lowest index first among equals; -1 = there are
 * fewer than k that are not -Inf. */
static int64_t kth_excluding(int64_t n, const double *v, int64_t k, int64_t out)
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

/* Which experts a token takes (eq. 5). SOFTMAX: expert j in slot j. */
static void select_experts(const reference_input_t *in, reference_result_t *r, int64_t t)
{
    const int64_t E = in->experts, K = in->top_k;
    const double *noisy = r->noisy + t * E;
    for (int64_t j = 0; j < K; j++) {
        const bool dense = in->gate == CUMOE_GATE_SOFTMAX;
        const int64_t chosen =
            dense ? (noisy[j] == -(double)INFINITY ? -1 : j) : kth_excluding(E, noisy, j + 1, -1);
        r->expert[t * K + j] = (int32_t)chosen;
    }
}

/* Softmax over the chosen logits (eq. 3). */
static void weigh(const reference_input_t *in, reference_result_t *r, int64_t t, int64_t refusals)
{
    const int64_t E = in->experts, K = in->top_k;
    const int32_t *expert = r->expert + t * K;
    const double *noisy = r->noisy + t * E;
    double *weight = r->weight + t * K, max = -INFINITY, sum = 0;
    for (int64_t j = 0; j < K; j++)
        if (expert[j] >= 0 && noisy[expert[j]] > max) max = noisy[expert[j]];
    for (int64_t j = 0; j < K; j++) sum += weight[j] = expert[j] < 0 ? 0 : exp(noisy[expert[j]] - max);
    const bool none = max == -(double)INFINITY;
    for (int64_t j = 0; j < K; j++) weight[j] = none ? (refusals > 0 ? NAN : 0) : weight[j] / sum;
    r->statistics.nan_logits += refusals;
    r->statistics.nan_tokens += none && refusals > 0;
}

/* P(x, i) for every expert (eq. 8-9). */
static void probabilities(const reference_input_t *in, reference_result_t *r, int64_t t)
{
    const int64_t E = in->experts;
    for (int64_t i = 0; i < E; i++) {
        const int64_t te = t * E + i;
        r->threshold[te] = -1;
        if (!isfinite(r->clean[te]) || !isfinite(r->noisy[te])) continue;
        const int64_t k = kth_excluding(E, r->noisy + t * E, in->top_k, i);
        r->threshold[te] = (int32_t)k;
        r->probability[te] = k < 0 ? 1 : normal_cdf((r->clean[te] - r->noisy[t * E + k]) / r->std[te]);
    }
}

static void external(const reference_input_t *in, reference_result_t *r, int64_t t)
{
    for (int64_t s = t * in->top_k; s < (t + 1) * in->top_k; s++) {
        const bool routed = in->index[s] >= 0 && in->index[s] < in->experts;
        r->expert[s] = routed ? (int32_t)in->index[s] : -1;
        r->weight[s] = routed ? in->index_weight[s] : 0;
        r->statistics.bad_indices += in->index[s] < -1 || in->index[s] > in->experts;
    }
}

static void gate_token(const reference_input_t *in, reference_result_t *r, int64_t t)
{
    const int64_t E = in->experts, K = in->top_k;
    if (in->gate == CUMOE_GATE_EXTERNAL) {
        external(in, r, t);
    } else {
        const int64_t refusals = logits(in, r, t);
        select_experts(in, r, t);
        weigh(in, r, t, refusals);
        if (smooth_load(in)) probabilities(in, r, t);
    }
    r->statistics.tokens++;
    for (int64_t s = t * K; s < (t + 1) * K; s++) {
        if (r->expert[s] < 0) continue;
        r->count[r->expert[s]]++;
        r->statistics.rows++;
        if (in->gate != CUMOE_GATE_EXTERNAL) r->importance[r->expert[s]] += r->weight[s];
    }
    for (int64_t e = 0; e < E && smooth_load(in); e++) r->load[e] += r->probability[t * E + e];
}

static void gate_forward(const reference_input_t *in, reference_result_t *r)
{
    const int64_t E = in->experts, K = in->top_k;
    for (int64_t t = 0; t < in->tokens; t++) {
        if (active(in, t))
            gate_token(in, r, t);
        else
            for (int64_t s = t * K; s < (t + 1) * K; s++) r->expert[s] = -1;
    }
    double *count = calloc((size_t)E, sizeof *count);
    for (int64_t e = 0; e < E; e++) {
        count[e] = (double)r->count[e];
        if (!smooth_load(in)) r->load[e] = count[e];
        if (r->count[e] > r->statistics.max_count) r->statistics.max_count = r->count[e];
    }
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

/* ---- experts ---- */

static double product(int64_t n, const double *a, const double *b, const double *bias, int64_t row)
{
    return dot(n, a, b + row * n) + (bias ? bias[row] : 0);
}

static void expert_forward(const reference_input_t *in, reference_result_t *r, int64_t t, int64_t slot)
{
    const int64_t H = in->hidden_size, I = in->intermediate_size, e = r->expert[slot];
    const double *x = in->x + t * H;
    for (int64_t i = 0; i < I; i++) {
        const int64_t si = slot * I + i;
        r->up[si] = has_up(in) ? stored(in, product(H, x, in->w_up, in->b_up, e * I + i)) : x[i];
        if (has_glu(in)) r->glu[si] = stored(in, product(H, x, in->w_glu, in->b_glu, e * I + i));
        r->hidden[si] = stored(in, reference_activation(in, r->up[si], r->glu[si]).value);
    }
    for (int64_t h = 0; h < H; h++)
        r->output[slot * H + h] = stored(in, product(I, r->hidden + slot * I, in->w_down, in->b_down, e * H + h));
}

/* ---- the whole ---- */

void reference_forward(const reference_input_t *in, reference_result_t *r)
{
    const int64_t H = in->hidden_size, K = in->top_k;
    memset(r->memory, 0, r->memory_size);
    memset(r->losses, 0, sizeof r->losses);
    memset(&r->statistics, 0, sizeof r->statistics);

    gate_forward(in, r);
    for (int64_t t = 0; t < in->tokens; t++) {
        if (t >= in->live_tokens)
            for (int64_t h = 0; h < H; h++) r->y[t * H + h] = NAN;
        for (int64_t s = t * K; s < (t + 1) * K; s++) {
            if (r->expert[s] >= 0) {
                expert_forward(in, r, t, s);
                add_scaled(H, r->weight[s], r->output + s * H, r->y + t * H);
            } else if (isnan(r->weight[s])) {
                for (int64_t h = 0; h < H; h++) r->y[t * H + h] = NAN;
            }
        }
        for (int64_t h = 0; h < H; h++) r->y[t * H + h] = stored(in, r->y[t * H + h]);
    }
}

double reference_total(const reference_input_t *in, const reference_result_t *r)
{
    const int64_t H = in->hidden_size;
    double total = 0;
    for (int64_t t = 0; t < in->tokens; t++)
        if (active(in, t) && !isnan(r->y[t * H])) total += dot(H, in->dy + t * H, r->y + t * H);
    for (int l = 0; l < CUMOE_NUM_LOSSES; l++) total += in->loss_gradient[l] * r->losses[l];
    return total;
}

/* A limit of SWIGLU_CLAMPED that a rounded pre-activation meets is no kink: both sides meet it. */
static double activation_margin(const reference_input_t *in, double up, double glu)
{
    const double limit = in->swiglu_limit;
    if (in->activation == CUMOE_ACTIVATION_RELU) return fabs(up);
    if (in->activation != CUMOE_ACTIVATION_SWIGLU_CLAMPED || in->round) return INFINITY;
    return fmin(fabs(fabs(up) - limit), fabs(glu - limit));
}

double reference_margin(const reference_input_t *in, const reference_result_t *r, int64_t t)
{
    const int64_t E = in->experts, K = in->top_k, I = in->intermediate_size;
    double margin = INFINITY;
    if (!active(in, t)) return margin;
    if (in->gate == CUMOE_GATE_NOISY_TOPK) {
        int64_t previous = kth_excluding(E, r->noisy + t * E, 1, -1);
        for (int64_t k = 2; k <= K + 2 && previous >= 0; k++) {
            const int64_t next = kth_excluding(E, r->noisy + t * E, k, -1);
            if (next >= 0) margin = fmin(margin, r->noisy[t * E + previous] - r->noisy[t * E + next]);
            previous = next;
        }
    }
    for (int64_t s = t * K; s < (t + 1) * K; s++)
        for (int64_t i = s * I; i < (s + 1) * I && r->expert[s] >= 0; i++)
            margin = fmin(margin, activation_margin(in, r->up[i], r->glu[i]));
    return margin;
}
