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
    return (in->gate == CUMOE_GATE_NOISY_TOPK || in->gate == CUMOE_GATE_HIERARCHICAL) && in->training;
}

/* Softmax or sigmoid of all logits, of which K are taken. */
static inline bool of_all_logits(const reference_input_t *in)
{
    return in->gate == CUMOE_GATE_SOFTMAX_TOPK || in->gate == CUMOE_GATE_SIGMOID_TOPK;
}

/* B, and K2. */
static inline int64_t group_size(const reference_input_t *in)
{
    return in->experts / in->groups;
}

static inline int64_t top_k_inside(const reference_input_t *in)
{
    return in->top_k / in->top_k_groups;
}

static inline bool refused(double v)
{
    return isnan(v) || v == (double)INFINITY;
}

/* One token at one level of a gate: n logits, of which k are taken. */
typedef struct reference_row {
    int64_t n, k;
    bool noise;                           /* is on */
    const double *x, *w_gate, *w_noise;   /* [H], [n, H], [n, H] */
    const double *normal;                 /* [n] */
    const double *bias;                   /* [n] of scores, or NULL; SIGMOID_TOPK */
    double *clean, *std, *noisy;          /* [n] */
    double *probability;                  /* [n] */
    int32_t *threshold;                   /* [n] */
    double *dclean, *draw;                /* [n] */
    double *dw_gate, *dw_noise;           /* [n, H] */
    double *dw_gate_size, *dw_noise_size; /* [n, H] */
} reference_row_t;

/* The row of a flat gate; of the groups; of the experts inside a group. */
reference_row_t reference_flat_row(const reference_input_t *in, const reference_result_t *r, int64_t t);
reference_row_t reference_primary_row(const reference_input_t *in, const reference_result_t *r, int64_t t);
reference_row_t reference_inner_row(const reference_input_t *in, const reference_result_t *r, int64_t t,
                                    int64_t group);

/* P(x, i) hangs on the logits. */
static inline bool smooth(const reference_row_t *row)
{
    return row->noise && row->k < row->n;
}

/* The k-th largest (k from 1) of v[n] without component out; the lowest index first among equals; -1 = there are
 * fewer than k that are not -Inf. */
int64_t reference_kth_excluding(int64_t n, const double *v, int64_t k, int64_t out);

/* The logits of a row; NaN and +Inf become -Inf in noisy and are counted. */
int64_t reference_logits(const reference_input_t *in, const reference_row_t *row);

/* softmax and log_sum of token t over its usable logits. */
void reference_softmax(const reference_input_t *in, reference_result_t *r, int64_t t);

/* The gate of all tokens, up to weights, importance, load and losses. */
void reference_gate_forward(const reference_input_t *in, reference_result_t *r);
void reference_balanced_forward(const reference_input_t *in, reference_result_t *r);

/* Steps of the way back, each added to what is there: through the softmax over what was taken; through P(x, i);
 * from the logits to the matrices and to x. dstd[n] is the gradient of the standard deviation. */
void reference_softmax_backward(const reference_row_t *row, const int32_t *taken, const double *weight,
                                const double *dweight, double *dstd);
void reference_load_backward(const reference_row_t *row, const double *dload, double *dstd);
void reference_logits_backward(const reference_input_t *in, const reference_row_t *row, const double *dstd,
                               double *dx);

/* From dweight and the losses to dw_gate and its like, and dx_gate. */
void reference_gate_backward(const reference_input_t *in, reference_result_t *r);

static inline bool has_up(const reference_input_t *in)
{
    return in->activation != CUMOE_ACTIVATION_IDENTITY;
}

static inline bool has_glu(const reference_input_t *in)
{
    return in->activation == CUMOE_ACTIVATION_SWIGLU || in->activation == CUMOE_ACTIVATION_GEGLU ||
           in->activation == CUMOE_ACTIVATION_SWIGLU_CLAMPED || in->activation == CUMOE_ACTIVATION_GEGLU_TANH;
}

/* As an array of the token type holds it. */
static inline double stored(const reference_input_t *in, double value)
{
    return in->round ? in->round(value) : value;
}

#endif
