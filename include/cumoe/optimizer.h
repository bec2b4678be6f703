/* One optimizer step over all parameters of a layer, in place on the device. */
#ifndef CUMOE_OPTIMIZER_H
#define CUMOE_OPTIMIZER_H

#include <cumoe/layer.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum cumoe_optimizer {
    CUMOE_OPTIMIZER_ADAM = 0,         /* first and second moment per parameter */
    CUMOE_OPTIMIZER_FACTORED_ADAM = 1 /* App. D: expert matrices keep row and column means of the squared gradient
                                         and no first moment, V = r c / mean(r); everything else is Adam */
} cumoe_optimizer_t;

/* Numbers of a step that may change between replays of a captured graph. */
typedef struct cumoe_optimizer_call {
    double learning_rate;
    double gradient_scale; /* gradients are multiplied by it first; 0 = 1 */
    int64_t step;          /* 1 for the first step: bias correction */
    int64_t skip;          /* not 0: leave everything as it is (overflow of scaled gradients) */
} cumoe_optimizer_call_t;

typedef struct cumoe_optimizer_args {
    size_t struct_size; /* sizeof(cumoe_optimizer_args_t) */
    cumoe_optimizer_t optimizer;
    const cumoe_weights_t *weights;   /* in/out */
    const cumoe_weights_t *gradients; /* in   a parameter whose gradient is NULL is left alone */
    float beta1, beta2, epsilon;      /* 0 = 0.9, 0.999, 1e-8 (factored: no beta1 on expert matrices, epsilon
                                         1e-30 inside the means) */
    float weight_decay;               /* decoupled; 0 = none */
    cumoe_optimizer_call_t values;
    const cumoe_optimizer_call_t *call; /* in, device: replaces values; NULL = values */
    void *state; /* in/out, the caller's; the step with step = 1 initialises it, whatever it holds. With 16-bit
                    parameters it holds their F32 master copies as well */
    size_t state_size;
} cumoe_optimizer_args_t;

/* The bytes of state that an optimizer needs for the layer and the types of its weights.
 *
 * CUMOE_INVALID_ARGUMENT    a pointer is NULL, optimizer unknown
 * CUMOE_UNSUPPORTED_CONFIG  not in this version
 *
 * Allocates: no.  Synchronizes: no.  Capturable: yes.  Thread-safe: yes. */
CUMOE_API CUMOE_NODISCARD cumoe_status_t cumoe_optimizer_state_size(const cumoe_layer_t *layer,
                                                                    cumoe_optimizer_t optimizer,
                                                                    const cumoe_weights_t *weights,
                                                                    size_t *state_size);

/* Update the weights from the gradients.
 *
 * CUMOE_INVALID_ARGUMENT    a pointer is NULL or a number out of range
 * CUMOE_BUFFER_TOO_SMALL    state_size is below cumoe_optimizer_state_size()
 * CUMOE_UNSUPPORTED_CONFIG  not in this version
 *
 * Allocates: no.  Synchronizes: no.  Capturable: yes.  Thread-safe: yes, for distinct weights. */
CUMOE_API CUMOE_NODISCARD cumoe_status_t cumoe_optimizer_step(const cumoe_layer_t *layer,
                                                              const cumoe_optimizer_args_t *args,
                                                              cumoe_stream_t stream);

#ifdef __cplusplus
}
#endif
#endif
