/* Types shared by the whole interface, and the letters of every shape comment:
 *
 *   T  tokens in a call                     H  hidden_size, model width
 *   E  experts, all ranks together          I  intermediate_size, width inside an expert
 *   K  experts per token (top_k)            G  groups of the hierarchical gate
 *   W  ranks that share the experts (1 without expert parallelism)
 *   R  routed rows, at most T*K             (dense softmax: K = E; BALANCED: cumoe_layer_max_rows())
 *   S  slots, one for each choice: T*K, token t's j-th choice is slot t*K + j (BALANCED: as that function says)
 *
 * Arrays are row-major, the last index contiguous. Every data pointer is a device pointer (host memory on
 * the CPU backend), 16-byte aligned where its comment does not say otherwise. Strides count elements.
 * In argument structs zero means "default": write {.struct_size = sizeof args, ...} and name the rest. */
#ifndef CUMOE_TYPES_H
#define CUMOE_TYPES_H

#include <stddef.h>
#include <stdint.h>

typedef struct CUstream_st *cumoe_stream_t; /* the same type as cudaStream_t; NULL on the CPU */
typedef struct cumoe_handle cumoe_handle_t;
typedef struct cumoe_layer cumoe_layer_t;
typedef struct cumoe_ep cumoe_ep_t;                   /* a group of ranks for expert parallelism: parallel.h */
typedef struct cumoe_ep_traffic_plan cumoe_ep_plan_t; /* the plan of a call's traffic between ranks */

typedef enum cumoe_dtype {
    CUMOE_DTYPE_DEFAULT = 0, /* what the field's comment says */
    CUMOE_F64 = 1,           /* for gradient checks; slow on GPUs */
    CUMOE_F32 = 2,
    CUMOE_BF16 = 3,
    CUMOE_F16 = 4,
    CUMOE_I32 = 5,
    CUMOE_I64 = 6
} cumoe_dtype_t;

/* How products of F32 matrices are computed. Sums are F32 (F64 for F64) in either case. */
typedef enum cumoe_compute {
    CUMOE_COMPUTE_EXACT = 0, /* F32 products */
    CUMOE_COMPUTE_TF32 = 1   /* factors rounded to 10 mantissa bits; CUDA only */
} cumoe_compute_t;

/* How a token chooses its experts, and with which weights. c = x w_gate^T are the clean logits. Ties go to the
 * lowest expert. NaN and +Inf never win, and -Inf is masked: such logits are not usable, and take part in no sum.
 */
typedef enum cumoe_gate_kind {
    CUMOE_GATE_NOISY_TOPK = 0,   /* softmax over the K largest of c + noise (paper eq. 3-5) */
    CUMOE_GATE_SOFTMAX = 1,      /* dense: every expert, softmax(c) (eq. 2) */
    CUMOE_GATE_EXTERNAL = 2,     /* the caller gives indices and weights */
    CUMOE_GATE_HIERARCHICAL = 3, /* two levels of noisy top-k (App. B): K1 of G groups, K2 of the E/G experts of
                                    each; the weight is the product of both. Expert j of group i is i * (E/G) + j */
    CUMOE_GATE_BALANCED = 4,     /* strictly balanced (App. F): g = softmax(c); in training every expert takes the m
                                    tokens with its largest g, m = max(1, K * tokens / E) rounded down, ties to the
                                    lowest token; else the tokens whose g is above its threshold; weights are g over
                                    the sum of the g of the experts that took the token. A token that none took
                                    gives 0 */
    CUMOE_GATE_SOFTMAX_TOPK = 5, /* the K largest of p = softmax(c); weight p, or, renormalised, p over their sum */
    CUMOE_GATE_SIGMOID_TOPK = 6  /* the K largest of s + gate_bias, s = sigmoid(c); weight s, or, renormalised, s
                                   over (the sum of the K + 1e-20), as in DeepSeek-V3 */
} cumoe_gate_kind_t;

/* Inside an expert: hidden = act(x w_up^T), or act(x w_glu^T) * (x w_up^T) for the gated linear units. Backward, a
 * derivative of 0 lets nothing through, not even Inf or NaN. */
