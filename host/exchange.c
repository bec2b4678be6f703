/* The way of rows between ranks, in terms of the backend's stages and the group's messages. */
#include "host/exchange.h"
#include "host/kinds.h"

static const cumoe_backend_ops_t *ops_of(const cumoe_layer_t *layer)
{
    return layer->handle->ops;
}

static cumoe_status_t exchange(const cumoe_layer_t *layer, const cumoe_transfer_t *transfers, int count,
                               cumoe_stream_t stream)
{
    const cumoe_ep_t *ep = layer->context.config.ep;
    return ep->ops->exchange(ep->comm, transfers, count, stream);
}

cumoe_status_t cumoe__exchange_traffic(const char *function, const cumoe_layer_t *layer,
                                       const cumoe_ep_plan_t *plan, const void *routing, int64_t num_tokens,
                                       cumoe_traffic_t *bounded, const cumoe_traffic_t **traffic)
{
    const cumoe_config_t *config = &layer->context.config;
    const int64_t W = layer->context.ranks.count, C = config->exchange_capacity;
    *traffic = NULL;
    CUMOE_REQUIRE(
        !plan || cumoe__is_planned(config), INVALID_ARGUMENT,
        "%s: plan = %p, but a layer without ranks or with config.exchange_capacity has none: must be NULL",
        function, (const void *)plan);
    if (!config->ep) return CUMOE_SUCCESS;
    if (C > 0) {
        const cumoe_blocks_t blocks = {layer->blocks, layer->blocks + W};
        *bounded = (cumoe_traffic_t){blocks, blocks, blocks, blocks, W * C, W * C, W * C, W * C};
        *traffic = bounded;
        return CUMOE_SUCCESS;
    }
    CUMOE_REQUIRE(
        plan, INVALID_ARGUMENT,
        "%s: plan = NULL, but with ranks and config.exchange_capacity = 0 it must come from cumoe_ep_plan()",
        function);
    CUMOE_REQUIRE(plan->num_tokens >= 0, INVALID_ARGUMENT,
                  "%s: plan = %p, but cumoe_ep_plan() has not made it yet, or failed", function,
                  (const void *)plan);
    CUMOE_REQUIRE(
        plan->layer == layer && plan->num_tokens == num_tokens && plan->routing == routing, INVALID_ARGUMENT,
        "%s: plan is for %lld tokens, layer %p and routing %p, but the call has %lld, %p and %p: each call in "
        "flight has a plan of its own",
        function, (long long)plan->num_tokens, (const void *)plan->layer, plan->routing, (long long)num_tokens,
        (const void *)layer, routing);
    *traffic = &plan->traffic;
    return CUMOE_SUCCESS;
}

static cumoe_dispatch_args_t dispatch_args(const cumoe_layer_t *layer, int64_t num_tokens, const cumoe_layout_t *l)
{
    return (cumoe_dispatch_args_t){.num_tokens = num_tokens,
                                   .capacity = layer->context.config.exchange_capacity,
                                   .routing = l->routing,
                                   .rows = l->rows,
                                   .slot_rank = l->exchange.slot_rank,
                                   .parcels = l->exchange.parcels,
                                   .count = l->exchange.sent,
                                   .expert = l->exchange.expert_sent,
                                   .token = l->exchange.token_sent,
                                   .weight = l->exchange.weight_sent,
                                   .sent_token = l->exchange.sent_token};
}

static cumoe_status_t permute(const cumoe_layer_t *layer, const cumoe_context_t *context, int64_t num_tokens,
                              cumoe_routing_t routing, cumoe_rows_t rows, const cumoe_layout_t *l,
                              cumoe_stream_t stream)
{
    const cumoe_permute_args_t args = {.struct_size = sizeof args,
                                       .num_tokens = num_tokens,
                                       .routing = routing,
                                       .rows = rows,
                                       .workspace = l->stage,
                                       .workspace_size = l->stage_size};
    return ops_of(layer)->permute(context, &args, stream);
}

