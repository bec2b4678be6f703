/* What gate.c and gate_backward.c share: blocks of tokens, their logits, the scratch of a thread. */
#ifndef CUMOE_CPU_GATE_H
#define CUMOE_CPU_GATE_H

#include "host/cpu/cpu.h"

/* Logits are made for a block of tokens at a time, so that scratch does not grow with T * E. No bit depends on the
 * size of a block: rows are independent, and sums over tokens run in the order of tokens. */
static inline int64_t cumoe__cpu_gate_block(const cumoe_config_t *c, int64_t num_tokens)
{
    const int64_t fitting = ((int64_t)1 << 19) / c->num_experts;
    const int64_t block = fitting < 64 ? 64 : fitting;
    return num_tokens < block ? num_tokens : block;
}

/* Columns of a block's logits: clean, and raw = x w_noise^T behind it for noisy kinds. */
static inline int64_t cumoe__cpu_gate_columns(const cumoe_config_t *c)
{
    return (int64_t)c->num_experts * (cumoe__is_noisy(c->gate) ? 2 : 1);
}

/* Smooth loads exist where noise is on and somebody can lose; otherwise load counts rows and has no gradient. */
static inline bool cumoe__cpu_smooth_load(const cumoe_config_t *c, bool training)
{
    return cumoe__is_noisy(c->gate) && training && c->top_k < c->num_experts;
}

static inline bool cumoe__cpu_token_counts(const uint8_t *token_mask, int64_t t)
{
    return !token_mask || token_mask[t];
}

/* The scratch of a gate stage, forward or backward. */
typedef struct cumoe_cpu_gate_scratch {
    void *logits;      /* [block, E or 2E] gate type; backward: their gradients, in place */
    void *dimportance; /* [E] gate type; backward */
    void *dload;       /* [E] gate type; backward */
    int64_t *sums;     /* [threads][2E] importance and load, fixed point; forward */
    int64_t *counters; /* [threads][8] forward; a cache line each */
    void *rows;        /* [threads][4E] gate type: std, noisy logits, two free rows */
    float *normals;    /* [threads][E rounded up to 64] */
    int32_t *count;    /* [E] rows per expert; forward */
    int32_t *counted;  /* [block] tokens that are not padding; backward */
    void *gemm;
    size_t size;
} cumoe_cpu_gate_scratch_t;

static inline int64_t cumoe__cpu_normals_stride(const cumoe_config_t *c)
{
    return ((int64_t)c->num_experts + 63) / 64 * 64;
}

cumoe_cpu_gate_scratch_t cumoe__cpu_gate_scratch(const cumoe_context_t *context, int64_t num_tokens, bool backward,
                                                 void *workspace);

/* logits[0..tokens) = x[first ..] w_gate^T, and raw beside them with noise. */
void cumoe__cpu_gate_logits(const cumoe_context_t *context, const cumoe_weights_t *weights, const void *x,
                            int64_t x_stride, int64_t first, int64_t tokens, bool noise,
                            const cumoe_cpu_gate_scratch_t *scratch);

/* eps of eq. 4 for experts 0..E-1 of one token, rounded up to a multiple of 64. */
void cumoe__cpu_row_normals(float *restrict normal, int64_t E, uint64_t seed, uint32_t stream, uint64_t offset,
                            int64_t token);

/* CV^2 of fixed-point sums over E experts, in double and two passes; 0 for a zero vector. mean may be NULL. */
double cumoe__cpu_cv2(const int64_t *sums, int64_t E, double unit, double *mean);

#endif
