/* What the files of the gate share: levels, blocks of tokens and their logits, the scratch of a call.
 *
 *   gate.c            the stage                     gate_backward.c   the same backward
 *   gate_flat.c       flat gates, both ways         gate_groups.c     HIERARCHICAL, both ways
 *   gate_balanced.c   BALANCED; backward it is flat
 *   gate_sums.c       sums over the batch           gate_scratch.c    where the scratch of a call stands */
#ifndef CUMOE_CPU_GATE_H
#define CUMOE_CPU_GATE_H

#include "host/cpu/cpu.h"
#include "host/philox.h"

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

static inline bool cumoe__cpu_token_counts(const uint8_t *token_mask, int64_t t)
{
    return !token_mask || token_mask[t];
}

/* What the sums of routing count in. */
static inline double cumoe__cpu_fixed_unit(const cumoe_config_t *c)
{
    return 1.0 / (double)((int64_t)1 << CUMOE_FIXED_POINT_BITS(c->dtype));
}

/* Experts of a row of logits that w_gate, or w_gate_primary, makes of a token. */
static inline int32_t cumoe__cpu_first_experts(const cumoe_config_t *c)
{
    return c->gate == CUMOE_GATE_HIERARCHICAL ? c->num_groups : c->num_experts;
}

/* Logits are made for a block of tokens at a time, so that scratch does not grow with T * E. No bit depends on the
 * size of a block: rows are independent, and sums over tokens run in the order of tokens. */
static inline int64_t cumoe__cpu_gate_block(const cumoe_config_t *c, int64_t num_tokens)
{
    const int64_t fitting = ((int64_t)1 << 19) / cumoe__cpu_first_experts(c);
    const int64_t block = fitting < 64 ? 64 : fitting;
    return num_tokens < block ? num_tokens : block;
}

/* Counters of a thread. */
enum {
    COUNT_NAN_LOGITS,
    COUNT_NAN_TOKENS,
    COUNT_BAD_INDICES,
    CUMOE_CPU_GATE_COUNTERS = 8 /* a cache line */
};

/* HIERARCHICAL: the choices of all tokens, c = t * K1 + j, as rows sorted by group. */
typedef struct cumoe_cpu_groups {
    int32_t *offset;     /* [G + 1] */
    int32_t *row_token;  /* [T * K1] */
    int32_t *row_choice; /* [T * K1] */
    int32_t *choice_row; /* [T * K1] -1 = none */
    void *logits;        /* [T * K1, B or 2B] gate type; backward: their gradients, in place */
    void *dprimary;      /* [T * K1] gate type, gradients of primary_weight; backward */
    void *dload;         /* [G] gate type, of primary_load; backward */
    void *piece;         /* [T * K1, piece_columns] gate type, parts of dx_gate; backward */
    int64_t piece_columns;
} cumoe_cpu_groups_t;

/* The scratch of a gate stage, forward or backward. */
typedef struct cumoe_cpu_gate_scratch {
    void *logits;      /* [block, first experts, twice with noise] gate type; backward: their gradients, in place */
    double *numbers;   /* [E] sums of the batch as numbers, one kind after the other */
    void *dimportance; /* [E] gate type; backward */
    void *dload;       /* [E] gate type; backward. Of the kinds with a Switch loss: of the probabilities */
    int64_t *sums;     /* [threads][2E] importance and load, or probability, fixed point; forward */
    void *square;      /* [T] gate type, squares of the z-loss; forward */
    double *square_sum; /* [1] of them */
    int64_t *counters;  /* [threads][8] forward; a cache line each */
    void *rows;         /* [threads][4 row_experts] gate type: std, noisy logits, two free rows */
    float *normals;     /* [threads][row_experts rounded up to 64] */
    int32_t *count;     /* [E] rows per expert; forward */
    int32_t *counted;   /* [block] tokens that are not padding; backward */

    /* BALANCED, forward. */
    void *gates;     /* [E, T] gate type: softmax(c); -1 = can not be taken */
    void *cut;       /* [E] gate type: gates above it are taken, ... */
    int32_t *last;   /* [E] ... and those equal to it of tokens up to this one */
    uint8_t *is_nan; /* [T] no usable logit because of NaN or +Inf */

    cumoe_cpu_groups_t groups;
    void *gemm;
    int64_t row_experts; /* of the longest row of logits */
    size_t size;
} cumoe_cpu_gate_scratch_t;