typedef enum cumoe_activation {
    CUMOE_ACTIVATION_RELU = 0,           /* max(z, 0): the paper's */
    CUMOE_ACTIVATION_SWIGLU = 1,         /* silu(glu) * up */
    CUMOE_ACTIVATION_GELU = 2,           /* z Phi(z) */
    CUMOE_ACTIVATION_GELU_TANH = 3,      /* the tanh approximation of gelu */
    CUMOE_ACTIVATION_SILU = 4,           /* z sigmoid(z) */
    CUMOE_ACTIVATION_RELU2 = 5,          /* max(z, 0)^2 */
    CUMOE_ACTIVATION_GEGLU = 6,          /* gelu(glu) * up */
    CUMOE_ACTIVATION_SWIGLU_CLAMPED = 7, /* g sigmoid(alpha g) * (u + offset), g = min(glu, limit),
                                            u = clamp(up, -limit, limit) */
    CUMOE_ACTIVATION_IDENTITY = 8,       /* one matrix: w_down [E, H, H], no w_up; I = H */
    CUMOE_ACTIVATION_GEGLU_TANH = 9      /* gelu_tanh(glu) * up */
} cumoe_activation_t;

#define CUMOE_NUM_ACTIVATIONS 10

/* Where the glu half stands beside the up half. */
typedef enum cumoe_glu_placement {
    CUMOE_GLU_SEPARATE = 0,   /* w_up [E, I, H] and w_glu [E, I, H]; also for activations without glu */
    CUMOE_GLU_FIRST = 1,      /* w_up [E, 2I, H]: rows 0..I-1 are glu, I..2I-1 up */
    CUMOE_GLU_LAST = 2,       /* w_up [E, 2I, H]: rows 0..I-1 are up, I..2I-1 glu */
    CUMOE_GLU_INTERLEAVED = 3 /* w_up [E, 2I, H]: rows 2i are glu, 2i+1 up */
} cumoe_glu_placement_t;

/* The losses of a layer, as indices into arrays of CUMOE_NUM_LOSSES numbers. */
typedef enum cumoe_loss {
    CUMOE_LOSS_IMPORTANCE = 0, /* CV^2 of the sums of gate values per expert (eq. 6-7) */
    CUMOE_LOSS_LOAD = 1,   /* CV^2 of the smooth loads (App. A, eq. 8-11); where these are rows per expert, a number
                              without gradient */
    CUMOE_LOSS_SWITCH = 2, /* E sum_e f_e p_e, f = rows of e / tokens, p = mean over tokens of softmax(c)_e, or of
                              sigmoid(c)_e over its sum; SOFTMAX_TOPK, SIGMOID_TOPK */
    CUMOE_LOSS_Z = 3,      /* mean over tokens of log(sum_e exp(c_e))^2; SOFTMAX_TOPK, SIGMOID_TOPK */
    CUMOE_LOSS_THRESHOLD = 4, /* L_batchwise of BALANCED in training (eq. 20); its gradient goes to the thresholds
                                 alone */
    CUMOE_NUM_LOSSES = 8      /* room in every array of losses; entries 5..7 are 0 */
} cumoe_loss_t;

/* The four numbers of a call that may change between replays of a captured graph. In device memory when
 * given by pointer; a tensor of four int64 has the same layout. */
typedef struct cumoe_call {
    uint64_t seed;       /* key of the noise, together with config.noise_stream */
    uint64_t offset;     /* counter of the noise: another value in every step and every time step */
    int64_t first_token; /* global index of row 0, 0..2^42 - T: the noise of a token hangs on it alone */
    int64_t live_tokens; /* rows to compute, 0..T: rows of x beyond are not read, rows of y and dx beyond not
                            written. A value outside 0..T is taken as the nearer of the two. */
} cumoe_call_t;

/* What a forward call counted; device memory, read it when you like. Tokens are the live, unmasked ones. */
typedef struct cumoe_statistics {
    int64_t tokens;             /* routed or not */
    int64_t rows;               /* (token, expert) pairs that reached an expert */
    int64_t nan_logits;         /* logits that were NaN or +Inf; they never win */
    int64_t nan_tokens;         /* tokens without a usable logit because of NaN or +Inf: y is NaN */
    int64_t bad_indices;        /* external indices below -1 or above E; not routed, like -1 and E */
    int64_t dropped_rows;       /* BALANCED: rows that config.max_rows had no room for */
    int64_t exchange_overflow;  /* rows of this rank's tokens beyond the capacity of the exchange between ranks */
    int64_t max_count;          /* rows of the busiest expert */
    double cv_importance;       /* std / mean over experts (population) of importance, not squared */
    double cv_load;             /* the same of load */
    double max_over_mean_load;  /* of load (paper table 6); 0 if all loads are 0 */
    double max_over_mean_count; /* of the rows per expert */
    int64_t reserved[4];        /* 0 */
} cumoe_statistics_t;

#endif
