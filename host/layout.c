#include "host/layout.h"
#include "host/arena.h"
#include "host/kinds.h"

static void place_routing(cumoe_arena_t *arena, const cumoe_layer_t *layer, int64_t T, cumoe_layout_t *layout)
{
    const cumoe_config_t *config = &layer->context.config;
    const size_t E = (size_t)config->num_experts, gate = cumoe__dtype_size(cumoe__gate_dtype(config));
    const size_t slots = (size_t)cumoe__max_slots(config, T), R = (size_t)cumoe__max_rows(config, T);
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
    layout->rows = (cumoe_rows_t){
        .offset = cumoe__take(arena, (E + 1) * sizeof(int32_t)),
        .row_token = cumoe__take(arena, R * sizeof(int32_t)),
        .row_slot = cumoe__take(arena, R * sizeof(int32_t)),
        .slot_row = cumoe__take(arena, slots * sizeof(int32_t)),
    };
    if (layer->handle->ops->row_tiles) {
        const int64_t size = cumoe_tile_size((int64_t)R, config->num_experts);
        layout->rows.tile = cumoe__take(arena, (size_t)size * sizeof(int32_t));
    }
}

static size_t stage_scratch(const cumoe_layer_t *layer, cumoe_pass_t pass, int64_t num_tokens)
{
    const cumoe_stage_t first = pass == CUMOE_PASS_BACKWARD ? CUMOE_STAGE_UP : CUMOE_STAGE_GATE;
    const cumoe_stage_t last = pass == CUMOE_PASS_BACKWARD ? CUMOE_STAGE_PERMUTE_BACKWARD : CUMOE_STAGE_COMBINE;
    size_t most = 0;
    for (cumoe_stage_t stage = first; stage <= last; stage++) {
        const size_t size = layer->handle->ops->workspace_size(&layer->context, stage, num_tokens);
        if (size > most) most = size;
    }
    return most;
}

cumoe_layout_t cumoe__layout(const cumoe_layer_t *layer, cumoe_pass_t pass, int64_t num_tokens, void *workspace,
                             const void *saved)
{
    const cumoe_config_t *config = &layer->context.config;
    const size_t token = cumoe__dtype_size(config->dtype), gate = cumoe__dtype_size(cumoe__gate_dtype(config));
    const size_t T = (size_t)num_tokens, H = (size_t)config->hidden_size;
    const size_t R = (size_t)cumoe__max_rows(config, num_tokens);
    const size_t z_size = R * (size_t)cumoe__z_width(config) * token;
    const bool glu = cumoe__is_glu(config->activation), linear = cumoe__is_linear(config->activation);

    /* Offsets in saved count from its first byte, so that a copy of it means the same. Those in workspace count
     * from an aligned byte inside, for which the size has room. */
    cumoe_arena_t scratch = {((uintptr_t)workspace + CUMOE_ARENA_ALIGNMENT - 1) / CUMOE_ARENA_ALIGNMENT *
                                 CUMOE_ARENA_ALIGNMENT,
                             CUMOE_ARENA_ALIGNMENT};
    if (workspace) scratch.used = 0;
    cumoe_arena_t kept = {(uintptr_t)saved, 0};
    cumoe_arena_t *routing = pass == CUMOE_PASS_INFERENCE ? &scratch : &kept;

    cumoe_layout_t layout = {0};
    place_routing(routing, layer, num_tokens, &layout);
    const bool z_is_kept = pass != CUMOE_PASS_INFERENCE && !config->recompute;
    layout.z = cumoe__take(z_is_kept ? &kept : &scratch, z_size);
    if (pass == CUMOE_PASS_BACKWARD) {
        layout.backward.dz = cumoe__take(&scratch, z_size);
        layout.backward.drows = linear ? layout.backward.dz : cumoe__take(&scratch, R * H * token);
        layout.backward.dweight = cumoe__take(&scratch, (size_t)cumoe__max_slots(config, num_tokens) * gate);
        layout.backward.dx_gate = cumoe__take(&scratch, T * H * gate);
    } else {
        const bool in_place = linear || (!z_is_kept && !glu);
        layout.forward.hidden =
            in_place ? layout.z : cumoe__take(&scratch, R * (size_t)config->intermediate_size * token);
        layout.forward.output = cumoe__take(&scratch, R * H * token);
    }
    layout.stage_size = stage_scratch(layer, pass, num_tokens);
    layout.stage = cumoe__take(&scratch, layout.stage_size);
    layout.workspace_size = scratch.used;
    layout.saved_size = kept.used;
    return layout;
}
