#include "host/kinds.h"
#include "host/objects.h"
#include "host/weights_layout.h"

#include <stdio.h>
#include <string.h>

/* One array of a layer's parameters. */
typedef struct {
    const char *name;
    size_t field;       /* offset of the pointer in cumoe_weights_t */
    const char *absent; /* why the layer does not have it; NULL = it does */
    int64_t elements;   /* when contiguous and SEPARATE */
    bool of_experts;    /* has weights.dtype; else a gate's */
    bool optional;      /* may be NULL in weights */
} array_t;

enum { NUM_ARRAYS = 12 };

/* glu is where the glu half stands: beside w_up, or inside it. */
static void list_arrays(const cumoe_context_t *context, cumoe_glu_placement_t glu, array_t arrays[NUM_ARRAYS])
{
    const cumoe_config_t *c = &context->config;
    const int64_t E = c->num_experts, own = context->ranks.own_experts, G = c->num_groups, H = c->hidden_size,
                  I = c->intermediate_size;
    const char *no_gate = c->gate == CUMOE_GATE_EXTERNAL ? "the caller is the gate" : NULL;
    const char *no_noise = cumoe__is_noisy(c->gate) ? NULL : "the gate has no noise";
    const char *no_groups = c->gate == CUMOE_GATE_HIERARCHICAL ? NULL : "the gate has no groups";
    const char *no_thresholds = c->gate == CUMOE_GATE_BALANCED ? NULL : "the gate has no thresholds";
    const char *no_selection_bias = c->gate == CUMOE_GATE_SIGMOID_TOPK ? NULL : "the gate has no bias";
    const char *no_up = cumoe__is_linear(c->activation) ? "IDENTITY has one matrix, w_down" : NULL;
    const char *no_glu = !cumoe__is_glu(c->activation) ? "the activation has no glu half"
                         : glu != CUMOE_GLU_SEPARATE   ? "the glu half stands in w_up"
                                                       : NULL;
    const char *no_bias = c->expert_bias ? NULL : "config.expert_bias = 0";
#define FIELD(name) #name, offsetof(cumoe_weights_t, name)
    const array_t list[NUM_ARRAYS] = {
        {FIELD(w_gate), no_gate, E * H, false, false},
        {FIELD(w_noise), no_noise, E * H, false, false},
        {FIELD(w_gate_primary), no_groups, G * H, false, false},
        {FIELD(w_noise_primary), no_groups, G * H, false, false},
        {FIELD(thresholds), no_thresholds, E, false, false},
        {FIELD(gate_bias), no_selection_bias, E, false, true},
        {FIELD(w_up), no_up, own * I * H, true, false},
        {FIELD(w_glu), no_glu, own * I * H, true, false},
        {FIELD(w_down), NULL, own * H * I, true, false},
        {FIELD(b_up), no_bias ? no_bias : no_up, own * I, true, false},
        {FIELD(b_glu), no_bias ? no_bias : no_glu, own * I, true, false},
        {FIELD(b_down), no_bias, own * H, true, false},
    };
#undef FIELD
    memcpy(arrays, list, sizeof list);
}

static void **pointer_of(cumoe_weights_t *weights, const array_t *array)
{
    return (void **)((char *)weights + array->field);
}

/* Bytes of an array as it stands in an allocation of ours, where gates have the gate type: every array begins at a
 * multiple of 256. */
static size_t array_size(const array_t *array, const cumoe_weights_t *weights)
{
    if (array->absent) return 0;
    const cumoe_dtype_t dtype = array->of_experts ? weights->dtype : weights->gate_dtype;
    return ((size_t)array->elements * cumoe__dtype_size(dtype) + 255) / 256 * 256;
}

