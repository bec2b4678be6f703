#include "host/arena.h"
#include "host/exchange.h"
#include "host/kinds.h"

#include <stdlib.h>

/* Two chunks hide half of the shorter of exchange and products; each more costs launches. Few rows, as a capacity
 * is for, are not worth them, and without streams nothing is hidden. LEAST experts are those of a rank. */
static int32_t choose_chunks(const cumoe_handle_t *handle, const cumoe_config_t *config, int32_t least)
{
    const bool hides = handle->ops->lane_create && config->ep->num_ranks > 1 && cumoe__is_planned(config);
    return hides && least >= 2 ? 2 : 1;
}

/* And what is left to choose is chosen. */
static cumoe_status_t check_ranks(const char *function, const cumoe_handle_t *handle, cumoe_config_t *config)
{
    const cumoe_ep_t *ep = config->ep;
    CUMOE_REQUIRE(ep || config->exchange_capacity == 0, INVALID_ARGUMENT,
                  "%s: config.exchange_capacity = %lld, but without config.ep nothing is exchanged: must be 0",
                  function, (long long)config->exchange_capacity);
    CUMOE_REQUIRE(ep || config->exchange_chunks == 0, INVALID_ARGUMENT,
                  "%s: config.exchange_chunks = %d, but without config.ep nothing is exchanged: must be 0",
                  function, config->exchange_chunks);
    if (!ep) {
        config->exchange_chunks = 1;
        return CUMOE_SUCCESS;
    }
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
    CUMOE_REQUIRE(config->exchange_capacity <= INT32_MAX / ep->num_ranks - CUMOE_MAX_CHUNKS, INVALID_ARGUMENT,
                  "%s: config.exchange_capacity = %lld, but + %d, times %d ranks, it must be below 2^31", function,
                  (long long)config->exchange_capacity, CUMOE_MAX_CHUNKS, ep->num_ranks);
    const int32_t least = units / ep->num_ranks * cumoe__experts_together(config);
    CUMOE_REQUIRE(config->exchange_chunks <= least, INVALID_ARGUMENT,
                  "%s: config.exchange_chunks = %d, but one of the %d ranks has %d experts: must be 0..%d",
                  function, config->exchange_chunks, ep->num_ranks, least,
                  least < CUMOE_MAX_CHUNKS ? least : CUMOE_MAX_CHUNKS);
    if (config->exchange_chunks == 0) config->exchange_chunks = choose_chunks(handle, config, least);
    return cumoe__ep_agree(function, config);
}

/* The contexts of the stages that see rows of other ranks, and tokens sorted by parcel. */
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
    parcels->num_experts = ranks->count * config->exchange_chunks;
    experts->top_k = 1;
    experts->gate = parcels->gate = CUMOE_GATE_EXTERNAL;
    experts->num_groups = parcels->num_groups = experts->top_k_groups = parcels->top_k_groups = 0;
}

static cumoe_status_t prepare_exchange(const char *function, cumoe_layer_t *layer)
{
    const cumoe_config_t *config = &layer->context.config;
    const cumoe_backend_ops_t *ops = layer->handle->ops;
    if (config->exchange_capacity > 0) {
        layer->bounded = calloc(1, sizeof *layer->bounded);
        CUMOE_REQUIRE(layer->bounded && cumoe__traffic_alloc(layer->bounded, layer), OUT_OF_MEMORY,
                      "%s: no host memory for the layer", function);
        cumoe__traffic_fill_capacity(layer->bounded, layer);
    }
    const bool overlaps = config->exchange_chunks > 1 && ops->lane_create;
    return overlaps ? ops->lane_create(layer->handle->device, &layer->lane) : CUMOE_SUCCESS;
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
    const cumoe_status_t status = prepare_exchange(function, made);
    if (status != CUMOE_SUCCESS) {
        cumoe_layer_destroy(made);
        return status;
    }
    *layer = made;
    return CUMOE_SUCCESS;
}

void cumoe_layer_destroy(cumoe_layer_t *layer)
{
    if (!layer) return;
    if (layer->lane.stream) layer->handle->ops->lane_destroy(layer->handle->device, &layer->lane);
    if (layer->bounded) cumoe__traffic_free(layer->bounded);
    free(layer->bounded);
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
    const cumoe_traffic_t *traffic = layer->bounded;
    const bool planned = cumoe__is_planned(&layer->context.config);
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
