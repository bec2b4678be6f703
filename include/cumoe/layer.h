/* The whole layer: y = sum over the chosen experts e of weight[e] * expert_e(x), forward and backward.
 *
 * A layer holds the configuration and the choice of kernels, no weights and no state: it does not change
 * after creation, and any number of threads and streams may share it, each with its own buffers. With ranks its
 * calls come one after the other (parallel.h). */
#ifndef CUMOE_LAYER_H
#define CUMOE_LAYER_H

#include <cumoe/weights.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Check a configuration and choose kernels for it.
 *
 * layer   out: unchanged on failure
 * handle  must outlive the layer
 * config  copied
 *
 * CUMOE_INVALID_ARGUMENT    a pointer is NULL or a field out of its range; the sentence names it
 * CUMOE_UNSUPPORTED_CONFIG  valid, but this kind, type or activation has no kernel yet; the sentence names it
 * CUMOE_UNSUPPORTED_DEVICE  valid, but not on this device (TF32 on the CPU)
 * CUMOE_OUT_OF_MEMORY       host memory; with ranks, device memory
 * CUMOE_COMM_ERROR          with ranks: one has another config, failed or is late
 * CUMOE_CUDA_ERROR          with ranks: no stream for exchanges beside products
 *
 * Allocates: host memory.  Synchronizes: may.  Capturable: no.  Thread-safe: yes. */
CUMOE_API CUMOE_NODISCARD cumoe_status_t cumoe_layer_create(cumoe_layer_t **layer, const cumoe_handle_t *handle,
                                                            const cumoe_config_t *config);

/* NULL is ignored. Weights of the layer must be gone.
 *
 * Allocates: no.  Synchronizes: may.  Capturable: no.  Thread-safe: yes. */
CUMOE_API void cumoe_layer_destroy(cumoe_layer_t *layer);

/* The bytes of the two buffers that the caller owns: workspace, free again when the stream has passed a call,
 * and saved, which goes unchanged from a forward to its backward (it holds no pointers: copy or offload it as
 * you like). Both grow with num_tokens, so one question for the largest T serves all smaller ones. BALANCED has T *
 * E values of the gate type in workspace; HIERARCHICAL nothing of that size, but 4 T (G + K1 E/G) values at most.
 * With config.recompute saved has no pre-activations: T * K * I values of config.dtype less (2I with glu), and up
 * to 63 bytes of alignment.
 *
 * num_tokens      T >= 0, T * K < 2^31, with F64 at most 2^22 (SOFTMAX: K = E)
 * workspace_size  out: enough for every call; for forward without saved alone if saved_size is NULL; where there
 * are plans, enough for cumoe_ep_plan() alone saved_size      out, or NULL; where there are plans, 0
 *
 * CUMOE_INVALID_ARGUMENT  layer or workspace_size is NULL, num_tokens out of range
 *
 * Allocates: no.  Synchronizes: no.  Capturable: yes.  Thread-safe: yes. */
CUMOE_API CUMOE_NODISCARD cumoe_status_t cumoe_layer_buffer_sizes(const cumoe_layer_t *layer, int64_t num_tokens,
                                                                  size_t *workspace_size, size_t *saved_size);

/* How many rows and slots a call has at most: the lengths of chosen_expert and of the arrays of stages.h. Both are
 * T * K, but for BALANCED, where a token has as many choices as experts took it: max_rows is the largest of E, T *
 * K and config.max_rows (0 for T = 0, and at most T * E), and there are T more slots (a token whose logits are NaN
 * has one of its own, without a row).
 *
 * num_tokens  T >= 0
 * max_rows    out, or NULL
 * max_slots   out, or NULL
 *
 * CUMOE_INVALID_ARGUMENT  layer is NULL, num_tokens out of range
 *
 * Allocates: no.  Synchronizes: no.  Capturable: yes.  Thread-safe: yes. */
CUMOE_API CUMOE_NODISCARD cumoe_status_t cumoe_layer_max_rows(const cumoe_layer_t *layer, int64_t num_tokens,
                                                              int64_t *max_rows, int64_t *max_slots);