static cumoe_status_t check_dtypes(const char *function, const char *name, const cumoe_config_t *config,
                                   cumoe_role_t role, const cumoe_weights_t *w)
{
    const bool gradients = role == CUMOE_ROLE_GRADIENTS;
    const cumoe_dtype_t wide = cumoe__gate_dtype(config);
    CUMOE_REQUIRE(w->dtype == config->dtype || (gradients && w->dtype == wide), INVALID_ARGUMENT,
                  "%s: %s.dtype = %d, but must be %d (config.dtype)%s", function, name, (int)w->dtype,
                  (int)config->dtype, gradients && wide != config->dtype ? " or F32 (2)" : "");
    if (gradients)
        CUMOE_REQUIRE(w->gate_dtype == wide, INVALID_ARGUMENT,
                      "%s: %s.gate_dtype = %d, but gradients of gates are of the gate type: must be %d", function,
                      name, (int)w->gate_dtype, (int)wide);
    CUMOE_REQUIRE(w->gate_dtype == wide || w->gate_dtype == config->dtype, INVALID_ARGUMENT,
                  "%s: %s.gate_dtype = %d, but must be %d (gate type)%s", function, name, (int)w->gate_dtype,
                  (int)wide, wide == config->dtype ? "" : " or that of config.dtype");
    CUMOE_REQUIRE((unsigned)w->glu <= CUMOE_GLU_INTERLEAVED, INVALID_ARGUMENT,
                  "%s: %s.glu = %d, but must be a cumoe_glu_placement_t, 0..3", function, name, (int)w->glu);
    CUMOE_REQUIRE(w->glu == CUMOE_GLU_SEPARATE || cumoe__is_glu(config->activation), INVALID_ARGUMENT,
                  "%s: %s.glu = %d, but the layer's activation has no glu half: must be SEPARATE (0)", function,
                  name, (int)w->glu);
    return CUMOE_SUCCESS;
}

/* The strides of one of the two matrices. */
typedef struct {
    const char *name;
    int64_t rows, cols;
    int64_t *expert, *row, *col;
} strides_t;

static cumoe_status_t check_stride(const char *function, const char *name, const strides_t *s, const char *which,
                                   int64_t stride, int limit)
{
    CUMOE_REQUIRE(stride >= 0 && stride >> limit == 0, INVALID_ARGUMENT,
                  "%s: %s.%s_%s_stride = %lld, but must be 0 (contiguous) or positive and below 2^%d", function,
                  name, s->name, which, (long long)stride, limit);
    return CUMOE_SUCCESS;
}

/* What is written must not overlap itself: rows and columns one inside the other, experts apart. */
static cumoe_status_t check_apart(const char *function, const char *name, const strides_t *s, int64_t experts)
{
    const int64_t rows = (s->rows - 1) * *s->row, cols = (s->cols - 1) * *s->col; /* from the first to the last */
    CUMOE_REQUIRE(
        *s->row > cols || *s->col > rows || s->rows == 1 || s->cols == 1, INVALID_ARGUMENT,
        "%s: %s.%s_row_stride = %lld, %s_col_stride = %lld, but elements of [%lld, %lld] that are written "
        "may not overlap",
        function, name, s->name, (long long)*s->row, s->name, (long long)*s->col, (long long)s->rows,
        (long long)s->cols);
    CUMOE_REQUIRE(
        *s->expert > rows + cols || experts == 1, INVALID_ARGUMENT,
        "%s: %s.%s_expert_stride = %lld, but must be above %lld: experts that are written may not overlap",
        function, name, s->name, (long long)*s->expert, (long long)(rows + cols));
    return CUMOE_SUCCESS;
}

