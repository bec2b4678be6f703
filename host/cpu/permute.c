/* From choices per token to rows per expert: a stable counting sort, so that the rows of an expert stand in the
 * order of tokens, then of choices, for any number of threads. */
#include "host/cpu/cpu.h"

size_t cumoe__cpu_permute_workspace(const cumoe_context_t *context, int64_t num_tokens)
{
    (void)num_tokens;
    return (size_t)context->config.num_experts * sizeof(int32_t);
}

static inline bool is_routed(const int32_t *expert, int64_t slot, int32_t E)
{
    return expert[slot] >= 0 && expert[slot] < E;
}

cumoe_status_t cumoe__cpu_permute(const cumoe_context_t *context, const cumoe_permute_args_t *args,
                                  cumoe_stream_t stream)
{
    (void)stream;
    const cumoe_config_t *c = &context->config;
    const int32_t E = c->num_experts, *token_slot = args->routing.token_slot;
    const int64_t live = args->routing.call->live_tokens, slots = cumoe__max_slots(c, args->num_tokens);
    const int64_t live_slots = live > 0 ? cumoe__cpu_slots_of(c, token_slot, live - 1).end : 0;
    const int32_t *expert = args->routing.expert; /* [S] */
    const cumoe_rows_t rows = args->rows;
    int32_t *next = args->workspace; /* [E] row that an expert's next choice gets */

    for (int32_t e = 0; e <= E; e++) rows.offset[e] = 0;
    for (int64_t slot = 0; slot < live_slots; slot++)
        if (is_routed(expert, slot, E)) rows.offset[expert[slot] + 1]++;
    for (int32_t e = 0; e < E; e++) {
        rows.offset[e + 1] += rows.offset[e];
        next[e] = rows.offset[e];
    }
    for (int64_t slot = live_slots; slot < slots; slot++) rows.slot_row[slot] = -1; /* not looked at */
    for (int64_t t = 0; t < live; t++) {
        const cumoe_cpu_slots_t own = cumoe__cpu_slots_of(c, token_slot, t);
        for (int64_t slot = own.begin; slot < own.end; slot++) {
            rows.slot_row[slot] = -1;
            if (!is_routed(expert, slot, E)) continue;
            const int32_t row = next[expert[slot]]++;
            rows.slot_row[slot] = row;
            rows.row_slot[row] = (int32_t)slot;
            rows.row_token[row] = (int32_t)t;
        }
    }
    return CUMOE_SUCCESS;
}
