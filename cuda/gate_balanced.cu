/* Gate BALANCED, forward: g of all tokens (gate_balanced_rows.cu); then experts take tokens, or thresholds do
 * (gate_balanced_select.cu); then every token gets as many slots as experts took it. */
#include "cuda/gate_balanced.cuh"

#include "cuda/launch.cuh"
#include "cuda/scan.cuh"

namespace cumoe
{

namespace
{

constexpr int kWarps = 16, kThreads = kWarps * kWarp, kBlocksPerSm = 2;
constexpr int kScanThreads = 1024;
constexpr int kInFlight = 4; // experts that a thread asks about before it writes a slot

/* The cut of all candidates; none in training. */
template <typename Real>
__device__ __forceinline__ Cut last_cut(const BalancedTokens &b)
{
    return b.training ? Cut{0, kAll} : b.scratch.cut[kDigitsOfReal<Real>];
}

/* A warp's share of the experts. */
struct Experts {
    int32_t begin, end;
};
__device__ __forceinline__ Experts experts_of_warp(int32_t num_experts)
{
    const int32_t share = (num_experts + kWarps - 1) / kWarps;
    const int32_t begin = static_cast<int32_t>(threadIdx.x / kWarp) * share, end = begin + share;
    return {begin, end < num_experts ? end : num_experts};
}

/* What these experts take of TOKEN; the one slot of a NaN token comes before those of all experts. */
template <typename Real>
__device__ __forceinline__ Taken count_taken(const BalancedTokens &b, const Cut &cut, const Experts &experts,
                                             int64_t token, int64_t live)
{
    Taken count = {0, 0};
    if (token >= live) return count;
    for (int32_t e = experts.begin; e < experts.end; e++) {
        Real g;
        const Taken one = taken(b, cut, e, token, g);
        count.sure += one.sure;
        count.tie += one.tie;
    }
    if (experts.begin == 0) count.sure += b.scratch.nan_token[token];
    return count;
}

struct CountArrays {
    uint32_t *sure, *ties; // [kWarps]
    __host__ __device__ explicit CountArrays(SharedArena &arena)
        : sure(arena.take<uint32_t>(kWarps)), ties(arena.take<uint32_t>(kWarps))
    {
    }
};

/* Slots, and ties, of every group of tokens. */
template <typename Real>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) balanced_count_kernel(BalancedTokens b)
{
    SharedArena arena;
    const CountArrays shared(arena);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const Cut cut = last_cut<Real>(b);
    const Experts experts = experts_of_warp(b.num_experts);
    const int64_t live = b.call->live_tokens;
    for (int64_t group = blockIdx.x; group < b.scratch.groups; group += gridDim.x) {
        const Taken count = count_taken<Real>(b, cut, experts, group * kGroupTokens + lane, live);
        const uint32_t sure = reduce_add(kFullMask, count.sure), ties = reduce_add(kFullMask, count.tie);
        if (lane == 0) {
            shared.sure[warp] = sure;
            shared.ties[warp] = ties;
        }
        sync_threads();
        if (threadIdx.x == 0) {
            uint64_t all_sure = 0, all_ties = 0;
            for (int w = 0; w < kWarps; w++) {
                all_sure += shared.sure[w];
                all_ties += shared.ties[w];
            }
            b.scratch.sure[group] = all_sure;
            b.scratch.ties[group] = all_ties;
        }
        sync_threads(); // they are read; the next group may write them
    }
}

struct ScanArrays {
    uint64_t *sure, *ties; // [warps]
    __host__ __device__ explicit ScanArrays(SharedArena &arena)
        : sure(arena.take<uint64_t>(kScanThreads / kWarp)), ties(arena.take<uint64_t>(kScanThreads / kWarp))
    {
    }
};

/* One block: from what the groups have to what lower groups have, and, behind the last, all. */
__global__ void __launch_bounds__(kScanThreads, 1)
    balanced_scan_kernel(uint64_t *sure, uint64_t *ties, int64_t groups)
{
    SharedArena arena;
    const ScanArrays shared(arena);
    uint64_t sure_before = 0, ties_before = 0;
    for (int64_t begin = 0; begin < groups; begin += kScanThreads) {
        const int64_t group = begin + threadIdx.x;
        const uint64_t own_sure = group < groups ? sure[group] : 0, own_ties = group < groups ? ties[group] : 0;
        const BlockSum<uint64_t> sums = block_inclusive_sum(own_sure, shared.sure);
        const BlockSum<uint64_t> tied = block_inclusive_sum(own_ties, shared.ties);
        if (group < groups) {
            sure[group] = sure_before + sums.inclusive - own_sure;
            ties[group] = ties_before + tied.inclusive - own_ties;
        }
        sure_before += sums.total;
        ties_before +=
            tied.total; // one sum's array is read before the other's barrier, so that none is needed here
    }
    if (threadIdx.x > 0) return;
    sure[groups] = sure_before;
    ties[groups] = ties_before;
}

/* Slots below a place with so many sure ones and ties before it. */
__device__ __forceinline__ int64_t slots_of(uint64_t sure, uint64_t ties, const Cut &cut)
{
    return static_cast<int64_t>(sure + (ties < cut.wanted ? ties : cut.wanted));
}

template <typename Real>
struct RouteArrays {
    uint32_t *sure, *ties; // [kWarps, kGroupTokens]
    Real *sum;             // [kGroupTokens] of the g of a token's slots
    SharedSums sums;
    __host__ __device__ RouteArrays(SharedArena &arena, int32_t num_experts)
        : sure(arena.take<uint32_t>(kThreads)), ties(arena.take<uint32_t>(kThreads)),
          sum(arena.take<Real>(kGroupTokens)), sums(arena, num_experts)
    {
    }
};

/* Every token's slots. */
template <typename Real>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) balanced_route_kernel(BalancedTokens b)
{
    SharedArena arena;
    const RouteArrays<Real> shared(arena, b.num_experts);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const Cut cut = last_cut<Real>(b);
    const Experts experts = experts_of_warp(b.num_experts);
    const int64_t live = b.call->live_tokens;
    const GateSums sums = shared.sums.begin(b.sums, b.num_experts);
    int32_t *const expert = b.routing.expert;
    Real *const weight = static_cast<Real *>(b.routing.weight);

    for (int64_t group = blockIdx.x; group < b.scratch.groups; group += gridDim.x) {
        const int64_t token = group * kGroupTokens + lane;
        // What the warps take of each token.
        const Taken count = count_taken<Real>(b, cut, experts, token, live);
        shared.sure[threadIdx.x] = count.sure;
        shared.ties[threadIdx.x] = count.tie;
        sync_threads();

        // What is before this warp's: in lower groups, of lower tokens, and of this one in lower warps.
        Taken all = {0, 0}, lower = {0, 0};
        for (int w = 0; w < kWarps; w++) {
            const uint32_t of_warp = shared.sure[w * kWarp + lane], ties_of_warp = shared.ties[w * kWarp + lane];
            all.sure += of_warp;
            all.tie += ties_of_warp;
            lower.sure += w < warp ? of_warp : 0;
            lower.tie += w < warp ? ties_of_warp : 0;
        }
        const uint64_t sure = b.scratch.sure[group] + warp_inclusive_sum(all.sure) - all.sure;
        const uint64_t ties = b.scratch.ties[group] + warp_inclusive_sum(all.tie) - all.tie;
        const int64_t first = slots_of(sure, ties, cut), end = slots_of(sure + all.sure, ties + all.tie, cut);
        int64_t slot = slots_of(sure + lower.sure, ties + lower.tie, cut);
        uint64_t ties_before = ties + lower.tie;
        if (warp == 0 && token <= b.num_tokens) b.routing.token_slot[token] = static_cast<int32_t>(first);

        // The slots, with g where the weights will be.
        const auto put = [&](int32_t e, Real value) {
            expert[slot] = e;
            weight[slot] = value;
            b.routing.slot_token[slot++] = static_cast<int32_t>(token);
        };
        const bool nan_token = token < live && b.scratch.nan_token[token];
        if (nan_token && experts.begin == 0) put(-1, static_cast<Real>(NAN));
        for (int32_t e = experts.begin; token < live && e < experts.end; e += kInFlight) {
            Real g[kInFlight];
            Taken one[kInFlight];
#pragma unroll
            for (int i = 0; i < kInFlight; i++)
                one[i] = e + i < experts.end ? taken(b, cut, e + i, token, g[i]) : Taken{0, 0};
#pragma unroll
            for (int i = 0; i < kInFlight; i++) {
                if (one[i].sure || (one[i].tie && ties_before < cut.wanted)) put(e + i, g[i]);
                ties_before += one[i].tie;
            }
        }
        sync_threads(); // the slots of the group are there

        // The weights, over the sum of a token's g in the order of slots.
        if (warp == 0) {
            Real sum = 0;
            for (int64_t s = first; s < end; s++) sum += weight[s];
            shared.sum[lane] = sum;
        }
        sync_threads();
        const int64_t group_begin = shuffle(kFullMask, first, 0), group_end = shuffle(kFullMask, end, kWarp - 1);
        for (int64_t s = group_begin + threadIdx.x; s < group_end; s += kThreads) {
            const int32_t e = expert[s];
            if (e < 0) continue;
            const Real sum = shared.sum[b.routing.slot_token[s] - group * kGroupTokens];
            const Real share = sum > 0 ? weight[s] / sum : 0;
            weight[s] = share;
            atomic_add(&sums.importance[e], fixed_point(share));
            atomic_add(&sums.count[e], 1u);
        }
        sync_threads(); // the arrays are read; the next group writes them
    }

    // Slots that are not in use, and the sums of the block.
    const int64_t used = slots_of(b.scratch.sure[b.scratch.groups], b.scratch.ties[b.scratch.groups], cut);
    for (int64_t s = used + static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; s < b.num_slots;
         s += static_cast<int64_t>(gridDim.x) * kThreads) {
        expert[s] = -1;
        weight[s] = 0;
    }
    shared.sums.end(b.sums, b.num_experts);
}

} // namespace