/* No offset passes 62 bits. Experts stand right behind each other by default, whatever the other strides are. */
static cumoe_status_t resolve_strides(const char *function, const char *name, const cumoe_context_t *context,
                                      bool written, cumoe_weights_t *w)
{
    const cumoe_config_t *config = &context->config;
    const int64_t H = config->hidden_size, I = config->intermediate_size;
    const strides_t matrices[] = {{"up", w->glu == CUMOE_GLU_SEPARATE ? I : 2 * I, H, &w->up_expert_stride,
                                   &w->up_row_stride, &w->up_col_stride},
                                  {"down", H, I, &w->down_expert_stride, &w->down_row_stride, &w->down_col_stride}};
    for (int i = 0; i < 2; i++) {
        const strides_t *s = &matrices[i];
        CUMOE_TRY(check_stride(function, name, s, "expert", *s->expert, 42));
        CUMOE_TRY(check_stride(function, name, s, "row", *s->row, 33));
        CUMOE_TRY(check_stride(function, name, s, "col", *s->col, 33));
        if (*s->row == 0) *s->row = s->cols;
        if (*s->col == 0) *s->col = 1;
        const int64_t by_rows = s->rows * *s->row, by_cols = s->cols * *s->col;
        if (*s->expert == 0) *s->expert = by_rows > by_cols ? by_rows : by_cols;
        CUMOE_REQUIRE(*s->expert <= ((int64_t)1 << 60) / config->num_experts, INVALID_ARGUMENT,
                      "%s: %s.%s_expert_stride = %lld, but times num_experts it must be at most 2^60", function,
                      name, s->name, (long long)*s->expert);
        if (written) CUMOE_TRY(check_apart(function, name, s, context->ranks.own_experts));
    }
    return CUMOE_SUCCESS;
}

cumoe_status_t cumoe__weights_read(const char *function, const char *name, const cumoe_layer_t *layer,
                                   const cumoe_weights_t *theirs, cumoe_role_t role, cumoe_weights_t *ours)
{
    const cumoe_config_t *config = &layer->context.config;
    memset(ours, 0, sizeof *ours);
    if (!theirs && role == CUMOE_ROLE_GRADIENTS) return CUMOE_SUCCESS;
    CUMOE_TRY(cumoe__struct_read(function, name, theirs, sizeof *ours, ours, sizeof *ours));
    if (ours->dtype == CUMOE_DTYPE_DEFAULT) ours->dtype = config->dtype;
    if (ours->gate_dtype == CUMOE_DTYPE_DEFAULT) ours->gate_dtype = cumoe__gate_dtype(config);
    CUMOE_TRY(check_dtypes(function, name, config, role, ours));
    CUMOE_TRY(resolve_strides(function, name, &layer->context, role != CUMOE_ROLE_WEIGHTS, ours));
    const bool anywhere = role == CUMOE_ROLE_WEIGHTS && layer->handle->backend == CUMOE_BACKEND_CPU;
    const bool complete = role == CUMOE_ROLE_WEIGHTS || role == CUMOE_ROLE_TRAINED_WEIGHTS;
    array_t arrays[NUM_ARRAYS];
    list_arrays(&layer->context, ours->glu, arrays);
    for (int i = 0; i < NUM_ARRAYS; i++) {
        const void *pointer = *pointer_of(ours, &arrays[i]);
        CUMOE_REQUIRE(!pointer || !arrays[i].absent, INVALID_ARGUMENT, "%s: %s.%s = %p, but must be NULL: %s",
                      function, name, arrays[i].name, pointer, arrays[i].absent);
        const size_t alignment = anywhere && arrays[i].of_experts ? cumoe__dtype_size(ours->dtype) : 16;
        if (pointer ? (uintptr_t)pointer % alignment == 0 : !complete || arrays[i].absent || arrays[i].optional)
            continue;
        char full_name[64];
        snprintf(full_name, sizeof full_name, "%s.%s", name, arrays[i].name);
        return cumoe__check_array(function, full_name, pointer, alignment, true);
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
    CUMOE_TRY(check_dtypes(function, "weights", config, CUMOE_ROLE_GRADIENTS, &made));
    CUMOE_TRY(resolve_strides(function, "weights", &layer->context, true, &made));

    array_t arrays[NUM_ARRAYS];
    list_arrays(&layer->context, made.glu, arrays);
    size_t size = 0;
    for (int i = 0; i < NUM_ARRAYS; i++) size += array_size(&arrays[i], &made);
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
        if (!arrays[i].absent) *pointer_of(&made, &arrays[i]) = next;
        next += array_size(&arrays[i], &made);
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
    CUMOE_TRY(cumoe__weights_read(function, "weights", layer, weights, CUMOE_ROLE_SOME_WEIGHTS, &ours));
    CUMOE_TRY(cumoe__check_stream(function, layer->handle, stream));
    return layer->handle->ops->weights_init(&layer->context, seed, &ours, stream);
}