/* For whoever must size saved before T is known, as a compiler that traces with an unknown T:
 * cumoe_layer_buffer_sizes() never says more than base + per_token * T, and hardly less. BALANCED, whose rows do
 * not grow with few tokens: never more than base + per_token * max(0, T - T0), T0 = max(E, config.max_rows) / K
 * rounded up, and hardly less from T0 on.
 *
 * base, per_token  out: bytes
 *
 * CUMOE_INVALID_ARGUMENT    a pointer is NULL
 * CUMOE_UNSUPPORTED_CONFIG  the layer has ranks
 *
 * Allocates: no.  Synchronizes: no.  Capturable: yes.  Thread-safe: yes. */
CUMOE_API CUMOE_NODISCARD cumoe_status_t cumoe_layer_saved_bound(const cumoe_layer_t *layer, size_t *base,
                                                                 size_t *per_token);

typedef struct cumoe_forward_args {
    size_t struct_size;             /* sizeof(cumoe_forward_args_t) */
    int64_t num_tokens;             /* T >= 0 */
    const cumoe_weights_t *weights; /* in */
    const void *x;                  /* in   [T, H] */
    int64_t x_stride;               /* >= H; 0 = H */
    void *y;                        /* out  [T, H]; shares no element with x (two column ranges of one
 buffer are fine) */
    int64_t y_stride;               /* >= H; 0 = H */
    const uint8_t *token_mask;      /* in   [T], any alignment: 0 = padding, not routed, in no loss, y = 0;
                                       NULL = no padding */
    int32_t training;               /* 1: noise on, smooth loads; 0: noise off, load = rows per expert */
    uint64_t seed;                  /* see cumoe_call_t */
    uint64_t offset;
    int64_t first_token;
    const cumoe_call_t *call; /* in, device: replaces seed, offset, first_token and T; NULL = those above
                                 and all T tokens live; 8-byte aligned */

    const void *index;                /* in   [T, K] EXTERNAL: an expert, or outside 0..E-1 for "none"; one
                                         expert may come twice */
    cumoe_dtype_t index_dtype;        /* I32 (default) or I64 */
    const void *index_weight;         /* in   [T, K] EXTERNAL: any numbers */
    cumoe_dtype_t index_weight_dtype; /* F32 (default; F64 with F64) or config.dtype */

    /* Optional outputs, NULL = not wanted. "Gate type" is F32, or F64 when config.dtype is F64. */
    int32_t *chosen_expert; /* out  [T, K] by descending weight (SOFTMAX: expert j in slot j; EXTERNAL: as given;
                               HIERARCHICAL: by group, then inside it; SIGMOID_TOPK: by s + gate_bias); -1 =
                               none, as for padding and rows that are not live. BALANCED: [S], those of a
                               token by ascending expert */
    void *chosen_weight;    /* out  [T, K] or [S] gate type; 0 where none; NaN for a token without a usable
                               logit because of NaN or +Inf */
    int32_t *chosen_offset; /* out  [T + 1] BALANCED: token t has slots chosen_offset[t] ..
                               chosen_offset[t + 1] - 1 */
    int32_t *expert_count;  /* out  [E] rows per expert */
    void *importance;       /* out  [E] sum of gate values (eq. 6), gate type; EXTERNAL: 0 */
    void *load;             /* out  [E] gate type: smooth load (eq. 10; HIERARCHICAL: eq. 14) of noisy kinds in
                               training, else rows per expert, which carry no gradient */
    void *batch_threshold;  /* out  [E] gate type, BALANCED in training: the m-th largest g of each expert, the
                               lowest that it took (0 without tokens): what to start its threshold with */
    void *losses;           /* out  [CUMOE_NUM_LOSSES] unweighted, gate type; 0 for a loss that the gate
                               kind does not have */
    cumoe_statistics_t *statistics; /* out  [1], 8-byte aligned */

    void *workspace; /* scratch; like saved it overlaps nothing else */
    size_t workspace_size;
    void *saved; /* out, for backward; NULL = no backward follows */
    size_t saved_size;

    const cumoe_ep_plan_t
        *plan;           /* in   of a layer with ranks and no exchange_capacity, see parallel.h; else NULL */
    void *routing;       /* in   what cumoe_ep_plan() wrote */
    size_t routing_size; /* cumoe_ep_routing_size() */
} cumoe_forward_args_t;

