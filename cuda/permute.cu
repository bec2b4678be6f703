/* Every block owns a chunk of consecutive slots, every warp of it a part of consecutive slots, and a row is
 *
 *     rows of lower experts + the expert's rows in lower blocks + in lower warps + in lower slots of the warp,
 *
 * which makes the sort stable for any number of blocks: that number may follow T, and the rows do not. */
#include "cuda/permute.cuh"

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "cuda/shared.cuh"

namespace cumoe
{

namespace
{

constexpr int kWarp = 32;
constexpr int kWarps = 4; // counters of 4096 experts for more warps would not fit into 99 KiB of shared memory
constexpr int kThreads = kWarps * kWarp;
constexpr int kScanThreads = 1024, kScanWarps = kScanThreads / kWarp;
constexpr int32_t kMinChunk = 2048, kMaxBlocks = 256;

struct Slots {
    const int32_t *expert;    // [T, K]
    const cumoe_call_t *call; // [1]
    int32_t num_slots;        // T * K
    int32_t num_experts, top_k;
    int32_t num_blocks;
    int32_t chunk; // slots of a block, a multiple of kThreads
};

Slots make_slots(const int32_t *expert, const cumoe_call_t *call, int64_t num_tokens, int32_t num_experts,
                 int32_t top_k)
{
    const int64_t slots = num_tokens * top_k;
    const int64_t chunks = (slots + kMinChunk - 1) / kMinChunk;
    const int64_t blocks = chunks < kMaxBlocks ? chunks : kMaxBlocks;
    const int64_t share = blocks > 0 ? (slots + blocks - 1) / blocks : 0;
    const int32_t chunk = static_cast<int32_t>((share + kThreads - 1) / kThreads * kThreads);
    return {expert, call, static_cast<int32_t>(slots), num_experts, top_k, static_cast<int32_t>(blocks), chunk};
}

/* The expert of a slot; from num_experts on, there is none. */
__device__ __forceinline__ uint32_t expert_of(const Slots &slots, int64_t slot, int64_t live)
{
    return slot < live ? static_cast<uint32_t>(slots.expert[slot]) : UINT32_MAX;
}

__device__ __forceinline__ int64_t live_slots(const Slots &slots)
{
    return slots.call->live_tokens * slots.top_k;
}

struct CountArrays {
    uint32_t *count; // [E]
    __host__ __device__ CountArrays(SharedArena &arena, int32_t num_experts)
        : count(arena.take<uint32_t>(static_cast<size_t>(num_experts)))
    {
    }
};

/* block_count [E, B]: rows of every expert in every block. */
__global__ void __launch_bounds__(kThreads) permute_count_kernel(Slots slots, uint32_t *block_count)
{
    SharedArena arena;
    const CountArrays shared(arena, slots.num_experts);
    for (int32_t e = threadIdx.x; e < slots.num_experts; e += kThreads) shared.count[e] = 0;
    sync_threads();

    const int64_t live = live_slots(slots), begin = static_cast<int64_t>(blockIdx.x) * slots.chunk;
    for (int32_t i = threadIdx.x; i < slots.chunk; i += kThreads) {
        const uint32_t expert = expert_of(slots, begin + i, live);
        if (expert < static_cast<uint32_t>(slots.num_experts)) atomic_add(&shared.count[expert], 1u);
    }
    sync_threads();

    for (int32_t e = threadIdx.x; e < slots.num_experts; e += kThreads)
        block_count[static_cast<int64_t>(e) * slots.num_blocks + blockIdx.x] = shared.count[e];
}

/* The sum of VALUE over this lane and those below. */
__device__ __forceinline__ uint32_t warp_inclusive_sum(uint32_t value)
{
    const int lane = threadIdx.x % kWarp;
    for (int delta = 1; delta < kWarp; delta *= 2) {
        const uint32_t below = shuffle_up(kFullMask, value, static_cast<unsigned>(delta));
        if (lane >= delta) value += below;
    }
    return value;
}

/* A warp for each expert: block_count becomes the rows in lower blocks, offset [E + 1] at e + 1 the rows in all. */
__global__ void __launch_bounds__(kThreads)
    permute_scan_blocks_kernel(int32_t num_experts, int32_t num_blocks, uint32_t *block_count, int32_t *offset)
{
    const int lane = threadIdx.x % kWarp;
    const int32_t expert = static_cast<int32_t>(blockIdx.x) * kWarps + static_cast<int32_t>(threadIdx.x / kWarp);
    if (expert >= num_experts) return; // the whole warp
    uint32_t *count = block_count + static_cast<int64_t>(expert) * num_blocks;
    uint32_t carry = 0;
    for (int32_t begin = 0; begin < num_blocks; begin += kWarp) {
        const int32_t b = begin + lane;
        const uint32_t value = b < num_blocks ? count[b] : 0;
        const uint32_t sum = warp_inclusive_sum(value);
        if (b < num_blocks) count[b] = carry + sum - value;
        carry += shuffle(kFullMask, sum, kWarp - 1);
    }
    if (lane == 0) offset[expert + 1] = static_cast<int32_t>(carry);
}

struct ScanArrays {
    uint32_t *warp_sum; // [kScanWarps]
    __host__ __device__ explicit ScanArrays(SharedArena &arena) : warp_sum(arena.take<uint32_t>(kScanWarps)) {}
};

/* One block: offset [E + 1] from the rows of each expert, at e + 1, to the sums up to each. */
__global__ void __launch_bounds__(kScanThreads) permute_scan_experts_kernel(int32_t num_experts, int32_t *offset)
{
    SharedArena arena;
    const ScanArrays shared(arena);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    if (threadIdx.x == 0) offset[0] = 0;
    uint32_t carry = 0;
    for (int32_t begin = 0; begin < num_experts; begin += kScanThreads) {
        const int32_t expert = begin + static_cast<int32_t>(threadIdx.x);
        uint32_t sum = warp_inclusive_sum(expert < num_experts ? static_cast<uint32_t>(offset[expert + 1]) : 0u);
        if (lane == kWarp - 1) shared.warp_sum[warp] = sum;
        sync_threads();
        // Every warp sums the sums of all for itself: cheaper than a second barrier.
        const uint32_t sums = warp_inclusive_sum(shared.warp_sum[lane]);
        const uint32_t lower = shuffle(kFullMask, sums, warp - 1);
        if (warp > 0) sum += lower;
        if (expert < num_experts) offset[expert + 1] = static_cast<int32_t>(carry + sum);
        carry += shuffle(kFullMask, sums, kWarp - 1);
        sync_threads(); // warp_sum is read; the next round may write it
    }
}

struct PlaceArrays {
    uint32_t *next; // [kWarps, E] row that a warp's next slot of an expert gets
    __host__ __device__ PlaceArrays(SharedArena &arena, int32_t num_experts)
        : next(arena.take<uint32_t>(static_cast<size_t>(num_experts) * kWarps))
    {
    }
};

/* block_base [E, B]: an expert's rows in lower blocks. */
__global__ void __launch_bounds__(kThreads)
    permute_place_kernel(Slots slots, const uint32_t *block_base, cumoe_rows_t rows)
{
    SharedArena arena;
    const PlaceArrays shared(arena, slots.num_experts);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const uint32_t E = static_cast<uint32_t>(slots.num_experts);
    uint32_t *next = shared.next + static_cast<size_t>(warp) * E; // [E] this warp's

    // Count the slots of this warp.
    for (uint32_t i = threadIdx.x; i < E * kWarps; i += kThreads) shared.next[i] = 0;
    sync_threads();
    const int64_t live = live_slots(slots);
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * slots.chunk + warp * (slots.chunk / kWarps);
    const int64_t limit = begin + slots.chunk / kWarps, end = limit < slots.num_slots ? limit : slots.num_slots;
    for (int64_t slot = begin + lane; slot < end; slot += kWarp) {
        const uint32_t expert = expert_of(slots, slot, live);
        if (expert < E) atomic_add(&next[expert], 1u);
    }
    sync_threads();

    // From the counts of the warps to their first rows.
    for (uint32_t e = threadIdx.x; e < E; e += kThreads) {
        uint32_t row = static_cast<uint32_t>(rows.offset[e]) +
                       block_base[static_cast<int64_t>(e) * slots.num_blocks + blockIdx.x];
        for (int w = 0; w < kWarps; w++) {
            const uint32_t count = shared.next[w * E + e];
            shared.next[w * E + e] = row;
            row += count;
        }
    }
    sync_threads();

    // Place 32 slots at a time; among them, those of one expert in the order of the lanes.
    for (int64_t base = begin; base < end; base += kWarp) {
        const int64_t slot = base + lane;
        const uint32_t expert = expert_of(slots, slot, live);
        const uint32_t same = match_any(kFullMask, expert);
        const bool routed = expert < E;
        int32_t row = -1;
        if (routed) row = static_cast<int32_t>(next[expert]) + popcount(same & ((1u << lane) - 1));
        sync_warp();
        if (routed && lane == kWarp - 1 - leading_zeros(same)) next[expert] = static_cast<uint32_t>(row) + 1;
        sync_warp();
        if (slot < slots.num_slots) rows.slot_row[slot] = row;
        if (routed) {
            rows.row_slot[row] = static_cast<int32_t>(slot);
            rows.row_token[row] = static_cast<int32_t>(slot / slots.top_k);
        }
    }
}

dim3 divide(int32_t count, int per_block)
{
    return dim3(static_cast<unsigned>((count + per_block - 1) / per_block));
}

} // namespace

size_t permute_workspace(int64_t num_tokens, int32_t num_experts, int32_t top_k)
{
    const Slots slots = make_slots(nullptr, nullptr, num_tokens, num_experts, top_k);
    return static_cast<size_t>(num_experts) * static_cast<size_t>(slots.num_blocks) * sizeof(uint32_t);
}

cudaError_t permute(const cumoe_permute_args_t &args, int32_t num_experts, int32_t top_k, cudaStream_t stream)
{
    const Slots slots = make_slots(args.routing.expert, args.routing.call, args.num_tokens, num_experts, top_k);
    uint32_t *block_count = static_cast<uint32_t *>(args.workspace); // [E, B]
    const dim3 blocks(static_cast<unsigned>(slots.num_blocks));

    cudaError_t error = launch({blocks, kThreads, stream, shared_bytes<CountArrays>(num_experts)},
                               permute_count_kernel, slots, block_count);
    if (error != cudaSuccess) return error;
    error = launch({divide(num_experts, kWarps), kThreads, stream}, permute_scan_blocks_kernel, num_experts,
                   slots.num_blocks, block_count, args.rows.offset);
    if (error != cudaSuccess) return error;
    error = launch({dim3(1), kScanThreads, stream, shared_bytes<ScanArrays>()}, permute_scan_experts_kernel,
                   num_experts, args.rows.offset);
    if (error != cudaSuccess) return error;
    return launch({blocks, kThreads, stream, shared_bytes<PlaceArrays>(num_experts)}, permute_place_kernel, slots,
                  block_count, args.rows);
}

} // namespace cumoe
