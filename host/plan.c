/* Plans: how many rows of a call go from where to where. */
#include "host/exchange.h"
#include "host/kinds.h"

#include <stdlib.h>

static cumoe_status_t check_layer(const char *function, const cumoe_layer_t *layer)
{
    CUMOE_REQUIRE(layer, INVALID_ARGUMENT, "%s: layer = NULL, but must come from cumoe_layer_create()", function);
    CUMOE_REQUIRE(cumoe__is_planned(&layer->context.config), INVALID_ARGUMENT,
                  "%s: layer has %s, but plans are for ranks without a capacity", function,
                  layer->context.config.ep ? "config.exchange_capacity" : "no config.ep");
    return CUMOE_SUCCESS;
}

bool cumoe__traffic_alloc(cumoe_traffic_t *traffic, const cumoe_layer_t *layer)
{
    const size_t parcels = (size_t)layer->parcels.config.num_experts;
    *traffic = (cumoe_traffic_t){.count = calloc(4 * parcels, sizeof *traffic->count),
                                 .blocks = calloc(8 * parcels, sizeof *traffic->blocks)};
    if (traffic->count && traffic->blocks) return true;
    cumoe__traffic_free(traffic);
    return false;
}

void cumoe__traffic_free(cumoe_traffic_t *traffic)
{
    free(traffic->count);
    free(traffic->blocks);
    *traffic = (cumoe_traffic_t){0};
}

/* Blocks [2, W]: COUNT of rank R stand at *NEXT, and what follows behind them. */
static void append(int64_t *blocks, int64_t W, int64_t r, int32_t count, int64_t *next)
{
    blocks[r] = *next;
    blocks[W + r] = count;
    *next += count;
}

/* From count to everything else: parcels stand one behind the other, but rows that come, chunk by chunk. */
static void fill(cumoe_traffic_t *t, const cumoe_layer_t *layer)
{
    const int32_t W = layer->context.ranks.count, n = layer->context.config.exchange_chunks;
    const int32_t *sent = t->count, *received = t->count + 2 * W * n;
    int64_t rows_sent = 0, tokens_sent = 0, tokens_received = 0, place = 0;
    t->num_rows_received = 0;
    for (int32_t r = 0; r < W; r++)
        for (int32_t c = 0; c < n; c++) {
            int64_t *blocks = t->blocks + (int64_t)8 * W * c;
            const int32_t parcel = r * n + c;
            append(blocks, W, r, sent[2 * parcel], &rows_sent);
            append(blocks + 2 * W, W, r, sent[2 * parcel + 1], &tokens_sent);
            append(blocks + 6 * W, W, r, received[2 * parcel + 1], &tokens_received);
        }
    for (int32_t c = 0; c < n; c++) {
        int64_t *blocks = t->blocks + (int64_t)8 * W * c;
        cumoe_chunk_t *chunk = &t->chunk[c];
        place = (place + 63) / 64 * 64; /* so that arrays are aligned there */
        chunk->first_row = place;
        for (int32_t r = 0; r < W; r++) append(blocks + 4 * W, W, r, received[2 * (r * n + c)], &place);
        chunk->num_rows = place - chunk->first_row;
        t->num_rows_received += chunk->num_rows;
        chunk->rows_sent = (cumoe_blocks_t){blocks, blocks + W};
        chunk->tokens_sent = (cumoe_blocks_t){blocks + 2 * W, blocks + 3 * W};
        chunk->rows_received = (cumoe_blocks_t){blocks + 4 * W, blocks + 5 * W};
        chunk->tokens_received = (cumoe_blocks_t){blocks + 6 * W, blocks + 7 * W};
    }
    t->num_rows_sent = rows_sent;
    t->num_tokens_sent = tokens_sent;
    t->num_tokens_received = tokens_received;
    t->num_places = place;
}

void cumoe__traffic_fill_capacity(cumoe_traffic_t *traffic, const cumoe_layer_t *layer)
{
    const int32_t parcels = layer->parcels.config.num_experts;
    for (int32_t i = 0; i < 4 * parcels; i++)
        traffic->count[i] = (int32_t)cumoe__parcel_capacity(&layer->context.config);
    fill(traffic, layer);
}

