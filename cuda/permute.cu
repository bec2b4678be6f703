/* Every block owns a chunk of consecutive slots, every warp of it a part of consecutive slots, and a row is
 *
 *     rows of lower experts + the expert's rows in lower blocks + in lower warps + in lower slots of the warp,
 *
 * which makes the sort stable for any number of blocks and warps: these may follow T, and the rows do not. Few
 * slots are the work of a single block, and a single launch. */
#include "cuda/permute.cuh"

#include "cuda/launch.cuh"
#include "cuda/scan.cuh"
#include "cuda/shared.cuh"
#include "host/tile.h"

namespace cumoe
{

namespace
{

constexpr int kWarp = 32;
constexpr int kWarps = 4; // counters of 4096 experts for more warps would not fit into 99 KiB of shared memory
constexpr int kThreads = kWarps * kWarp;
constexpr int kScanThreads = 1024, kScanWarps = kScanThreads / kWarp;
constexpr int32_t kMinChunk = 2048, kMaxBlocks = 256;
constexpr int kSlotsOfWarp = 512; // that are worth less than the launches of the other way

static_assert(kPermuteMaxCounters * kWarps * sizeof(uint32_t) <= 99 * 1024, "the least that a block may have");
static_assert(kScanWarps <= kWarp, "a warp sums the sums of all warps");

struct Chunks {
    int32_t num_blocks;
    int32_t size; // slots of a block, a multiple of kThreads
};

Chunks chunks_of(int64_t slots)
{
    const int64_t chunks = (slots + kMinChunk - 1) / kMinChunk;
    const int64_t blocks = chunks < kMaxBlocks ? chunks : kMaxBlocks;
    const int64_t share = blocks > 0 ? (slots + blocks - 1) / blocks : 0;
    return {static_cast<int32_t>(blocks), static_cast<int32_t>((share + kThreads - 1) / kThreads * kThreads)};
}

/* Warps of a single block for all slots, as many as there is shared memory for counters; 0 = too many slots. */
int warps_of_single_block(const Slots &slots)
{
    int warps = kScanWarps;
    while (warps > kWarps && slots.num_experts * warps > kPermuteMaxCounters * kWarps) warps /= 2;
    return slots.num_slots <= warps * kSlotsOfWarp ? warps : 0;
}

struct CountArrays {
    uint32_t *count; // [E]
    __host__ __device__ CountArrays(SharedArena &arena, int32_t num_experts)
        : count(arena.take<uint32_t>(static_cast<size_t>(num_experts)))
    {
    }
};

/* block_count [E, B]: rows of every expert in every block. */
__global__ void __launch_bounds__(kThreads) permute_count_kernel(Slots slots, Chunks chunks, uint32_t *block_count)
{
    SharedArena arena;
    const CountArrays shared(arena, slots.num_experts);
    for (int32_t e = threadIdx.x; e < slots.num_experts; e += kThreads) shared.count[e] = 0;
    sync_threads();

    const int64_t live = live_slots(slots), begin = static_cast<int64_t>(blockIdx.x) * chunks.size;
    for (int32_t i = threadIdx.x; i < chunks.size; i += kThreads) {
        const uint32_t expert = expert_of(slots, begin + i, live);
        if (expert < static_cast<uint32_t>(slots.num_experts)) atomic_add(&shared.count[expert], 1u);
    }
    sync_threads();

    for (int32_t e = threadIdx.x; e < slots.num_experts; e += kThreads)
        block_count[static_cast<int64_t>(e) * chunks.num_blocks + blockIdx.x] = shared.count[e];
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
        const uint32_t value = b < num_blocks ? count[b] : 0u;
        const uint32_t sum = warp_inclusive_sum(value);
        if (b < num_blocks) count[b] = carry + sum - value;
        carry += shuffle(kFullMask, sum, kWarp - 1);
    }
    if (lane == 0) offset[expert + 1] = static_cast<int32_t>(carry);
}

/* Rows in the low half, tiles in the high one: both are summed at once, and neither passes 2^31. */
__device__ __forceinline__ uint64_t rows_and_tiles(uint32_t rows, int32_t tile_rows)
{
    const uint32_t size = static_cast<uint32_t>(tile_rows);
    return rows | static_cast<uint64_t>((rows + size - 1) / size) << 32;
}

/* Tiles of the experts that the lanes of a warp have: COUNT their rows and tiles, BEFORE those of lower experts. */
__device__ __forceinline__ void write_tiles(uint64_t count, uint64_t before, int32_t expert, int32_t tile_rows,
                                            int32_t *tile)
{
    constexpr uint32_t kFew = 4;
    const auto write = [=](int32_t of, uint64_t from, uint32_t i) {
        int32_t *entry = tile + 2 + 2 * ((from >> 32) + i);
        entry[0] = of;
        entry[1] = static_cast<int32_t>(from) + static_cast<int32_t>(i) * tile_rows;
    };
    const uint32_t tiles = static_cast<uint32_t>(count >> 32), lane = threadIdx.x % kWarp;
    if (tiles <= kFew)
        for (uint32_t i = 0; i < tiles; i++) write(expert, before, i);

    // Many tiles of one expert are shared by the lanes.
    for (uint32_t many = ballot(kFullMask, tiles > kFew); many != 0; many &= many - 1) {
        const int source = popcount((many & (0u - many)) - 1);
        const uint64_t from = shuffle(kFullMask, before, source);
        const uint32_t all = shuffle(kFullMask, tiles, source);
        const int32_t of = shuffle(kFullMask, expert, source);
        for (uint32_t i = lane; i < all; i += kWarp) write(of, from, i);
    }
}

struct ScanArrays {
    uint64_t *warp_sum; // [kScanWarps]
    __host__ __device__ explicit ScanArrays(SharedArena &arena) : warp_sum(arena.take<uint64_t>(kScanWarps)) {}
};

/* A whole block: offset [E + 1] and the tile map, from rows_of(expert). */
template <typename RowsOf>
__device__ __forceinline__ void scan_experts(const RowsOf &rows_of, int32_t num_experts, int32_t tile_rows,
                                             const cumoe_rows_t &rows, const ScanArrays &shared)
{
    const int32_t threads = static_cast<int32_t>(blockDim.x);
    uint64_t carry = 0;
    for (int32_t begin = 0; begin < num_experts; begin += threads) {
        const int32_t expert = begin + static_cast<int32_t>(threadIdx.x);
        const uint64_t count = rows_and_tiles(expert < num_experts ? rows_of(expert) : 0u, tile_rows);
        const BlockSum<uint64_t> sums = block_inclusive_sum(count, shared.warp_sum);
        const uint64_t sum = carry + sums.inclusive;
        if (expert < num_experts) rows.offset[expert + 1] = static_cast<int32_t>(sum);
        write_tiles(count, sum - count, expert, tile_rows, rows.tile);
        carry += sums.total;
        sync_threads(); // warp_sum is read; the next round may write it
    }
    if (threadIdx.x == 0) {
        rows.offset[0] = 0;
        rows.tile[0] = static_cast<int32_t>(carry >> 32);
        rows.tile[1] = tile_rows;
    }
}

/* One block: offset [E + 1] from the rows of each expert, at e + 1. */
__global__ void __launch_bounds__(kScanThreads)
    permute_scan_experts_kernel(int32_t num_experts, int32_t tile_rows, cumoe_rows_t rows)
{
    SharedArena arena;
    const ScanArrays shared(arena);
    const auto rows_of = [&](int32_t expert) { return static_cast<uint32_t>(rows.offset[expert + 1]); };
    scan_experts(rows_of, num_experts, tile_rows, rows, shared);
}

struct PlaceArrays {
    uint32_t *next; // [warps, E] row that a warp's next slot of an expert gets
    __host__ __device__ PlaceArrays(SharedArena &arena, int32_t num_experts, int num_warps)
        : next(arena.take<uint32_t>(static_cast<size_t>(num_experts) * static_cast<size_t>(num_warps)))
    {
    }
};

/* Slots begin .. end - 1 are a warp's. */
struct Part {
    int64_t begin, end, live;
};

/* Part WARP, of SHARE slots each, of a block whose slots begin at BEGIN. */
__device__ __forceinline__ Part part_of(const Slots &slots, int64_t begin, int warp, int64_t share)
{
    const int64_t first = begin + warp * share, limit = first + share;
    return {first, limit < slots.num_slots ? limit : slots.num_slots, live_slots(slots)};
}

/* next [E]: the slots of this part are added. */
__device__ __forceinline__ void count_part(const Slots &slots, const Part &part, uint32_t *next)
{
    for (int64_t slot = part.begin + threadIdx.x % kWarp; slot < part.end; slot += kWarp) {
        const uint32_t expert = expert_of(slots, slot, part.live);
        if (expert < static_cast<uint32_t>(slots.num_experts)) atomic_add(&next[expert], 1u);
    }
}

/* 32 slots at a time; among them, those of one expert in the order of the lanes. */
__device__ __forceinline__ void place_part(const Slots &slots, const Part &part, uint32_t *next,
                                           const cumoe_rows_t &rows)
{
    const uint32_t E = static_cast<uint32_t>(slots.num_experts);
    const int lane = threadIdx.x % kWarp;
    for (int64_t base = part.begin; base < part.end; base += kWarp) {
        const int64_t slot = base + lane;
        const uint32_t expert = expert_of(slots, slot, part.live);
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
            rows.row_token[row] = token_of(slots, static_cast<int32_t>(slot));
        }
    }
}

