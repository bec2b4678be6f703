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

static void add_noisy(const reference_input_t *in, int64_t t, int64_t e, double size, double *clean, double *std)
{
    clean[e] += size;
    if (noise_on(in)) std[e] += size * fabs(in->noise[t * in->experts + e]);
}

static double weight_size(const reference_input_t *in, const reference_result_t *r, int64_t t, int64_t slot)
{
    const int64_t H = in->hidden_size;
    return dot_size(H, in->dy + t * H, r->output + slot * H) +
           fabs(in->loss_gradient[CUMOE_LOSS_IMPORTANCE]) *
               cv_squared_size(in->experts, r->importance, r->expert[slot]);
}

static void softmax_size(const reference_input_t *in, const reference_result_t *r, int64_t t, double *clean,
                         double *std)
{
    const int64_t first = t * in->top_k, end = first + in->top_k;
    double mean = 0;
    for (int64_t s = first; s < end; s++)
        if (r->expert[s] >= 0) mean += r->weight[s] * weight_size(in, r, t, s);
    for (int64_t s = first; s < end; s++)
        if (r->expert[s] >= 0)
            add_noisy(in, t, r->expert[s], r->weight[s] * (weight_size(in, r, t, s) + mean), clean, std);
}

/* An error of the argument z of the density is an error of the density. */
static void load_size(const reference_input_t *in, const reference_result_t *r, int64_t t, double *clean,
                      double *std)
{
    const int64_t E = in->experts;
    for (int64_t i = 0; i < E; i++) {
        const int64_t te = t * E + i, k = r->threshold[te];
        if (k < 0) continue;
        const double threshold = r->noisy[t * E + k], s = r->std[te], z = (r->clean[te] - threshold) / s;
        const double spread = 1 + fabs(z) * (fabs(r->clean[te]) + fabs(threshold)) / s;
        const double size = fabs(in->loss_gradient[CUMOE_LOSS_LOAD]) * cv_squared_size(E, r->load, i) *
                            normal_density(z) / s * spread;
        clean[i] += size;
        std[i] += size * (1 + fabs(z));
        add_noisy(in, t, k, size, clean, std);
    }
}

static void gate_size(const reference_input_t *in, reference_result_t *r, int64_t t, double *clean, double *std)
{
    const int64_t H = in->hidden_size, E = in->experts;
    const double *x = in->x + t * H;
    for (int64_t e = 0; e < E; e++) clean[e] = std[e] = 0;
    softmax_size(in, r, t, clean, std);
    if (smooth_load(in)) load_size(in, r, t, clean, std);
    for (int64_t e = 0; e < E; e++) {
        add_size(H, clean[e], x, r->dw_gate_size + e * H);
        add_size(H, clean[e], in->w_gate + e * H, r->dx_gate_size + t * H);
        if (!noise_on(in) || std[e] == 0) continue;
        const double raw = std[e] * sigmoid(dot(H, x, in->w_noise + e * H));
        add_size(H, raw, x, r->dw_noise_size + e * H);
        add_size(H, raw, in->w_noise + e * H, r->dx_gate_size + t * H);
    }
}

void reference_sizes(const reference_input_t *in, reference_result_t *r)
{
    const int64_t H = in->hidden_size, E = in->experts, K = in->top_k;
    double *clean = calloc((size_t)(2 * E), sizeof *clean);
    for (int64_t t = 0; t < in->tokens && clean; t++) {
        if (!active(in, t)) continue;
        if (in->gate != CUMOE_GATE_EXTERNAL) gate_size(in, r, t, clean, clean + E);
        add_size(H, 1, r->dx_gate_size + t * H, r->dx_size + t * H);
        for (int64_t s = t * K; s < (t + 1) * K; s++)
            if (r->expert[s] >= 0) add_size(H, 1, r->drows + s * H, r->dx_size + t * H);
    }
    free(clean);
}
