#include "layer_run.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void layer_run_check(cumoe_status_t status)
{
    if (status == CUMOE_SUCCESS) return;
    fprintf(stderr, "cumoe-perf-cpu: %s: %s\n", cumoe_status_name(status), cumoe_last_error());
    exit(EXIT_FAILURE);
}

/* ---- the 16-bit types ---- */

static size_t size_of(cumoe_dtype_t dtype)
{
    return dtype == CUMOE_F32 ? sizeof(float) : sizeof(uint16_t);
}

/* A finite value. */
static float widen(cumoe_dtype_t dtype, uint16_t half)
{
    const uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    if (dtype == CUMOE_BF16) return value;
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    const float magnitude = ldexpf((float)(exponent ? fraction + 1024 : fraction), (exponent ? exponent : 1) - 25);
    return half & 0x8000 ? -magnitude : magnitude;
}

void layer_run_widen(cumoe_dtype_t dtype, const void *values, float *wide, int64_t count)
{
    if (dtype == CUMOE_F32) memcpy(wide, values, (size_t)count * sizeof *wide);
    for (int64_t i = 0; dtype != CUMOE_F32 && i < count; i++) wide[i] = widen(dtype, ((const uint16_t *)values)[i]);
}

/* Multiples of 1/128 in -1..1 without a library: xorshift. */
static void fill(cumoe_dtype_t dtype, void *array, int64_t count, uint32_t seed)
{
    uint16_t half[256]; /* of (i - 128) / 128 */
    for (uint32_t code = 0; dtype != CUMOE_F32 && code < 65536; code++) {
        const float value = 128 * widen(dtype, (uint16_t)code);
        if (value >= -128 && value < 128 && value == floorf(value)) half[(int)value + 128] = (uint16_t)code;
    }
    for (int64_t i = 0; i < count; i++) {
        seed ^= seed << 13;
        seed ^= seed >> 17;
        seed ^= seed << 5;
        const int value = (int)(seed >> 24);
        if (dtype == CUMOE_F32) {
            ((float *)array)[i] = (float)(value - 128) / 128;
        } else {
            ((uint16_t *)array)[i] = half[value];
        }
    }
}

/* ---- the layer ---- */

static void *device_array(const layer_run_t *run, int64_t count, size_t size)
{
    void *array;
    layer_run_check(cumoe_memory_alloc(run->handle, (size_t)count * size, &array));
    layer_run_check(cumoe_memory_set(run->handle, array, 0, (size_t)count * size, NULL));
    return array;
}

/* A layer, and room for its buffers. */
static cumoe_layer_t *new_layer(layer_run_t *run, cumoe_gate_kind_t gate, int threads)
{
    const shape_t *s = &run->shape;
    cumoe_config_t config;
    layer_run_check(cumoe_config_init(&config));
    config.hidden_size = s->H;
    config.intermediate_size = s->I;
    config.num_experts = s->E;
    config.top_k = s->K;
    config.dtype = run->dtype;
    config.activation = s->glu ? CUMOE_ACTIVATION_SWIGLU : CUMOE_ACTIVATION_RELU;
    config.gate = gate;
    config.max_threads = threads;
    cumoe_layer_t *layer;
    layer_run_check(cumoe_layer_create(&layer, run->handle, &config));
    size_t workspace, saved;
    layer_run_check(cumoe_layer_buffer_sizes(layer, s->T, &workspace, &saved));
    if (workspace > run->workspace_size) run->workspace_size = workspace;
    if (saved > run->saved_size) run->saved_size = saved;
    return layer;
}

void layer_run_create(layer_run_t *run, const shape_t *shape, cumoe_dtype_t dtype, int threads)
{
    const int64_t elements = (int64_t)shape->T * shape->H, slots = (int64_t)shape->T * shape->K;
    *run = (layer_run_t){.shape = *shape, .dtype = dtype};
    layer_run_check(cumoe_handle_create(&run->handle, CUMOE_BACKEND_CPU, 0));
    run->layer = new_layer(run, CUMOE_GATE_NOISY_TOPK, threads);
    run->external = new_layer(run, CUMOE_GATE_EXTERNAL, threads);
    layer_run_check(cumoe_weights_create(run->layer, CUMOE_DTYPE_DEFAULT, &run->weights));
    layer_run_check(cumoe_weights_create(run->layer, CUMOE_F32, &run->gradients));
    layer_run_check(cumoe_weights_init(run->layer, 1, &run->weights, NULL));
    void **tokens[] = {&run->x, &run->dy, &run->y, &run->dx};
    for (int i = 0; i < 4; i++) *tokens[i] = device_array(run, elements, size_of(dtype));
    fill(dtype, run->x, elements, 1);
    fill(dtype, run->dy, elements, 2);
    run->expert = device_array(run, slots, sizeof *run->expert);
    run->weight = device_array(run, slots, sizeof *run->weight);
    run->workspace = device_array(run, (int64_t)run->workspace_size, 1);
    run->saved = device_array(run, (int64_t)run->saved_size, 1);
}

void layer_run_destroy(layer_run_t *run)
{
    void *arrays[] = {run->x, run->dy, run->y, run->dx, run->expert, run->weight, run->workspace, run->saved};
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) cumoe_memory_free(run->handle, arrays[i]);
    cumoe_weights_destroy(run->layer, &run->weights);
    cumoe_weights_destroy(run->layer, &run->gradients);
    cumoe_layer_destroy(run->layer);
    cumoe_layer_destroy(run->external);
    cumoe_handle_destroy(run->handle);
}

/* What the layer with external routing has. */
static cumoe_weights_t experts_alone(const cumoe_weights_t *weights)
{
    cumoe_weights_t experts = *weights;
    experts.w_gate = experts.w_noise = NULL;
    return experts;
}

void layer_run_forward(layer_run_t *run, bool external)
{
    const cumoe_weights_t experts = experts_alone(&run->weights);
    const cumoe_forward_args_t args = {.struct_size = sizeof args,
                                       .num_tokens = run->shape.T,
                                       .weights = external ? &experts : &run->weights,
                                       .x = run->x,
                                       .y = run->y,
                                       .training = !external,
                                       .seed = 1,
                                       .index = external ? run->expert : NULL,
                                       .index_weight = external ? run->weight : NULL,
                                       .chosen_expert = external ? NULL : run->expert,
                                       .chosen_weight = external ? NULL : run->weight,
                                       .workspace = run->workspace,
                                       .workspace_size = run->workspace_size,
                                       .saved = run->saved,
                                       .saved_size = run->saved_size};
    layer_run_check(cumoe_layer_forward(external ? run->external : run->layer, &args, NULL));
}

void layer_run_backward(layer_run_t *run, bool external)
{
    const cumoe_weights_t experts = experts_alone(&run->weights), gradients = experts_alone(&run->gradients);
    const cumoe_backward_args_t args = {.struct_size = sizeof args,
                                        .num_tokens = run->shape.T,
                                        .weights = external ? &experts : &run->weights,
                                        .x = run->x,
                                        .dy = run->dy,
                                        .training = !external,
                                        .dx = run->dx,
                                        .gradients = external ? &gradients : &run->gradients,
                                        .workspace = run->workspace,
                                        .workspace_size = run->workspace_size,
                                        .saved = run->saved,
                                        .saved_size = run->saved_size};
    layer_run_check(cumoe_layer_backward(external ? run->external : run->layer, &args, NULL));
}
