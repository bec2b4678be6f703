/* From choices per token to rows per expert: a stable counting sort, so that the rows of an expert stand in the
 * order of tokens, then of choices, for any number of threads. */
#include "host/cpu/cpu.h"

size_t cumoe__cpu_permute_workspace(const cumoe_context_t *context, int64_t num_tokens)
{
    (void)num_tokens;
    return (size_t)context->config.num_experts * sizeof(int32_t);
}

/* A choice of a live token that names an expert. Choices beyond the live ones are not looked at. */
static inline bool is_routed(const int32_t *expert, int32_t slot, int32_t live, int32_t E)
{
    return slot < live && expert[slot] >= 0 && expert[slot] < E;
}

cumoe_status_t cumoe__cpu_permute(const cumoe_context_t *context, const cumoe_permute_args_t *args,
                                  cumoe_stream_t stream)
{
    (void)stream;
    const int32_t E = context->config.num_experts, K = context->config.top_k;
    const int32_t slots = (int32_t)(args->num_tokens * K), live = (int32_t)(args->routing.call->live_tokens * K);
    const int32_t *expert = args->routing.expert; /* [T, K] */
    const cumoe_rows_t rows = args->rows;
    int32_t *next = args->workspace; /* [E] row that an expert's next choice gets */

    for (int32_t e = 0; e <= E; e++) rows.offset[e] = 0;
    for (int32_t slot = 0; slot < slots; slot++)
        if (is_routed(expert, slot, live, E)) rows.offset[expert[slot] + 1]++;
    for (int32_t e = 0; e < E; e++) {
        rows.offset[e + 1] += rows.offset[e];
        next[e] = rows.offset[e];
    }
    for (int32_t slot = 0; slot < slots; slot++) {
        if (!is_routed(expert, slot, live, E)) {
            rows.slot_row[slot] = -1;
            continue;
        }
        const int32_t row = next[expert[slot]]++;
        rows.slot_row[slot] = row;
        rows.row_slot[row] = slot;
        rows.row_token[row] = slot / K;
    }
    return CUMOE_SUCCESS;
}
