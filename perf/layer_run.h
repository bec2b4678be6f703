/* One layer with all its buffers, ready to run: the contestant that the benchmarks are about. */
#ifndef CUMOE_PERF_LAYER_RUN_H
#define CUMOE_PERF_LAYER_RUN_H

#include "yardsticks.h"

#include <cumoe/cumoe.h>

typedef struct layer_run {
    shape_t shape;
    cumoe_dtype_t dtype;
    cumoe_handle_t *handle;
    cumoe_layer_t *layer;    /* with the noisy gate, in training */
    cumoe_layer_t *external; /* routed by expert and weight */
    cumoe_weights_t weights;
    cumoe_weights_t gradients; /* F32 */
    void *x, *dy;              /* in  [T, H] dtype: multiples of 1/128 in -1..1, the same in every type */
    void *y, *dx;              /* out [T, H] dtype */
    int32_t *expert;           /* [T, K] chosen by the gate, or given */
    float *weight;             /* [T, K] */
    void *workspace, *saved;
    size_t workspace_size, saved_size;
} layer_run_t;

/* End the program with the library's sentence. */
void layer_run_check(cumoe_status_t status);

/* dtype is F32, BF16 or F16. */
void layer_run_create(layer_run_t *run, const shape_t *shape, cumoe_dtype_t dtype, int threads);
void layer_run_destroy(layer_run_t *run);

/* external: routed by expert and weight, else by the gate, which writes them. */
void layer_run_forward(layer_run_t *run, bool external);
void layer_run_backward(layer_run_t *run, bool external);

/* count values of a type as F32. */
void layer_run_widen(cumoe_dtype_t dtype, const void *values, float *wide, int64_t count);

#endif
