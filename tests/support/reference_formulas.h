/* Small formulas that both halves of the reference use. */
#ifndef CUMOE_TESTS_REFERENCE_FORMULAS_H
#define CUMOE_TESTS_REFERENCE_FORMULAS_H

#include "tests/support/reference.h"

#include <math.h>

static inline double dot(int64_t n, const double *a, const double *b)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

static inline void add_scaled(int64_t n, double scale, const double *a, double *sum)
{
    for (int64_t i = 0; i < n; i++) sum[i] += scale * a[i];
}

static inline double sigmoid(double z)
{
    return 1 / (1 + exp(-z));
}

static inline double softplus(double z)
{
    return z > 0 ? z + log1p(exp(-z)) : log1p(exp(z));
}

static inline double normal_cdf(double z)
{
    return 0.5 * erfc(-z / sqrt(2));
}

static inline double normal_density(double z)
{
    return exp(-0.5 * z * z) / sqrt(2 * acos(-1));
}

static inline bool active(const reference_input_t *in, int64_t t)
{
    return t < in->live_tokens && (!in->token_mask || in->token_mask[t]);
}

static inline bool noise_on(const reference_input_t *in)
{
    return in->gate == CUMOE_GATE_NOISY_TOPK && in->training;
}

static inline bool smooth_load(const reference_input_t *in)
{
    return noise_on(in) && in->top_k < in->experts;
}

static inline bool refused(double v)
{
    return isnan(v) || v == (double)INFINITY;
}

static inline bool has_up(const reference_input_t *in)
{
    return in->activation != CUMOE_ACTIVATION_IDENTITY;
}

static inline bool has_glu(const reference_input_t *in)
{
    return in->activation == CUMOE_ACTIVATION_SWIGLU || in->activation == CUMOE_ACTIVATION_GEGLU ||
           in->activation == CUMOE_ACTIVATION_SWIGLU_CLAMPED;
}

/* As an array of the token type holds it. */
static inline double stored(const reference_input_t *in, double value)
{
    return in->round ? in->round(value) : value;
}

#endif
