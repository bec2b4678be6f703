/* The second rung: the stages that the layer is made of, one by one. EXPERIMENTAL: shapes of structs may change
 * until version 0.2.
 *
 * forward    gate -> permute -> up -> down -> combine
 * backward   down_backward -> gate_backward, up_backward -> permute_backward
 *
 * The backward pass of combine is inside down_backward (dy is gathered by token; the experts' outputs are never
 * needed again), that of the gathering in permute_backward. A program with a gate of its own starts at permute;
 * tests and benchmarks call each stage alone. Buffers between stages are the caller's, in the shapes given.
 * Workspaces of stages are 64-byte aligned. Every sum is taken in the gate type and rounded where it is stored in
 * the token type; z is rounded before it is activated, so that it is the same whether kept or computed again.
 * Outputs share no byte with inputs, but for the two pairs that say so. These structs are also what a backend
 * implements (host/backend.h): one set, no translation.
 *
 * Every stage: enqueued on the stream. Statuses:
 *   CUMOE_INVALID_ARGUMENT  a required pointer is NULL or misaligned, a number out of range
 *   CUMOE_BUFFER_TOO_SMALL  workspace_size is below cumoe_stage_workspace_size()
 *   CUMOE_CUDA_ERROR        a launch failed
 *   Allocates: no.  Synchronizes: no.  Capturable: yes.  Thread-safe: yes, with distinct buffers. */
#ifndef CUMOE_STAGES_H
#define CUMOE_STAGES_H

#include <cumoe/layer.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum cumoe_stage {
    CUMOE_STAGE_GATE = 0,
    CUMOE_STAGE_PERMUTE = 1,
    CUMOE_STAGE_UP = 2,
    CUMOE_STAGE_DOWN = 3,
    CUMOE_STAGE_COMBINE = 4,
    CUMOE_STAGE_DOWN_BACKWARD = 5,
    CUMOE_STAGE_GATE_BACKWARD = 6,
    CUMOE_STAGE_UP_BACKWARD = 7,
    CUMOE_STAGE_PERMUTE_BACKWARD = 8,
    CUMOE_NUM_STAGES = 9
} cumoe_stage_t;

/* Scratch bytes of a stage for T = num_tokens. Statuses as cumoe_layer_buffer_sizes().
 *
 * Allocates: no.  Synchronizes: no.  Capturable: yes.  Thread-safe: yes. */
CUMOE_API CUMOE_NODISCARD cumoe_status_t cumoe_stage_workspace_size(const cumoe_layer_t *layer, cumoe_stage_t stage,
                                                                    int64_t num_tokens, size_t *workspace_size);

/* What the gate decided. Token t has slots t * K .. t * K + K - 1, or, where token_slot is not NULL, token_slot[t]
 * .. token_slot[t + 1] - 1. S and the most rows that R can be: cumoe_layer_max_rows(). */
typedef struct cumoe_routing {
    cumoe_call_t *call;  /* [1]     the numbers of the call, live_tokens within 0..T; later stages read them here */
    int64_t *tokens;     /* [1]     live tokens that are no padding */
    int32_t *expert;     /* [S]     -1 = none, as for masked tokens and rows that are not live */
    void *weight;        /* [S]     gate type; 0 where none, NaN in every slot of a token without a usable logit */
    int64_t *importance; /* [E]     fixed point, see CUMOE_FIXED_POINT_BITS: exact sums in any order */
    int64_t *load;       /* [E]     fixed point; HIERARCHICAL: Load_i(X^(i))_j of eq. 14 */

    /* BALANCED; else NULL. */
    int32_t *token_slot; /* [T + 1] first slot of a token */
    int32_t *slot_token; /* [S]     token of a slot; only the first token_slot[T] are written */
    int32_t *excess; /* [E]     in training: tokens whose g is above the threshold, less those that the expert took:
                                what moves the threshold */

    /* HIERARCHICAL, the first level; else NULL. */
    int32_t *primary_group; /* [T, K1] by descending weight; -1 = none */
    void *primary_weight;   /* [T, K1] gate type */
    int64_t *primary_load;  /* [G]     fixed point: Load_primary(X)_i */
    int32_t *primary_count; /* [G]     |X^(i)|: tokens that chose the group */
} cumoe_routing_t;

/* importance and load count in units of 2^-bits: at most 2^22 rows with F64 gates, else below 2^31. */
#define CUMOE_FIXED_POINT_BITS(dtype) ((dtype) == CUMOE_F64 ? 40 : 32)

