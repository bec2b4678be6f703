/* Rules about sizes and pointers that every call with arrays shares. */
#include "host/kinds.h"
#include "host/objects.h"

cumoe_status_t cumoe__check_tokens(const char *function, const cumoe_layer_t *layer, int64_t num_tokens)
{
    const cumoe_config_t *config = &layer->context.config;
    CUMOE_REQUIRE(num_tokens >= 0, INVALID_ARGUMENT, "%s: num_tokens = %lld, but must be >= 0", function,
                  (long long)num_tokens);
    /* F64: the fixed-point sums stay below 2^62. */
    const int32_t ranks = layer->context.ranks.count;
    const int32_t most = (config->dtype == CUMOE_F64 ? (1 << 22) : INT32_MAX) / ranks;
    CUMOE_REQUIRE(num_tokens <= most / config->top_k, INVALID_ARGUMENT,
                  "%s: num_tokens = %lld, but num_tokens * %d experts per token must be at most %d%s%s", function,
                  (long long)num_tokens, config->top_k, most, config->dtype == CUMOE_F64 ? " (2^22, F64)" : "",
                  ranks > 1 ? " by the number of ranks" : "");
    CUMOE_REQUIRE(
        cumoe__max_slots(config, num_tokens) <= most, INVALID_ARGUMENT,
        "%s: num_tokens = %lld, but the rows that this may give (cumoe_layer_max_rows()) and num_tokens together "
        "must be at most %d%s",
        function, (long long)num_tokens, most, config->dtype == CUMOE_F64 ? " (2^22, F64)" : "");
    return CUMOE_SUCCESS;
}

cumoe_status_t cumoe__check_array(const char *function, const char *name, const void *ptr, size_t alignment,
                                  bool required)
{
    CUMOE_REQUIRE(ptr || !required, INVALID_ARGUMENT, "%s: %s = NULL, but is required", function, name);
    CUMOE_REQUIRE((uintptr_t)ptr % alignment == 0, INVALID_ARGUMENT, "%s: %s = %p, but must be %zu-byte aligned",
                  function, name, ptr, alignment);
    return CUMOE_SUCCESS;
}

cumoe_status_t cumoe__check_stride(const char *function, const char *name, int64_t *stride, int64_t width,
                                   int64_t rows)
{
    if (*stride == 0) *stride = width;
    CUMOE_REQUIRE(*stride >= width, INVALID_ARGUMENT, "%s: %s = %lld, but must be 0 or at least %lld (hidden_size)",
                  function, name, (long long)*stride, (long long)width);
    const int64_t most = (int64_t)1 << 58; /* elements: no byte offset passes 62 bits */
    CUMOE_REQUIRE(rows == 0 || *stride <= most / rows, INVALID_ARGUMENT,
                  "%s: %s = %lld, but num_tokens * %s must be at most 2^58", function, name, (long long)*stride,
                  name);
    return CUMOE_SUCCESS;
}

cumoe_status_t cumoe__check_stream(const char *function, const cumoe_handle_t *handle, cumoe_stream_t stream)
{
    CUMOE_REQUIRE(!stream || handle->backend == CUMOE_BACKEND_CUDA, INVALID_ARGUMENT,
                  "%s: stream = %p, but must be NULL on the CPU", function, (void *)stream);
    return CUMOE_SUCCESS;
}

cumoe_status_t cumoe__check_buffer(const char *function, const char *name, const void *ptr, size_t size,
                                   size_t needed, int64_t num_tokens)
{
    CUMOE_REQUIRE(size >= needed, BUFFER_TOO_SMALL, "%s: %s_size = %zu, but %zu is needed for num_tokens = %lld",
                  function, name, size, needed, (long long)num_tokens);
    return cumoe__check_array(function, name, ptr, 16, needed > 0);
}

/* Do [rows, width] at a and at b share an element? With equal strides they may be two column ranges of one buffer.
 */
bool cumoe__overlap(const void *a, int64_t a_stride, const void *b, int64_t b_stride, int64_t rows, int64_t width,
                    size_t element)
{
    if (!a || !b || rows == 0) return false;
    const uintptr_t a0 = (uintptr_t)a, b0 = (uintptr_t)b, row = (uintptr_t)width * element;
    const uintptr_t a_end = a0 + (uintptr_t)((rows - 1) * a_stride) * element + row;
    const uintptr_t b_end = b0 + (uintptr_t)((rows - 1) * b_stride) * element + row;
    if (a_end <= b0 || b_end <= a0) return false;
    if (a_stride != b_stride) return true;
    const uintptr_t stride = (uintptr_t)a_stride * element, shift = (a0 < b0 ? b0 - a0 : a0 - b0) % stride;
    return shift < row || stride - shift < row;
}