cumoe_status_t cumoe_ep_plan_create(const cumoe_layer_t *layer, cumoe_ep_plan_t **plan)
{
    const char *function = "cumoe_ep_plan_create";
    CUMOE_TRY(check_layer(function, layer));
    CUMOE_REQUIRE(plan, INVALID_ARGUMENT, "%s: plan = NULL, but the result needs a place", function);
    cumoe_ep_plan_t *made = calloc(1, sizeof *made);
    if (!made || !cumoe__traffic_alloc(&made->traffic, layer)) {
        free(made);
        return cumoe__fail(CUMOE_OUT_OF_MEMORY, "%s: no host memory for the plan", function);
    }
    made->layer = layer;
    made->num_tokens = -1;
    *plan = made;
    return CUMOE_SUCCESS;
}

void cumoe_ep_plan_destroy(cumoe_ep_plan_t *plan)
{
    if (!plan) return;
    cumoe__traffic_free(&plan->traffic);
    free(plan);
}

cumoe_status_t cumoe_ep_routing_size(const cumoe_layer_t *layer, int64_t num_tokens, size_t *routing_size)
{
    const char *function = "cumoe_ep_routing_size";
    CUMOE_TRY(check_layer(function, layer));
    CUMOE_REQUIRE(routing_size, INVALID_ARGUMENT, "%s: routing_size = NULL, but the result needs a place",
                  function);
    CUMOE_TRY(cumoe__check_tokens(function, layer, num_tokens));
    *routing_size = cumoe__layout(layer, CUMOE_PASS_PLAN, num_tokens, NULL, (cumoe_memory_t){0}).routing_size;
    return CUMOE_SUCCESS;
}

cumoe_status_t cumoe__exchange_counts(const cumoe_layer_t *layer, int64_t num_tokens, const cumoe_layout_t *layout,
                                      cumoe_ep_plan_t *plan, cumoe_stream_t stream)
{
    const cumoe_ep_t *ep = layer->context.config.ep;
    const cumoe_handle_t *handle = layer->handle;
    const int64_t W = ep->num_ranks, parcels = layer->parcels.config.num_experts;
    cumoe_traffic_t *traffic = &plan->traffic;
    const cumoe_dispatch_args_t args = {.num_tokens = num_tokens,
                                        .routing = layout->routing,
                                        .rows = layout->rows,
                                        .parcels = layout->exchange.parcels,
                                        .count = layout->exchange.sent};
    CUMOE_TRY(handle->ops->dispatch_count(&layer->context, &args, stream));
    int64_t *begin = traffic->blocks, *one = traffic->blocks + W; /* not in use yet: a row for each rank */
    for (int64_t r = 0; r < W; r++) begin[r] = r, one[r] = 1;
    const cumoe_blocks_t rows = {begin, one};
    const size_t size = (size_t)(2 * parcels) * sizeof(int32_t);
    const cumoe_transfer_t transfer = {layout->exchange.sent, layout->exchange.received, size / (size_t)W, rows,
                                       rows};
    CUMOE_TRY(ep->ops->exchange(ep->comm, &transfer, 1, stream));
    CUMOE_TRY(ep->ops->wait(ep->comm, stream, ep->timeout)); /* first: a copy to the host may wait without an end */
    CUMOE_TRY(cumoe_memory_copy(handle, traffic->count, transfer.send, size, CUMOE_COPY_TO_HOST, stream));
    CUMOE_TRY(
        cumoe_memory_copy(handle, traffic->count + 2 * parcels, transfer.recv, size, CUMOE_COPY_TO_HOST, stream));
    CUMOE_TRY(cumoe_stream_synchronize(handle, stream));
    fill(traffic, layer);
    plan->num_tokens = num_tokens;
    return CUMOE_SUCCESS;
}

cumoe_ep_sizes_t cumoe__exchange_sizes(const cumoe_ep_plan_t *plan)
{
    const cumoe_traffic_t *t = &plan->traffic;
    cumoe_ep_sizes_t sizes = {.rows_sent = t->num_rows_sent,
                              .rows_received = t->num_rows_received,
                              .tokens_sent = t->num_tokens_sent,
                              .tokens_received = t->num_tokens_received};
    for (cumoe_pass_t pass = CUMOE_PASS_INFERENCE; pass <= CUMOE_PASS_BACKWARD; pass++) {
        const cumoe_layout_t need = cumoe__layout(plan->layer, pass, plan->num_tokens, t, (cumoe_memory_t){0});
        if (need.workspace_size > sizes.workspace_size) sizes.workspace_size = need.workspace_size;
        if (need.saved_size > sizes.saved_size) sizes.saved_size = need.saved_size;
    }
    return sizes;
}