typedef struct cumoe_gate_args {
    size_t struct_size;
    int64_t num_tokens;
    const cumoe_weights_t *weights;
    const void *x; /* in   [T, H] */
    int64_t x_stride;
    const uint8_t *token_mask; /* in   [T] or NULL */
    int32_t training;
    uint64_t seed; /* in   these three, or call */
    uint64_t offset;
    int64_t first_token;
    const cumoe_call_t *call; /* in   [1] device, or NULL */
    const void *index;        /* in   [T, K] EXTERNAL */
    cumoe_dtype_t index_dtype;
    const void *index_weight; /* in   [T, K] EXTERNAL */
    cumoe_dtype_t index_weight_dtype;
    cumoe_routing_t routing;        /* out */
    int32_t *expert_count;          /* out  [E] or NULL */
    void *importance;               /* out  [E] gate type, or NULL */
    void *load;                     /* out  [E] gate type, or NULL */
    void *batch_threshold;          /* out  [E] gate type, or NULL; BALANCED in training */
    void *losses;                   /* out  [CUMOE_NUM_LOSSES] gate type, or NULL */
    cumoe_statistics_t *statistics; /* out  [1] or NULL */
    void *workspace;
    size_t workspace_size;
} cumoe_gate_args_t;
CUMOE_API CUMOE_NODISCARD cumoe_status_t cumoe_gate(const cumoe_layer_t *layer, const cumoe_gate_args_t *args,
                                                    cumoe_stream_t stream);

/* The rows that go to experts: sorted by expert, inside an expert by global token, then by choice. */
typedef struct cumoe_rows {
    int32_t *offset;    /* [E + 1] expert e has rows offset[e] .. offset[e + 1] - 1; R = offset[E] */
    int32_t *row_token; /* [most R] token of a row; only the first R are written */
    int32_t *row_slot;  /* [most R] slot of a row; only the first R are written */
    int32_t *slot_row;  /* [S]     row of a slot, -1 = none */
    int32_t *tile;      /* [cumoe_tile_size()] CUDA: see there; CPU: NULL */
} cumoe_rows_t;

/* Grouped products walk over tiles, rows of one expert each: tile[0] is their number, tile[1] the rows of a full
 * one (at least 64), and tile i has the rows from tile[3 + 2 i] on, of expert tile[2 + 2 i]; experts ascend, and so
 * do the rows of an expert. The length of the array for as many rows as R can be: */
static inline int64_t cumoe_tile_size(int64_t max_rows, int32_t num_experts)
{
    return 2 + 2 * (max_rows / 64 + (max_rows < num_experts ? max_rows : num_experts));
}

typedef struct cumoe_permute_args {
    size_t struct_size;
    int64_t num_tokens;
    cumoe_routing_t routing; /* in   call, expert, token_slot, slot_token */
    cumoe_rows_t rows;       /* out */
    void *workspace;
    size_t workspace_size;
} cumoe_permute_args_t;
CUMOE_API CUMOE_NODISCARD cumoe_status_t cumoe_permute(const cumoe_layer_t *layer, const cumoe_permute_args_t *args,
                                                       cumoe_stream_t stream);

/* z = gather(x) w_up^T (+ b_up), then glu likewise;  hidden = act(z). IDENTITY: z = hidden = gather(x). */
typedef struct cumoe_up_args {
    size_t struct_size;
    int64_t num_tokens;
    const cumoe_weights_t *weights;
    cumoe_rows_t rows; /* in */
    const void *x;     /* in   [T, H] */
    int64_t x_stride;
    void *z;      /* out  [R, I], or [R, 2I] with up in columns 0..I-1 and glu behind; token type */
    void *hidden; /* out  [R, I] token type; NULL = z only; z itself = hidden only (without glu) */
    void *workspace;
    size_t workspace_size;
} cumoe_up_args_t;
CUMOE_API CUMOE_NODISCARD cumoe_status_t cumoe_experts_up(const cumoe_layer_t *layer, const cumoe_up_args_t *args,
                                                          cumoe_stream_t stream);

/* output = hidden w_down^T (+ b_down). */
typedef struct cumoe_down_args {
    size_t struct_size;
    int64_t num_tokens;
    const cumoe_weights_t *weights;
    cumoe_rows_t rows;  /* in */
    const void *hidden; /* in   [R, I] */
    void *output;       /* out  [R, H] token type */
    void *workspace;
    size_t workspace_size;
} cumoe_down_args_t;
CUMOE_API CUMOE_NODISCARD cumoe_status_t cumoe_experts_down(const cumoe_layer_t *layer,
                                                            const cumoe_down_args_t *args, cumoe_stream_t stream);

/* y[t] = sum over the choices j of t, ascending, of weight[t, j] * output[row of (t, j)]. */
typedef struct cumoe_combine_args {
    size_t struct_size;
    int64_t num_tokens;
    cumoe_routing_t routing; /* in   call, weight, token_slot */
    cumoe_rows_t rows;       /* in   slot_row */
    const void *output;      /* in   [R, H] */
    void *y;                 /* out  [T, H] */
    int64_t y_stride;
} cumoe_combine_args_t;
CUMOE_API CUMOE_NODISCARD cumoe_status_t cumoe_combine(const cumoe_layer_t *layer, const cumoe_combine_args_t *args,
                                                       cumoe_stream_t stream);

