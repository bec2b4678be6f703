#include "host/arena.h"
#include "host/kinds.h"
#include "host/layout.h"

#include <stdlib.h>

cumoe_status_t cumoe_layer_create(cumoe_layer_t **layer, const cumoe_handle_t *handle, const cumoe_config_t *config)
{
    const char *function = "cumoe_layer_create";
    CUMOE_REQUIRE(layer, INVALID_ARGUMENT, "%s: layer = NULL, but the result needs a place", function);
    CUMOE_REQUIRE(handle, INVALID_ARGUMENT, "%s: handle = NULL, but must come from cumoe_handle_create()",
                  function);
    cumoe_config_t read;
    CUMOE_TRY(cumoe__config_read(function, config, &read));
    CUMOE_REQUIRE(!read.ep, UNSUPPORTED_CONFIG,
                  "%s: config.ep (expert parallelism) is not in this version: must be NULL", function);
    CUMOE_TRY(handle->ops->supports(handle->device, &read));

    cumoe_layer_t *made = malloc(sizeof *made);
    CUMOE_REQUIRE(made, OUT_OF_MEMORY, "%s: no host memory for the layer", function);
    *made = (cumoe_layer_t){.handle = handle, .context = {.config = read, .device = handle->device}};
    *layer = made;
    return CUMOE_SUCCESS;
}

void cumoe_layer_destroy(cumoe_layer_t *layer)
{
    free(layer);
}

cumoe_status_t cumoe_layer_max_rows(const cumoe_layer_t *layer, int64_t num_tokens, int64_t *max_rows,
                                    int64_t *max_slots)
{
    const char *function = "cumoe_layer_max_rows";
    CUMOE_REQUIRE(layer, INVALID_ARGUMENT, "%s: layer = NULL, but must come from cumoe_layer_create()", function);
    CUMOE_TRY(cumoe__check_tokens(function, layer, num_tokens));
    if (max_rows) *max_rows = cumoe__max_rows(&layer->context.config, num_tokens);
    if (max_slots) *max_slots = cumoe__max_slots(&layer->context.config, num_tokens);
    return CUMOE_SUCCESS;
}

cumoe_status_t cumoe_layer_buffer_sizes(const cumoe_layer_t *layer, int64_t num_tokens, size_t *workspace_size,
                                        size_t *saved_size)
{
    const char *function = "cumoe_layer_buffer_sizes";
    CUMOE_REQUIRE(layer, INVALID_ARGUMENT, "%s: layer = NULL, but must come from cumoe_layer_create()", function);
    CUMOE_REQUIRE(workspace_size, INVALID_ARGUMENT, "%s: workspace_size = NULL, but the result needs a place",
                  function);
    CUMOE_TRY(cumoe__check_tokens(function, layer, num_tokens));
    size_t most = cumoe__layout(layer, CUMOE_PASS_INFERENCE, num_tokens, NULL, NULL).workspace_size;
    if (saved_size) {
        const cumoe_layout_t forward = cumoe__layout(layer, CUMOE_PASS_FORWARD, num_tokens, NULL, NULL);
        const cumoe_layout_t backward = cumoe__layout(layer, CUMOE_PASS_BACKWARD, num_tokens, NULL, NULL);
        if (forward.workspace_size > most) most = forward.workspace_size;
        if (backward.workspace_size > most) most = backward.workspace_size;
        *saved_size = forward.saved_size;
    }
    *workspace_size = most;
    return CUMOE_SUCCESS;
}

static size_t saved_size(const cumoe_layer_t *layer, int64_t num_tokens)
{
    return cumoe__layout(layer, CUMOE_PASS_FORWARD, num_tokens, NULL, NULL).saved_size;
}

cumoe_status_t cumoe_layer_saved_bound(const cumoe_layer_t *layer, size_t *base, size_t *per_token)
{
    const char *function = "cumoe_layer_saved_bound";
    CUMOE_REQUIRE(layer, INVALID_ARGUMENT, "%s: layer = NULL, but must come from cumoe_layer_create()", function);
    CUMOE_REQUIRE(base && per_token, INVALID_ARGUMENT, "%s: %s = NULL, but the result needs a place", function,
                  base ? "per_token" : "base");
    const cumoe_config_t *config = &layer->context.config;
    const int64_t least = config->max_rows > config->num_experts ? config->max_rows : config->num_experts;

    /* From so many tokens on rows grow with tokens, and each array by a fixed number of bytes for every 4096. */
    const int64_t far = (least + 4095) / 4096 * 4096;
    const size_t once = saved_size(layer, far), twice = saved_size(layer, 2 * far);
    *per_token = (twice - once + (size_t)far - 1) / (size_t)far;
    if (config->gate == CUMOE_GATE_BALANCED)
        *base = saved_size(layer, (least + config->top_k - 1) / config->top_k); /* fewer tokens have no more rows */
    else
        *base = 2 * once - twice;
    *base += CUMOE_LAYOUT_ARRAYS * CUMOE_ARENA_ALIGNMENT;
    return CUMOE_SUCCESS;
}
