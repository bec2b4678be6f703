#include "host/arena.h"
#include "host/exchange.h"
#include "host/kinds.h"

static cumoe_rows_t place_rows(cumoe_arena_t *arena, const cumoe_layer_t *layer, const cumoe_config_t *config,
                               int64_t num_tokens)
{
    const size_t R = (size_t)cumoe__max_rows(config, num_tokens);
    cumoe_rows_t rows = {
        .offset = cumoe__take(arena, (size_t)(config->num_experts + 1) * sizeof(int32_t)),
        .row_token = cumoe__take(arena, R * sizeof(int32_t)),
        .row_slot = cumoe__take(arena, R * sizeof(int32_t)),
        .slot_row = cumoe__take(arena, (size_t)cumoe__max_slots(config, num_tokens) * sizeof(int32_t)),
    };
    if (layer->handle->ops->row_tiles) {
        const int64_t size = cumoe_tile_size((int64_t)R, config->num_experts);
        rows.tile = cumoe__take(arena, (size_t)size * sizeof(int32_t));
    }
    return rows;
}

static void place_routing(cumoe_arena_t *arena, const cumoe_layer_t *layer, int64_t T, cumoe_layout_t *layout)
{
    const cumoe_config_t *config = &layer->context.config;
    const size_t E = (size_t)config->num_experts, gate = cumoe__dtype_size(cumoe__gate_dtype(config));
    const size_t slots = (size_t)cumoe__max_slots(config, T);
    cumoe_routing_t *routing = &layout->routing;
    *routing = (cumoe_routing_t){
        .call = cumoe__take(arena, sizeof(cumoe_call_t)),
        .tokens = cumoe__take(arena, sizeof(int64_t)),
        .expert = cumoe__take(arena, slots * sizeof(int32_t)),
        .weight = cumoe__take(arena, slots * gate),
        .importance = cumoe__take(arena, E * sizeof(int64_t)),
        .load = cumoe__take(arena, E * sizeof(int64_t)),
    };
    if (cumoe__has_token_slots(config)) {
        routing->token_slot = cumoe__take(arena, (size_t)(T + 1) * sizeof(int32_t));
        routing->slot_token = cumoe__take(arena, slots * sizeof(int32_t));
        routing->excess = cumoe__take(arena, E * sizeof(int32_t));
    }
    if (config->gate == CUMOE_GATE_HIERARCHICAL) {
        const size_t choices = (size_t)T * (size_t)config->top_k_groups, G = (size_t)config->num_groups;
        routing->primary_group = cumoe__take(arena, choices * sizeof(int32_t));
        routing->primary_weight = cumoe__take(arena, choices * gate);
        routing->primary_load = cumoe__take(arena, G * sizeof(int64_t));
        routing->primary_count = cumoe__take(arena, G * sizeof(int32_t));
    }
    layout->rows = place_rows(arena, layer, &layer->context.config, T);
    if (config->ep) {
        const size_t parcels = (size_t)layer->parcels.config.num_experts;
        cumoe_exchange_layout_t *exchange = &layout->exchange;
        exchange->slot_parcel = cumoe__take(arena, slots * sizeof(int32_t));
        exchange->parcels = place_rows(arena, layer, &layer->parcels.config, T);
        exchange->sent = cumoe__take(arena, 2 * parcels * sizeof(int32_t));
        exchange->received = cumoe__take(arena, 2 * parcels * sizeof(int32_t));
        exchange->losses = cumoe__take(arena, CUMOE_NUM_LOSSES * gate);
    }
}