static bool ranges_overlap(const cumoe_range_t *a, const cumoe_range_t *b)
{
    return a->ptr && b->ptr && a->size && b->size && (uintptr_t)a->ptr < (uintptr_t)b->ptr + b->size &&
           (uintptr_t)b->ptr < (uintptr_t)a->ptr + a->size;
}

cumoe_status_t cumoe__check_buffers_apart(const char *function, const cumoe_range_t *ranges, size_t count)
{
    for (size_t i = 0; i < 3; i++) /* workspace, saved and routing, against all others */
        for (size_t j = i + 1; j < count; j++)
            CUMOE_REQUIRE(!ranges_overlap(&ranges[i], &ranges[j]), INVALID_ARGUMENT,
                          "%s: %s = %p (%zu bytes) overlaps %s = %p (%zu bytes), but they may share no byte",
                          function, ranges[i].name, ranges[i].ptr, ranges[i].size, ranges[j].name, ranges[j].ptr,
                          ranges[j].size);
    return CUMOE_SUCCESS;
}

cumoe_status_t cumoe__check_first_token(const char *function, int64_t first_token, int64_t num_tokens)
{
    CUMOE_REQUIRE(first_token >= 0 && first_token <= ((int64_t)1 << 42) - num_tokens, INVALID_ARGUMENT,
                  "%s: first_token = %lld, but must be 0..2^42 - num_tokens", function, (long long)first_token);
    return CUMOE_SUCCESS;
}

cumoe_status_t cumoe__check_flag(const char *function, const char *name, int32_t flag)
{
    CUMOE_REQUIRE(flag == 0 || flag == 1, INVALID_ARGUMENT, "%s: %s = %d, but must be 0 or 1", function, name,
                  flag);
    return CUMOE_SUCCESS;
}

cumoe_status_t cumoe__check_mode(const char *function, cumoe_gradient_mode_t mode)
{
    CUMOE_REQUIRE((unsigned)mode <= CUMOE_GRADIENT_ADD, INVALID_ARGUMENT,
                  "%s: gradient_mode = %d, but must be WRITE (0) or ADD (1)", function, (int)mode);
    return CUMOE_SUCCESS;
}

cumoe_status_t cumoe__check_index(const char *function, const cumoe_layer_t *layer, int64_t num_tokens,
                                  const void *index_data, const void *weight_data, cumoe_dtype_t *index,
                                  cumoe_dtype_t *weight)
{
    const cumoe_config_t *config = &layer->context.config;
    if (config->gate != CUMOE_GATE_EXTERNAL) {
        CUMOE_REQUIRE(!index_data && !weight_data, INVALID_ARGUMENT,
                      "%s: index = %p, index_weight = %p, but only CUMOE_GATE_EXTERNAL takes choices: must be NULL",
                      function, index_data, weight_data);
        return CUMOE_SUCCESS;
    }
    CUMOE_TRY(cumoe__check_array(function, "index", index_data, 16, num_tokens > 0));
    CUMOE_TRY(cumoe__check_array(function, "index_weight", weight_data, 16, num_tokens > 0));
    const cumoe_dtype_t gate = cumoe__gate_dtype(config);
    if (*index == CUMOE_DTYPE_DEFAULT) *index = CUMOE_I32;
    if (*weight == CUMOE_DTYPE_DEFAULT) *weight = gate;
    CUMOE_REQUIRE(*index == CUMOE_I32 || *index == CUMOE_I64, INVALID_ARGUMENT,
                  "%s: index_dtype = %d, but must be I32 (5) or I64 (6)", function, (int)*index);
    CUMOE_REQUIRE(*weight == gate || *weight == config->dtype, INVALID_ARGUMENT,
                  "%s: index_weight_dtype = %d, but must be %d (gate type) or %d (config.dtype)", function,
                  (int)*weight, (int)gate, (int)config->dtype);
    return CUMOE_SUCCESS;
}

cumoe_status_t cumoe__check_batch_threshold(const char *function, const cumoe_layer_t *layer, const void *threshold,
                                            int32_t training)
{
    CUMOE_REQUIRE(!threshold || (layer->context.config.gate == CUMOE_GATE_BALANCED && training), INVALID_ARGUMENT,
                  "%s: batch_threshold = %p, but only CUMOE_GATE_BALANCED in training has it: must be NULL",
                  function, threshold);
    return CUMOE_SUCCESS;
}
