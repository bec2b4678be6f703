/* What the gate says about a call at its end: vectors, losses and statistics. */
#pragma once

#include "cuda/gate_decide.cuh"

namespace cumoe
{

/* What the caller asked for beside the routing; any of it may be NULL. */
struct GateOutputs {
    int32_t *expert_count;                  // [E]
    void *importance, *load;                // [E]
    void *losses;                           // [CUMOE_NUM_LOSSES]
    cumoe_statistics_t *statistics;         // [1]
    int64_t *fixed_importance, *fixed_load; // [E] of the routing, never NULL
    const int64_t *fixed_share;             // [E] fixed point, and [T] gate type, where there are shares and losses
    const void *square;
    const double *square_sum;     // [1] of the tokens of all ranks; NULL = to be made of square
    int64_t num_tokens;           // T
    const double *threshold_loss; // [E] terms of L_batchwise; NULL = 0
    PrimarySums primary;
    bool smooth, primary_smooth; // loads are sums of probabilities; else they count
    bool learned;                // not EXTERNAL, which has no losses
};

/* E sum_e f_e p_e, f = rows of e / tokens, p = its shares / tokens. */
template <typename Real>
__device__ __forceinline__ double switch_loss(const GateSums &sums, const int64_t *fixed_share, int32_t num_experts,
                                              const SumArrays &shared)
{
    const double tokens = static_cast<double>(*sums.tokens);
    const FixedPoint<Real> share = {fixed_share};
    return num_experts * sum_of(num_experts, shared, [&](int32_t e) {
               return tokens > 0 ? sums.count[e] / tokens * (share(e) / tokens) : 0.0;
           });
}

template <typename Real>
__device__ __forceinline__ double sum_squares(const Real *square, int64_t num_tokens, const SumArrays &shared)
{
    double total = 0;
    for (int64_t t = threadIdx.x; t < num_tokens; t += kSumThreads) total += static_cast<double>(square[t]);
    return block_sum(total, shared.real);
}

/* One block: the sum of this rank's squares. */
template <typename Real>
__global__ void __launch_bounds__(kSumThreads, 1)
    gate_squares_kernel(const Real *square, int64_t num_tokens, double *square_sum)
{
    SharedArena arena;
    const SumArrays shared(arena);
    const double total = sum_squares(square, num_tokens, shared);
    if (threadIdx.x == 0) *square_sum = total;
}

/* The mean over tokens of their squares. */
template <typename Real>
__device__ __forceinline__ double z_loss(const GateSums &sums, const GateOutputs &out, const SumArrays &shared)
{
    const double total = out.square_sum
                             ? *out.square_sum
                             : sum_squares(static_cast<const Real *>(out.square), out.num_tokens, shared);
    return *sums.tokens > 0 ? total / static_cast<double>(*sums.tokens) : 0;
}

/* Rows and loads over the experts, and what the teams counted. */
template <typename Real>
__device__ __forceinline__ void
write_statistics(const GateSums &sums, const Loads<Real> &loads, int32_t num_experts, const Balance &importance,
                 const Balance &load, const SumArrays &shared, cumoe_statistics_t *statistics)
{
    uint64_t rows = 0, max_count = 0;
    double max_load = 0;
    for (int32_t e = threadIdx.x; e < num_experts; e += kSumThreads) {
        const uint64_t count = sums.count[e];
        const double load_of_expert = loads(e);
        rows += count;
        max_count = count > max_count ? count : max_count;
        max_load = load_of_expert > max_load ? load_of_expert : max_load;
    }
    rows = block_sum(rows, shared.integer);
    max_count = block_max(max_count, shared.integer);
    max_load = block_max(max_load, shared.real);
    if (threadIdx.x > 0) return;
    cumoe_statistics_t s = {};
    s.tokens = static_cast<int64_t>(*sums.tokens);
    s.rows = static_cast<int64_t>(rows);
    s.nan_logits = static_cast<int64_t>(sums.counter[kNanLogits]);
    s.nan_tokens = static_cast<int64_t>(sums.counter[kNanTokens]);
    s.bad_indices = static_cast<int64_t>(sums.counter[kBadIndices]);
    s.dropped_rows = static_cast<int64_t>(sums.counter[kDroppedRows]);
    s.max_count = static_cast<int64_t>(max_count);
    s.cv_importance = sqrt(importance.cv2);
    s.cv_load = sqrt(load.cv2);
    if (load.mean > 0) s.max_over_mean_load = max_load / load.mean;
    if (rows > 0) s.max_over_mean_count = static_cast<double>(max_count) * num_experts / static_cast<double>(rows);
    *statistics = s;
}

/* One block: the vectors, losses and statistics. */
template <typename Real>
__global__ void __launch_bounds__(kSumThreads, 1)
    gate_finish_kernel(int32_t num_experts, GateSums sums, GateOutputs out)
{
    SharedArena arena;
    const SumArrays shared(arena);
    constexpr double unit = 1 / kFixedPoint<Real>;
    constexpr int bits = CUMOE_FIXED_POINT_BITS(sizeof(Real) == 8 ? CUMOE_F64 : CUMOE_F32);
    const Loads<Real> loads = {{out.fixed_load}, out.primary};

    // The vectors. A load that is not smooth counts rows.
    for (int32_t g = threadIdx.x; g < out.primary.num_groups && !out.primary_smooth; g += kSumThreads)
        out.primary.load[g] = static_cast<int64_t>(out.primary.count[g]) << bits;
    sync_threads(); // the loads of groups are there
    for (int32_t e = threadIdx.x; e < num_experts; e += kSumThreads) {
        if (!out.smooth) out.fixed_load[e] = static_cast<int64_t>(sums.count[e]) << bits;
        if (out.expert_count) out.expert_count[e] = static_cast<int32_t>(sums.count[e]);
        if (out.importance)
            static_cast<Real *>(out.importance)[e] =
                static_cast<Real>(static_cast<double>(out.fixed_importance[e]) * unit);
        if (out.load) static_cast<Real *>(out.load)[e] = static_cast<Real>(loads(e));
    }
    if (!out.losses && !out.statistics) return; // the whole block

    // The losses: every thread reads the sums that it wrote.
    const Balance importance = balance_of(num_experts, shared, FixedPoint<Real>{out.fixed_importance});
    const Balance load = balance_of(num_experts, shared, loads);
    double of_shares = 0, of_squares = 0, of_thresholds = 0;
    if (out.fixed_share) {
        of_shares = switch_loss<Real>(sums, out.fixed_share, num_experts, shared);
        of_squares = z_loss<Real>(sums, out, shared);
    }
    if (out.threshold_loss)
        of_thresholds = sum_of(num_experts, shared, [&](int32_t e) { return out.threshold_loss[e]; });
    if (out.losses && threadIdx.x < CUMOE_NUM_LOSSES) {
        double loss = 0;
        if (out.learned && threadIdx.x == CUMOE_LOSS_IMPORTANCE) loss = importance.cv2;
        if (out.learned && threadIdx.x == CUMOE_LOSS_LOAD) loss = load.cv2;
        if (threadIdx.x == CUMOE_LOSS_SWITCH) loss = of_shares;
        if (threadIdx.x == CUMOE_LOSS_Z) loss = of_squares;
        if (threadIdx.x == CUMOE_LOSS_THRESHOLD) loss = of_thresholds;
        static_cast<Real *>(out.losses)[threadIdx.x] = static_cast<Real>(loss);
    }
    if (out.statistics) write_statistics<Real>(sums, loads, num_experts, importance, load, shared, out.statistics);
}

} // namespace cumoe
