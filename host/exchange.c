/* The way of rows between ranks, in terms of the backend's stages and the group's messages. */
#include "host/exchange.h"
#include "host/kinds.h"

#include <stdio.h>

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
                                       const cumoe_traffic_t **traffic)
{
    const cumoe_config_t *config = &layer->context.config;
    *traffic = layer->bounded;
    CUMOE_REQUIRE(
        !plan || cumoe__is_planned(config), INVALID_ARGUMENT,
        "%s: plan = %p, but a layer without ranks or with config.exchange_capacity has none: must be NULL",
        function, (const void *)plan);
    if (!cumoe__is_planned(config)) return CUMOE_SUCCESS;
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
                                   .capacity = cumoe__parcel_capacity(&layer->context.config),
                                   .routing = l->routing,
                                   .rows = l->rows,
                                   .slot_parcel = l->exchange.slot_parcel,
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
    const cumoe_routing_t by_parcel = {.call = layout->routing.call, .expert = layout->exchange.slot_parcel};
    return permute(layer, &layer->parcels, gate->num_tokens, by_parcel, layout->exchange.parcels, layout, stream);
}

/* Where a chunk of this rank's experts begins, among all experts. */
static int32_t first_of_chunk(const cumoe_layer_t *layer, int32_t chunk)
{
    const cumoe_config_t *config = &layer->context.config;
    const cumoe_ranks_t *ranks = &layer->context.ranks;
    return cumoe__first_of_parcel(config, ranks->count, ranks->rank * config->exchange_chunks + chunk);
}

cumoe_context_t cumoe__exchange_context(const cumoe_layer_t *layer, int32_t chunk)
{
    cumoe_context_t context = layer->experts;
    context.config.num_experts = first_of_chunk(layer, chunk + 1) - first_of_chunk(layer, chunk);
    return context;
}

cumoe_side_t cumoe__exchange_side(const cumoe_layer_t *layer, const cumoe_layout_t *layout,
                                  const cumoe_traffic_t *traffic, int32_t chunk, const cumoe_weights_t *weights,
                                  const cumoe_weights_t *gradients)
{
    const cumoe_exchange_layout_t *e = &layout->exchange;
    const cumoe_config_t *config = &layer->context.config;
    const int64_t row = traffic->chunk[chunk].first_row;
    const int32_t first = first_of_chunk(layer, chunk) - layer->context.ranks.first_expert;
    cumoe_side_t side = {
        .context = cumoe__exchange_context(layer, chunk),
        .weights = cumoe__weights_from(weights, config, first),
        .num_tokens = traffic->chunk[chunk].num_rows,
        .routing = {.call = e->call + chunk,
                    .weight = (char *)e->weight + (size_t)row * cumoe__dtype_size(cumoe__gate_dtype(config))},
        .rows = e->rows[chunk],
        .first_row = row,
        .x = e->x,
        .x_stride = config->hidden_size};
    if (e->expert) side.routing.expert = e->expert + row;
    if (gradients) side.gradients = cumoe__weights_from(gradients, config, first);
    return side;
}

/* What rows of tokens become before they travel. */
static cumoe_status_t pack_rows(const cumoe_layer_t *layer, const void *from, int64_t stride,
                                const cumoe_layout_t *l, const cumoe_traffic_t *traffic, cumoe_stream_t stream)
{
    const cumoe_config_t *config = &layer->context.config;
    const cumoe_gather_args_t gather = {.from = from,
                                        .from_stride = stride,
                                        .to = l->exchange.packed,
                                        .index = l->exchange.sent_token,
                                        .count = traffic->num_tokens_sent,
                                        .width = config->hidden_size,
                                        .element = cumoe__dtype_size(config->dtype)};
    return ops_of(layer)->gather(&layer->context, &gather, stream);
}

