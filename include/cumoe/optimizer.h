/* One optimizer step over all parameters of a layer, in place on the device.
 *
 * With g = gradient_scale * gradient, w a parameter, t the step, everything elementwise:
 *
 *   Adam      m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2
 *             w = w - learning_rate * (m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + epsilon) + weight_decay w)
 *   factored  for an expert's matrix [rows, cols] (App. D: no first moment, no v of full size):
 *             r_i = beta2 r_i + (1 - beta2) mean over j of (g_ij^2 + 1e-30)
 *             c_j = beta2 c_j + (1 - beta2) mean over i of (g_ij^2 + 1e-30)
 *             v_ij = r_i c_j / mean(r)
 *             w = w - learning_rate * (g / sqrt(v / (1 - beta2^t)) + weight_decay w)
 *
 * w_up and w_glu count as two matrices in every layout. Arithmetic is F32 (F64 with F64). The state holds, per
 * value of an array: Adam 2 values, factored about none, and for 16-bit parameters one F32 master copy, which is
 * what a step updates: the parameter is that copy, rounded, and what somebody else writes to it is lost; after
 * loading parameters begin with t = 1 again. gate_bias has no gradient and is never touched. */
#ifndef CUMOE_OPTIMIZER_H
#define CUMOE_OPTIMIZER_H

#include <cumoe/layer.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum cumoe_optimizer {
    CUMOE_OPTIMIZER_ADAM = 0,         /* every parameter */
    CUMOE_OPTIMIZER_FACTORED_ADAM = 1 /* w_up, w_glu and w_down factored; gates and biases by Adam */
} cumoe_optimizer_t;

/* Numbers of a step that may change between replays of a captured graph. */
typedef struct cumoe_optimizer_call {
    double learning_rate;  /* 0 or a positive normal number of F32 */
    double gradient_scale; /* the same; 0 = 1 */
    int64_t step;          /* t >= 1: 1 for the first step, which initialises the state */
    int64_t skip;          /* not 0: leave everything as it is (overflow of scaled gradients). The step does not
                              count: the next has the same t, and a skipped t = 1 initialises nothing */
} cumoe_optimizer_call_t;

typedef struct cumoe_optimizer_args {
    size_t struct_size; /* sizeof(cumoe_optimizer_args_t) */
    cumoe_optimizer_t optimizer;
    const cumoe_weights_t *weights;   /* in/out. Weights, gradients and state share no byte */
    const cumoe_weights_t *gradients; /* in   an array whose gradient is NULL keeps its values */
    float beta1, beta2;               /* 0 <= beta < 1; 0 = 0.9f and 0.999f, so take 1e-30f for none */
    float epsilon;                    /* >= 0; 0 = 1e-8 */
    float weight_decay;               /* >= 0, decoupled */
    cumoe_optimizer_call_t values;
    const cumoe_optimizer_call_t *call; /* in, device: replaces values, not checked (a step below 1 counts as 1);
                                           NULL = values; 8-byte aligned. A GPU's powers of beta may differ from
                                           the host's in the last bit */
    void *state;                        /* in/out, the caller's. The step with t = 1 writes all of it, whatever it
                                           holds; it holds no pointers */
    size_t state_size;
} cumoe_optimizer_args_t;

/* The bytes of state that an optimizer needs for a layer and the types of its weights.
 *
 * weights     dtype and gate_dtype are looked at, pointers and strides are not
 * state_size  out
 *
 * CUMOE_INVALID_ARGUMENT  a pointer is NULL, optimizer unknown, a type that weights of the layer cannot have
 *
 * Allocates: no.  Synchronizes: no.  Capturable: yes.  Thread-safe: yes. */
CUMOE_API CUMOE_NODISCARD cumoe_status_t cumoe_optimizer_state_size(const cumoe_layer_t *layer,
                                                                    cumoe_optimizer_t optimizer,
                                                                    const cumoe_weights_t *weights,
                                                                    size_t *state_size);

/* Update the weights from the gradients.
 *
 * CUMOE_INVALID_ARGUMENT  a pointer is NULL or misaligned, a number out of range, weights or gradients do not fit
 *                         the layer
 * CUMOE_BUFFER_TOO_SMALL  state_size is below cumoe_optimizer_state_size()
 * CUMOE_CUDA_ERROR        a launch failed
 *
 * Allocates: no.  Synchronizes: no.  Capturable: yes.  Thread-safe: yes, for distinct weights and states. */
CUMOE_API CUMOE_NODISCARD cumoe_status_t cumoe_optimizer_step(const cumoe_layer_t *layer,
                                                              const cumoe_optimizer_args_t *args,
                                                              cumoe_stream_t stream);

/* Move the selection bias of SIGMOID_TOPK towards balance without a loss, as DeepSeek-V3 does once per step (Wang
 * et al., "Auxiliary-loss-free load balancing strategy for mixture-of-experts", 2024): gate_bias[e] += rate *
 * sign(mean of the counts - expert_count[e]), exactly 0 where they are equal.
 *
 * gate_bias     in/out, device [E] gate type; usually weights.gate_bias
 * expert_count  in, device [E]: that of a forward call, or the sum of several; the sum is below 2^62
 * rate          finite and >= 0; DeepSeek-V3 has 0.001
 *
 * CUMOE_INVALID_ARGUMENT  a pointer is NULL or misaligned, rate out of range, the gate is not SIGMOID_TOPK
 * CUMOE_CUDA_ERROR        a launch failed
 *
 * Allocates: no.  Synchronizes: no.  Capturable: yes.  Thread-safe: yes, for distinct biases. */
CUMOE_API CUMOE_NODISCARD cumoe_status_t cumoe_gate_bias_update(const cumoe_layer_t *layer, void *gate_bias,
                                                                const int32_t *expert_count, float rate,
                                                                cumoe_stream_t stream);

#ifdef __cplusplus
}
#endif
#endif
