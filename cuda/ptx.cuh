/* The machine's instructions, one a function: the only file with inline assembly, intrinsics or __shared__. It is
 * replaced by tests/sim/stand_in/cuda/ptx.cuh where there is no GPU, so the declarations of both are the same, and
 * everything else in cuda/ is compiled for both as it stands.
 *
 * All of it runs on sm_80 and up. Pointers to shared memory are ordinary (generic) pointers. A function that takes
 * a mask is called by every lane that the mask names; one without a mask that says "warp" is called by all 32.
 * Blocks are one-dimensional: the lane is threadIdx.x % 32. */
#pragma once

#ifdef CUMOE_SIM
#error "the simulator has its own ptx.cuh in front of this one; include it as \"cuda/ptx.cuh\""
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>
#include <type_traits>

namespace cumoe
{

constexpr uint32_t kFullMask = 0xffffffffu;

/* Where a shared array at OFFSET bytes begins. For SharedArena alone, which also calls it on the host, to count. */
__host__ __device__ inline void *shared_array(size_t offset, [[maybe_unused]] size_t bytes)
{
#ifdef __CUDA_ARCH__
    extern __shared__ __align__(1024) unsigned char cumoe_shared[];
    return cumoe_shared + offset;
#else
    return reinterpret_cast<void *>(offset);
#endif
}

/* --- Barriers. Each orders the memory accesses of those who take part. */

/* The whole block, nobody having left the kernel (bar.sync 0). */
__device__ __forceinline__ void sync_threads()
{
    __syncthreads();
}

__device__ __forceinline__ void sync_warp(uint32_t mask = kFullMask)
{
    __syncwarp(mask);
}

/* Barrier kId, 1 .. 15, for whole warps: THREADS, a multiple of 32, is the number of those who wait and of those
 * who only arrive, together. (A number known at run time alone would take all 16 of the machine's barriers.) */
template <int kId>
__device__ __forceinline__ void barrier_sync(int threads)
{
    static_assert(kId > 0 && kId < 16, "barrier 0 is that of sync_threads");
    asm volatile("bar.sync %0, %1;" ::"n"(kId), "r"(threads) : "memory");
}

template <int kId>
__device__ __forceinline__ void barrier_arrive(int threads)
{
    static_assert(kId > 0 && kId < 16, "barrier 0 is that of sync_threads");
    asm volatile("bar.arrive %0, %1;" ::"n"(kId), "r"(threads) : "memory");
}

/* Earlier writes of this thread are seen by the device before its later ones. */
__device__ __forceinline__ void fence_device()
{
    __threadfence();
}

/* --- Between the lanes of a warp: T has 4 or 8 bytes. These order no memory accesses. */

template <typename T>
__device__ __forceinline__ T shuffle(uint32_t mask, T value, int lane)
{
    return __shfl_sync(mask, value, lane);
}

template <typename T>
__device__ __forceinline__ T shuffle_xor(uint32_t mask, T value, int lane_mask)
{
    return __shfl_xor_sync(mask, value, lane_mask);
}

/* From the lane DELTA below; the lowest DELTA lanes get their own value. */
template <typename T>
__device__ __forceinline__ T shuffle_up(uint32_t mask, T value, unsigned delta)
{
    return __shfl_up_sync(mask, value, delta);
}

/* From the lane DELTA above; the highest DELTA lanes get their own value. */
template <typename T>
__device__ __forceinline__ T shuffle_down(uint32_t mask, T value, unsigned delta)
{
    return __shfl_down_sync(mask, value, delta);
}

__device__ __forceinline__ uint32_t ballot(uint32_t mask, bool predicate)
{
    return __ballot_sync(mask, predicate);
}

/* The lanes whose value is the caller's. */
__device__ __forceinline__ uint32_t match_any(uint32_t mask, uint32_t value)
{
    return __match_any_sync(mask, value);
}

/* redux.sync */
__device__ __forceinline__ uint32_t reduce_add(uint32_t mask, uint32_t value)
{
    return __reduce_add_sync(mask, value);
}

__device__ __forceinline__ uint32_t reduce_min(uint32_t mask, uint32_t value)
{
    return __reduce_min_sync(mask, value);
}

__device__ __forceinline__ uint32_t reduce_max(uint32_t mask, uint32_t value)
{
    return __reduce_max_sync(mask, value);
}

/* --- Atomics on global or shared memory, relaxed. Of integers: sums of floats would depend on the order. */

__device__ __forceinline__ uint32_t atomic_add(uint32_t *address, uint32_t value)
{
    return atomicAdd(address, value);
}

__device__ __forceinline__ uint64_t atomic_add(uint64_t *address, uint64_t value)
{
    return atomicAdd(reinterpret_cast<unsigned long long *>(address), value);
}

__device__ __forceinline__ uint32_t atomic_min(uint32_t *address, uint32_t value)
{
    return atomicMin(address, value);
}

__device__ __forceinline__ uint64_t atomic_min(uint64_t *address, uint64_t value)
{
    return atomicMin(reinterpret_cast<unsigned long long *>(address), value);
}

__device__ __forceinline__ uint32_t atomic_max(uint32_t *address, uint32_t value)
{
    return atomicMax(address, value);
}

__device__ __forceinline__ uint64_t atomic_max(uint64_t *address, uint64_t value)
{
    return atomicMax(reinterpret_cast<unsigned long long *>(address), value);
}

__device__ __forceinline__ uint32_t atomic_cas(uint32_t *address, uint32_t expected, uint32_t value)
{
    return atomicCAS(address, expected, value);
}

__device__ __forceinline__ uint64_t atomic_cas(uint64_t *address, uint64_t expected, uint64_t value)
{
    return atomicCAS(reinterpret_cast<unsigned long long *>(address), expected, value);
}

/* --- Asynchronous copies from global to shared memory */

/* Copy SOURCE_BYTES (0 .. kBytes) and fill the rest with zeros. Both addresses are multiples of kBytes. With 0 the
 * source is not read. 16 bytes go past the L1 cache (.cg), 4 and 8 through it (.ca), as the machine has it. */
template <int kBytes>
__device__ __forceinline__ void cp_async(void *shared, const void *global, int source_bytes = kBytes)
{
    static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    if constexpr (kBytes == 16)
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(address), "l"(global),
                     "r"(source_bytes)
                     : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(global), "n"(kBytes),
                     "r"(source_bytes)
                     : "memory");
}

