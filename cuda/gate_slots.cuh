/* Slots that no row of logits decides: those of EXTERNAL, and of HIERARCHICAL behind a choice of no group. */
#pragma once

#include "cuda/gate_decide.cuh"

namespace cumoe
{

constexpr int kSlotThreads = 256, kSlotBlocksPerSm = 6;

/* EXTERNAL: the caller's choices. */
struct ExternalSlots {
    int32_t num_experts;
    uint32_t top_k;
    const cumoe_call_t *call;
    const uint8_t *token_mask; // [T] or NULL
    uint32_t slots;            // T * K, below 2^31
    const void *index;         // [T, K]
    cumoe_dtype_t index_dtype;
    const void *index_weight; // [T, K]
    cumoe_dtype_t index_weight_dtype;
    int32_t *expert; // [T, K]
    void *weight;    // [T, K]
    GateSums sums;
};

/* What is outside 0..E-1 is not routed, and its weight not looked at. */
template <typename Real>
__global__ void __launch_bounds__(kSlotThreads, kSlotBlocksPerSm) gate_external_kernel(ExternalSlots in)
{
    SharedArena arena;
    const SharedSums shared(arena, in.num_experts);
    const GateSums sums = shared.begin(in.sums, in.num_experts);
    const int64_t live = in.call->live_tokens;
    uint32_t tokens = 0, bad_indices = 0;
    for (uint32_t slot = blockIdx.x * kSlotThreads + threadIdx.x; slot < in.slots;
         slot += gridDim.x * kSlotThreads) {
        const uint32_t token = slot / in.top_k;
        int64_t e = -1;
        if (token < live && token_counts(in.token_mask, token)) {
            e = in.index_dtype == CUMOE_I64 ? static_cast<const int64_t *>(in.index)[slot]
                                            : static_cast<const int32_t *>(in.index)[slot];
            tokens += slot % in.top_k == 0;
        }
        const bool routed = e >= 0 && e < in.num_experts;
        bad_indices += e < -1 || e > in.num_experts;
        in.expert[slot] = routed ? static_cast<int32_t>(e) : -1;
        static_cast<Real *>(in.weight)[slot] =
            routed ? load<Real>(in.index_weight, in.index_weight_dtype, slot) : static_cast<Real>(0);
        if (routed) atomic_add(&sums.count[e], 1u);
    }
    tokens = reduce_add(kFullMask, tokens);
    bad_indices = reduce_add(kFullMask, bad_indices);
    if (threadIdx.x % kWarp == 0) {
        atomic_add(in.sums.tokens, static_cast<uint64_t>(tokens));
        atomic_add(&in.sums.counter[kBadIndices], static_cast<uint64_t>(bad_indices));
    }
    sync_threads(); // the sums of all warps are there
    shared.end(in.sums, in.num_experts);
}

/* HIERARCHICAL: the choices of tokens, when both levels have decided. */
struct ChoicesOfTokens {
    int64_t num_tokens;           // T
    int32_t top_k_groups, top_k;  // K1, K2
    const int32_t *primary_group; // [T, K1]
    const void *primary_weight;   // [T, K1]
    int32_t *expert;              // [T, K1, K2]
    void *weight;                 // the same
    uint64_t *nan_tokens;         // [1]
};

/* Slots behind a choice of no group are not routed, and NaN with it. Tokens that a group made NaN are counted;
 * those that the primary gate made NaN are. */
template <typename Real>
__global__ void __launch_bounds__(kSlotThreads, kSlotBlocksPerSm) gate_choices_kernel(ChoicesOfTokens in)
{
    uint32_t nan_tokens = 0;
    const Real *const primary_weight = static_cast<const Real *>(in.primary_weight);
    Real *const weight = static_cast<Real *>(in.weight);
    for (int64_t t = static_cast<int64_t>(blockIdx.x) * kSlotThreads + threadIdx.x; t < in.num_tokens;
         t += static_cast<int64_t>(gridDim.x) * kSlotThreads) {
        bool is_nan = false;
#pragma unroll 1
        for (int64_t choice = t * in.top_k_groups; choice < (t + 1) * in.top_k_groups; choice++) {
            const int64_t first = choice * in.top_k;
            if (in.primary_group[choice] >= 0) {
                is_nan = is_nan || weight[first] != weight[first];
                continue;
            }
#pragma unroll 1
            for (int64_t slot = first; slot < first + in.top_k; slot++) {
                in.expert[slot] = -1;
                weight[slot] = primary_weight[choice];
            }
        }
        nan_tokens += is_nan;
    }
    nan_tokens = reduce_add(kFullMask, nan_tokens);
    if (threadIdx.x % kWarp == 0) atomic_add(in.nan_tokens, static_cast<uint64_t>(nan_tokens));
}

} // namespace cumoe
