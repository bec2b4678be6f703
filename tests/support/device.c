#include "tests/support/device.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

cumoe_backend_t device_backend(void)
{
    const char *name = getenv("CUMOE_TEST_BACKEND");
    if (!name || strcmp(name, "cpu") == 0) return CUMOE_BACKEND_CPU;
    if (strcmp(name, "cuda") == 0) return CUMOE_BACKEND_CUDA;
    fprintf(stderr, "CUMOE_TEST_BACKEND = %s, but must be cpu or cuda\n", name);
    exit(EXIT_FAILURE);
}

static bool is_set(const char *name)
{
    const char *value = getenv(name);
    return value && strcmp(value, "1") == 0;
}

bool device_is_slow(void)
{
    const char *value = getenv("CUMOE_TEST_SHORT");
    return value && atoi(value) > 0;
}

int device_share(void)
{
    return device_is_slow() ? atoi(getenv("CUMOE_TEST_SHORT")) : 1;
}

int device_part(void)
{
    const char *value = getenv("CUMOE_TEST_PART");
    return value ? atoi(value) : 0;
}

bool device_has_twins(const cumoe_handle_t *handle)
{
    return cumoe_handle_backend(handle) == CUMOE_BACKEND_CUDA || is_set("CUMOE_TEST_MIRROR");
}

/* What the tests themselves ask of the library cannot be a matter of reports. */
static void require(cumoe_status_t status)
{
    if (status == CUMOE_SUCCESS) return;
    fprintf(stderr, "test device: %s\n", cumoe_last_error());
    exit(EXIT_FAILURE);
}

/* ---- twins ---- */

enum { ALIGNMENT = 256 }; /* of device memory */

/* As well aligned as the buffer, and no better. CUMOE_TEST_EXACT leaves the guard zone behind out: the allocation
 * ends with the data, and the simulator tells on those who only read behind it. */
static void make_twin(buffer_t *b, const cumoe_handle_t *handle)
{
    const size_t front = BUFFER_GUARD + (uintptr_t)b->data % ALIGNMENT;
    void *block = NULL;
    b->twin_front = BUFFER_GUARD;
    b->twin_back = is_set("CUMOE_TEST_EXACT") ? 0 : BUFFER_GUARD;
    require(cumoe_memory_alloc(handle, front + b->size + b->twin_back, &block));
    b->handle = handle;
    b->twin_block = block;
    b->twin = (unsigned char *)block + front;
}

static void copy_twin(const device_call_t *call, const buffer_t *b, cumoe_copy_t kind)
{
    unsigned char *host = b->data - b->twin_front, *device = b->twin - b->twin_front;
    const bool up = kind == CUMOE_COPY_TO_DEVICE;
    require(cumoe_memory_copy(call->handle, up ? device : host, up ? host : device,
                              b->twin_front + b->size + b->twin_back, kind, call->stream));
}

/* On the CPU a pointer that is not translated would serve as well: until the download there is nothing to be had
 * from the buffer itself. */
static void hide(const device_call_t *call, buffer_t *b)
{
    if (cumoe_handle_backend(call->handle) == CUMOE_BACKEND_CPU) memset(b->data, 0x3d, b->size);
}

void *device_address(device_call_t *call, const void *host)
{
    buffer_t *b = host && device_has_twins(call->handle) ? buffer_find(host) : NULL;
    if (!b) return (void *)host;
    if (!b->handle) make_twin(b, call->handle);
    if (b->in_use != call) {
        if (call->num_buffers == DEVICE_MAX_BUFFERS) {
            fprintf(stderr, "test device: a call names more than %d buffers\n", DEVICE_MAX_BUFFERS);
            exit(EXIT_FAILURE);
        }
        b->in_use = call;
        call->buffers[call->num_buffers++] = b;
        copy_twin(call, b, CUMOE_COPY_TO_DEVICE);
        hide(call, b);
    }
    return b->twin + ((const unsigned char *)host - b->data);
}

void device_upload(device_call_t *call, const void *host)
{
    const int named = call->num_buffers;
    buffer_t *b = device_has_twins(call->handle) ? buffer_find(host) : NULL;
    (void)device_address(call, host);
    if (b && call->num_buffers == named) copy_twin(call, b, CUMOE_COPY_TO_DEVICE);
}