/* block_base [E, B]: an expert's rows in lower blocks. */
__global__ void __launch_bounds__(kThreads)
    permute_place_kernel(Slots slots, Chunks chunks, const uint32_t *block_base, cumoe_rows_t rows)
{
    SharedArena arena;
    const PlaceArrays shared(arena, slots.num_experts, kWarps);
    const int warp = threadIdx.x / kWarp;
    const uint32_t E = static_cast<uint32_t>(slots.num_experts);
    uint32_t *next = shared.next + static_cast<size_t>(warp) * E; // [E] this warp's

    // Count the slots of this warp.
    for (uint32_t i = threadIdx.x; i < E * kWarps; i += kThreads) shared.next[i] = 0;
    sync_threads();
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * chunks.size;
    const Part part = part_of(slots, begin, warp, chunks.size / kWarps);
    count_part(slots, part, next);
    sync_threads();

    // From the counts of the warps to their first rows.
    for (uint32_t e = threadIdx.x; e < E; e += kThreads) {
        uint32_t row = static_cast<uint32_t>(rows.offset[e]) +
                       block_base[static_cast<int64_t>(e) * chunks.num_blocks + blockIdx.x];
        for (int w = 0; w < kWarps; w++) {
            const uint32_t count = shared.next[w * E + e];
            shared.next[w * E + e] = row;
            row += count;
        }
    }
    sync_threads();

    place_part(slots, part, next, rows);
}

