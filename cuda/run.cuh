/* Runs of four neighbouring elements, as threads move them: widened as they are read, rounded as they are written,
 * by one access where they are contiguous, aligned and whole. */
#pragma once

#include "cuda/vector.cuh"

namespace cumoe
{

constexpr int kRun = 4;

/* Four elements of an array, and one access of it, or two where they have 32 bytes. */
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

/* A run as it is read, not yet widened: several may be on their way before the first is needed. */
template <typename Real>
struct RunBits {
    Run<Real> bits; // as large as the largest

    template <typename T>
    __device__ __forceinline__ Run<T> &as()
    {
        static_assert(sizeof(Run<T>) <= sizeof bits && alignof(Run<T>) <= alignof(Run<Real>), "there is room");
        return *reinterpret_cast<Run<T> *>(&bits);
    }
};

/* Elements of an access. */
template <typename T>
constexpr int kAccess = sizeof(Run<T>) <= 16 ? kRun : kRun / 2;

template <typename T>
__device__ __forceinline__ bool is_whole_run(const void *data, int64_t at, int64_t step, int count)
{
    return count == kRun && step == 1 && is_aligned_run<T>(data, at);
}

/* COUNT elements, 1 .. kRun, from element AT on, STEP apart; the others are zeros. */
template <typename T>
__device__ __forceinline__ void fetch_run_of(Run<T> &run, const void *data, int64_t at, int64_t step, int count)
{
    const T *from = static_cast<const T *>(data) + at;
    if (is_whole_run<T>(data, at, step, count)) {
#pragma unroll
        for (int i = 0; i < kRun; i += kAccess<T>) {
            const auto piece = load_vector<Vector<T, kAccess<T>>>(from + i);
#pragma unroll
            for (int j = 0; j < kAccess<T>; j++) run.at[i + j] = piece.value[j];
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < kRun; i++) run.at[i] = i < count ? from[i * step] : T(0.0f);
}

template <typename Real>
__device__ __forceinline__ void fetch_run(RunBits<Real> &run, const void *data, cumoe_dtype_t dtype, int64_t at,
                                          int64_t step, int count)
{
    if (dtype == CUMOE_BF16)
        fetch_run_of(run.template as<__nv_bfloat16>(), data, at, step, count);
    else if (dtype == CUMOE_F16)
        fetch_run_of(run.template as<__half>(), data, at, step, count);
    else
        fetch_run_of(run.template as<Real>(), data, at, step, count);
}

template <typename T, typename Real>
__device__ __forceinline__ void widen_run_of(Run<Real> &run, const Run<T> &narrow)
{
#pragma unroll
    for (int i = 0; i < kRun; i++) run.at[i] = static_cast<Real>(widened(narrow.at[i]));
}

template <typename Real>
__device__ __forceinline__ Run<Real> widen_run(RunBits<Real> &bits, cumoe_dtype_t dtype)
{
    Run<Real> run;
    if (dtype == CUMOE_BF16)
        widen_run_of(run, bits.template as<__nv_bfloat16>());
    else if (dtype == CUMOE_F16)
        widen_run_of(run, bits.template as<__half>());
    else
        run = bits.bits;
    return run;
}

template <typename Real>
__device__ __forceinline__ void load_run(Run<Real> &run, const void *data, cumoe_dtype_t dtype, int64_t at,
                                         int64_t step, int count)
{
    RunBits<Real> bits;
    fetch_run(bits, data, dtype, at, step, count);
    run = widen_run(bits, dtype);
}

template <typename T, typename Real>
__device__ __forceinline__ void store_run_of(const Run<Real> &run, void *data, int64_t at, int64_t step, int count)
{
    T *to = static_cast<T *>(data) + at;
    if (is_whole_run<T>(data, at, step, count)) {
#pragma unroll
        for (int i = 0; i < kRun; i += kAccess<T>) {
            Vector<T, kAccess<T>> piece;
#pragma unroll
            for (int j = 0; j < kAccess<T>; j++) piece.value[j] = narrowed<T>(run.at[i + j]);
            store_vector(to + i, piece);
        }
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
