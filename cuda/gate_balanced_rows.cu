/* Gate BALANCED: rows of softmax, which are turned. */
#include "cuda/gate_balanced.cuh"

#include "cuda/launch.cuh"

namespace cumoe
{

namespace
{

constexpr int kWarps = 8, kThreads = kWarps * kWarp, kBlocksPerSm = 4;
constexpr int kPitch = kWarp + 1; // of a tile that is read by rows and by columns

template <typename Real>
struct RowsArrays {
    Real *most, *sum; // [kGroupTokens] of a token's logits, and of their exp; most is -Inf where nobody may take it
    Real *tile;       // [kWarp experts, kPitch]
    __host__ __device__ explicit RowsArrays(SharedArena &arena)
        : most(arena.take<Real>(kGroupTokens)), sum(arena.take<Real>(kGroupTokens)),
          tile(arena.take<Real>(kWarp * kPitch))
    {
    }
};

/* What a warp found in a token's logits. */
template <typename Real>
struct RowFacts {
    Real most, sum;
    uint32_t unusable; // NaN or +Inf
};

/* The sum is that of host/cpu: interleaved sums, of which the upper half of the warp computes the terms too. */
template <typename Real>
__device__ __forceinline__ RowFacts<Real> facts_of(const Real *logits, int32_t num_experts)
{
    const int lane = threadIdx.x % kWarp;
    RowFacts<Real> row = {-infinity<Real>(), 0, 0};
    for (int32_t e = lane; e < num_experts; e += kWarp) {
        const Real logit = logits[e];
        const bool usable = logit < infinity<Real>();
        row.unusable += !usable;
        row.most = usable && logit > row.most ? logit : row.most;
    }
    row.unusable = reduce_add(kFullMask, row.unusable);
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
        const Real other = shuffle_xor(kFullMask, row.most, lanes);
        row.most = other > row.most ? other : row.most;
    }
    if (row.most == -infinity<Real>()) return row; // the whole warp
    Real sum = 0;
    for (int32_t first = 0; first < num_experts; first += kWarp) {
        const Real logit = first + lane < num_experts ? logits[first + lane] : -infinity<Real>();
        const bool usable = logit < infinity<Real>() && logit > -infinity<Real>();
        const Real term = usable ? real::exp(logit - row.most) : 0;
        const Real upper = shuffle_down(kFullMask, term, kWarp / 2);
        sum += term;
        sum += upper;
    }
    for (int l = 0; l < kWarp / 2; l++) row.sum += shuffle(kFullMask, sum, l);
    return row;
}

/* g of a block of tokens, from its logits [tokens, E]. */
template <typename Real>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    balanced_rows_kernel(BalancedTokens b, const uint8_t *token_mask, int64_t first, int64_t tokens,
                         const Real *logits)
{
    SharedArena arena;
    const RowsArrays<Real> shared(arena);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int64_t live = live_rows(b.call, first, tokens), E = b.num_experts;
    Real *const g = static_cast<Real *>(b.scratch.g);
    uint64_t counted = 0, nan_logits = 0, nan_tokens = 0;

    for (int64_t begin = static_cast<int64_t>(blockIdx.x) * kGroupTokens; begin < live;
         begin += static_cast<int64_t>(gridDim.x) * kGroupTokens) {
        const int size = static_cast<int>(live - begin < kGroupTokens ? live - begin : kGroupTokens);

        // A warp for each token: its largest logit, and their sum.
        for (int i = warp; i < size; i += kWarps) {
            const int64_t token = first + begin + i;
            const bool counts = token_counts(token_mask, token);
            RowFacts<Real> row = {-infinity<Real>(), 0, 0};
            if (counts) row = facts_of(logits + (begin + i) * E, b.num_experts);
            const bool nan_token = row.unusable && row.most == -infinity<Real>();
            counted += counts;
            nan_logits += row.unusable;
            nan_tokens += nan_token;
            if (lane > 0) continue;
            shared.most[i] = row.most;
            shared.sum[i] = row.sum;
            b.scratch.nan_token[token] = nan_token;
        }
        sync_threads();

        // Tiles of experts, written by columns.
        for (int64_t e0 = 0; e0 < E; e0 += kWarp) {
            for (int i = warp; i < size; i += kWarps) {
                const Real most = shared.most[i];
                Real share = -1;
                if (e0 + lane < E && most > -infinity<Real>()) {
                    const Real logit = logits[(begin + i) * E + e0 + lane];
                    if (logit < infinity<Real>() && logit > -infinity<Real>())
                        share = real::exp(logit - most) / shared.sum[i];
                }
                shared.tile[lane * kPitch + i] = share;
            }
            sync_threads();
            for (int64_t e = e0 + warp; e < E && e < e0 + kWarp; e += kWarps)
                if (lane < size) g[e * b.num_tokens + first + begin + lane] = shared.tile[(e - e0) * kPitch + lane];
            sync_threads(); // the tile is read; the next one, or the next tokens, may be written
        }
    }
    if (lane > 0) return;
    atomic_add(b.sums.tokens, counted);
    atomic_add(&b.sums.counter[kNanLogits], nan_logits);
    atomic_add(&b.sums.counter[kNanTokens], nan_tokens);
}

} // namespace

template <typename Real>
cudaError_t balanced_rows(const cumoe_context_t &context, const cumoe_gate_args_t &args, int64_t values,
                          const BalancedTokens &balanced, void *logits, cudaStream_t stream)
{
    const int64_t block = gate_block(context.config, args.num_tokens, values);
    for (int64_t first = 0; first < args.num_tokens; first += block) {
        const int64_t tokens = args.num_tokens - first < block ? args.num_tokens - first : block;
        const GateRows rows = {balanced.call, args.token_mask, first, tokens, 1, {}, nullptr};
        cudaError_t error = gate_logits(context, gate_facts(context.config, args.weights, args.training), rows,
                                        *args.weights, args.x, args.x_stride, logits, stream);
        if (error != cudaSuccess) return error;
        error = launch({resident_blocks(context, (tokens + kGroupTokens - 1) / kGroupTokens, kBlocksPerSm),
                        dim3(kThreads), stream, shared_bytes<RowsArrays<Real>>()},
                       balanced_rows_kernel<Real>, balanced, args.token_mask, first, tokens,
                       static_cast<const Real *>(logits));
        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}

template cudaError_t balanced_rows<float>(const cumoe_context_t &, const cumoe_gate_args_t &, int64_t,
                                          const BalancedTokens &, void *, cudaStream_t);
template cudaError_t balanced_rows<double>(const cumoe_context_t &, const cumoe_gate_args_t &, int64_t,
                                           const BalancedTokens &, void *, cudaStream_t);

} // namespace cumoe
