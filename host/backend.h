/* THE SEAM: what a backend implements. The layer knows the order of stages, a backend knows how a stage is
 * computed.
 *
 * Stage functions get arguments that have been checked: required pointers are there and aligned, sizes agree,
 * strides are resolved (never 0), structs have the library's size, gradients is never NULL (its pointers may be).
 * They allocate nothing, wait for nothing, and only enqueue. What begins inside an array (the glu half of z, dz,
 * w_up or b_up, a row of odd width) is aligned to its elements alone. */
#ifndef CUMOE_BACKEND_H
#define CUMOE_BACKEND_H

#include "host/weights_layout.h"

#include <cumoe/handle.h>
#include <cumoe/optimizer.h>
#include <cumoe/stages.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What every stage of a layer needs to know. */
typedef struct cumoe_context {
    cumoe_config_t config; /* checked and complete: top_k and max_threads are never 0 */
    void *device;          /* the backend's own, from open() */
} cumoe_context_t;

/* One array of parameters as an optimizer sees it: [experts, rows, cols] in any layout. Its state is contiguous and
 * of the gate type. */
typedef struct cumoe_parameter {
    cumoe_matrix_t value, gradient; /* without gradient.data, step 1 initialises the state and that is all */
    int64_t experts, rows, cols;
    void *master;              /* [experts, rows, cols] of 16-bit values; else NULL */
    void *moment1, *moment2;   /* [experts, rows, cols]; NULL where factored */
    void *row_mean, *col_mean; /* [experts, rows], [experts, cols]; NULL where not factored */
    void *average;             /* [experts] mean of row_mean; NULL where not factored */
} cumoe_parameter_t;

typedef struct cumoe_backend_ops {
    /* Device. */
    cumoe_status_t (*open)(int32_t ordinal, void **device, char *description, size_t description_size);
    void (*close)(void *device);
    cumoe_status_t (*memory_alloc)(void *device, size_t size, void **ptr);
    void (*memory_free)(void *device, void *ptr);
    cumoe_status_t (*memory_copy)(void *device, void *dst, const void *src, size_t size, cumoe_copy_t kind,
                                  cumoe_stream_t stream);
    cumoe_status_t (*memory_set)(void *device, void *ptr, int value, size_t size, cumoe_stream_t stream);
    cumoe_status_t (*stream_create)(void *device, cumoe_stream_t *stream);
    void (*stream_destroy)(void *device, cumoe_stream_t stream);
    cumoe_status_t (*stream_synchronize)(void *device, cumoe_stream_t stream);

    /* UNSUPPORTED_CONFIG with its name for what the backend has no kernel for; resolves max_threads. */
    cumoe_status_t (*supports)(void *device, cumoe_config_t *config);

    bool row_tiles; /* rows.tile is required */

    /* Stages. */
    size_t (*workspace_size)(const cumoe_context_t *context, cumoe_stage_t stage, int64_t num_tokens);
    cumoe_status_t (*gate)(const cumoe_context_t *, const cumoe_gate_args_t *, cumoe_stream_t);
    cumoe_status_t (*permute)(const cumoe_context_t *, const cumoe_permute_args_t *, cumoe_stream_t);
    cumoe_status_t (*up)(const cumoe_context_t *, const cumoe_up_args_t *, cumoe_stream_t);
    cumoe_status_t (*down)(const cumoe_context_t *, const cumoe_down_args_t *, cumoe_stream_t);
    cumoe_status_t (*combine)(const cumoe_context_t *, const cumoe_combine_args_t *, cumoe_stream_t);
    cumoe_status_t (*down_backward)(const cumoe_context_t *, const cumoe_down_backward_args_t *, cumoe_stream_t);
    cumoe_status_t (*gate_backward)(const cumoe_context_t *, const cumoe_gate_backward_args_t *, cumoe_stream_t);
    cumoe_status_t (*up_backward)(const cumoe_context_t *, const cumoe_up_backward_args_t *, cumoe_stream_t);
    cumoe_status_t (*permute_backward)(const cumoe_context_t *, const cumoe_permute_backward_args_t *,
                                       cumoe_stream_t);

    /* Parameters. */
    cumoe_status_t (*gate_bias_update)(const cumoe_context_t *, void *gate_bias, const int32_t *expert_count,
                                       float rate, cumoe_stream_t);
    cumoe_status_t (*weights_init)(const cumoe_context_t *, uint64_t seed, const cumoe_weights_t *, cumoe_stream_t);
    /* parameters is host memory, read during the call. args->call is device memory: whether to skip, and whether t
     * <= 1, which first clears the state and fills all masters, is decided on the device. */
    cumoe_status_t (*optimizer_step)(const cumoe_context_t *, const cumoe_optimizer_args_t *,
                                     const cumoe_parameter_t *parameters, int count, cumoe_stream_t);
} cumoe_backend_ops_t;

extern const cumoe_backend_ops_t cumoe__backend_cpu, cumoe__backend_cuda;

#ifdef __cplusplus
}
#endif
#endif