cumoe_status_t cumoe__exchange_gate(const cumoe_layer_t *layer, const cumoe_gate_args_t *gate,
                                    const cumoe_layout_t *layout, cumoe_stream_t stream)
{
    const cumoe_backend_ops_t *ops = ops_of(layer);
    const cumoe_context_t *context = &layer->context;
    const cumoe_ep_t *ep = context->config.ep;
    CUMOE_TRY(ops->gate(context, gate, stream));
    if (context->ranks.count > 1) {
        cumoe_sum_t sums[CUMOE_GATE_MAX_SUMS];
        const int count = ops->gate_sums(context, gate, sums);
        CUMOE_TRY(ep->ops->sum(ep->comm, sums, count, stream));
        CUMOE_TRY(ops->gate_finish(context, gate, stream));
    }
    CUMOE_TRY(permute(layer, context, gate->num_tokens, layout->routing, layout->rows, layout, stream));
    if (!ep) return CUMOE_SUCCESS;
    const cumoe_dispatch_args_t args = dispatch_args(layer, gate->num_tokens, layout);
    CUMOE_TRY(ops->dispatch_mark(context, &args, stream));
    const cumoe_routing_t by_rank = {.call = layout->routing.call, .expert = layout->exchange.slot_rank};
    return permute(layer, &layer->parcels, gate->num_tokens, by_rank, layout->exchange.parcels, layout, stream);
}

/* Rows of tokens for ranks, and what comes for them. */
static cumoe_status_t dispatch_rows(const cumoe_layer_t *layer, const void *from, int64_t stride,
                                    const cumoe_layout_t *l, const cumoe_traffic_t *traffic, void *to,
                                    cumoe_transfer_t *transfer, cumoe_stream_t stream)
{
    const cumoe_config_t *config = &layer->context.config;
    const size_t element = cumoe__dtype_size(config->dtype);
    const cumoe_gather_args_t gather = {.from = from,
                                        .from_stride = stride,
                                        .to = l->exchange.packed,
                                        .index = l->exchange.sent_token,
                                        .count = traffic->num_tokens_sent,
                                        .width = config->hidden_size,
                                        .element = element};
    *transfer = (cumoe_transfer_t){.send = l->exchange.packed,
                                   .recv = to,
                                   .row_size = (size_t)config->hidden_size * element,
                                   .sent = traffic->tokens_sent,
                                   .received = traffic->tokens_received};
    return ops_of(layer)->gather(&layer->context, &gather, stream);
}

cumoe_side_t cumoe__exchange_side(const cumoe_layer_t *layer, const cumoe_layout_t *layout,
                                  const cumoe_traffic_t *traffic)
{
    const cumoe_exchange_layout_t *e = &layout->exchange;
    return (cumoe_side_t){.num_tokens = traffic->num_rows_received,
                          .routing = {.call = e->call, .expert = e->expert, .weight = e->weight},
                          .rows = e->rows,
                          .x = e->x,
                          .x_stride = layer->context.config.hidden_size};
}

/* What free places hold until a row takes them: no expert, no token. */
static cumoe_status_t clear_places(const cumoe_layer_t *layer, const cumoe_layout_t *l,
                                   const cumoe_traffic_t *traffic, cumoe_stream_t stream)
{
    const cumoe_handle_t *handle = layer->handle;
    CUMOE_TRY(cumoe_memory_set(handle, l->exchange.expert_sent, 0xff,
                               (size_t)traffic->num_rows_sent * sizeof(int32_t), stream));
    return cumoe_memory_set(handle, l->exchange.sent_token, 0xff,
                            (size_t)traffic->num_tokens_sent * sizeof(int32_t), stream);
}