static inline int64_t cumoe__cpu_normals_stride(int64_t row_experts)
{
    return (row_experts + 63) / 64 * 64;
}

cumoe_cpu_gate_scratch_t cumoe__cpu_gate_scratch(const cumoe_context_t *context, int64_t num_tokens, bool backward,
                                                 void *workspace);

/* What a batch decides beside the routing; forward. */
typedef struct cumoe_cpu_batch_result {
    double threshold_loss;
    int64_t dropped_rows;
} cumoe_cpu_batch_result_t;

/* What the losses over the batch ask of a token's row; backward. */
typedef struct cumoe_cpu_batch {
    bool load;          /* the load loss has a gradient: scratch->dload */
    bool probabilities; /* the Switch loss has one: scratch->dload */
    double z;           /* gradient of the z-loss by half the square of a token's lse */
} cumoe_cpu_batch_t;

/* A flat gate of any kind: choices, weights, and their parts of the sums of every thread. For the primary gate of
 * HIERARCHICAL config, weights and routing are made to look like those of a flat one. */
void cumoe__cpu_flat_forward(const cumoe_config_t *c, const cumoe_gate_args_t *args, const cumoe_cpu_level_t *level,
                             const cumoe_cpu_gate_scratch_t *scratch);
/* scratch->count, and routing.importance and load, from what the threads counted. */
void cumoe__cpu_reduce_sums(const cumoe_config_t *c, const cumoe_gate_args_t *args, bool smooth,
                            const cumoe_cpu_gate_scratch_t *scratch);
void cumoe__cpu_clear_sums(const cumoe_config_t *c, const cumoe_cpu_gate_scratch_t *scratch);

void cumoe__cpu_flat_backward(const cumoe_config_t *c, const cumoe_gate_backward_args_t *args,
                              const cumoe_cpu_level_t *level, const cumoe_cpu_batch_t *batch,
                              const cumoe_cpu_gate_scratch_t *scratch);

void cumoe__cpu_groups_forward(const cumoe_config_t *c, const cumoe_gate_args_t *args,
                               const cumoe_cpu_gate_scratch_t *scratch);
void cumoe__cpu_groups_backward(const cumoe_config_t *c, const cumoe_gate_backward_args_t *args,
                                const cumoe_cpu_gate_scratch_t *scratch);

cumoe_cpu_batch_result_t cumoe__cpu_balanced_forward(const cumoe_config_t *c, const cumoe_gate_args_t *args,
                                                     const cumoe_cpu_gate_scratch_t *scratch);

/* logits[0..tokens) = x[first ..] w_gate^T, and raw beside them with noise. */
void cumoe__cpu_gate_logits(const cumoe_config_t *c, const cumoe_cpu_level_t *level, const cumoe_weights_t *weights,
                            const void *x, int64_t x_stride, int64_t first, int64_t tokens,
                            const cumoe_cpu_gate_scratch_t *scratch);

/* eps of eq. 4 for n experts of one token from a quad on, n rounded up to a multiple of 64. */
void cumoe__cpu_row_normals(float *restrict normal, int64_t n, const cumoe_call_t *call, uint32_t stream,
                            int64_t row, uint32_t noise_level, uint32_t quad);

/* CV^2 of n values, in double and two passes; 0 for a zero vector. mean may be NULL. */
double cumoe__cpu_cv2(const double *values, int64_t n, double *mean);

/* The loads of the experts, [E], as the load loss sees them: with groups by eq. 14. */
void cumoe__cpu_loads(const cumoe_config_t *c, const cumoe_routing_t *routing, double *loads);

#endif
