/* What the two ways of stage permute share: a counting sort where shared memory holds a counter for every expert
 * and warp (permute.cu), else a radix sort (permute_sorted.cu). */
#pragma once

#include "cuda/stages.cuh"
#include "host/kinds.h"

namespace cumoe
{

constexpr int32_t kPermuteMaxCounters = 4096; // experts of the counting sort

/* The choices of all tokens. */
struct Slots {
    const int32_t *expert;     // [S]
    const int32_t *token_slot; // [T + 1] where the slots of a token begin, and
    const int32_t *slot_token; // [S]     whose a slot is; NULL: every token has K
    const cumoe_call_t *call;  // [1]
    int32_t num_slots;         // S
    int32_t num_experts, top_k;
};

inline Slots slots_of(const cumoe_context_t &context, const cumoe_permute_args_t &args)
{
    const cumoe_config_t &config = context.config;
    return {args.routing.expert,
            args.routing.token_slot,
            args.routing.slot_token,
            args.routing.call,
            static_cast<int32_t>(cumoe__max_slots(&config, args.num_tokens)),
            config.num_experts,
            config.top_k};
}

/* The expert of a slot; from num_experts on, there is none. Slots from LIVE on are not read. */
__device__ __forceinline__ uint32_t expert_of(const Slots &slots, int64_t slot, int64_t live)
{
    return slot < live ? static_cast<uint32_t>(slots.expert[slot]) : UINT32_MAX;
}

__device__ __forceinline__ int64_t live_slots(const Slots &slots)
{
    const int64_t live = slots.call->live_tokens;
    return slots.token_slot ? slots.token_slot[live] : live * slots.top_k;
}

__device__ __forceinline__ int32_t token_of(const Slots &slots, int32_t slot)
{
    return slots.token_slot ? slots.slot_token[slot] : slot / slots.top_k;
}

/* offset [E + 1] from the rows of each expert, at e + 1, to the sums up to each; and the tile map. */
cudaError_t permute_scan_experts(const cumoe_rows_t &rows, int32_t num_experts, int32_t tile_rows,
                                 cudaStream_t stream);

size_t permute_sorted_workspace(const cumoe_context_t &context, int64_t num_tokens);
cudaError_t permute_sorted(const cumoe_context_t &context, const cumoe_permute_args_t &args, cudaStream_t stream);

} // namespace cumoe