void device_upload_all(device_call_t *call)
{
    for (int i = 0; i < call->num_buffers; i++) copy_twin(call, call->buffers[i], CUMOE_COPY_TO_DEVICE);
}

void device_begin(device_call_t *call, const cumoe_handle_t *handle)
{
    *call = (device_call_t){.handle = handle};
    if (device_has_twins(handle)) require(cumoe_stream_create(handle, &call->stream));
}

cumoe_status_t device_download(device_call_t *call)
{
    const cumoe_status_t status = cumoe_stream_synchronize(call->handle, call->stream);
    if (status != CUMOE_SUCCESS) return status;
    for (int i = 0; i < call->num_buffers; i++) copy_twin(call, call->buffers[i], CUMOE_COPY_TO_HOST);
    return cumoe_stream_synchronize(call->handle, call->stream);
}

cumoe_status_t device_end(device_call_t *call)
{
    const cumoe_status_t status = device_download(call);
    for (int i = 0; i < call->num_buffers; i++) call->buffers[i]->in_use = NULL;
    cumoe_stream_destroy(call->handle, call->stream);
    return status;
}

void *device_adopt(buffer_list_t *list, const cumoe_handle_t *handle, void *memory, size_t size)
{
    if (!memory || !device_has_twins(handle)) return memory;
    void *host = buffer_get(list, size);
    buffer_t *b = buffer_find(host);
    b->handle = handle;
    b->twin = memory;
    device_read(handle, host, memory, size);
    return host;
}

static void copy(const cumoe_handle_t *handle, void *dst, const void *src, size_t size, cumoe_copy_t kind)
{
    require(cumoe_memory_copy(handle, dst, src, size, kind, NULL));
    require(cumoe_stream_synchronize(handle, NULL));
}

void device_write(const cumoe_handle_t *handle, void *memory, const void *host, size_t size)
{
    copy(handle, memory, host, size, CUMOE_COPY_TO_DEVICE);
}

void device_read(const cumoe_handle_t *handle, void *host, const void *memory, size_t size)
{
    copy(handle, host, memory, size, CUMOE_COPY_TO_HOST);
}

/* ---- the pointers of the structs ---- */

#define TRANSLATE(pointer) ((pointer) = device_address(call, pointer))

static void translate_weights(device_call_t *call, const cumoe_weights_t **pointer)
{
    if (!*pointer) return;
    if (call->num_weights == DEVICE_MAX_WEIGHTS) {
        fprintf(stderr, "test device: a call names more than %d structs of weights\n", DEVICE_MAX_WEIGHTS);
        exit(EXIT_FAILURE);
    }
    cumoe_weights_t *w = &call->weights[call->num_weights++];
    *w = **pointer;
    TRANSLATE(w->w_gate), TRANSLATE(w->w_noise), TRANSLATE(w->w_gate_primary), TRANSLATE(w->w_noise_primary);
    TRANSLATE(w->thresholds), TRANSLATE(w->gate_bias);
    TRANSLATE(w->w_up), TRANSLATE(w->w_glu), TRANSLATE(w->w_down);
    TRANSLATE(w->b_up), TRANSLATE(w->b_glu), TRANSLATE(w->b_down);
    *pointer = w;
}

static void translate_routing(device_call_t *call, cumoe_routing_t *routing)
{
    TRANSLATE(routing->call), TRANSLATE(routing->expert), TRANSLATE(routing->weight);
    TRANSLATE(routing->tokens), TRANSLATE(routing->importance), TRANSLATE(routing->load);
    TRANSLATE(routing->token_slot), TRANSLATE(routing->slot_token), TRANSLATE(routing->excess);
    TRANSLATE(routing->primary_group), TRANSLATE(routing->primary_weight);
    TRANSLATE(routing->primary_load), TRANSLATE(routing->primary_count);
}

static void translate_rows(device_call_t *call, cumoe_rows_t *rows)
{
    TRANSLATE(rows->offset), TRANSLATE(rows->row_token), TRANSLATE(rows->row_slot);
    TRANSLATE(rows->slot_row), TRANSLATE(rows->tile);
}