/* Close the group of this thread's copies since the last commit. A group may be empty. */
__device__ __forceinline__ void cp_async_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* All groups of this thread but the kPending newest are there, for this thread. Others need a barrier as well. */
template <int kPending>
__device__ __forceinline__ void cp_async_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

/* --- Matrix products of a warp */

/* Four 8x8 matrices of 16-bit values. Lane 8 i + r gives the address of row r of matrix i, 16 bytes, aligned. In
 * tile[i] lane l gets the values (row l / 4, columns 2 (l % 4) and + 1) of matrix i, the first in the low half. */
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&tile)[4], const void *row)
{
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(tile[0]), "=r"(tile[1]), "=r"(tile[2]), "=r"(tile[3])
                 : "r"(address)
                 : "memory");
}

/* The same, each matrix transposed: lane l gets (rows 2 (l % 4) and + 1, column l / 4). */
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&tile)[4], const void *row)
{
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(tile[0]), "=r"(tile[1]), "=r"(tile[2]), "=r"(tile[3])
                 : "r"(address)
                 : "memory");
}

/* d [16, 8] += a [16, 16] b [16, 8]. With g = lane / 4 and p = 2 (lane % 4), in pairs, the first in the low half:
 *   a[0] (g, p) (g, p + 1)          a[2] (g, p + 8) (g, p + 9)            b[0] (p, g) (p + 1, g)
 *   a[1] (g + 8, p) (g + 8, p + 1)  a[3] (g + 8, p + 8) (g + 8, p + 9)    b[1] (p + 8, g) (p + 9, g)
 *   d[0] (g, p)   d[1] (g, p + 1)   d[2] (g + 8, p)   d[3] (g + 8, p + 1)
 * ldmatrix_x4 of a row-major a gives a[], of a row-major transposed b (rows of b's columns) b[] of two k-steps. */
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2])
{
    static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>, "T is BF16 or F16");
    if constexpr (std::is_same_v<T, __half>)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* d [16, 8] += a [16, 8] b [8, 8] in TF32: the low 13 bits of each float are not looked at (to_tf32 rounds). With
 * g = lane / 4 and q = lane % 4: a[0] (g, q), a[1] (g + 8, q), a[2] (g, q + 4), a[3] (g + 8, q + 4); b[0] (q, g),
 * b[1] (q + 4, g); d[] as above. */
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2])
{
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* --- Bits and fast arithmetic */

__device__ __forceinline__ int popcount(uint32_t value)
{
    return __popc(value);
}

/* Zeros above the highest set bit; 32 for 0. */
__device__ __forceinline__ int leading_zeros(uint32_t value)
{
    return __clz(static_cast<int>(value));
}

__device__ __forceinline__ uint32_t float_bits(float value)
{
    return __float_as_uint(value);
}

__device__ __forceinline__ float bits_float(uint32_t bits)
{
    return __uint_as_float(bits);
}

/* To the nearest TF32, ties away from zero; the result's low 13 bits are 0. */
__device__ __forceinline__ uint32_t to_tf32(float value)
{
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
    return bits;
}

/* 2^x: 2 ulp; subnormals count as 0. */
__device__ __forceinline__ float exp2_approx(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* 1 / x: 1 ulp; subnormals count as 0. */
__device__ __forceinline__ float reciprocal_approx(float x)
{
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* --- Vectors of global memory, aligned to their size, in one access. (Of a struct that is stored the compiler
 * makes one access a member.) */

__device__ __forceinline__ uint2 load_8(const void *address)
{
    return *static_cast<const uint2 *>(address);
}

__device__ __forceinline__ uint4 load_16(const void *address)
{
    return *static_cast<const uint4 *>(address);
}

__device__ __forceinline__ void store_8(void *address, uint2 value)
{
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(address), "r"(value.x), "r"(value.y) : "memory");
}

__device__ __forceinline__ void store_16(void *address, uint4 value)
{
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(value.x), "r"(value.y),
                 "r"(value.z), "r"(value.w)
                 : "memory");
}

/* With hints: each used once. */

/* For what no thread of this kernel writes. */
__device__ __forceinline__ uint4 load_once(const uint4 *address)
{
    uint4 value;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
        : "l"(address));
    return value;
}

__device__ __forceinline__ void store_once(uint4 *address, uint4 value)
{
    __stcs(address, value);
}

} // namespace cumoe