struct SingleArrays {
    ScanArrays scan;
    uint32_t *count; // [E] rows of an expert
    PlaceArrays place;
    __host__ __device__ SingleArrays(SharedArena &arena, int32_t num_experts, int num_warps)
        : scan(arena), count(arena.take<uint32_t>(static_cast<size_t>(num_experts))),
          place(arena, num_experts, num_warps)
    {
    }
};

/* All of it by one block. */
__global__ void __launch_bounds__(kScanThreads)
    permute_single_block_kernel(Slots slots, int32_t tile_rows, cumoe_rows_t rows)
{
    SharedArena arena;
    const uint32_t threads = blockDim.x, num_warps = threads / kWarp;
    const SingleArrays shared(arena, slots.num_experts, static_cast<int>(num_warps));
    const int warp = threadIdx.x / kWarp;
    const uint32_t E = static_cast<uint32_t>(slots.num_experts);
    uint32_t *next = shared.place.next + static_cast<size_t>(warp) * E; // [E] this warp's

    // Count the slots of this warp.
    for (uint32_t i = threadIdx.x; i < E * num_warps; i += threads) shared.place.next[i] = 0;
    sync_threads();
    const int64_t share = (slots.num_slots + static_cast<int64_t>(threads) - 1) / threads * kWarp;
    const Part part = part_of(slots, 0, warp, share);
    count_part(slots, part, next);
    sync_threads();

    // The rows of each expert, and those in lower warps.
    for (uint32_t e = threadIdx.x; e < E; e += threads) {
        uint32_t lower = 0;
        for (uint32_t w = 0; w < num_warps; w++) {
            const uint32_t count = shared.place.next[w * E + e];
            shared.place.next[w * E + e] = lower;
            lower += count;
        }
        shared.count[e] = lower;
    }

    // The rows of lower experts: the thread that counted an expert reads it, so that no barrier is needed before.
    const auto rows_of = [&](int32_t expert) { return shared.count[expert]; };
    scan_experts(rows_of, slots.num_experts, tile_rows, rows, shared.scan);
    sync_threads(); // offset is there
    for (uint32_t i = threadIdx.x; i < E * num_warps; i += threads)
        shared.place.next[i] += static_cast<uint32_t>(rows.offset[i % E]);
    sync_threads();

    place_part(slots, part, next, rows);
}