void device_forward_args(device_call_t *call, cumoe_forward_args_t *a)
{
    translate_weights(call, &a->weights);
    TRANSLATE(a->x), TRANSLATE(a->y), TRANSLATE(a->token_mask), TRANSLATE(a->call);
    TRANSLATE(a->index), TRANSLATE(a->index_weight);
    TRANSLATE(a->chosen_expert), TRANSLATE(a->chosen_weight), TRANSLATE(a->expert_count);
    TRANSLATE(a->importance), TRANSLATE(a->load), TRANSLATE(a->losses), TRANSLATE(a->statistics);
    TRANSLATE(a->chosen_offset), TRANSLATE(a->batch_threshold);
    TRANSLATE(a->workspace), TRANSLATE(a->saved), TRANSLATE(a->routing);
}

void device_backward_args(device_call_t *call, cumoe_backward_args_t *a)
{
    translate_weights(call, &a->weights);
    translate_weights(call, &a->gradients);
    TRANSLATE(a->x), TRANSLATE(a->dy), TRANSLATE(a->token_mask), TRANSLATE(a->loss_gradient);
    TRANSLATE(a->dx), TRANSLATE(a->dindex_weight), TRANSLATE(a->workspace), TRANSLATE(a->saved);
    TRANSLATE(a->routing);
}

void device_optimizer_args(device_call_t *call, cumoe_optimizer_args_t *a)
{
    translate_weights(call, &a->weights);
    translate_weights(call, &a->gradients);
    TRANSLATE(a->call), TRANSLATE(a->state);
}

static void gate_args(device_call_t *call, cumoe_gate_args_t *a)
{
    translate_weights(call, &a->weights);
    translate_routing(call, &a->routing);
    TRANSLATE(a->x), TRANSLATE(a->token_mask), TRANSLATE(a->call), TRANSLATE(a->index), TRANSLATE(a->index_weight);
    TRANSLATE(a->expert_count), TRANSLATE(a->importance), TRANSLATE(a->load), TRANSLATE(a->losses);
    TRANSLATE(a->batch_threshold), TRANSLATE(a->statistics), TRANSLATE(a->workspace);
}

static void permute_args(device_call_t *call, cumoe_permute_args_t *a)
{
    translate_routing(call, &a->routing);
    translate_rows(call, &a->rows);
    TRANSLATE(a->workspace);
}

static void up_args(device_call_t *call, cumoe_up_args_t *a)
{
    translate_weights(call, &a->weights);
    translate_rows(call, &a->rows);
    TRANSLATE(a->x), TRANSLATE(a->z), TRANSLATE(a->hidden), TRANSLATE(a->workspace);
}

static void down_args(device_call_t *call, cumoe_down_args_t *a)
{
    translate_weights(call, &a->weights);
    translate_rows(call, &a->rows);
    TRANSLATE(a->hidden), TRANSLATE(a->output), TRANSLATE(a->workspace);
}

static void combine_args(device_call_t *call, cumoe_combine_args_t *a)
{
    translate_routing(call, &a->routing);
    translate_rows(call, &a->rows);
    TRANSLATE(a->output), TRANSLATE(a->y);
}

static void down_backward_args(device_call_t *call, cumoe_down_backward_args_t *a)
{
    translate_weights(call, &a->weights);
    translate_weights(call, &a->gradients);
    translate_routing(call, &a->routing);
    translate_rows(call, &a->rows);
    TRANSLATE(a->z), TRANSLATE(a->dy), TRANSLATE(a->dz), TRANSLATE(a->dweight), TRANSLATE(a->workspace);
}

static void gate_backward_args(device_call_t *call, cumoe_gate_backward_args_t *a)
{
    translate_weights(call, &a->weights);
    translate_weights(call, &a->gradients);
    translate_routing(call, &a->routing);
    TRANSLATE(a->x), TRANSLATE(a->token_mask), TRANSLATE(a->dweight), TRANSLATE(a->loss_gradient);
    TRANSLATE(a->dx_gate), TRANSLATE(a->workspace);
}