/* What the experts of this rank see, and what the backward pass needs of it. */
static void place_arrived(cumoe_arena_t *arena, const cumoe_layer_t *layer, const cumoe_traffic_t *traffic,
                          cumoe_exchange_layout_t *exchange)
{
    const cumoe_config_t *config = &layer->experts.config;
    const int32_t chunks = config->exchange_chunks;
    exchange->sent_token = cumoe__take(arena, (size_t)traffic->num_tokens_sent * sizeof(int32_t));
    exchange->call = cumoe__take(arena, (size_t)chunks * sizeof(cumoe_call_t));
    exchange->weight =
        cumoe__take(arena, (size_t)traffic->num_places * cumoe__dtype_size(cumoe__gate_dtype(config)));
    for (int32_t c = 0; c < chunks; c++) {
        const cumoe_context_t context = cumoe__exchange_context(layer, c);
        exchange->rows[c] = place_rows(arena, layer, &context.config, traffic->chunk[c].num_rows);
    }
    exchange->x = cumoe__take(arena, (size_t)traffic->num_tokens_received * (size_t)config->hidden_size *
                                         cumoe__dtype_size(config->dtype));
}

/* What is on its way. */
static void place_messages(cumoe_arena_t *arena, const cumoe_layer_t *layer, cumoe_pass_t pass,
                           const cumoe_traffic_t *traffic, cumoe_exchange_layout_t *exchange)
{
    const cumoe_config_t *config = &layer->experts.config;
    const size_t P = (size_t)traffic->num_rows_sent, N = (size_t)traffic->num_places;
    const size_t tokens = (size_t)traffic->num_tokens_sent, most = tokens > N ? tokens : N;
    const bool at_once = config->exchange_chunks > 1;
    const size_t row = (size_t)config->hidden_size * cumoe__dtype_size(config->dtype);
    const size_t gate = cumoe__dtype_size(cumoe__gate_dtype(config));
    exchange->packed = cumoe__take(arena, (at_once ? tokens : most) * row);
    exchange->returned = at_once ? cumoe__take(arena, N * row) : exchange->packed;
    exchange->results = cumoe__take(arena, P * row);
    if (pass == CUMOE_PASS_BACKWARD) {
        exchange->dy = cumoe__take(arena, (size_t)traffic->num_tokens_received * row);
        exchange->dweight = cumoe__take(arena, N * gate);
        exchange->dweight_back = cumoe__take(arena, P * gate);
    } else {
        exchange->expert_sent = cumoe__take(arena, P * sizeof(int32_t));
        exchange->token_sent = cumoe__take(arena, P * sizeof(int32_t));
        exchange->weight_sent = cumoe__take(arena, P * gate);
        exchange->expert = cumoe__take(arena, N * sizeof(int32_t));
        exchange->token = cumoe__take(arena, N * sizeof(int32_t));
    }
}

static void most(size_t *size, const cumoe_layer_t *layer, const cumoe_context_t *context, cumoe_stage_t stage,
                 int64_t num_tokens)
{
    const size_t needed = layer->handle->ops->workspace_size(context, stage, num_tokens);
    if (needed > *size) *size = needed;
}

/* Of the stages that see rows of experts: NUM_ROWS are the tokens there. */
static void most_of_experts(size_t *size, const cumoe_layer_t *layer, const cumoe_context_t *context,
                            cumoe_pass_t pass, int64_t num_rows)
{
    const bool backward = pass == CUMOE_PASS_BACKWARD;
    if (!backward) most(size, layer, context, CUMOE_STAGE_PERMUTE, num_rows);
    most(size, layer, context, CUMOE_STAGE_UP, num_rows);
    most(size, layer, context, backward ? CUMOE_STAGE_DOWN_BACKWARD : CUMOE_STAGE_DOWN, num_rows);
    if (backward) most(size, layer, context, CUMOE_STAGE_UP_BACKWARD, num_rows);
}