/* With g = weight of a row, d = gather(dy) w_down:
 *   dweight = <d, hidden> (+ <dy, b_down>),  dz = g d act'(z),  dw_down = gather(dy)^T (g hidden),
 *   db_down = sum of g dy.
 * g hidden is rounded to the token type on CUDA, scaled by a power of two for each expert so that no g is too
 * small. */
typedef struct cumoe_down_backward_args {
    size_t struct_size;
    int64_t num_tokens;
    const cumoe_weights_t *weights;
    cumoe_routing_t routing; /* in   weight */
    cumoe_rows_t rows;       /* in */
    const void *z;           /* in   [R, I or 2I] */
    const void *dy;          /* in   [T, H] */
    int64_t dy_stride;
    void *dz;                         /* out  [R, I or 2I] token type */
    void *dweight;                    /* out  [S] gate type; 0 where there is no row */
    const cumoe_weights_t *gradients; /* out  w_down, b_down; or NULL */
    cumoe_gradient_mode_t gradient_mode;
    void *workspace;
    size_t workspace_size;
} cumoe_down_backward_args_t;
CUMOE_API CUMOE_NODISCARD cumoe_status_t cumoe_experts_down_backward(const cumoe_layer_t *layer,
                                                                     const cumoe_down_backward_args_t *args,
                                                                     cumoe_stream_t stream);

/* drows = dz w_up (+ the same of glu);  dw_up = dz^T gather(x);  db_up = sum of dz. */
typedef struct cumoe_up_backward_args {
    size_t struct_size;
    int64_t num_tokens;
    const cumoe_weights_t *weights;
    cumoe_rows_t rows; /* in */
    const void *x;     /* in   [T, H] */
    int64_t x_stride;
    const void *dz;                   /* in   [R, I or 2I] */
    void *drows;                      /* out  [R, H] token type; NULL = not wanted; IDENTITY: may be dz itself */
    const cumoe_weights_t *gradients; /* out  w_up, w_glu, b_up, b_glu; or NULL */
    cumoe_gradient_mode_t gradient_mode;
    void *workspace;
    size_t workspace_size;
} cumoe_up_backward_args_t;
CUMOE_API CUMOE_NODISCARD cumoe_status_t cumoe_experts_up_backward(const cumoe_layer_t *layer,
                                                                   const cumoe_up_backward_args_t *args,
                                                                   cumoe_stream_t stream);

/* From the gradients of the weights and of the losses to those of the logits, w_gate, w_noise and x. */
typedef struct cumoe_gate_backward_args {
    size_t struct_size;
    int64_t num_tokens;
    const cumoe_weights_t *weights;
    const void *x; /* in   [T, H] */
    int64_t x_stride;
    const uint8_t *token_mask; /* in   [T] or NULL */
    int32_t training;
    cumoe_routing_t routing;          /* in   all of it */
    const void *dweight;              /* in   [S] gate type */
    const void *loss_gradient;        /* in   [CUMOE_NUM_LOSSES] gate type, or NULL = config.loss_weight */
    void *dx_gate;                    /* out  [T, H] gate type; NULL = not wanted */
    const cumoe_weights_t *gradients; /* out  w_gate, w_noise, the primary pair, thresholds; or NULL */
    cumoe_gradient_mode_t gradient_mode;
    void *workspace;
    size_t workspace_size;
} cumoe_gate_backward_args_t;
CUMOE_API CUMOE_NODISCARD cumoe_status_t cumoe_gate_backward(const cumoe_layer_t *layer,
                                                             const cumoe_gate_backward_args_t *args,
                                                             cumoe_stream_t stream);

/* dx[t] = dx_gate[t] + sum over the choices j of t, ascending, of drows[row of (t, j)]. */
typedef struct cumoe_permute_backward_args {
    size_t struct_size;
    int64_t num_tokens;
    cumoe_routing_t routing; /* in   call, token_slot */
    cumoe_rows_t rows;       /* in   slot_row */
    const void *drows;       /* in   [R, H] */
    const void *dx_gate;     /* in   [T, H] gate type, or NULL */
    void *dx;                /* out  [T, H] */
    int64_t dx_stride;
} cumoe_permute_backward_args_t;
CUMOE_API CUMOE_NODISCARD cumoe_status_t cumoe_permute_backward(const cumoe_layer_t *layer,
                                                                const cumoe_permute_backward_args_t *args,
                                                                cumoe_stream_t stream);

#ifdef __cplusplus
}
#endif
#endif
