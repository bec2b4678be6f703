/* The parameters of a layer, and, in the same struct, their gradients.
 *
 * A struct of pointers: fill it with memory of your own (a framework's tensors), or let
 * cumoe_weights_create() allocate it. On the CPU forward and backward read experts at any address that suits their
 * elements, as in a file that is mapped. Layouts of other libraries are described, not repacked:
 *   Mixtral, Qwen3    .w_up = gate_up_proj, .glu = CUMOE_GLU_FIRST
 *   gpt-oss           .w_up = gate_up_proj, .glu = CUMOE_GLU_INTERLEAVED,
 *                     .up_row_stride = 1, .up_col_stride = 2I, .down_row_stride = 1, .down_col_stride = H
 * An array that the layer does not have is NULL: a bias beside expert_bias = 0 is refused, not ignored.
 * Forward and backward never write to weights; they write to what is passed as gradients. A NaN or infinity in the
 * weights of a gate makes that expert unusable and reaches dx. With expert parallelism w_up, w_glu, w_down and the
 * biases hold the rank's own experts; everything else is replicated. */
#ifndef CUMOE_WEIGHTS_H
#define CUMOE_WEIGHTS_H

#include <cumoe/config.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct cumoe_weights {
    size_t struct_size;  /* sizeof(cumoe_weights_t) */
    cumoe_dtype_t dtype; /* of the expert matrices and biases: config.dtype, the default. Gradients: that, or F32
                            (F64 with F64). A gradient is summed in F32 (F64 with F64) and rounded
                            once per call */
    cumoe_dtype_t gate_dtype;  /* of w_gate, w_noise and the primary pair: the gate type, the default, which is F32
                                  (F64 with F64), or config.dtype. Gradients: the gate type */
    cumoe_glu_placement_t glu; /* default SEPARATE */

    void *w_gate;         /* [E, H]  not EXTERNAL; HIERARCHICAL: the gates inside the groups, one after the other */
    void *w_noise;        /* [E, H]  NOISY_TOPK, HIERARCHICAL */
    void *w_gate_primary; /* [G, H]  HIERARCHICAL */
    void *w_noise_primary; /* [G, H]  HIERARCHICAL */
    void *thresholds;      /* [E]     BALANCED; gate type whatever gate_dtype is. Start them with batch_threshold of
                              the first forward call */
    void *gate_bias;       /* [E]     SIGMOID_TOPK, selection only, has no gradient; gate type; NULL = 0 */

    void *w_up;   /* [E, I, H], or [E, 2I, H] as glu says; not IDENTITY */
    void *w_glu;  /* [E, I, H]  gated linear units with SEPARATE; strides of w_up */
    void *w_down; /* [E, H, I] */
    void *b_up;   /* [E, I], or [E, 2I] as glu says; expert_bias, not IDENTITY */
    void *b_glu;  /* [E, I]  gated linear units with SEPARATE; expert_bias */
    void *b_down; /* [E, H]  expert_bias */

    /* Distance in elements between experts, rows and columns of the matrices above; 0 = contiguous in the order
     * written there, experts right behind each other whatever the other strides are. A transposed matrix has row
     * stride 1. Negative strides are refused, and where the library writes (gradients, initial values, the
     * optimizer) those with which elements overlap. Biases are contiguous. */
    int64_t up_expert_stride, up_row_stride, up_col_stride;
    int64_t down_expert_stride, down_row_stride, down_col_stride;

    void *allocation; /* the library's, when cumoe_weights_create() made this; else NULL */
} cumoe_weights_t;

/* Allocate every array that the layer has, in one piece, SEPARATE and contiguous, set to zero. For weights
 * (then call cumoe_weights_init()), and for gradients as they are.
 *
 * layer    decides which arrays exist and their sizes
 * dtype    of the expert matrices; CUMOE_DTYPE_DEFAULT = the layer's
 * weights  out: everything is overwritten; unchanged on failure
 *
 * CUMOE_INVALID_ARGUMENT    a pointer is NULL, dtype neither the layer's nor the gate type (F32; F64 with F64)
 * CUMOE_OUT_OF_MEMORY       device memory
 *
 * Allocates: yes.  Synchronizes: yes.  Capturable: no.  Thread-safe: yes. */
CUMOE_API CUMOE_NODISCARD cumoe_status_t cumoe_weights_create(const cumoe_layer_t *layer, cumoe_dtype_t dtype,
                                                              cumoe_weights_t *weights);

/* Free what cumoe_weights_create() allocated and clear the pointers; borrowed weights are only cleared.
 * NULL is ignored.
 *
 * Allocates: no.  Synchronizes: may.  Capturable: no.  Thread-safe: yes, for distinct weights. */
CUMOE_API void cumoe_weights_destroy(const cumoe_layer_t *layer, cumoe_weights_t *weights);

/* Write initial values, created or borrowed, in any layout: expert matrices N(0, 1 / columns) (w_up: 1/H, w_down:
 * 1/I), keyed by (seed, matrix, global expert, element), so that they do not depend on layout or number of
 * ranks; biases, thresholds and the gates of noisy kinds 0 (App. A: no signal, some noise); other gates
 * N(0, 0.02^2). NULL arrays are skipped.
 *
 * CUMOE_INVALID_ARGUMENT  layer or weights is NULL, or weights does not fit the layer
 *
 * Allocates: no.  Synchronizes: no.  Capturable: yes.  Thread-safe: yes, for distinct weights. */
CUMOE_API CUMOE_NODISCARD cumoe_status_t cumoe_weights_init(const cumoe_layer_t *layer, uint64_t seed,
                                                            const cumoe_weights_t *weights, cumoe_stream_t stream);

#ifdef __cplusplus
}
#endif
#endif
