/* Runs of four neighbouring elements, as threads move them: widened as they are read, rounded as they are written,
 * by one access where they are contiguous, aligned and whole. */
#pragma once

#include "cuda/real.cuh"

namespace cumoe
{

constexpr int kRun = 4;

/* Four elements of an array, and one access of it: 16 bytes at most. */
template <typename T>
struct alignas(sizeof(T) < 4 ? 8 : 16) Run {
    T at[kRun];
};

template <typename T>
__device__ __forceinline__ bool is_aligned_run(const void *data, int64_t at)
{
    return reinterpret_cast<uintptr_t>(static_cast<const T *>(data) + at) % alignof(Run<T>) == 0;
}

__device__ __forceinline__ float widened(float value)
{
    return value;
}
__device__ __forceinline__ double widened(double value)
{
    return value;
}
__device__ __forceinline__ float widened(__nv_bfloat16 value)
{
    return __bfloat162float(value);
}
__device__ __forceinline__ float widened(__half value)
{
    return __half2float(value);
}

template <typename T>
__device__ __forceinline__ T narrowed(float value)
{
    if constexpr (sizeof(T) == 4)
        return value;
    else if constexpr (std::is_same_v<T, __half>)
        return __float2half_rn(value);
    else
        return __float2bfloat16_rn(value);
}
template <typename T>
__device__ __forceinline__ T narrowed(double value)
{
    return value;
}

/* COUNT elements, 1 .. kRun, from element AT on, STEP apart; the others are zeros. */
template <typename T, typename Real>
__device__ __forceinline__ void load_run_of(Run<Real> &run, const void *data, int64_t at, int64_t step, int count)
{
    const T *from = static_cast<const T *>(data) + at;
    if (count == kRun && step == 1 && is_aligned_run<T>(data, at)) {
        const Run<T> all = *reinterpret_cast<const Run<T> *>(from);
#pragma unroll
        for (int i = 0; i < kRun; i++) run.at[i] = widened(all.at[i]);
        return;
    }
#pragma unroll
    for (int i = 0; i < kRun; i++) run.at[i] = i < count ? static_cast<Real>(widened(from[i * step])) : Real(0);
}

template <typename Real>
__device__ __forceinline__ void load_run(Run<Real> &run, const void *data, cumoe_dtype_t dtype, int64_t at,
                                         int64_t step, int count)
{
    if (dtype == CUMOE_BF16)
        load_run_of<__nv_bfloat16>(run, data, at, step, count);
    else if (dtype == CUMOE_F16)
        load_run_of<__half>(run, data, at, step, count);
    else
        load_run_of<Real>(run, data, at, step, count);
}

template <typename T, typename Real>
__device__ __forceinline__ void store_run_of(const Run<Real> &run, void *data, int64_t at, int64_t step, int count)
{
    T *to = static_cast<T *>(data) + at;
    if (count == kRun && step == 1 && is_aligned_run<T>(data, at)) {
        Run<T> all;
#pragma unroll
        for (int i = 0; i < kRun; i++) all.at[i] = narrowed<T>(run.at[i]);
        *reinterpret_cast<Run<T> *>(to) = all;
        return;
    }
#pragma unroll
    for (int i = 0; i < kRun; i++)
        if (i < count) to[i * step] = narrowed<T>(run.at[i]);
}

template <typename Real>
__device__ __forceinline__ void store_run(const Run<Real> &run, void *data, cumoe_dtype_t dtype, int64_t at,
                                          int64_t step, int count)
{
    if constexpr (sizeof(Real) == 4) {
        if (dtype == CUMOE_BF16) return store_run_of<__nv_bfloat16>(run, data, at, step, count);
        if (dtype == CUMOE_F16) return store_run_of<__half>(run, data, at, step, count);
    }
    store_run_of<Real>(run, data, at, step, count);
}

} // namespace cumoe