/* Stages come one after the other. */
static size_t stage_scratch(const cumoe_layer_t *layer, cumoe_pass_t pass, int64_t num_tokens,
                            const cumoe_traffic_t *traffic)
{
    const bool backward = pass == CUMOE_PASS_BACKWARD;
    const cumoe_context_t *tokens = &layer->context;
    size_t size = 0;
    most(&size, layer, tokens, backward ? CUMOE_STAGE_GATE_BACKWARD : CUMOE_STAGE_GATE, num_tokens);
    if (!backward) most(&size, layer, tokens, CUMOE_STAGE_PERMUTE, num_tokens);
    if (!backward && tokens->config.ep) most(&size, layer, &layer->parcels, CUMOE_STAGE_PERMUTE, num_tokens);
    if (pass == CUMOE_PASS_PLAN) return size;
    if (!traffic) most_of_experts(&size, layer, &layer->experts, pass, num_tokens);
    for (int32_t c = 0; traffic && c < tokens->config.exchange_chunks; c++) {
        const cumoe_context_t context = cumoe__exchange_context(layer, c);
        most_of_experts(&size, layer, &context, pass, traffic->chunk[c].num_rows);
    }
    return size;
}

cumoe_layout_t cumoe__layout(const cumoe_layer_t *layer, cumoe_pass_t pass, int64_t num_tokens,
                             const cumoe_traffic_t *traffic, cumoe_memory_t memory)
{
    const cumoe_config_t *config = &layer->context.config;
    const size_t token = cumoe__dtype_size(config->dtype), gate = cumoe__dtype_size(cumoe__gate_dtype(config));
    const size_t T = (size_t)num_tokens, H = (size_t)config->hidden_size;
    const size_t R = (size_t)(traffic ? traffic->num_places : cumoe__max_rows(config, num_tokens));
    const size_t z_size = R * (size_t)cumoe__z_width(config) * token;
    const bool glu = cumoe__is_glu(config->activation), linear = cumoe__is_linear(config->activation);

    /* Offsets in saved and routing count from their first byte, so that a copy means the same. Those in workspace
     * count from an aligned byte inside, for which the size has room. */
    cumoe_arena_t scratch = {((uintptr_t)memory.workspace + CUMOE_ARENA_ALIGNMENT - 1) / CUMOE_ARENA_ALIGNMENT *
                                 CUMOE_ARENA_ALIGNMENT,
                             CUMOE_ARENA_ALIGNMENT};
    if (memory.workspace) scratch.used = 0;
    cumoe_arena_t saved = {(uintptr_t)memory.saved, 0}, planned = {(uintptr_t)memory.routing, 0};
    cumoe_arena_t *kept = pass == CUMOE_PASS_INFERENCE ? &scratch : &saved;

    cumoe_layout_t layout = {0};
    place_routing(cumoe__is_planned(config) ? &planned : kept, layer, num_tokens, &layout);
    if (traffic) place_arrived(kept, layer, traffic, &layout.exchange);
    if (traffic) place_messages(&scratch, layer, pass, traffic, &layout.exchange);
    const bool z_is_kept = pass != CUMOE_PASS_INFERENCE && !config->recompute;
    if (pass != CUMOE_PASS_PLAN) layout.z = cumoe__take(z_is_kept ? kept : &scratch, z_size);
    if (pass == CUMOE_PASS_BACKWARD) {
        layout.backward.dz = cumoe__take(&scratch, z_size);
        layout.backward.drows = linear ? layout.backward.dz : cumoe__take(&scratch, R * H * token);
        layout.backward.dweight = cumoe__take(&scratch, (size_t)cumoe__max_slots(config, num_tokens) * gate);
        layout.backward.dx_gate = cumoe__take(&scratch, T * H * gate);
    } else if (pass != CUMOE_PASS_PLAN) {
        const bool in_place = linear || (!z_is_kept && !glu);
        layout.forward.hidden =
            in_place ? layout.z : cumoe__take(&scratch, R * (size_t)config->intermediate_size * token);
        layout.forward.output = cumoe__take(&scratch, R * H * token);
    }
    layout.stage_size = stage_scratch(layer, pass, num_tokens, traffic);
    layout.stage = cumoe__take(&scratch, layout.stage_size);
    layout.workspace_size = scratch.used;
    layout.saved_size = saved.used;
    layout.routing_size = planned.used;
    return layout;
}