BalancedScratch balanced_scratch(const cumoe_context_t &context, int64_t num_tokens, void *workspace, size_t used)
{
    const cumoe_config_t &c = context.config;
    BalancedScratch s = {};
    s.end = used;
    if (c.gate != CUMOE_GATE_BALANCED) return s;
    const size_t E = static_cast<size_t>(c.num_experts), T = static_cast<size_t>(num_tokens);
    const size_t real = cumoe__dtype_size(cumoe__gate_dtype(&c));
    const size_t digits = real == 8 ? kDigitsOfReal<double> : kDigitsOfReal<float>;
    cumoe_arena_t arena = {reinterpret_cast<uintptr_t>(workspace), used};
    const auto take = [&arena](size_t count, size_t size) { return cumoe__take(&arena, count * size); };
    s.groups = num_tokens / kGroupTokens + 1;
    const size_t sums = static_cast<size_t>(s.groups) + 1;
    s.g = take(E * T, real);
    s.nan_token = static_cast<uint32_t *>(take(T, sizeof(uint32_t)));
    s.lowest = take(E, real);
    s.last = static_cast<int32_t *>(take(E, sizeof(int32_t)));
    s.loss = static_cast<double *>(take(E, sizeof(double)));
    s.cut = static_cast<Cut *>(take(digits + 1, sizeof(Cut)));
    s.histogram = static_cast<uint64_t *>(take(digits * kDigits, sizeof(uint64_t)));
    s.sure = static_cast<uint64_t *>(take(sums, sizeof(uint64_t)));
    s.ties = static_cast<uint64_t *>(take(sums, sizeof(uint64_t)));
    s.end = arena.used;
    return s;
}

