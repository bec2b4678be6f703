/* Rules about sizes and pointers that every call with arrays shares. */
#include "host/kinds.h"
#include "host/objects.h"

cumoe_status_t cumoe__check_tokens(const char *function, const cumoe_layer_t *layer, int64_t num_tokens)
{
    const cumoe_config_t *config = &layer->context.config;
    CUMOE_REQUIRE(num_tokens >= 0, INVALID_ARGUMENT, "%s: num_tokens = %lld, but must be >= 0", function,
                  (long long)num_tokens);
    CUMOE_REQUIRE(num_tokens <= INT32_MAX / config->top_k, INVALID_ARGUMENT,
                  "%s: num_tokens = %lld, but num_tokens * %d experts per token must be below 2^31", function,
                  (long long)num_tokens, config->top_k);
    /* The fixed-point sums would pass 2^63. */
    CUMOE_REQUIRE(config->dtype != CUMOE_F64 || num_tokens <= (int64_t)1 << 22, UNSUPPORTED_CONFIG,
                  "%s: num_tokens = %lld, but with CUMOE_F64 at most 2^22", function, (long long)num_tokens);
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

cumoe_status_t cumoe__check_stride(const char *function, const char *name, int64_t *stride, int64_t width)
{
    if (*stride == 0) *stride = width;
    /* The upper bound keeps every offset, rows below 2^31 times stride times 8 bytes, within 63 bits. */
    CUMOE_REQUIRE(*stride >= width && *stride <= INT32_MAX, INVALID_ARGUMENT,
                  "%s: %s = %lld, but must be 0 or %lld (hidden_size) .. 2^31 - 1", function, name,
                  (long long)*stride, (long long)width);
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

bool cumoe__overlap(const void *a, int64_t a_stride, const void *b, int64_t b_stride, int64_t rows, int64_t width,
                    size_t element)
{
    if (!a || !b || rows == 0) return false;
    const uintptr_t a0 = (uintptr_t)a, b0 = (uintptr_t)b;
    return a0 < b0 + (uintptr_t)((rows - 1) * b_stride + width) * element &&
           b0 < a0 + (uintptr_t)((rows - 1) * a_stride + width) * element;
}

cumoe_status_t cumoe__check_noise_name(const char *function, int64_t first_token)
{
    CUMOE_REQUIRE(first_token >= 0 && first_token < (int64_t)1 << 42, INVALID_ARGUMENT,
                  "%s: first_token = %lld, but must be 0..2^42 - 1", function, (long long)first_token);
    return CUMOE_SUCCESS;
}

cumoe_status_t cumoe__check_index_types(const char *function, const cumoe_config_t *config, cumoe_dtype_t *index,
                                        cumoe_dtype_t *weight)
{
    if (config->gate != CUMOE_GATE_EXTERNAL) return CUMOE_SUCCESS;
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
