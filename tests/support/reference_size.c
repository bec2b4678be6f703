/* How large the terms of a gradient are before they cancel. Rounding errors grow with the terms and not with what
 * is left of them: behind a softmax and a squared coefficient of variation little may be left. */
#include "tests/support/reference_formulas.h"

#include <stdlib.h>

static double dot_size(int64_t n, const double *a, const double *b)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += fabs(a[i] * b[i]);
    return sum;
}

static void add_size(int64_t n, double scale, const double *a, double *sum)
{
    for (int64_t i = 0; i < n && scale != 0; i++) sum[i] += fabs(scale * a[i]);
}

/* Of reference_cv_squared_gradient(). One unit more: v is a sum in fixed point, and off by an absolute amount. */
static double cv_squared_size(int64_t n, const double *v, int64_t i)
{
    double sum = 0, squares = 0;
    for (int64_t j = 0; j < n; j++) sum += v[j];
    for (int64_t j = 0; j < n; j++) squares += v[j] * v[j];
    return sum == 0 ? 0 : 2 * (double)n / (sum * sum) * (1 + v[i] + squares / sum);
}

/* What the gradients of tokens share, see reference_gate_backward.c. */
typedef struct sums {
    double *importance, *load, *share; /* [E] */
    double *primary;                   /* [G] */
} sums_t;

static void find_sums(const reference_input_t *in, const reference_result_t *r, sums_t *s)
{
    const int64_t E = in->experts, B = in->gate == CUMOE_GATE_HIERARCHICAL ? group_size(in) : 1;
    const double tokens = (double)r->statistics.tokens;
    for (int64_t e = 0; e < E; e++) {
        s->importance[e] = fabs(in->loss_gradient[CUMOE_LOSS_IMPORTANCE]) * cv_squared_size(E, r->importance, e);
        s->load[e] = fabs(in->loss_gradient[CUMOE_LOSS_LOAD]) * cv_squared_size(E, r->load, e);
        s->share[e] =
            fabs(in->loss_gradient[CUMOE_LOSS_SWITCH]) * (double)E * ((double)r->count[e] / tokens) / tokens;
        if (in->gate != CUMOE_GATE_HIERARCHICAL || r->primary_count[e / B] == 0) continue;
        s->primary[e / B] += s->load[e] * r->level_load[e] / (double)r->primary_count[e / B];
        s->load[e] *= r->primary_load[e / B] / (double)r->primary_count[e / B];
    }
}

/* Of dclean and of the gradient of the standard deviation, for one row. */
typedef struct row_size {
    double *clean, *std; /* [n] */
} row_size_t;

static void add_noisy(const reference_row_t *row, int64_t i, double size, row_size_t sizes)
{
    sizes.clean[i] += size;
    if (row->noise) sizes.std[i] += size * fabs(row->normal[i]);
}

static void weight_sizes(const reference_input_t *in, const reference_result_t *r, int64_t t, const sums_t *sums,
                         double *size)
{
    const int64_t H = in->hidden_size;
    for (int64_t s = r->token_slot[t]; s < r->token_slot[t + 1]; s++, size++)
        *size =
            r->expert[s] < 0 ? 0 : dot_size(H, in->dy + t * H, r->output + s * H) + sums->importance[r->expert[s]];
}

static void softmax_size(const reference_row_t *row, int64_t k, const int32_t *taken, const double *weight,
                         const double *size, row_size_t sizes)
{
    double mean = 0;
    for (int64_t j = 0; j < k; j++)
        if (taken[j] >= 0) mean += weight[j] * size[j];
    for (int64_t j = 0; j < k; j++)
        if (taken[j] >= 0) add_noisy(row, taken[j], weight[j] * (size[j] + mean), sizes);
}

/* An error of the argument z of the density is an error of the density. */
static void load_size(const reference_row_t *row, const double *load, row_size_t sizes)
{
    for (int64_t i = 0; i < row->n; i++) {
        const int64_t k = row->threshold[i];
        if (k < 0) continue;
        const double threshold = row->noisy[k], s = row->std[i], z = (row->clean[i] - threshold) / s;
        const double spread = 1 + fabs(z) * (fabs(row->clean[i]) + fabs(threshold)) / s;
        const double size = load[i] * normal_density(z) / s * spread;
        sizes.clean[i] += size;
        sizes.std[i] += size * (1 + fabs(z));
        add_noisy(row, k, size, sizes);
    }
}

static void logits_size(const reference_input_t *in, const reference_row_t *row, row_size_t sizes, double *dx_size)
{
    const int64_t H = in->hidden_size;
    for (int64_t i = 0; i < row->n; i++) {
        add_size(H, sizes.clean[i], row->x, row->dw_gate_size + i * H);
        add_size(H, sizes.clean[i], row->w_gate + i * H, dx_size);
        if (!row->noise || sizes.std[i] == 0) continue;
        const double raw = sizes.std[i] * sigmoid(dot(H, row->x, row->w_noise + i * H));
        add_size(H, raw, row->x, row->dw_noise_size + i * H);
        add_size(H, raw, row->w_noise + i * H, dx_size);
    }
}

