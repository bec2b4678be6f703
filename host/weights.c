#include "host/kinds.h"
#include "host/objects.h"
#include "host/weights_layout.h"

#include <stdio.h>
#include <string.h>

/* One array of a layer's parameters. */
typedef struct {
    const char *name;
    size_t field;     /* offset of the pointer in cumoe_weights_t */
    int64_t elements; /* when contiguous and SEPARATE; 0 = the layer does not have it */
    bool gate_type;
    bool optional; /* may be NULL in weights */
} array_t;

enum { NUM_ARRAYS = 12 };

static void list_arrays(const cumoe_config_t *c, array_t arrays[NUM_ARRAYS])
{
    const int64_t E = c->num_experts, G = c->num_groups, H = c->hidden_size, I = c->intermediate_size;
    const bool identity = c->activation == CUMOE_ACTIVATION_IDENTITY, glu = cumoe__is_glu(c->activation);
    const bool hierarchical = c->gate == CUMOE_GATE_HIERARCHICAL;
#define FIELD(name) #name, offsetof(cumoe_weights_t, name)
    const array_t list[NUM_ARRAYS] = {
        {FIELD(w_gate), c->gate == CUMOE_GATE_EXTERNAL ? 0 : E * H, true, false},
        {FIELD(w_noise), cumoe__is_noisy(c->gate) ? E * H : 0, true, false},
        {FIELD(w_gate_primary), hierarchical ? G * H : 0, true, false},
        {FIELD(w_noise_primary), hierarchical ? G * H : 0, true, false},
        {FIELD(thresholds), c->gate == CUMOE_GATE_BALANCED ? E : 0, true, false},
        {FIELD(gate_bias), c->gate == CUMOE_GATE_SIGMOID_TOPK ? E : 0, true, true},
        {FIELD(w_up), identity ? 0 : E * I * H, false, false},
        {FIELD(w_glu), glu ? E * I * H : 0, false, false},
        {FIELD(w_down), E * H * I, false, false},
        {FIELD(b_up), c->expert_bias && !identity ? E * I : 0, false, false},
        {FIELD(b_glu), c->expert_bias && glu ? E * I : 0, false, false},
        {FIELD(b_down), c->expert_bias ? E * H : 0, false, false},
    };
#undef FIELD
    memcpy(arrays, list, sizeof list);
}

static void **pointer_of(cumoe_weights_t *weights, const array_t *array)
{
    return (void **)((char *)weights + array->field);
}

/* Bytes of an array as it stands in the allocation: every array begins at a multiple of 256. */
static size_t array_size(const array_t *array, cumoe_dtype_t dtype, cumoe_dtype_t gate_dtype)
{
    const size_t size = (size_t)array->elements * cumoe__dtype_size(array->gate_type ? gate_dtype : dtype);
    return (size + 255) / 256 * 256;
}

static cumoe_status_t check_dtypes(const char *function, const char *name, const cumoe_config_t *config,
                                   bool gradients, const cumoe_weights_t *w)
{
    const cumoe_dtype_t wide = cumoe__gate_dtype(config);
    CUMOE_REQUIRE(w->dtype == config->dtype || (gradients && w->dtype == wide), INVALID_ARGUMENT,
                  "%s: %s.dtype = %d, but must be %d (config.dtype)%s", function, name, (int)w->dtype,
                  (int)config->dtype, gradients && wide != config->dtype ? " or F32 (2)" : "");
    CUMOE_REQUIRE(w->gate_dtype == wide || w->gate_dtype == config->dtype, INVALID_ARGUMENT,
                  "%s: %s.gate_dtype = %d, but must be %d (gate type) or %d (config.dtype)", function, name,
                  (int)w->gate_dtype, (int)wide, (int)config->dtype);
    CUMOE_REQUIRE((unsigned)w->glu <= CUMOE_GLU_INTERLEAVED, INVALID_ARGUMENT,
                  "%s: %s.glu = %d, but must be a cumoe_glu_placement_t, 0..3", function, name, (int)w->glu);
    CUMOE_REQUIRE(w->glu == CUMOE_GLU_SEPARATE || cumoe__is_glu(config->activation), INVALID_ARGUMENT,
                  "%s: %s.glu = %d, but the layer's activation has no glu half: must be SEPARATE (0)", function,
                  name, (int)w->glu);
    return CUMOE_SUCCESS;
}

static cumoe_status_t resolve_strides(const char *function, const char *name, const cumoe_config_t *config,
                                      cumoe_weights_t *w)
{
    const int64_t H = config->hidden_size, I = config->intermediate_size;
    const struct {
        const char *field;
        int64_t *stride, contiguous;
        int limit; /* log2: no offset passes 62 bits */
    } strides[] = {
        {"up_expert_stride", &w->up_expert_stride, I * H * (w->glu == CUMOE_GLU_SEPARATE ? 1 : 2), 42},
        {"up_row_stride", &w->up_row_stride, H, 33},
        {"up_col_stride", &w->up_col_stride, 1, 33},
        {"down_expert_stride", &w->down_expert_stride, H * I, 42},
        {"down_row_stride", &w->down_row_stride, I, 33},
        {"down_col_stride", &w->down_col_stride, 1, 33},
    };
    for (size_t i = 0; i < sizeof strides / sizeof strides[0]; i++) {
        CUMOE_REQUIRE(*strides[i].stride >= 0 && *strides[i].stride >> strides[i].limit == 0, INVALID_ARGUMENT,
                      "%s: %s.%s = %lld, but must be 0 (contiguous) or positive and below 2^%d", function, name,
                      strides[i].field, (long long)*strides[i].stride, strides[i].limit);
        if (*strides[i].stride == 0) *strides[i].stride = strides[i].contiguous;
    }
    return CUMOE_SUCCESS;
}