static void up_backward_args(device_call_t *call, cumoe_up_backward_args_t *a)
{
    translate_weights(call, &a->weights);
    translate_weights(call, &a->gradients);
    translate_rows(call, &a->rows);
    TRANSLATE(a->x), TRANSLATE(a->dz), TRANSLATE(a->drows), TRANSLATE(a->workspace);
}

static void permute_backward_args(device_call_t *call, cumoe_permute_backward_args_t *a)
{
    translate_routing(call, &a->routing);
    translate_rows(call, &a->rows);
    TRANSLATE(a->drows), TRANSLATE(a->dx_gate), TRANSLATE(a->dx);
}

/* ---- the calls ---- */

static cumoe_status_t end_with(device_call_t *call, cumoe_status_t status)
{
    const cumoe_status_t end = device_end(call);
    return status == CUMOE_SUCCESS ? end : status;
}

#define DEVICE_CALL(name, args_t, translate)                                                                       \
    cumoe_status_t device_##name(const cumoe_handle_t *handle, const cumoe_layer_t *layer, const args_t *args)     \
    {                                                                                                              \
        device_call_t call;                                                                                        \
        args_t translated = *args;                                                                                 \
        device_begin(&call, handle);                                                                               \
        translate(&call, &translated);                                                                             \
        return end_with(&call, cumoe_##name(layer, &translated, call.stream));                                     \
    }

DEVICE_CALL(layer_forward, cumoe_forward_args_t, device_forward_args)
DEVICE_CALL(layer_backward, cumoe_backward_args_t, device_backward_args)
DEVICE_CALL(gate, cumoe_gate_args_t, gate_args)
DEVICE_CALL(permute, cumoe_permute_args_t, permute_args)
DEVICE_CALL(experts_up, cumoe_up_args_t, up_args)
DEVICE_CALL(experts_down, cumoe_down_args_t, down_args)
DEVICE_CALL(combine, cumoe_combine_args_t, combine_args)
DEVICE_CALL(experts_down_backward, cumoe_down_backward_args_t, down_backward_args)
DEVICE_CALL(gate_backward, cumoe_gate_backward_args_t, gate_backward_args)
DEVICE_CALL(experts_up_backward, cumoe_up_backward_args_t, up_backward_args)
DEVICE_CALL(permute_backward, cumoe_permute_backward_args_t, permute_backward_args)
DEVICE_CALL(optimizer_step, cumoe_optimizer_args_t, device_optimizer_args)

cumoe_status_t device_weights_init(const cumoe_handle_t *handle, const cumoe_layer_t *layer, uint64_t seed,
                                   const cumoe_weights_t *weights)
{
    device_call_t call;
    device_begin(&call, handle);
    translate_weights(&call, &weights);
    return end_with(&call, cumoe_weights_init(layer, seed, weights, call.stream));
}

cumoe_status_t device_gate_bias_update(const cumoe_handle_t *handle, const cumoe_layer_t *layer, void *gate_bias,
                                       const int32_t *expert_count, float rate)
{
    device_call_t call;
    device_begin(&call, handle);
    gate_bias = device_address(&call, gate_bias);
    expert_count = device_address(&call, expert_count);
    return end_with(&call, cumoe_gate_bias_update(layer, gate_bias, expert_count, rate, call.stream));
}

cumoe_status_t device_ep_plan(const cumoe_handle_t *handle, const cumoe_layer_t *layer,
                              const cumoe_forward_args_t *args, cumoe_ep_plan_t *plan, cumoe_ep_sizes_t *sizes)
{
    device_call_t call;
    cumoe_forward_args_t translated = *args;
    device_begin(&call, handle);
    device_forward_args(&call, &translated);
    return end_with(&call, cumoe_ep_plan(layer, &translated, plan, sizes, call.stream));
}

cumoe_status_t device_ep_sum_gradients(const cumoe_handle_t *handle, const cumoe_layer_t *layer,
                                       const cumoe_weights_t *gradients)
{
    device_call_t call;
    device_begin(&call, handle);
    translate_weights(&call, &gradients);
    return end_with(&call, cumoe_ep_sum_gradients(layer, gradients, call.stream));
}