/* 1 - sigmoid is off by a unit of 1, and log_sum by one of its two terms. */
static void all_logits_size(const reference_input_t *in, const reference_result_t *r, int64_t t, const sums_t *sums,
                            const double *size, row_size_t sizes)
{
    const int64_t E = in->experts, first = t * in->top_k;
    const double tokens = (double)r->statistics.tokens, share_mean = dot(E, r->share + t * E, sums->share);
    const bool sigmoids = in->gate == CUMOE_GATE_SIGMOID_TOPK;
    double mean = 0, max = 0;
    for (int64_t j = 0; j < in->top_k; j++)
        if (r->expert[first + j] >= 0) mean += r->weight[first + j] * size[j];
    for (int64_t j = 0; j < in->top_k; j++)
        if (r->expert[first + j] >= 0) sizes.clean[r->expert[first + j]] += r->weight[first + j] * (size[j] + mean);
    for (int64_t e = 0; e < E; e++)
        if (isfinite(r->clean[t * E + e])) max = fmax(max, fabs(r->clean[t * E + e]));
    for (int64_t e = 0; e < E; e++) {
        const double softmax = r->softmax[t * E + e];
        if (!sigmoids && !in->renormalize) sizes.clean[e] += softmax * mean;
        sizes.clean[e] += r->share[t * E + e] * (sums->share[e] + share_mean);
        sizes.clean[e] +=
            2 * fabs(in->loss_gradient[CUMOE_LOSS_Z]) / tokens * (2 * max + fabs(r->log_sum[t])) * softmax;
    }
}

static void flat_size(const reference_input_t *in, const reference_result_t *r, int64_t t, const sums_t *sums,
                      double *scratch)
{
    const int64_t first = r->token_slot[t];
    const reference_row_t row = reference_flat_row(in, r, t);
    const row_size_t sizes = {scratch, scratch + in->experts};
    double *size = scratch + 2 * in->experts;
    weight_sizes(in, r, t, sums, size);
    if (of_all_logits(in))
        all_logits_size(in, r, t, sums, size, sizes);
    else
        softmax_size(&row, r->token_slot[t + 1] - first, r->expert + first, r->weight + first, size, sizes);
    if (smooth(&row)) load_size(&row, sums->load, sizes);
    logits_size(in, &row, sizes, r->dx_gate_size + t * in->hidden_size);
}

static void inner_size(const reference_input_t *in, const reference_result_t *r, int64_t t, int64_t j1,
                       const sums_t *sums, const double *size, double *primary_size, double *scratch)
{
    const int64_t K1 = in->top_k_groups, K2 = top_k_inside(in), B = group_size(in);
    const int64_t group = r->primary_group[t * K1 + j1], first = t * in->top_k + j1 * K2;
    int32_t inside[64];
    double scaled[64];
    *primary_size = 0;
    if (group < 0) return;
    for (int64_t i = 0; i < 2 * B; i++) scratch[i] = 0;
    for (int64_t j2 = 0; j2 < K2; j2++) {
        const int32_t e = r->expert[first + j2];
        inside[j2] = e < 0 ? -1 : e - (int32_t)(group * B);
        if (e >= 0) *primary_size += r->local_weight[first + j2] * size[j1 * K2 + j2];
        scaled[j2] = r->primary_weight[t * K1 + j1] * size[j1 * K2 + j2];
    }
    const reference_row_t row = reference_inner_row(in, r, t, group);
    const row_size_t sizes = {scratch, scratch + B};
    softmax_size(&row, K2, inside, r->local_weight + first, scaled, sizes);
    if (smooth(&row)) load_size(&row, sums->load + group * B, sizes);
    logits_size(in, &row, sizes, r->dx_gate_size + t * in->hidden_size);
}

static void hierarchical_size(const reference_input_t *in, const reference_result_t *r, int64_t t,
                              const sums_t *sums, double *scratch)
{
    const int64_t K1 = in->top_k_groups, G = in->groups;
    double size[64], primary_size[64];
    weight_sizes(in, r, t, sums, size);
    for (int64_t j1 = 0; j1 < K1; j1++) inner_size(in, r, t, j1, sums, size, &primary_size[j1], scratch);
    for (int64_t i = 0; i < 2 * G; i++) scratch[i] = 0;
    const reference_row_t row = reference_primary_row(in, r, t);
    const row_size_t sizes = {scratch, scratch + G};
    softmax_size(&row, K1, r->primary_group + t * K1, r->primary_weight + t * K1, primary_size, sizes);
    if (smooth(&row)) load_size(&row, sums->primary, sizes);
    logits_size(in, &row, sizes, r->dx_gate_size + t * in->hidden_size);
}

void reference_sizes(const reference_input_t *in, reference_result_t *r)
{
    const int64_t H = in->hidden_size, E = in->experts, scratch_size = 3 * E + 1;
    double *memory = calloc((size_t)(3 * E + in->groups + scratch_size), sizeof *memory);
    double *scratch = memory + 3 * E + in->groups;
    sums_t sums = {memory, memory + E, memory + 2 * E, memory + 3 * E};
    if (memory) find_sums(in, r, &sums);
    for (int64_t t = 0; t < in->tokens && memory; t++) {
        if (!active(in, t)) continue;
        for (int64_t i = 0; i < scratch_size; i++) scratch[i] = 0;
        if (in->gate == CUMOE_GATE_HIERARCHICAL)
            hierarchical_size(in, r, t, &sums, scratch);
        else if (in->gate != CUMOE_GATE_EXTERNAL)
            flat_size(in, r, t, &sums, scratch);
        add_size(H, 1, r->dx_gate_size + t * H, r->dx_size + t * H);
        for (int64_t s = r->token_slot[t]; s < r->token_slot[t + 1]; s++)
            if (r->expert[s] >= 0) add_size(H, 1, r->drows + s * H, r->dx_size + t * H);
    }
    free(memory);
}
