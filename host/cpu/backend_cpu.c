/* The table of the CPU backend, its memory, and what it has kernels for. */
#include "host/cpu/cpu.h"
#include "host/error.h"

#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static cumoe_status_t open_cpu(int32_t ordinal, void **device, char *description, size_t description_size)
{
    CUMOE_REQUIRE(ordinal == 0, UNSUPPORTED_DEVICE, "cumoe_handle_create: ordinal = %d, but the CPU is device 0",
                  ordinal);
    *device = NULL;
    snprintf(description, description_size, "CPU, %s, %d threads", cumoe__cpu_gemm_isa(), omp_get_max_threads());
    return CUMOE_SUCCESS;
}

static void close_cpu(void *device)
{
    (void)device;
}

static cumoe_status_t memory_alloc(void *device, size_t size, void **ptr)
{
    (void)device;
    CUMOE_REQUIRE(size <= SIZE_MAX / 2, OUT_OF_MEMORY, "cumoe_memory_alloc: size = %zu, more than any machine has",
                  size);
    void *made = aligned_alloc(256, (size + 255) / 256 * 256);
    CUMOE_REQUIRE(made, OUT_OF_MEMORY, "cumoe_memory_alloc: size = %zu, but the host has no such memory left",
                  size);
    *ptr = made;
    return CUMOE_SUCCESS;
}

static void memory_free(void *device, void *ptr)
{
    (void)device;
    free(ptr);
}

static cumoe_status_t memory_copy(void *device, void *dst, const void *src, size_t size, cumoe_copy_t kind,
                                  cumoe_stream_t stream)
{
    (void)device, (void)kind, (void)stream;
    memcpy(dst, src, size);
    return CUMOE_SUCCESS;
}

static cumoe_status_t memory_set(void *device, void *ptr, int value, size_t size, cumoe_stream_t stream)
{
    (void)device, (void)stream;
    memset(ptr, value, size);
    return CUMOE_SUCCESS;
}

static cumoe_status_t stream_create(void *device, cumoe_stream_t *stream)
{
    (void)device;
    *stream = NULL;
    return CUMOE_SUCCESS;
}

static void stream_destroy(void *device, cumoe_stream_t stream)
{
    (void)device, (void)stream;
}

static cumoe_status_t stream_synchronize(void *device, cumoe_stream_t stream)
{
    (void)device, (void)stream;
    return CUMOE_SUCCESS;
}

static cumoe_status_t supports(void *device, cumoe_config_t *c)
{
    (void)device;
    CUMOE_REQUIRE(
        c->compute == CUMOE_COMPUTE_EXACT, UNSUPPORTED_DEVICE,
        "cumoe_layer_create: config.compute = CUMOE_COMPUTE_TF32 is for CUDA, but this handle is the CPU");
    if (c->max_threads == 0) c->max_threads = omp_get_max_threads();
    return CUMOE_SUCCESS;
}

static size_t workspace_size(const cumoe_context_t *context, cumoe_stage_t stage, int64_t num_tokens)
{
    switch (stage) {
    case CUMOE_STAGE_GATE:
        return cumoe__cpu_gate_workspace(context, num_tokens);
    case CUMOE_STAGE_PERMUTE:
        return cumoe__cpu_permute_workspace(context, num_tokens);
    case CUMOE_STAGE_UP:
    case CUMOE_STAGE_DOWN:
    case CUMOE_STAGE_UP_BACKWARD:
        return cumoe__cpu_gemm_workspace(context->config.max_threads);
    case CUMOE_STAGE_DOWN_BACKWARD:
        return cumoe__cpu_down_backward_workspace(context, num_tokens);
    case CUMOE_STAGE_GATE_BACKWARD:
        return cumoe__cpu_gate_backward_workspace(context, num_tokens);
    default:
        return 0;
    }
}

const cumoe_backend_ops_t cumoe__backend_cpu = {
    .open = open_cpu,
    .close = close_cpu,
    .memory_alloc = memory_alloc,
    .memory_free = memory_free,
    .memory_copy = memory_copy,
    .memory_set = memory_set,
    .stream_create = stream_create,
    .stream_destroy = stream_destroy,
    .stream_synchronize = stream_synchronize,
    .supports = supports,
    .workspace_size = workspace_size,
    .gate = cumoe__cpu_gate,
    .permute = cumoe__cpu_permute,
    .up = cumoe__cpu_up,
    .down = cumoe__cpu_down,
    .combine = cumoe__cpu_combine,
    .down_backward = cumoe__cpu_down_backward,
    .gate_backward = cumoe__cpu_gate_backward,
    .up_backward = cumoe__cpu_up_backward,
    .permute_backward = cumoe__cpu_permute_backward,
    .gate_sums = cumoe__cpu_gate_sums,
    .gate_finish = cumoe__cpu_gate_finish,
    .dispatch_mark = cumoe__cpu_dispatch_mark,
    .dispatch_count = cumoe__cpu_dispatch_count,
    .dispatch_pack = cumoe__cpu_dispatch_pack,
    .arrive_begin = cumoe__cpu_arrive_begin,
    .arrive_end = cumoe__cpu_arrive_end,
    .gather = cumoe__cpu_gather,
    .gate_bias_update = cumoe__cpu_gate_bias_update,
    .weights_init = cumoe__cpu_weights_init,
    .optimizer_step = cumoe__cpu_optimizer_step,
};
