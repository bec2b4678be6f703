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

/* Mean and CV^2 of fixed-point sums, in double and two passes; CV^2 is 0 for a zero vector. */
struct Balance {
    double mean, cv2;
};
template <typename Real>
__device__ __forceinline__ Balance balance_of(const int64_t *sums, int32_t num_experts, const SumArrays &shared)
{
    constexpr double unit = 1 / kFixedPoint<Real>;
    double total = 0; // not an integer: smooth loads of many tokens and experts may pass 2^64
    for (int32_t e = threadIdx.x; e < num_experts; e += kSumThreads) total += static_cast<double>(sums[e]);
    const double mean = block_sum(total, shared.real) * unit / num_experts;
    double squares = 0;
    for (int32_t e = threadIdx.x; e < num_experts; e += kSumThreads) {
        const double deviation = static_cast<double>(sums[e]) * unit - mean;
        squares += deviation * deviation;
    }
    squares = block_sum(squares, shared.real);
    return {mean, mean > 0 ? squares / num_experts / (mean * mean) : 0};
}

} // namespace cumoe
