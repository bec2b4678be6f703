/* What goes to the experts of other ranks, what came from them, and rows that are taken from where they stand.
 * Bound by memory: a thread has a slot, or 16 bytes of a row. */
#include "cuda/launch.cuh"
#include "cuda/stages.cuh"
#include "cuda/vector.cuh"

namespace cumoe
{

namespace
{

constexpr int kThreads = 256, kBlocksPerSm = 8;

/* Which experts a parcel has: cumoe__first_of_parcel(), on the device. */
struct Owners {
    int32_t together, units, num_ranks, chunks; // experts that stay together; how many such units, ranks, chunks

    __device__ __forceinline__ int32_t first_of_rank(int32_t rank) const
    {
        return static_cast<int32_t>(static_cast<int64_t>(units) * rank / num_ranks) * together;
    }
    __device__ __forceinline__ int32_t first_expert(int32_t parcel) const
    {
        const int32_t rank = rank_of(parcel), first = first_of_rank(rank), chunk = parcel - rank * chunks;
        if (chunk == 0) return first;
        return first + static_cast<int32_t>(static_cast<int64_t>(first_of_rank(rank + 1) - first) * chunk / chunks);
    }
    __device__ __forceinline__ int32_t rank_of(int32_t parcel) const
    {
        return parcel / chunks;
    }
    __device__ __forceinline__ int32_t parcel_of(int32_t expert) const
    {
        const int64_t unit = expert / together;
        const int32_t rank = static_cast<int32_t>(((unit + 1) * num_ranks - 1) / units);
        if (chunks == 1) return rank;
        const int32_t first = first_of_rank(rank), own = first_of_rank(rank + 1) - first;
        return rank * chunks + static_cast<int32_t>((static_cast<int64_t>(expert - first + 1) * chunks - 1) / own);
    }
    __device__ __forceinline__ int32_t num_parcels() const
    {
        return num_ranks * chunks;
    }
};

Owners owners_of(const cumoe_context_t &context)
{
    const int32_t together = cumoe__experts_together(&context.config);
    return {together, context.config.num_experts / together, context.ranks.count, context.config.exchange_chunks};
}

struct Dispatch {
    cumoe_dispatch_args_t args;
    Owners owners;
    int32_t top_k;
    bool wide; // weights are F64
};

/* The parcel of a slot's row, and which of its rows; -1: not routed, or no room there. */
struct Sent {
    int32_t parcel, row;
};
__device__ __forceinline__ Sent find_row(const Dispatch &d, int64_t slot)
{
    const int32_t row = d.args.rows.slot_row[slot];
    if (row < 0) return {-1, 0};
    const int32_t parcel = d.owners.parcel_of(d.args.routing.expert[slot]);
    const int32_t among = row - d.args.rows.offset[d.owners.first_expert(parcel)];
    return {d.args.capacity == 0 || among < d.args.capacity ? parcel : -1, among};
}

__device__ __forceinline__ bool is_live(const Dispatch &d, int64_t slot)
{
    return slot / d.top_k < d.args.routing.call->live_tokens;
}

__device__ __forceinline__ int32_t rows_of(const Dispatch &d, int32_t parcel)
{
    return d.args.rows.offset[d.owners.first_expert(parcel + 1)] -
           d.args.rows.offset[d.owners.first_expert(parcel)];
}

/* The parcel of a slot, unless another slot of its token brings it to that rank earlier. */
__device__ __forceinline__ int32_t mark_slot(const Dispatch &d, int64_t slot)
{
    const int32_t parcel = is_live(d, slot) ? find_row(d, slot).parcel : -1;
    if (parcel < 0) return -1;
    const int64_t begin = slot - slot % d.top_k;
    const int32_t rank = d.owners.rank_of(parcel);
    for (int64_t other = slot - 1; other >= begin; other--) {
        const int32_t with = find_row(d, other).parcel;
        if (with >= 0 && with <= parcel && d.owners.rank_of(with) == rank) return -1;
    }
    if (parcel == rank * d.owners.chunks) return parcel; // there is none before
    for (int64_t other = slot + 1; other < begin + d.top_k; other++) {
        const int32_t with = find_row(d, other).parcel;
        if (with >= 0 && with < parcel && d.owners.rank_of(with) == rank) return -1;
    }
    return parcel;
}

__global__ void __launch_bounds__(kThreads) dispatch_mark_kernel(Dispatch d, int64_t slots)
{
    const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t slot = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; slot < slots; slot += step)
        d.args.slot_parcel[slot] = mark_slot(d, slot);
}

__global__ void __launch_bounds__(kThreads) dispatch_count_kernel(Dispatch d)
{
    for (int32_t p = static_cast<int32_t>(threadIdx.x); p < d.owners.num_parcels(); p += kThreads) {
        d.args.count[2 * p] = rows_of(d, p);
        d.args.count[2 * p + 1] = d.args.parcels.offset[p + 1] - d.args.parcels.offset[p];
    }
}

/* Where a parcel begins, among rows or tokens that are sorted. */
__device__ __forceinline__ int64_t begin_of(const Dispatch &d, int32_t parcel, int32_t sorted)
{
    return d.args.capacity > 0 ? parcel * d.args.capacity : sorted;
}

/* The slot that stands for the token of a slot with a rank. */
__device__ __forceinline__ int64_t find_marked(const Dispatch &d, int64_t slot, int32_t rank)
{
    const auto stands = [&](int64_t i) {
        return d.args.slot_parcel[i] >= 0 && d.owners.rank_of(d.args.slot_parcel[i]) == rank;
    };
    const int64_t begin = slot - slot % d.top_k;
    int64_t i = slot;
    while (i >= begin && !stands(i)) i--;
    if (i >= begin) return i;
    i = slot + 1;
    while (!stands(i)) i++;
    return i;
}

__device__ __forceinline__ void pack_slot(const Dispatch &d, int64_t slot)
{
    const cumoe_dispatch_args_t &a = d.args;
    const Sent sent = find_row(d, slot);
    if (sent.parcel < 0) {
        a.rows.slot_row[slot] = -1;
        return;
    }
    const int32_t expert = d.owners.first_expert(sent.parcel), rank = d.owners.rank_of(sent.parcel);
    const int64_t at = begin_of(d, sent.parcel, a.rows.offset[expert]) + sent.row;
    const int64_t marked = find_marked(d, slot, rank);
    const int32_t with = a.slot_parcel[marked], first = rank * d.owners.chunks;
    const int32_t *offset = a.parcels.offset;
    const int64_t sent_token = begin_of(d, with, offset[with]) + a.parcels.slot_row[marked] - offset[with];
    a.rows.slot_row[slot] = static_cast<int32_t>(at);
    a.expert[at] = a.routing.expert[slot] - expert;
    a.token[at] = static_cast<int32_t>(sent_token - begin_of(d, first, offset[first]));
    if (d.wide)
        static_cast<double *>(a.weight)[at] = static_cast<const double *>(a.routing.weight)[slot];
    else
        static_cast<float *>(a.weight)[at] = static_cast<const float *>(a.routing.weight)[slot];
    if (marked == slot) a.sent_token[sent_token] = static_cast<int32_t>(slot / d.top_k);
}

__global__ void __launch_bounds__(kThreads) dispatch_pack_kernel(Dispatch d, int64_t slots)
{
    const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t slot = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; slot < slots; slot += step)
        if (is_live(d, slot)) pack_slot(d, slot);

