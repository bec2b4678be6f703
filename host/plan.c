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

/* The traffic stands in the plan's own memory. */
static void point_at_blocks(cumoe_ep_plan_t *plan, int64_t W)
{
    int64_t *b = plan->blocks;
    plan->traffic.rows_sent = (cumoe_blocks_t){b, b + W};
    plan->traffic.tokens_sent = (cumoe_blocks_t){b + 2 * W, b + 3 * W};
    plan->traffic.rows_received = (cumoe_blocks_t){b + 4 * W, b + 5 * W};
    plan->traffic.tokens_received = (cumoe_blocks_t){b + 6 * W, b + 7 * W};
}

cumoe_status_t cumoe_ep_plan_create(const cumoe_layer_t *layer, cumoe_ep_plan_t **plan)
{
    const char *function = "cumoe_ep_plan_create";
    CUMOE_TRY(check_layer(function, layer));
    CUMOE_REQUIRE(plan, INVALID_ARGUMENT, "%s: plan = NULL, but the result needs a place", function);
    const size_t W = (size_t)layer->context.ranks.count;
    cumoe_ep_plan_t *made = calloc(1, sizeof *made);
    if (made) {
        *made = (cumoe_ep_plan_t){.layer = layer,
                                  .num_tokens = -1,
                                  .count = calloc(4 * W, sizeof *made->count),
                                  .blocks = calloc(8 * W, sizeof *made->blocks)};
        if (made->count && made->blocks) {
            point_at_blocks(made, (int64_t)W);
            *plan = made;
            return CUMOE_SUCCESS;
        }
        cumoe_ep_plan_destroy(made);
    }
    return cumoe__fail(CUMOE_OUT_OF_MEMORY, "%s: no host memory for the plan", function);
}

void cumoe_ep_plan_destroy(cumoe_ep_plan_t *plan)
{
    if (!plan) return;
    free(plan->count);
    free(plan->blocks);
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

/* BLOCKS [2, W] from every second of COUNT; the sum. */
static int64_t set_blocks(int64_t *blocks, const int32_t *count, int64_t W)
{
    int64_t begin = 0;
    for (int64_t r = 0; r < W; r++) {
        blocks[r] = begin;
        blocks[W + r] = count[2 * r];
        begin += count[2 * r];
    }
    return begin;
}

cumoe_status_t cumoe__exchange_counts(const cumoe_layer_t *layer, int64_t num_tokens, const cumoe_layout_t *layout,
                                      cumoe_ep_plan_t *plan, cumoe_stream_t stream)
{
    const cumoe_ep_t *ep = layer->context.config.ep;
    const cumoe_handle_t *handle = layer->handle;
    const int64_t W = ep->num_ranks;
    const cumoe_dispatch_args_t args = {.num_tokens = num_tokens,
                                        .routing = layout->routing,
                                        .rows = layout->rows,
                                        .parcels = layout->exchange.parcels,
                                        .count = layout->exchange.sent};
    CUMOE_TRY(handle->ops->dispatch_count(&layer->context, &args, stream));
    for (int64_t r = 0; r < W; r++) plan->blocks[r] = r, plan->blocks[W + r] = 1; /* as of one pair for each rank */
    const cumoe_blocks_t pairs = {plan->blocks, plan->blocks + W};
    const cumoe_transfer_t transfer = {layout->exchange.sent, layout->exchange.received, 2 * sizeof(int32_t), pairs,
                                       pairs};
    const size_t size = (size_t)(2 * W) * sizeof(int32_t);
    CUMOE_TRY(ep->ops->exchange(ep->comm, &transfer, 1, stream));
    CUMOE_TRY(ep->ops->wait(ep->comm, stream, ep->timeout)); /* first: a copy to the host may wait without an end */
    CUMOE_TRY(cumoe_memory_copy(handle, plan->count, transfer.send, size, CUMOE_COPY_TO_HOST, stream));
    CUMOE_TRY(cumoe_memory_copy(handle, plan->count + 2 * W, transfer.recv, size, CUMOE_COPY_TO_HOST, stream));
    CUMOE_TRY(cumoe_stream_synchronize(handle, stream));

    plan->traffic.num_rows_sent = set_blocks(plan->blocks, plan->count, W);
    plan->traffic.num_tokens_sent = set_blocks(plan->blocks + 2 * W, plan->count + 1, W);
    plan->traffic.num_rows_received = set_blocks(plan->blocks + 4 * W, plan->count + 2 * W, W);
    plan->traffic.num_tokens_received = set_blocks(plan->blocks + 6 * W, plan->count + 2 * W + 1, W);
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
