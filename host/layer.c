#include "host/arena.h"
#include "host/exchange.h"
#include "host/kinds.h"

#include <stdlib.h>

static cumoe_status_t check_ranks(const char *function, const cumoe_handle_t *handle, const cumoe_config_t *config)
{
    const cumoe_ep_t *ep = config->ep;
    CUMOE_REQUIRE(ep || config->exchange_capacity == 0, INVALID_ARGUMENT,
                  "%s: config.exchange_capacity = %lld, but without config.ep nothing is exchanged: must be 0",
                  function, (long long)config->exchange_capacity);
    if (!ep) return CUMOE_SUCCESS;
    const int32_t units = config->num_experts / cumoe__experts_together(config);
    CUMOE_REQUIRE(ep->handle == handle, INVALID_ARGUMENT,
                  "%s: config.ep is of handle %p, but the layer is of handle %p: must be the same", function,
                  (const void *)ep->handle, (const void *)handle);
    CUMOE_REQUIRE(
        config->gate != CUMOE_GATE_BALANCED, UNSUPPORTED_CONFIG,
        "%s: config.gate = CUMOE_GATE_BALANCED, but experts that choose among the tokens of all ranks are "
        "not in this version: must be another kind with config.ep",
        function);
    CUMOE_REQUIRE(units >= ep->num_ranks, INVALID_ARGUMENT,
                  "%s: config.%s = %d, but each of the %d ranks needs one: must be at least that", function,
                  config->num_groups > 0 ? "num_groups" : "num_experts", units, ep->num_ranks);
    CUMOE_REQUIRE(config->exchange_capacity <= INT32_MAX / ep->num_ranks, INVALID_ARGUMENT,
                  "%s: config.exchange_capacity = %lld, but times %d ranks it must be below 2^31", function,
                  (long long)config->exchange_capacity, ep->num_ranks);
    return cumoe__ep_agree(function, config);
}

/* The contexts of the stages that see rows of other ranks, and tokens sorted by rank. */
static void split_contexts(cumoe_layer_t *layer)
{
    const cumoe_config_t *config = &layer->context.config;
    cumoe_ranks_t *ranks = &layer->context.ranks;
    *ranks = (cumoe_ranks_t){.count = 1, .own_experts = config->num_experts};
    layer->experts = layer->context;
    if (!config->ep) return;
    ranks->count = config->ep->num_ranks;
    ranks->rank = config->ep->rank;
    ranks->first_expert = cumoe__first_expert(config, ranks->count, ranks->rank);
    ranks->own_experts = cumoe__first_expert(config, ranks->count, ranks->rank + 1) - ranks->first_expert;

    layer->experts = layer->parcels = layer->context;
    cumoe_config_t *experts = &layer->experts.config, *parcels = &layer->parcels.config;
    experts->num_experts = ranks->own_experts;
    parcels->num_experts = ranks->count;
    experts->top_k = 1;
    experts->gate = parcels->gate = CUMOE_GATE_EXTERNAL;
    experts->num_groups = parcels->num_groups = experts->top_k_groups = parcels->top_k_groups = 0;
}

cumoe_status_t cumoe_layer_create(cumoe_layer_t **layer, const cumoe_handle_t *handle, const cumoe_config_t *config)
{
    const char *function = "cumoe_layer_create";
    CUMOE_REQUIRE(layer, INVALID_ARGUMENT, "%s: layer = NULL, but the result needs a place", function);
    CUMOE_REQUIRE(handle, INVALID_ARGUMENT, "%s: handle = NULL, but must come from cumoe_handle_create()",
                  function);
    cumoe_config_t read;
    CUMOE_TRY(cumoe__config_read(function, config, &read));
    CUMOE_TRY(handle->ops->supports(handle->device, &read));
    CUMOE_TRY(check_ranks(function, handle, &read));

    cumoe_layer_t *made = calloc(1, sizeof *made);
    CUMOE_REQUIRE(made, OUT_OF_MEMORY, "%s: no host memory for the layer", function);
    made->handle = handle;
    made->context = (cumoe_context_t){.config = read, .device = handle->device};
    split_contexts(made);
    if (read.exchange_capacity > 0) {
        const int64_t W = made->context.ranks.count;
        made->blocks = malloc(2 * (size_t)W * sizeof *made->blocks);
        if (!made->blocks) {
            free(made);
            return cumoe__fail(CUMOE_OUT_OF_MEMORY, "%s: no host memory for the layer", function);
        }
        for (int64_t r = 0; r < W; r++) {
            made->blocks[r] = r * read.exchange_capacity;
            made->blocks[W + r] = read.exchange_capacity;
        }
    }
    *layer = made;
    return CUMOE_SUCCESS;
}

void cumoe_layer_destroy(cumoe_layer_t *layer)
{
    if (layer) free(layer->blocks);
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
    cumoe_traffic_t bounded;
    const cumoe_traffic_t *traffic = NULL;
    const bool planned = cumoe__is_planned(&layer->context.config);
    if (!planned) CUMOE_TRY(cumoe__exchange_traffic(function, layer, NULL, NULL, num_tokens, &bounded, &traffic));
    const cumoe_pass_t last = planned ? CUMOE_PASS_PLAN : saved_size ? CUMOE_PASS_BACKWARD : CUMOE_PASS_INFERENCE;
    size_t workspace = 0, saved = 0;
    for (cumoe_pass_t pass = planned ? CUMOE_PASS_PLAN : CUMOE_PASS_INFERENCE; pass <= last; pass++) {
        const cumoe_layout_t need = cumoe__layout(layer, pass, num_tokens, traffic, (cumoe_memory_t){0});
        if (need.workspace_size > workspace) workspace = need.workspace_size;
        if (need.saved_size > saved) saved = need.saved_size;
    }
    *workspace_size = workspace;
    if (saved_size) *saved_size = saved;
    return CUMOE_SUCCESS;
}

static size_t saved_size(const cumoe_layer_t *layer, int64_t num_tokens)
{
    return cumoe__layout(layer, CUMOE_PASS_FORWARD, num_tokens, NULL, (cumoe_memory_t){0}).saved_size;
}

cumoe_status_t cumoe_layer_saved_bound(const cumoe_layer_t *layer, size_t *base, size_t *per_token)
{
    const char *function = "cumoe_layer_saved_bound";
    CUMOE_REQUIRE(layer, INVALID_ARGUMENT, "%s: layer = NULL, but must come from cumoe_layer_create()", function);
    CUMOE_REQUIRE(base && per_token, INVALID_ARGUMENT, "%s: %s = NULL, but the result needs a place", function,
                  base ? "per_token" : "base");
    const cumoe_config_t *config = &layer->context.config;
    CUMOE_REQUIRE(!config->ep, UNSUPPORTED_CONFIG,
                  "%s: layer has config.ep, but with ranks saved hangs on more than the tokens of this one",
                  function);
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
