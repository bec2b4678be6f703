/* The simulator's twins of the instructions of cuda/ptx.cuh, which says what each of them does. */
#pragma once

#include "tests/sim/device.h"

#include <cmath>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <type_traits>

namespace cumoe
{

constexpr uint32_t kFullMask = 0xffffffffu;

/* Of SharedArena. */
__host__ __device__ __forceinline__ void *shared_array(size_t offset, size_t bytes)
{
    return sim::carve(offset, bytes);
}

/* --- Barriers */

/* permute: between counting, scanning and placing */
__device__ __forceinline__ void sync_threads()
{
    sim::barrier("sync_threads", 0, 0, true);
}

/* permute: counters of a warp between groups of 32 slots */
__device__ __forceinline__ void sync_warp(uint32_t mask = kFullMask)
{
    sim::collective("sync_warp", mask, sim::ORDERS, nullptr, nullptr, nullptr);
}

/* grouped products: the warps that load and those that multiply */
template <int kId>
__device__ __forceinline__ void barrier_sync(int threads)
{
    static_assert(kId > 0 && kId < 16, "barrier 0 is that of sync_threads");
    sim::barrier("barrier_sync", kId, threads, true);
}

template <int kId>
__device__ __forceinline__ void barrier_arrive(int threads)
{
    static_assert(kId > 0 && kId < 16, "barrier 0 is that of sync_threads");
    sim::barrier("barrier_arrive", kId, threads, false);
}

/* gate: partial sums before the ticket of the last block. Blocks run one after another: nothing to do. */
__device__ __forceinline__ void fence_device() {}

/* --- Between the lanes of a warp */

template <typename T>
struct ShuffleInput {
    T value;
    int source;
};

template <typename T>
__device__ __forceinline__ T sim_shuffle(const char *name, uint32_t mask, T value, int source)
{
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 4 or 8 bytes");
    const ShuffleInput<T> input = {value, source};
    T result = value;
    sim::collective(name, mask, 0, &input, &result, [](const void *const *in, void *const *out, uint32_t lanes) {
        for (int lane = 0; lane < 32; lane++) {
            if (!(lanes >> lane & 1)) continue;
            const int from = static_cast<const ShuffleInput<T> *>(in[lane])->source;
            if (!(lanes >> from & 1)) sim::lane_without_source(lane, from);
            *static_cast<T *>(out[lane]) = static_cast<const ShuffleInput<T> *>(in[from])->value;
        }
    });
    return result;
}

__device__ __forceinline__ int sim_lane()
{
    return static_cast<int>(threadIdx.x % 32);
}

/* scans: the sum of a warp to all its lanes */
template <typename T>
__device__ __forceinline__ T shuffle(uint32_t mask, T value, int lane)
{
    return sim_shuffle("shuffle", mask, value, lane & 31);
}

/* gate, combine: sums and maxima of a warp */
template <typename T>
__device__ __forceinline__ T shuffle_xor(uint32_t mask, T value, int lane_mask)
{
    return sim_shuffle("shuffle_xor", mask, value, (sim_lane() ^ lane_mask) & 31);
}

/* permute: prefix sums of a warp */
template <typename T>
__device__ __forceinline__ T shuffle_up(uint32_t mask, T value, unsigned delta)
{
    const int source = sim_lane() - static_cast<int>(delta);
    return sim_shuffle("shuffle_up", mask, value, source < 0 ? sim_lane() : source);
}

/* reductions to lane 0 */
template <typename T>
__device__ __forceinline__ T shuffle_down(uint32_t mask, T value, unsigned delta)
{
    const int source = sim_lane() + static_cast<int>(delta);
    return sim_shuffle("shuffle_down", mask, value, source > 31 ? sim_lane() : source);
}

/* gate: which lanes hold a NaN */
__device__ __forceinline__ uint32_t ballot(uint32_t mask, bool predicate)
{
    uint32_t result = 0;
    sim::collective("ballot", mask, 0, &predicate, &result,
                    [](const void *const *in, void *const *out, uint32_t lanes) {
                        uint32_t set = 0;
                        for (int lane = 0; lane < 32; lane++)
                            if (lanes >> lane & 1 && *static_cast<const bool *>(in[lane])) set |= 1u << lane;
                        for (int lane = 0; lane < 32; lane++)
                            if (lanes >> lane & 1) *static_cast<uint32_t *>(out[lane]) = set;
                    });
    return result;
}

/* permute: the slots of a warp that name the same expert */
__device__ __forceinline__ uint32_t match_any(uint32_t mask, uint32_t value)
{
    uint32_t result = 0;
    sim::collective("match_any", mask, 0, &value, &result,
                    [](const void *const *in, void *const *out, uint32_t lanes) {
                        for (int a = 0; a < 32; a++) {
                            if (!(lanes >> a & 1)) continue;
                            uint32_t same = 0;
                            for (int b = 0; b < 32; b++)
                                if (lanes >> b & 1 &&
                                    *static_cast<const uint32_t *>(in[a]) == *static_cast<const uint32_t *>(in[b]))
                                    same |= 1u << b;
                            *static_cast<uint32_t *>(out[a]) = same;
                        }
                    });
    return result;
}

template <typename Fold>
__device__ __forceinline__ uint32_t sim_reduce(const char *name, uint32_t mask, uint32_t value, Fold)
{
    uint32_t result = 0;
    sim::collective(name, mask, 0, &value, &result, [](const void *const *in, void *const *out, uint32_t lanes) {
        uint32_t all = *static_cast<const uint32_t *>(in[__builtin_ctz(lanes)]);
        for (int lane = __builtin_ctz(lanes) + 1; lane < 32; lane++)
            if (lanes >> lane & 1) all = Fold::fold(all, *static_cast<const uint32_t *>(in[lane]));
        for (int lane = 0; lane < 32; lane++)
            if (lanes >> lane & 1) *static_cast<uint32_t *>(out[lane]) = all;
    });
    return result;
}

/* gate: top-k keys and counts */
__device__ __forceinline__ uint32_t reduce_add(uint32_t mask, uint32_t value)
{
    struct Add {
        static uint32_t fold(uint32_t a, uint32_t b)
        {
            return a + b;
        }
    };
    return sim_reduce("reduce_add", mask, value, Add{});
}

__device__ __forceinline__ uint32_t reduce_min(uint32_t mask, uint32_t value)
{
    struct Min {
        static uint32_t fold(uint32_t a, uint32_t b)
        {
            return a < b ? a : b;
        }
    };
    return sim_reduce("reduce_min", mask, value, Min{});
}

__device__ __forceinline__ uint32_t reduce_max(uint32_t mask, uint32_t value)
{
    struct Max {
        static uint32_t fold(uint32_t a, uint32_t b)
        {
            return a > b ? a : b;
        }
    };
    return sim_reduce("reduce_max", mask, value, Max{});
}

/* --- Atomics. permute: counts; gate: importance and load in fixed point */

template <typename T>
__device__ __forceinline__ T sim_atomic(sim::Atomic operation, T *address, T value, T expected = 0)
{
    static_assert(std::is_same_v<T, uint32_t> || std::is_same_v<T, uint64_t>, "atomics are for unsigned integers");
    return static_cast<T>(sim::atomic(operation, address, sizeof(T), value, expected));
}

__device__ __forceinline__ uint32_t atomic_add(uint32_t *address, uint32_t value)
{
    return sim_atomic(sim::Atomic::ADD, address, value);
}

__device__ __forceinline__ uint64_t atomic_add(uint64_t *address, uint64_t value)
{
    return sim_atomic(sim::Atomic::ADD, address, value);
}

__device__ __forceinline__ uint32_t atomic_min(uint32_t *address, uint32_t value)
{
    return sim_atomic(sim::Atomic::MIN, address, value);
}

__device__ __forceinline__ uint64_t atomic_min(uint64_t *address, uint64_t value)
{
    return sim_atomic(sim::Atomic::MIN, address, value);
}

__device__ __forceinline__ uint32_t atomic_max(uint32_t *address, uint32_t value)
{
    return sim_atomic(sim::Atomic::MAX, address, value);
}

__device__ __forceinline__ uint64_t atomic_max(uint64_t *address, uint64_t value)
{
    return sim_atomic(sim::Atomic::MAX, address, value);
}

__device__ __forceinline__ uint32_t atomic_cas(uint32_t *address, uint32_t expected, uint32_t value)
{
    return sim_atomic(sim::Atomic::CAS, address, value, expected);
}

__device__ __forceinline__ uint64_t atomic_cas(uint64_t *address, uint64_t expected, uint64_t value)
{
    return sim_atomic(sim::Atomic::CAS, address, value, expected);
}

/* --- Asynchronous copies. grouped products: rows of x and of the weights */

template <int kBytes>
__device__ __forceinline__ void cp_async(void *shared, const void *global, int source_bytes = kBytes)
{
    static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
    sim::copy(shared, global, kBytes, source_bytes);
}

__device__ __forceinline__ void cp_async_commit()
{
    sim::copy_commit();
}

template <int kPending>
__device__ __forceinline__ void cp_async_wait()
{
    sim::copy_wait(kPending);
}

/* --- Matrix products of a warp. grouped products, gate logits */

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&tile)[4], const void *row)
{
    sim::read_row(row);
    sim::collective("ldmatrix_x4", kFullMask, sim::ALIGNED, row, tile, sim::load_matrices);
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&tile)[4], const void *row)
{
    sim::read_row(row);
    sim::collective("ldmatrix_x4_trans", kFullMask, sim::ALIGNED, row, tile, sim::load_matrices_trans);
}

