/* Prefix sums of integers, over a warp and over a block. */
#pragma once

#include "cuda/ptx.cuh"

namespace cumoe
{

/* The sum of VALUE over this lane and those below. */
template <typename T>
__device__ __forceinline__ T warp_inclusive_sum(T value)
{
    constexpr int kLanes = 32;
    const int lane = threadIdx.x % kLanes;
    for (int delta = 1; delta < kLanes; delta *= 2) {
        const T below = shuffle_up(kFullMask, value, static_cast<unsigned>(delta));
        if (lane >= delta) value += below;
    }
    return value;
}

/* The sum of VALUE over this thread and those below, and over all of them. WARP_SUM has an element for each warp of
 * the block, at most 32; the caller orders its next use behind this one with a barrier. */
template <typename T>
struct BlockSum {
    T inclusive, total;
};
template <typename T>
__device__ __forceinline__ BlockSum<T> block_inclusive_sum(T value, T *warp_sum)
{
    constexpr int kLanes = 32;
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, num_warps = blockDim.x / kLanes;
    const T sum = warp_inclusive_sum(value);
    if (lane == kLanes - 1) warp_sum[warp] = sum;
    sync_threads();
    // Every warp sums the sums of all for itself: cheaper than a second barrier.
    const T sums = warp_inclusive_sum(lane < num_warps ? warp_sum[lane] : T{0});
    const T lower = shuffle(kFullMask, sums, (warp + kLanes - 1) % kLanes);
    return {sum + (warp > 0 ? lower : T{0}), shuffle(kFullMask, sums, kLanes - 1)};
}

} // namespace cumoe
