/* For more experts than there is shared memory for counters. */
#include "cuda/permute.cuh"

#include "cuda/launch.cuh"
#include "cuda/sort.cuh"
#include "host/arena.h"
#include "host/tile.h"

namespace cumoe
{

namespace
{

constexpr int kThreads = 256;

dim3 blocks_of(int64_t count)
{
    return dim3(static_cast<unsigned>((count + kThreads - 1) / kThreads));
}

struct Scratch {
    SortPairs pairs;
    void *sort;
    size_t used;
};

/* Slots that are not routed get the key E, and so stand behind all rows. */
Scratch carve(const cumoe_context_t &context, int64_t num_tokens, void *workspace)
{
    Scratch scratch;
    cumoe_arena_t arena = {reinterpret_cast<uintptr_t>(workspace), 0};
    SortPairs &pairs = scratch.pairs;
    pairs.count = static_cast<int32_t>(cumoe__max_slots(&context.config, num_tokens));
    pairs.key_bits = 1;
    while (context.config.num_experts >> pairs.key_bits) pairs.key_bits++;
    const size_t bytes = static_cast<size_t>(pairs.count) * sizeof(uint32_t);
    for (int i = 0; i < 2; i++) {
        pairs.key[i] = static_cast<uint32_t *>(cumoe__take(&arena, bytes));
        pairs.value[i] = static_cast<uint32_t *>(cumoe__take(&arena, bytes));
    }
    scratch.sort = cumoe__take(&arena, sort_workspace(pairs.count));
    scratch.used = arena.used;
    return scratch;
}

__global__ void __launch_bounds__(kThreads) permute_keys_kernel(Slots slots, SortPairs pairs)
{
    const int64_t slot = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (slot >= slots.num_slots) return;
    const uint32_t expert = expert_of(slots, slot, live_slots(slots)), E = static_cast<uint32_t>(slots.num_experts);
    pairs.key[0][slot] = expert < E ? expert : E;
    pairs.value[0][slot] = static_cast<uint32_t>(slot);
}

/* The first of the ascending keys [count] that is at least KEY. */
__device__ __forceinline__ int32_t first_of(const uint32_t *keys, int32_t count, uint32_t key)
{
    int32_t begin = 0, end = count;
    while (begin < end) {
        const int32_t middle = begin + (end - begin) / 2;
        if (keys[middle] < key)
            begin = middle + 1;
        else
            end = middle;
    }
    return begin;
}

/* The rows of each expert, at offset [e + 1]. */
__global__ void __launch_bounds__(kThreads)
    permute_count_sorted_kernel(const uint32_t *key, int32_t num_slots, int32_t num_experts, int32_t *offset)
{
    const int32_t expert = static_cast<int32_t>(blockIdx.x) * kThreads + static_cast<int32_t>(threadIdx.x);
    if (expert >= num_experts) return;
    const uint32_t e = static_cast<uint32_t>(expert);
    offset[expert + 1] = first_of(key, num_slots, e + 1) - first_of(key, num_slots, e);
}

__global__ void __launch_bounds__(kThreads)
    permute_place_sorted_kernel(const uint32_t *key, const uint32_t *value, Slots slots, cumoe_rows_t rows)
{
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (row >= slots.num_slots) return;
    const int32_t slot = static_cast<int32_t>(value[row]);
    const bool routed = key[row] < static_cast<uint32_t>(slots.num_experts);
    rows.slot_row[slot] = routed ? static_cast<int32_t>(row) : -1;
    if (!routed) return;
    rows.row_slot[row] = slot;
    rows.row_token[row] = token_of(slots, slot);
}

} // namespace

size_t permute_sorted_workspace(const cumoe_context_t &context, int64_t num_tokens)
{
    return carve(context, num_tokens, nullptr).used;
}

cudaError_t permute_sorted(const cumoe_context_t &context, const cumoe_permute_args_t &args, cudaStream_t stream)
{
    const Slots slots = slots_of(context, args);
    const dim3 blocks = blocks_of(slots.num_slots);
    const Scratch scratch = carve(context, args.num_tokens, args.workspace);
    cudaError_t error = launch({blocks, kThreads, stream}, permute_keys_kernel, slots, scratch.pairs);
    if (error != cudaSuccess) return error;
    int result = 0;
    if (slots.num_slots > 0) error = sort_pairs(scratch.pairs, scratch.sort, &result, stream);
    if (error != cudaSuccess) return error;
    const uint32_t *key = scratch.pairs.key[result], *value = scratch.pairs.value[result];
    error = launch({blocks_of(slots.num_experts), kThreads, stream}, permute_count_sorted_kernel, key,
                   slots.num_slots, slots.num_experts, args.rows.offset);
    if (error != cudaSuccess) return error;
    error = permute_scan_experts(args.rows, slots.num_experts, cumoe__row_tile(&context.config, args.num_tokens),
                                 stream);
    if (error != cudaSuccess) return error;
    return launch({blocks, kThreads, stream}, permute_place_sorted_kernel, key, value, slots, args.rows);
}

} // namespace cumoe