cumoe_status_t cumoe__exchange_dispatch(const cumoe_layer_t *layer, const cumoe_forward_args_t *args,
                                        const cumoe_layout_t *layout, const cumoe_traffic_t *traffic,
                                        cumoe_side_t *side, cumoe_stream_t stream)
{
    const cumoe_backend_ops_t *ops = ops_of(layer);
    const cumoe_exchange_layout_t *e = &layout->exchange;
    const cumoe_config_t *config = &layer->context.config;
    if (config->exchange_capacity > 0) CUMOE_TRY(clear_places(layer, layout, traffic, stream));
    cumoe_dispatch_args_t pack = dispatch_args(layer, args->num_tokens, layout);
    pack.statistics = args->statistics;
    CUMOE_TRY(ops->dispatch_pack(&layer->context, &pack, stream));

    cumoe_transfer_t transfers[4];
    CUMOE_TRY(dispatch_rows(layer, args->x, args->x_stride, layout, traffic, e->x, &transfers[0], stream));
    const struct {
        const void *send;
        void *recv;
        size_t size;
    } of_rows[] = {{e->expert_sent, e->expert, sizeof(int32_t)},
                   {e->token_sent, e->token, sizeof(int32_t)},
                   {e->weight_sent, e->weight, cumoe__dtype_size(cumoe__gate_dtype(config))}};
    for (int i = 0; i < 3; i++)
        transfers[1 + i] = (cumoe_transfer_t){.send = of_rows[i].send,
                                              .recv = of_rows[i].recv,
                                              .row_size = of_rows[i].size,
                                              .sent = traffic->rows_sent,
                                              .received = traffic->rows_received};
    CUMOE_TRY(exchange(layer, transfers, 4, stream));

    *side = cumoe__exchange_side(layer, layout, traffic);
    const cumoe_arrive_args_t arrive = {.num_slots = traffic->num_rows_received,
                                        .capacity = config->exchange_capacity,
                                        .count = e->received,
                                        .token = e->token,
                                        .call = e->call,
                                        .rows = e->rows};
    CUMOE_TRY(ops->arrive_begin(&layer->experts, &arrive, stream));
    CUMOE_TRY(permute(layer, &layer->experts, side->num_tokens, side->routing, side->rows, layout, stream));
    return ops->arrive_end(&layer->experts, &arrive, stream);
}

cumoe_status_t cumoe__exchange_dispatch_dy(const cumoe_layer_t *layer, const cumoe_backward_args_t *args,
                                           const cumoe_layout_t *layout, const cumoe_traffic_t *traffic,
                                           cumoe_stream_t stream)
{
    cumoe_transfer_t transfer;
    CUMOE_TRY(
        dispatch_rows(layer, args->dy, args->dy_stride, layout, traffic, layout->exchange.dy, &transfer, stream));
    return exchange(layer, &transfer, 1, stream);
}

cumoe_status_t cumoe__exchange_return(const cumoe_layer_t *layer, const void *rows, const cumoe_layout_t *layout,
                                      const cumoe_traffic_t *traffic, cumoe_stream_t stream)
{
    const cumoe_config_t *config = &layer->context.config;
    const size_t element = cumoe__dtype_size(config->dtype);
    const cumoe_gather_args_t gather = {.from = rows,
                                        .from_stride = config->hidden_size,
                                        .to = layout->exchange.packed,
                                        .index = layout->exchange.rows.slot_row,
                                        .count = traffic->num_rows_received,
                                        .width = config->hidden_size,
                                        .element = element};
    CUMOE_TRY(ops_of(layer)->gather(&layer->context, &gather, stream));
    const cumoe_transfer_t transfer = {.send = layout->exchange.packed,
                                       .recv = layout->exchange.results,
                                       .row_size = (size_t)config->hidden_size * element,
                                       .sent = traffic->rows_received,
                                       .received = traffic->rows_sent};
    return exchange(layer, &transfer, 1, stream);
}

cumoe_status_t cumoe__exchange_return_dweight(const cumoe_layer_t *layer, void *dweight, int64_t num_tokens,
                                              const cumoe_layout_t *layout, const cumoe_traffic_t *traffic,
                                              cumoe_stream_t stream)
{
    const cumoe_config_t *config = &layer->context.config;
    const size_t element = cumoe__dtype_size(cumoe__gate_dtype(config));
    const cumoe_transfer_t transfer = {.send = layout->exchange.dweight,
                                       .recv = layout->exchange.dweight_back,
                                       .row_size = element,
                                       .sent = traffic->rows_received,
                                       .received = traffic->rows_sent};
    CUMOE_TRY(exchange(layer, &transfer, 1, stream));
    const cumoe_gather_args_t gather = {.from = layout->exchange.dweight_back,
                                        .from_stride = 1,
                                        .to = dweight,
                                        .index = layout->rows.slot_row,
                                        .count = cumoe__max_slots(config, num_tokens),
                                        .width = 1,
                                        .element = element,
                                        .zeros = true};
    return ops_of(layer)->gather(&layer->context, &gather, stream);
}