template <typename Real>
cudaError_t route_balanced(const cumoe_context_t &context, const cumoe_gate_args_t &args, int64_t values,
                           const GateScratch &scratch, const GateSums &sums, double **threshold_loss,
                           cudaStream_t stream)
{
    const cumoe_config_t &c = context.config;
    BalancedTokens b = {};
    b.num_experts = c.num_experts;
    b.top_k = c.top_k;
    b.num_tokens = args.num_tokens;
    b.training = args.training;
    b.call = args.routing.call;
    b.most_rows = cumoe__max_rows_of_thresholds(&c, args.num_tokens);
    b.thresholds = args.weights->thresholds;
    b.scratch = balanced_scratch(context, args.num_tokens, args.workspace, scratch.size);
    b.routing = args.routing;
    b.num_slots = cumoe__max_slots(&c, args.num_tokens);
    b.sums = sums;
    *threshold_loss = args.training ? b.scratch.loss : nullptr;
    cudaError_t error = balanced_rows<Real>(context, args, values, b, scratch.logits, stream);
    if (error != cudaSuccess) return error;
    error = args.training ? balanced_take<Real>(context, b, args.batch_threshold, stream)
                          : balanced_cut<Real>(context, b, stream);
    if (error != cudaSuccess) return error;
    const dim3 blocks = resident_blocks(context, b.scratch.groups, kBlocksPerSm);
    error = launch({blocks, dim3(kThreads), stream, shared_bytes<CountArrays>()}, balanced_count_kernel<Real>, b);
    if (error != cudaSuccess) return error;
    error = launch({dim3(1), dim3(kScanThreads), stream, shared_bytes<ScanArrays>()}, balanced_scan_kernel,
                   b.scratch.sure, b.scratch.ties, b.scratch.groups);
    if (error != cudaSuccess) return error;
    return launch({blocks, dim3(kThreads), stream, shared_bytes<RouteArrays<Real>>(c.num_experts)},
                  balanced_route_kernel<Real>, b);
}

template cudaError_t route_balanced<float>(const cumoe_context_t &, const cumoe_gate_args_t &, int64_t,
                                           const GateScratch &, const GateSums &, double **, cudaStream_t);
template cudaError_t route_balanced<double>(const cumoe_context_t &, const cumoe_gate_args_t &, int64_t,
                                            const GateScratch &, const GateSums &, double **, cudaStream_t);

} // namespace cumoe
