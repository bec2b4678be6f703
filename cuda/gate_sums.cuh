/* Sums over experts by one block, in an order that hangs on nothing but their number. */
#pragma once

#include "cuda/gate_row.cuh"

namespace cumoe
{

constexpr int kSumWarps = 8, kSumThreads = kSumWarps * kWarp;

struct SumArrays {
    uint64_t *integer; // [kSumWarps]
    double *real;      // [kSumWarps]
    __host__ __device__ explicit SumArrays(SharedArena &arena)
        : integer(arena.take<uint64_t>(kSumWarps)), real(arena.take<double>(kSumWarps))
    {
    }
};

/* What the threads of the block bring, in one by COMBINE, for all of them. */
template <typename T, typename Combine>
__device__ __forceinline__ T block_reduce(T value, T *partial, const Combine &combine)
{
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value = combine(value, shuffle_xor(kFullMask, value, lanes));
    if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
    sync_threads();
    value = partial[0];
    for (int warp = 1; warp < kSumWarps; warp++) value = combine(value, partial[warp]);
    sync_threads(); // they are read; the next sum may write them
    return value;
}

template <typename T>
__device__ __forceinline__ T block_sum(T value, T *partial)
{
    return block_reduce(value, partial, [](T a, T b) { return a + b; });
}

template <typename T>
__device__ __forceinline__ T block_max(T value, T *partial)
{
    return block_reduce(value, partial, [](T a, T b) { return a > b ? a : b; });
}

/* Units of importance and load in 1. */
template <typename Real>
constexpr double kFixedPoint =
    static_cast<double>(int64_t{1} << CUMOE_FIXED_POINT_BITS(sizeof(Real) == 8 ? CUMOE_F64 : CUMOE_F32));

/* The sum over experts of what VALUE says of each. */
template <typename Value>
__device__ __forceinline__ double sum_of(int32_t num_experts, const SumArrays &shared, const Value &value)
{
    double total = 0; // not an integer: smooth loads of many tokens and experts may pass 2^64
    for (int32_t e = threadIdx.x; e < num_experts; e += kSumThreads) total += value(e);
    return block_sum(total, shared.real);
}

/* A sum over tokens as a number. */
template <typename Real>
struct FixedPoint {
    const int64_t *sums; // [E]
    __device__ __forceinline__ double operator()(int32_t e) const
    {
        return static_cast<double>(sums[e]) * (1 / kFixedPoint<Real>);
    }
};

/* What the primary gate counted; num_groups 0: there is none. */
struct PrimarySums {
    int32_t num_groups, group_experts; // G, B
    int64_t *load;                     // [G] fixed point
    int32_t *count;                    // [G] tokens
};

/* The load of an expert: that of its gate, and inside a group times that of the group over its tokens (eq. 14). */
template <typename Real>
struct Loads {
    FixedPoint<Real> of_gate;
    PrimarySums primary;
    __device__ __forceinline__ double operator()(int32_t e) const
    {
        const double load = of_gate(e);
        if (primary.num_groups == 0) return load;
        const int32_t group = e / primary.group_experts, tokens = primary.count[group];
        const double of_group = FixedPoint<Real>{primary.load}(group);
        return tokens > 0 ? of_group * load / tokens : 0;
    }
};

/* Mean and CV^2 of what VALUE says of each expert, in double and two passes; CV^2 is 0 for a zero vector. */
struct Balance {
    double mean, cv2;
};
template <typename Value>
__device__ __forceinline__ Balance balance_of(int32_t num_experts, const SumArrays &shared, const Value &value)
{
    const double mean = sum_of(num_experts, shared, value) / num_experts;
    const double squares = sum_of(num_experts, shared, [&](int32_t e) {
        const double deviation = value(e) - mean;
        return deviation * deviation;
    });
    return {mean, mean > 0 ? squares / num_experts / (mean * mean) : 0};
}

/* dCV^2 / dv = (2 n / S^2) ((v - mean) - mean CV^2), times the upstream gradient; 0 for a zero vector. */
struct BalanceGradient {
    Balance balance;
    double factor;
    __device__ __forceinline__ BalanceGradient(const Balance &of, int32_t num_experts, double upstream)
        : balance(of), factor(of.mean > 0 ? upstream * 2 / (num_experts * of.mean * of.mean) : 0)
    {
    }
    __device__ __forceinline__ double operator()(double value) const
    {
        return factor * ((value - balance.mean) - balance.mean * balance.cv2);
    }
};

struct SumGradients {
    int32_t num_experts;
    const int64_t *tokens;            // [1]
    const int64_t *importance, *load; // [E] fixed point
    const void *loss_gradient;        // [CUMOE_NUM_LOSSES] gate type, or NULL: the next
    float loss_weight[CUMOE_NUM_LOSSES];
    PrimarySums primary;
    bool smooth, primary_smooth, shares;
    void *dimportance, *dload; // [E] gate type; with shares dload is of their sums
    void *dprimary;            // [G] gate type, of primary loads
    int32_t *has_load;         // [2]
    void *dz;                  // [1] gate type; with shares
};

/* One block: gradients of the sums over the batch, and whether those of the loads, or shares, matter. */
template <typename Real>
__global__ void __launch_bounds__(kSumThreads, 1) gate_sum_gradients_kernel(SumGradients in)
{
    SharedArena arena;
    const SumArrays shared(arena);
    const auto upstream = [&in](cumoe_loss_t loss) {
        return in.loss_gradient ? static_cast<double>(static_cast<const Real *>(in.loss_gradient)[loss])
                                : static_cast<double>(in.loss_weight[loss]);
    };
    const FixedPoint<Real> importance = {in.importance}, load = {in.load};
    const Loads<Real> loads = {load, in.primary};
    const BalanceGradient dimportance(balance_of(in.num_experts, shared, importance), in.num_experts,
                                      upstream(CUMOE_LOSS_IMPORTANCE));
    for (int32_t e = threadIdx.x; e < in.num_experts; e += kSumThreads)
        static_cast<Real *>(in.dimportance)[e] = static_cast<Real>(dimportance(importance(e)));

    Real *const to = static_cast<Real *>(in.dload);
    if (in.shares) { // f has no gradient: E f_e / tokens for p_e
        const double tokens = static_cast<double>(*in.tokens), dswitch = upstream(CUMOE_LOSS_SWITCH),
                     factor = tokens > 0 ? dswitch * in.num_experts / tokens : 0;
        for (int32_t e = threadIdx.x; e < in.num_experts; e += kSumThreads)
            to[e] = static_cast<Real>(tokens > 0 ? factor * load(e) / tokens : 0);
        if (threadIdx.x > 0) return;
        *in.has_load = dswitch != 0;
        *static_cast<Real *>(in.dz) = static_cast<Real>(tokens > 0 ? 2 * upstream(CUMOE_LOSS_Z) / tokens : 0);
        return;
    }
    const double dcv2 = upstream(CUMOE_LOSS_LOAD);
    const BalanceGradient dload(balance_of(in.num_experts, shared, loads), in.num_experts, dcv2);
    if (threadIdx.x == 0) {
        in.has_load[0] = dcv2 != 0 && in.smooth;
        in.has_load[1] = dcv2 != 0 && in.primary_smooth;
    }
    if (in.primary.num_groups == 0)
        for (int32_t e = threadIdx.x; e < in.num_experts; e += kSumThreads)
            to[e] = static_cast<Real>(dload(load(e)));

    // The load of a group is a factor of the loads of its experts; the number of its tokens has no gradient.
    for (int32_t group = threadIdx.x; group < in.primary.num_groups; group += kSumThreads) {
        const int32_t tokens = in.primary.count[group], first = group * in.primary.group_experts;
        const double of_group = FixedPoint<Real>{in.primary.load}(group);
        double sum = 0;
        for (int32_t e = first; e < first + in.primary.group_experts; e++) {
            const double d = dload(loads(e));
            to[e] = static_cast<Real>(tokens > 0 ? d * of_group / tokens : 0);
            sum += tokens > 0 ? d * load(e) / tokens : 0;
        }
        static_cast<Real *>(in.dprimary)[group] = static_cast<Real>(sum);
    }
}

} // namespace cumoe
