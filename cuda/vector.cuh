/* Neighbouring values that are read and written at once, and what is known of a value's type when a kernel is
 * compiled. */
#pragma once

#include "cuda/real.cuh"

namespace cumoe
{

/* kCount values, aligned to all of them: one access of up to 16 bytes. */
template <typename Value, int kCount>
struct alignas(sizeof(Value) * kCount) Vector {
    static_assert(sizeof(Value) * kCount <= 16, "the longest access of the machine");
    Value value[kCount];
};

/* A vector of global memory, in one access: 2, 4, 8 or 16 bytes, aligned to as many. */
template <typename Whole>
__device__ __forceinline__ Whole load_vector(const void *from)
{
    Whole vector;
    if constexpr (sizeof(Whole) == 16)
        *reinterpret_cast<uint4 *>(&vector) = load_16(from);
    else if constexpr (sizeof(Whole) == 8)
        *reinterpret_cast<uint2 *>(&vector) = load_8(from);
    else if constexpr (sizeof(Whole) == 4)
        *reinterpret_cast<uint32_t *>(&vector) = *static_cast<const uint32_t *>(from);
    else
        vector = *static_cast<const Whole *>(from);
    return vector;
}

template <typename Whole>
__device__ __forceinline__ void store_vector(void *to, const Whole &vector)
{
    if constexpr (sizeof(Whole) == 16)
        store_16(to, *reinterpret_cast<const uint4 *>(&vector));
    else if constexpr (sizeof(Whole) == 8)
        store_8(to, *reinterpret_cast<const uint2 *>(&vector));
    else if constexpr (sizeof(Whole) == 4)
        *static_cast<uint32_t *>(to) = *reinterpret_cast<const uint32_t *>(&vector);
    else
        *static_cast<Whole *>(to) = vector;
}

/* The arithmetic of a type. */
template <typename Value>
using real_of = std::conditional_t<std::is_same_v<Value, double>, double, float>;

template <typename Value>
__device__ __forceinline__ real_of<Value> widen(Value value)
{
    if constexpr (std::is_same_v<Value, __nv_bfloat16>)
        return __bfloat162float(value);
    else if constexpr (std::is_same_v<Value, __half>)
        return __half2float(value);
    else
        return value;
}

template <typename Value>
__device__ __forceinline__ Value narrow(real_of<Value> value)
{
    if constexpr (std::is_same_v<Value, __nv_bfloat16>)
        return __float2bfloat16_rn(value);
    else if constexpr (std::is_same_v<Value, __half>)
        return __float2half_rn(value);
    else
        return value;
}

/* Threads of a block that stand side by side, each with a vector of a row; the others take further rows. */
inline int side_by_side(int64_t vectors_of_row, int threads)
{
    int width = 1;
    while (width < threads && width < vectors_of_row) width *= 2;
    return width;
}

} // namespace cumoe