static cumoe_transfer_t transfer_of_tokens(const cumoe_layer_t *layer, const cumoe_layout_t *l,
                                           const cumoe_chunk_t *chunk, void *to)
{
    const cumoe_config_t *config = &layer->context.config;
    return (cumoe_transfer_t){.send = l->exchange.packed,
                              .recv = to,
                              .row_size = (size_t)config->hidden_size * cumoe__dtype_size(config->dtype),
                              .sent = chunk->tokens_sent,
                              .received = chunk->tokens_received};
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

cumoe_status_t cumoe__exchange_pack(const cumoe_layer_t *layer, const cumoe_forward_args_t *args,
                                    const cumoe_layout_t *layout, const cumoe_traffic_t *traffic,
                                    cumoe_stream_t stream)
{
    if (layer->context.config.exchange_capacity > 0) CUMOE_TRY(clear_places(layer, layout, traffic, stream));
    cumoe_dispatch_args_t pack = dispatch_args(layer, args->num_tokens, layout);
    pack.statistics = args->statistics;
    CUMOE_TRY(ops_of(layer)->dispatch_pack(&layer->context, &pack, stream));
    return pack_rows(layer, args->x, args->x_stride, layout, traffic, stream);
}

cumoe_status_t cumoe__exchange_dispatch(const cumoe_layer_t *layer, const cumoe_layout_t *layout,
                                        const cumoe_chunk_t *chunk, cumoe_stream_t stream)
{
    const cumoe_exchange_layout_t *e = &layout->exchange;
    const struct {
        const void *send;
        void *recv;
        size_t size;
    } of_rows[] = {{e->expert_sent, e->expert, sizeof(int32_t)},
                   {e->token_sent, e->token, sizeof(int32_t)},
                   {e->weight_sent, e->weight, cumoe__dtype_size(cumoe__gate_dtype(&layer->context.config))}};
    cumoe_transfer_t transfers[4] = {transfer_of_tokens(layer, layout, chunk, e->x)};
    for (int i = 0; i < 3; i++)
        transfers[1 + i] = (cumoe_transfer_t){.send = of_rows[i].send,
                                              .recv = of_rows[i].recv,
                                              .row_size = of_rows[i].size,
                                              .sent = chunk->rows_sent,
                                              .received = chunk->rows_received};
    return exchange(layer, transfers, 4, stream);
}

cumoe_status_t cumoe__exchange_arrive(const cumoe_layer_t *layer, const cumoe_layout_t *layout, int32_t chunk,
                                      const cumoe_side_t *side, cumoe_stream_t stream)
{
    const cumoe_backend_ops_t *ops = ops_of(layer);
    const cumoe_exchange_layout_t *e = &layout->exchange;
    const cumoe_arrive_args_t arrive = {.num_slots = side->num_tokens,
                                        .capacity = cumoe__parcel_capacity(&layer->context.config),
                                        .chunk = chunk,
                                        .count = e->received,
                                        .token = e->token + side->first_row,
                                        .call = side->routing.call,
                                        .rows = side->rows};
    CUMOE_TRY(ops->arrive_begin(&side->context, &arrive, stream));
    CUMOE_TRY(permute(layer, &side->context, side->num_tokens, side->routing, side->rows, layout, stream));
    return ops->arrive_end(&side->context, &arrive, stream);
}

cumoe_status_t cumoe__exchange_pack_dy(const cumoe_layer_t *layer, const cumoe_backward_args_t *args,
                                       const cumoe_layout_t *layout, const cumoe_traffic_t *traffic,
                                       cumoe_stream_t stream)
{
    return pack_rows(layer, args->dy, args->dy_stride, layout, traffic, stream);
}

cumoe_status_t cumoe__exchange_dispatch_dy(const cumoe_layer_t *layer, const cumoe_layout_t *layout,
                                           const cumoe_chunk_t *chunk, cumoe_stream_t stream)
{
    const cumoe_transfer_t transfer = transfer_of_tokens(layer, layout, chunk, layout->exchange.dy);
    return exchange(layer, &transfer, 1, stream);
}

cumoe_status_t cumoe__exchange_unpermute(const cumoe_layer_t *layer, const cumoe_side_t *side, const void *rows,
                                         const cumoe_layout_t *layout, cumoe_stream_t stream)
{
    const cumoe_config_t *config = &layer->context.config;
    const cumoe_gather_args_t gather = {.from = rows,
                                        .from_stride = config->hidden_size,
                                        .to =
                                            cumoe__side_rows(side, layout->exchange.returned, config->hidden_size),
                                        .index = side->rows.slot_row,
                                        .count = side->num_tokens,
                                        .width = config->hidden_size,
                                        .element = cumoe__dtype_size(config->dtype)};
    return ops_of(layer)->gather(&layer->context, &gather, stream);
}

cumoe_status_t cumoe__exchange_return(const cumoe_layer_t *layer, const cumoe_layout_t *layout,
                                      const cumoe_chunk_t *chunk, bool backward, cumoe_stream_t stream)
{
    const cumoe_config_t *config = &layer->context.config;
    const cumoe_exchange_layout_t *e = &layout->exchange;
    const cumoe_transfer_t transfers[] = {
        {.send = e->returned,
         .recv = e->results,
         .row_size = (size_t)config->hidden_size * cumoe__dtype_size(config->dtype),
         .sent = chunk->rows_received,
         .received = chunk->rows_sent},
        {.send = e->dweight,
         .recv = e->dweight_back,
         .row_size = cumoe__dtype_size(cumoe__gate_dtype(config)),
         .sent = chunk->rows_received,
         .received = chunk->rows_sent}};
    return exchange(layer, transfers, backward ? 2 : 1, stream);
}

cumoe_status_t cumoe__exchange_take_dweight(const cumoe_layer_t *layer, void *dweight, int64_t num_tokens,
                                            const cumoe_layout_t *layout, cumoe_stream_t stream)
{
    const cumoe_config_t *config = &layer->context.config;
    const cumoe_gather_args_t gather = {.from = layout->exchange.dweight_back,
                                        .from_stride = 1,
                                        .to = dweight,
                                        .index = layout->rows.slot_row,
                                        .count = cumoe__max_slots(config, num_tokens),
                                        .width = 1,
                                        .element = cumoe__dtype_size(cumoe__gate_dtype(config)),
                                        .zeros = true};
    return ops_of(layer)->gather(&layer->context, &gather, stream);
}

/* Marks: what has come, on the layer's own stream; and what is computed, two for chunks in turn, as the next is
 * enqueued before somebody waits for the one before. */
enum { ARRIVED, COMPUTED };
_Static_assert(COMPUTED + 2 == CUMOE_LANE_MARKS, "a mark for each");

static cumoe_status_t mark(const cumoe_layer_t *layer, const char *function, int which, cumoe_stream_t stream)
{
    if (!layer->lane.stream) return CUMOE_SUCCESS;
    return ops_of(layer)->mark_set(layer->handle->device, function, layer->lane.marks[which], stream);
}

static cumoe_status_t await(const cumoe_layer_t *layer, const char *function, int which, cumoe_stream_t stream)
{
    if (!layer->lane.stream) return CUMOE_SUCCESS;
    return ops_of(layer)->mark_wait(layer->handle->device, function, layer->lane.marks[which], stream);
}

static cumoe_status_t run_chunks(const cumoe_layer_t *layer, const cumoe_chunk_ops_t *ops, cumoe_stream_t lane,
                                 cumoe_stream_t stream)
{
    const int32_t n = layer->context.config.exchange_chunks;
    CUMOE_TRY(mark(layer, ops->function, COMPUTED, stream));
    CUMOE_TRY(await(layer, ops->function, COMPUTED, lane));
    CUMOE_TRY(ops->dispatch(ops->call, 0, lane));
    for (int32_t c = 0; c <= n; c++) {
        if (c < n) {
            CUMOE_TRY(mark(layer, ops->function, ARRIVED, lane));
            CUMOE_TRY(await(layer, ops->function, ARRIVED, stream));
            CUMOE_TRY(ops->compute(ops->call, c, stream));
            CUMOE_TRY(mark(layer, ops->function, COMPUTED + c % 2, stream));
        }
        if (c > 0) {
            CUMOE_TRY(await(layer, ops->function, COMPUTED + (c - 1) % 2, lane));
            CUMOE_TRY(ops->give_back(ops->call, c - 1, lane));
        }
        if (c + 1 < n) CUMOE_TRY(ops->dispatch(ops->call, c + 1, lane));
    }
    return CUMOE_SUCCESS;
}

static cumoe_status_t join(const cumoe_layer_t *layer, const char *function, cumoe_stream_t stream)
{
    CUMOE_TRY(mark(layer, function, ARRIVED, layer->lane.stream));
    return await(layer, function, ARRIVED, stream);
}

cumoe_status_t cumoe__exchange_chunks(const cumoe_layer_t *layer, const cumoe_chunk_ops_t *ops,
                                      cumoe_stream_t stream)
{
    const cumoe_ep_t *ep = layer->context.config.ep;
    const cumoe_stream_t lane = layer->lane.stream;
    char sentence[512]; /* of the first failure */
    cumoe_status_t status = run_chunks(layer, ops, lane ? lane : stream, stream);
    snprintf(sentence, sizeof sentence, "%s", cumoe_last_error());
    /* After a failure, too: for how long buffers are needed is known by the caller's stream. */
    const cumoe_status_t joined = join(layer, ops->function, stream);
    if (joined == CUMOE_SUCCESS) return status;
    if (status == CUMOE_SUCCESS) {
        status = joined;
        snprintf(sentence, sizeof sentence, "%s", cumoe_last_error());
    }
    (void)ep->ops->wait(ep->comm, lane, ep->timeout);
    return cumoe__fail(status, "%s", sentence);
}