    // What has no room.
    if (blockIdx.x > 0 || !d.args.statistics || d.args.capacity == 0) return;
    for (int32_t p = static_cast<int32_t>(threadIdx.x); p < d.owners.num_parcels(); p += kThreads) {
        const int64_t rows = rows_of(d, p);
        if (rows > d.args.capacity)
            atomic_add(reinterpret_cast<uint64_t *>(&d.args.statistics->exchange_overflow),
                       static_cast<uint64_t>(rows - d.args.capacity));
    }
}

__global__ void arrive_begin_kernel(cumoe_call_t *call, int64_t num_slots)
{
    *call = {0, 0, 0, num_slots};
}

/* A row of blocks for each rank: the numbers of its tokens become those among the tokens of all. */
__global__ void __launch_bounds__(kThreads) arrive_end_kernel(cumoe_arrive_args_t args, int32_t chunks)
{
    const int64_t rank = blockIdx.y, step = static_cast<int64_t>(gridDim.x) * kThreads;
    int64_t begin = rank * args.capacity, tokens = begin * chunks, count = args.capacity;
    if (args.capacity == 0) {
        for (int64_t p = 0; p < rank * chunks; p++) tokens += args.count[2 * p + 1];
        for (int64_t r = 0; r < rank; r++) begin += args.count[2 * (r * chunks + args.chunk)];
        count = args.count[2 * (rank * chunks + args.chunk)];
    }
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += step) {
        const int32_t row = args.rows.slot_row[begin + i];
        if (row >= 0) args.rows.row_token[row] = static_cast<int32_t>(tokens + args.token[begin + i]);
    }
}