dim3 divide(int32_t count, int per_block)
{
    return dim3(static_cast<unsigned>((count + per_block - 1) / per_block));
}

cudaError_t permute_by_blocks(const Slots &slots, int32_t tile_rows, const cumoe_permute_args_t &args,
                              cudaStream_t stream)
{
    const Chunks chunks = chunks_of(slots.num_slots);
    const int32_t num_experts = slots.num_experts;
    uint32_t *block_count = static_cast<uint32_t *>(args.workspace); // [E, B]
    const dim3 blocks(static_cast<unsigned>(chunks.num_blocks));

    cudaError_t error = launch({blocks, kThreads, stream, shared_bytes<CountArrays>(num_experts)},
                               permute_count_kernel, slots, chunks, block_count);
    if (error != cudaSuccess) return error;
    error = launch({divide(num_experts, kWarps), kThreads, stream}, permute_scan_blocks_kernel, num_experts,
                   chunks.num_blocks, block_count, args.rows.offset);
    if (error != cudaSuccess) return error;
    error = permute_scan_experts(args.rows, num_experts, tile_rows, stream);
    if (error != cudaSuccess) return error;
    return launch({blocks, kThreads, stream, shared_bytes<PlaceArrays>(num_experts, kWarps)}, permute_place_kernel,
                  slots, chunks, block_count, args.rows);
}

} // namespace

cudaError_t permute_scan_experts(const cumoe_rows_t &rows, int32_t num_experts, int32_t tile_rows,
                                 cudaStream_t stream)
{
    return launch({dim3(1), kScanThreads, stream, shared_bytes<ScanArrays>()}, permute_scan_experts_kernel,
                  num_experts, tile_rows, rows);
}

size_t permute_workspace(const cumoe_context_t &context, int64_t num_tokens)
{
    const int32_t num_experts = context.config.num_experts;
    if (num_experts > kPermuteMaxCounters) return permute_sorted_workspace(context, num_tokens);
    return static_cast<size_t>(num_experts) *
           static_cast<size_t>(chunks_of(cumoe__max_slots(&context.config, num_tokens)).num_blocks) *
           sizeof(uint32_t);
}

cudaError_t permute(const cumoe_context_t &context, const cumoe_permute_args_t &args, cudaStream_t stream)
{
    if (context.config.num_experts > kPermuteMaxCounters) return permute_sorted(context, args, stream);
    const Slots slots = slots_of(context, args);
    const int32_t tile_rows = cumoe__row_tile(&context.config, args.num_tokens);
    const int warps = warps_of_single_block(slots);
    if (warps == 0) return permute_by_blocks(slots, tile_rows, args, stream);
    return launch({dim3(1), dim3(static_cast<unsigned>(warps * kWarp)), stream,
                   shared_bytes<SingleArrays>(slots.num_experts, warps)},
                  permute_single_block_kernel, slots, tile_rows, args.rows);
}

} // namespace cumoe