template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2])
{
    static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>, "T is BF16 or F16");
    const sim::Fragments in = {{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
    sim::collective("mma_m16n8k16", kFullMask, sim::ALIGNED, &in, d,
                    std::is_same_v<T, __half> ? sim::multiply_f16 : sim::multiply_bf16);
}

__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2])
{
    const sim::Fragments in = {{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
    sim::collective("mma_m16n8k8_tf32", kFullMask, sim::ALIGNED, &in, d, sim::multiply_tf32);
}

/* --- Bits and fast arithmetic. permute: popcount; gate: keys; activations: exp2 and reciprocal */

__device__ __forceinline__ int popcount(uint32_t value)
{
    return __builtin_popcount(value);
}

__device__ __forceinline__ int leading_zeros(uint32_t value)
{
    return value ? __builtin_clz(value) : 32;
}

__device__ __forceinline__ uint32_t float_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

__device__ __forceinline__ float bits_float(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

__device__ __forceinline__ uint32_t to_tf32(float value)
{
    const uint32_t bits = float_bits(value);
    if (std::isnan(value)) return 0x7fffe000u;
    return (bits + 0x1000u) & 0xffffe000u; // past the largest it becomes infinity
}

__device__ __forceinline__ float exp2_approx(float x)
{
    const float y = std::exp2(x);
    return std::fpclassify(y) == FP_SUBNORMAL ? 0.0f : y;
}

__device__ __forceinline__ float reciprocal_approx(float x)
{
    const float y = 1 / (std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x);
    return std::fpclassify(y) == FP_SUBNORMAL ? std::copysign(0.0f, y) : y;
}

/* --- Vectors of global memory. runs of epilogues, combine, optimizer */

template <typename Words>
__device__ __forceinline__ Words sim_load(const void *address)
{
    Words value;
    sim::load_vector(&value, address, sizeof value);
    return value;
}

__device__ __forceinline__ uint2 load_8(const void *address)
{
    return sim_load<uint2>(address);
}

__device__ __forceinline__ uint4 load_16(const void *address)
{
    return sim_load<uint4>(address);
}

__device__ __forceinline__ void store_8(void *address, uint2 value)
{
    sim::store_vector(address, &value, sizeof value);
}

__device__ __forceinline__ void store_16(void *address, uint4 value)
{
    sim::store_vector(address, &value, sizeof value);
}

__device__ __forceinline__ uint4 load_once(const uint4 *address)
{
    return load_16(address);
}

__device__ __forceinline__ void store_once(uint4 *address, uint4 value)
{
    store_16(address, value);
}

} // namespace cumoe