/* Compute y, and what is asked for beside it. Enqueued on the stream; the outputs are ready when the stream
 * reaches this point. args is read before the call returns, the memory behind it until the stream has passed.
 *
 * stream  any stream of the handle's device, NULL = the default stream; NULL on the CPU
 *
 * CUMOE_INVALID_ARGUMENT  a required pointer is NULL or misaligned, a number out of range, arrays overlap
 * CUMOE_BUFFER_TOO_SMALL  workspace_size or saved_size is below what this call needs (cumoe_layer_buffer_sizes()
 *                         always suffices, but for a call with a plan: cumoe_ep_sizes_t)
 * CUMOE_CUDA_ERROR        a launch failed
 * CUMOE_COMM_ERROR        a rank failed, is late or calls something else
 *
 * Allocates: no.  Synchronizes: no.  Capturable: yes.  Thread-safe: yes, with distinct buffers; with ranks, as
 * parallel.h and the transport say. */
CUMOE_API CUMOE_NODISCARD cumoe_status_t cumoe_layer_forward(const cumoe_layer_t *layer,
                                                             const cumoe_forward_args_t *args,
                                                             cumoe_stream_t stream);

typedef enum cumoe_gradient_mode {
    CUMOE_GRADIENT_WRITE = 0, /* overwrite; zeros for an expert without rows */
    CUMOE_GRADIENT_ADD = 1    /* add to what is there; an expert without rows is left alone */
} cumoe_gradient_mode_t;

typedef struct cumoe_backward_args {
    size_t struct_size;             /* sizeof(cumoe_backward_args_t) */
    int64_t num_tokens;             /* T of the forward call */
    const cumoe_weights_t *weights; /* in   unchanged since forward */
    const void *x;                  /* in   [T, H] unchanged since forward */
    int64_t x_stride;               /* >= H; 0 = H */
    const void *dy;                 /* in   [T, H] gradient of the task loss (of the sum over all ranks) */
    int64_t dy_stride;              /* >= H; 0 = H */
    const uint8_t *token_mask;      /* in   [T] that of the forward call */
    int32_t training;               /* that of the forward call */
    const void *loss_gradient;      /* in   [CUMOE_NUM_LOSSES] gate type: upstream gradients; NULL =
                                       config.loss_weight */
    void *dx; /* out  [T, H], overwritten in either mode; shares no element with x or dy; NULL = not wanted */
    int64_t dx_stride;                /* >= H; 0 = H */
    void *dindex_weight;              /* out  [T, K] EXTERNAL, gate type: gradient of index_weight; 0 where not
                                         routed, so for padding and rows that are not live; NULL = not wanted */
    const cumoe_weights_t *gradients; /* out  arrays with NULL pointers are not wanted; NULL = none. Layout and type
                                         are its own */
    cumoe_gradient_mode_t gradient_mode;
    void *workspace; /* scratch */
    size_t workspace_size;
    const void *saved; /* in   from the forward call; seed, offset and live tokens are read there */
    size_t saved_size;

    const cumoe_ep_plan_t *plan; /* in   these three as in the forward call */
    const void *routing;
    size_t routing_size;
} cumoe_backward_args_t;

/* Compute the gradients of  <dy, y> + sum over losses l of loss_gradient[l] * losses[l].
 *
 * stream and statuses as cumoe_layer_forward(). A saved buffer may be used by several backward calls.
 *
 * Allocates: no.  Synchronizes: no.  Capturable: yes.  Thread-safe: yes, with distinct buffers; with ranks, as
 * parallel.h and the transport say. */
CUMOE_API CUMOE_NODISCARD cumoe_status_t cumoe_layer_backward(const cumoe_layer_t *layer,
                                                              const cumoe_backward_args_t *args,
                                                              cumoe_stream_t stream);

#ifdef __cplusplus
}
#endif
#endif
