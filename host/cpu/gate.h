/* What gate.c and gate_backward.c share: blocks of tokens, their logits, the scratch of a thread. */
#ifndef CUMOE_CPU_GATE_H
#define CUMOE_CPU_GATE_H

#include "host/cpu/cpu.h"
#include "host/philox.h"

/* Logits are made for a block of tokens at a time, so that scratch does not grow with T * E. No bit depends on the
 * size of a block: rows are independent, and sums over tokens run in the order of tokens. */
static inline int64_t cumoe__cpu_gate_block(const cumoe_config_t *c, int64_t num_tokens)
{
    const int64_t fitting = ((int64_t)1 << 19) / c->num_experts;
    const int64_t block = fitting < 64 ? 64 : fitting;
    return num_tokens < block ? num_tokens : block;
}

/* Something that chooses top_k of experts for a row of logits: a flat gate, or a level of HIERARCHICAL. */
typedef struct cumoe_cpu_level {
    int32_t experts, top_k;
    uint32_t noise_level; /* in the name of the noise */
    int64_t columns;      /* of a row of logits: clean, and raw = x w_noise^T behind it for noisy kinds */
    bool noise;
    bool smooth; /* noise is on and somebody can lose; otherwise load counts rows and has no gradient */
} cumoe_cpu_level_t;

static inline cumoe_cpu_level_t cumoe__cpu_level(const cumoe_config_t *c, bool training, int32_t experts,
                                                 int32_t top_k, uint32_t noise_level)
{
    const bool noisy = cumoe__is_noisy(c->gate);
    return (cumoe_cpu_level_t){.experts = experts,
                               .top_k = top_k,
                               .noise_level = noise_level,
                               .columns = (int64_t)experts * (noisy ? 2 : 1),
                               .noise = noisy && training,
                               .smooth = noisy && training && top_k < experts};
}

static inline cumoe_cpu_level_t cumoe__cpu_flat_level(const cumoe_config_t *c, bool training)
{
    return cumoe__cpu_level(c, training, c->num_experts, c->top_k, CUMOE_NOISE_FLAT);
}

/* The kinds that have the Switch loss and the z-loss. */
static inline bool cumoe__cpu_has_spread(const cumoe_config_t *c)
{
    return c->gate == CUMOE_GATE_SOFTMAX_TOPK || c->gate == CUMOE_GATE_SIGMOID_TOPK;
}

static inline bool cumoe__cpu_token_counts(const uint8_t *token_mask, int64_t t)
{
    return !token_mask || token_mask[t];
}

/* Counters of a thread. */
enum {
    COUNT_NAN_LOGITS,
    COUNT_NAN_TOKENS,
    COUNT_BAD_INDICES,
    CUMOE_CPU_GATE_COUNTERS = 8 /* a cache line */
};

/* The scratch of a gate stage, forward or backward. */
typedef struct cumoe_cpu_gate_scratch {
    void *logits;      /* [block, E or 2E] gate type; backward: their gradients, in place */
    void *dimportance; /* [E] gate type; backward */
    void *dload;       /* [E] gate type; backward. Of the kinds with a Switch loss: of the probabilities */
    int64_t *sums;     /* [threads][2E] importance and load, or probability, fixed point; forward */
    void *square;      /* [T] gate type, squares of the z-loss; forward */
    int64_t *counters; /* [threads][8] forward; a cache line each */
    void *rows;        /* [threads][4 experts of a row] gate type: std, noisy logits, two free rows */
    float *normals;    /* [threads][experts of a row rounded up to 64] */
    int32_t *count;    /* [E] rows per expert; forward */
    int32_t *counted;  /* [block] tokens that are not padding; backward */
    void *gemm;
    size_t size;
} cumoe_cpu_gate_scratch_t;

/* Experts of the longest row of logits. */
static inline int64_t cumoe__cpu_row_experts(const cumoe_config_t *c)
{
    if (c->gate != CUMOE_GATE_HIERARCHICAL) return c->num_experts;
    const int32_t B = c->num_experts / c->num_groups;
    return B > c->num_groups ? B : c->num_groups;
}

/* What the losses over the batch ask of a token's row, backward. */
typedef struct cumoe_cpu_batch {
    bool load;          /* the load loss has a gradient: scratch->dload */
    bool probabilities; /* the Switch loss has one: scratch->dload */
    double z;           /* gradient of the z-loss by half the square of a token's lse */
} cumoe_cpu_batch_t;

static inline int64_t cumoe__cpu_normals_stride(const cumoe_config_t *c)
{
    return (cumoe__cpu_row_experts(c) + 63) / 64 * 64;
}

cumoe_cpu_gate_scratch_t cumoe__cpu_gate_scratch(const cumoe_context_t *context, int64_t num_tokens, bool backward,
                                                 void *workspace);

/* logits[0..tokens) = x[first ..] w_gate^T, and raw beside them with noise. */
void cumoe__cpu_gate_logits(const cumoe_context_t *context, const cumoe_weights_t *weights, const void *x,
                            int64_t x_stride, int64_t first, int64_t tokens, bool noise,
                            const cumoe_cpu_gate_scratch_t *scratch);

/* eps of eq. 4 for n experts of one token from a quad on, n rounded up to a multiple of 64. */
void cumoe__cpu_row_normals(float *restrict normal, int64_t n, const cumoe_call_t *call, uint32_t stream,
                            int64_t row, uint32_t noise_level, uint32_t quad);

/* CV^2 of fixed-point sums over E experts, in double and two passes; 0 for a zero vector. mean may be NULL. */
double cumoe__cpu_cv2(const int64_t *sums, int64_t E, double unit, double *mean);

#endif