/* Rows in units of 2 to 16 bytes. */
struct Gather {
    const void *from;
    void *to;
    const int32_t *index;
    int64_t count, width, from_stride; // in units
    bool zeros;
};

template <typename Unit>
__global__ void __launch_bounds__(kThreads) gather_kernel(Gather g)
{
    const int64_t all = g.count * g.width, step = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < all; i += step) {
        const int64_t row = i / g.width, column = i - row * g.width, from = g.index[row];
        Unit *to = static_cast<Unit *>(g.to) + i;
        if (from >= 0)
            *to = static_cast<const Unit *>(g.from)[from * g.from_stride + column];
        else if (g.zeros)
            *to = Unit{};
    }
}

template <typename Unit>
cudaError_t launch_gather(const cumoe_context_t &context, const cumoe_gather_args_t &args, cudaStream_t stream)
{
    const int64_t per = static_cast<int64_t>(sizeof(Unit) / args.element);
    const Gather gather = {args.from, args.to, args.index, args.count, args.width / per, args.from_stride / per,
                           args.zeros};
    const int64_t blocks = (gather.count * gather.width + kThreads - 1) / kThreads;
    return launch({resident_blocks(context, blocks, kBlocksPerSm), kThreads, stream}, gather_kernel<Unit>, gather);
}

/* Every row of both arrays begins and ends at a multiple of SIZE bytes. */
bool consists_of(const cumoe_gather_args_t &args, size_t size)
{
    const auto is_multiple = [=](size_t bytes) { return bytes % size == 0; };
    return is_multiple(reinterpret_cast<uintptr_t>(args.from)) &&
           is_multiple(reinterpret_cast<uintptr_t>(args.to)) &&
           is_multiple(static_cast<size_t>(args.width) * args.element) &&
           is_multiple(static_cast<size_t>(args.from_stride) * args.element);
}

Dispatch dispatch_of(const cumoe_context_t &context, const cumoe_dispatch_args_t &args)
{
    return {args, owners_of(context), context.config.top_k, context.config.dtype == CUMOE_F64};
}

dim3 slot_blocks(const cumoe_context_t &context, int64_t slots)
{
    return resident_blocks(context, (slots + kThreads - 1) / kThreads, kBlocksPerSm);
}

} // namespace

cudaError_t dispatch_mark(const cumoe_context_t &context, const cumoe_dispatch_args_t &args, cudaStream_t stream)
{
    const int64_t slots = args.num_tokens * context.config.top_k;
    return launch({slot_blocks(context, slots), kThreads, stream}, dispatch_mark_kernel, dispatch_of(context, args),
                  slots);
}

cudaError_t dispatch_count(const cumoe_context_t &context, const cumoe_dispatch_args_t &args, cudaStream_t stream)
{
    return launch({dim3(1), kThreads, stream}, dispatch_count_kernel, dispatch_of(context, args));
}

cudaError_t dispatch_pack(const cumoe_context_t &context, const cumoe_dispatch_args_t &args, cudaStream_t stream)
{
    const int64_t slots = args.num_tokens * context.config.top_k;
    return launch({slot_blocks(context, slots), kThreads, stream}, dispatch_pack_kernel, dispatch_of(context, args),
                  slots);
}

cudaError_t arrive_begin(const cumoe_context_t &, const cumoe_arrive_args_t &args, cudaStream_t stream)
{
    return launch({dim3(1), dim3(1), stream}, arrive_begin_kernel, args.call, args.num_slots);
}

cudaError_t arrive_end(const cumoe_context_t &context, const cumoe_arrive_args_t &args, cudaStream_t stream)
{
    const unsigned ranks = static_cast<unsigned>(context.ranks.count);
    dim3 grid = slot_blocks(context, (args.num_slots + ranks - 1) / ranks);
    grid.y = ranks;
    return launch({grid, kThreads, stream}, arrive_end_kernel, args, context.config.exchange_chunks);
}

cudaError_t gather(const cumoe_context_t &context, const cumoe_gather_args_t &args, cudaStream_t stream)
{
    if (consists_of(args, 16)) return launch_gather<uint4>(context, args, stream);
    if (consists_of(args, 8)) return launch_gather<uint64_t>(context, args, stream);
    if (consists_of(args, 4)) return launch_gather<uint32_t>(context, args, stream);
    return launch_gather<uint16_t>(context, args, stream);
}

} // namespace cumoe