cumoe_status_t cumoe__weights_read(const char *function, const char *name, const cumoe_layer_t *layer,
                                   const cumoe_weights_t *theirs, bool gradients, cumoe_weights_t *ours)
{
    const cumoe_config_t *config = &layer->context.config;
    memset(ours, 0, sizeof *ours);
    if (!theirs && gradients) return CUMOE_SUCCESS;
    CUMOE_TRY(cumoe__struct_read(function, name, theirs, sizeof *ours, ours, sizeof *ours));
    if (ours->dtype == CUMOE_DTYPE_DEFAULT) ours->dtype = config->dtype;
    if (ours->gate_dtype == CUMOE_DTYPE_DEFAULT) ours->gate_dtype = cumoe__gate_dtype(config);
    CUMOE_TRY(check_dtypes(function, name, config, gradients, ours));
    CUMOE_TRY(resolve_strides(function, name, config, ours));
    array_t arrays[NUM_ARRAYS];
    list_arrays(config, arrays);
    for (int i = 0; i < NUM_ARRAYS; i++) {
        void **pointer = pointer_of(ours, &arrays[i]);
        const bool inside_up =
            ours->glu != CUMOE_GLU_SEPARATE && (pointer == &ours->w_glu || pointer == &ours->b_glu);
        if (arrays[i].elements == 0 || inside_up) {
            *pointer = NULL; /* the layer has no such array: whatever stands there is not looked at */
            continue;
        }
        if (*pointer ? (uintptr_t)*pointer % 16 == 0 : gradients || arrays[i].optional) continue;
        char full_name[64];
        snprintf(full_name, sizeof full_name, "%s.%s", name, arrays[i].name);
        return cumoe__check_array(function, full_name, *pointer, 16, true);
    }
    return CUMOE_SUCCESS;
}

cumoe_status_t cumoe_weights_create(const cumoe_layer_t *layer, cumoe_dtype_t dtype, cumoe_weights_t *weights)
{
    const char *function = "cumoe_weights_create";
    CUMOE_REQUIRE(layer, INVALID_ARGUMENT, "%s: layer = NULL, but must come from cumoe_layer_create()", function);
    CUMOE_REQUIRE(weights, INVALID_ARGUMENT, "%s: weights = NULL, but the result needs a place", function);
    const cumoe_config_t *config = &layer->context.config;
    cumoe_weights_t made = {.struct_size = sizeof made,
                            .dtype = dtype ? dtype : config->dtype,
                            .gate_dtype = cumoe__gate_dtype(config)};
    CUMOE_TRY(check_dtypes(function, "weights", config, true, &made));
    CUMOE_TRY(resolve_strides(function, "weights", config, &made));

    array_t arrays[NUM_ARRAYS];
    list_arrays(config, arrays);
    size_t size = 0;
    for (int i = 0; i < NUM_ARRAYS; i++) size += array_size(&arrays[i], made.dtype, made.gate_dtype);
    const cumoe_handle_t *handle = layer->handle;
    CUMOE_REQUIRE(handle->ops->memory_alloc(handle->device, size, &made.allocation) == CUMOE_SUCCESS, OUT_OF_MEMORY,
                  "%s: the arrays take %zu bytes, but the device has no such memory left", function, size);
    cumoe_status_t status = cumoe_memory_set(handle, made.allocation, 0, size, NULL);
    if (status == CUMOE_SUCCESS) status = cumoe_stream_synchronize(handle, NULL);
    if (status != CUMOE_SUCCESS) {
        cumoe_memory_free(handle, made.allocation);
        return status;
    }
    char *next = made.allocation;
    for (int i = 0; i < NUM_ARRAYS; i++) {
        if (arrays[i].elements) *pointer_of(&made, &arrays[i]) = next;
        next += array_size(&arrays[i], made.dtype, made.gate_dtype);
    }
    *weights = made;
    return CUMOE_SUCCESS;
}

void cumoe_weights_destroy(const cumoe_layer_t *layer, cumoe_weights_t *weights)
{
    if (!layer || !weights) return;
    cumoe_memory_free(layer->handle, weights->allocation);
    *weights = (cumoe_weights_t){.struct_size = sizeof *weights};
}

cumoe_status_t cumoe_weights_init(const cumoe_layer_t *layer, uint64_t seed, const cumoe_weights_t *weights,
                                  cumoe_stream_t stream)
{
    const char *function = "cumoe_weights_init";
    CUMOE_REQUIRE(layer, INVALID_ARGUMENT, "%s: layer = NULL, but must come from cumoe_layer_create()", function);
    CUMOE_REQUIRE(weights, INVALID_ARGUMENT, "%s: weights = NULL, but is required", function);
    cumoe_weights_t ours;
    CUMOE_TRY(cumoe__weights_read(function, "weights", layer, weights, true, &ours));
    CUMOE_TRY(cumoe__check_stream(function, layer->handle, stream));
    return layer->handle->ops->weights_init(&layer->context, seed, &ours, stream);
}
