#include "tests/sim/instructions.cuh"

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "cuda/shared.cuh"

using namespace cumoe;

namespace
{

constexpr uint32_t kEven = 0x55555555u, kOdd = 0xaaaaaaaau;

struct Words {
    uint32_t *word; // [256]
    __host__ __device__ explicit Words(SharedArena &arena) : word(arena.take<uint32_t>(kInstructionWords)) {}
};

__device__ __forceinline__ uint32_t *shared_words()
{
    SharedArena arena;
    return Words(arena).word;
}

__device__ __forceinline__ int lane_index()
{
    return threadIdx.x % 32;
}

/* The lanes of the thread's own parity. */
__device__ __forceinline__ uint32_t half_mask()
{
    return threadIdx.x % 2 ? kOdd : kEven;
}

__device__ __forceinline__ uint64_t wide(const uint32_t *in, int i)
{
    return static_cast<uint64_t>(in[i]) << 32 | in[i + 64];
}

__device__ __forceinline__ void put_wide(uint32_t *out, uint64_t value)
{
    out[threadIdx.x] = static_cast<uint32_t>(value >> 32);
    out[threadIdx.x + 64] = static_cast<uint32_t>(value);
}

/* --- Barriers */

__global__ void sync_threads_kernel(const uint32_t *in, uint32_t *out)
{
    uint32_t *word = shared_words();
    word[threadIdx.x] = in[threadIdx.x];
    sync_threads();
    out[threadIdx.x] = word[63 - threadIdx.x];
}

__global__ void sync_warp_kernel(const uint32_t *in, uint32_t *out)
{
    uint32_t *word = shared_words();
    word[threadIdx.x] = in[threadIdx.x];
    sync_warp(half_mask());
    out[threadIdx.x] = word[threadIdx.x ^ 2];
}

__global__ void barrier_kernel(const uint32_t *in, uint32_t *out)
{
    uint32_t *word = shared_words();
    if (threadIdx.x < 32) {
        word[threadIdx.x] = in[threadIdx.x];
        barrier_arrive<1>(64);
    } else {
        barrier_sync<1>(64);
        out[threadIdx.x] = word[63 - threadIdx.x];
    }
}

__global__ void fence_device_kernel(const uint32_t *in, uint32_t *out)
{
    out[threadIdx.x] = in[threadIdx.x];
    fence_device();
    out[threadIdx.x + 64] = in[threadIdx.x + 64];
}

/* --- Between lanes */

__global__ void shuffle_kernel(const uint32_t *in, uint32_t *out)
{
    out[threadIdx.x] = shuffle(kFullMask, in[threadIdx.x], static_cast<int>(in[threadIdx.x + 64] % 32));
}

__global__ void shuffle_wide_kernel(const uint32_t *in, uint32_t *out)
{
    put_wide(out, shuffle(kFullMask, wide(in, threadIdx.x), 5));
}

__global__ void shuffle_xor_kernel(const uint32_t *in, uint32_t *out)
{
    for (int i = 0; i < 4; i++)
        out[threadIdx.x + 64 * i] = shuffle_xor(half_mask(), in[threadIdx.x + 64 * i], 2 << i);
}

__global__ void shuffle_up_kernel(const uint32_t *in, uint32_t *out)
{
    for (unsigned i = 0; i < 4; i++)
        out[threadIdx.x + 64 * i] = shuffle_up(kFullMask, in[threadIdx.x + 64 * i], 5 * i + 1);
}

__global__ void shuffle_down_kernel(const uint32_t *in, uint32_t *out)
{
    for (unsigned i = 0; i < 4; i++)
        out[threadIdx.x + 64 * i] = shuffle_down(kFullMask, in[threadIdx.x + 64 * i], 5 * i + 1);
}

__global__ void ballot_kernel(const uint32_t *in, uint32_t *out)
{
    out[threadIdx.x] = ballot(kFullMask, in[threadIdx.x] % 2);
    out[threadIdx.x + 64] = ballot(half_mask(), in[threadIdx.x + 64] % 2);
}

__global__ void match_any_kernel(const uint32_t *in, uint32_t *out)
{
    out[threadIdx.x] = match_any(kFullMask, in[threadIdx.x] % 7);
    out[threadIdx.x + 64] = match_any(half_mask(), in[threadIdx.x + 64] % 3);
}

__global__ void reduce_add_kernel(const uint32_t *in, uint32_t *out)
{
    out[threadIdx.x] = reduce_add(half_mask(), in[threadIdx.x]);
}

__global__ void reduce_min_kernel(const uint32_t *in, uint32_t *out)
{
    out[threadIdx.x] = reduce_min(half_mask(), in[threadIdx.x]);
}

__global__ void reduce_max_kernel(const uint32_t *in, uint32_t *out)
{
    out[threadIdx.x] = reduce_max(half_mask(), in[threadIdx.x]);
}

/* --- Atomics: eight counters in global memory, eight in shared, 32 bits; then the same with 64. Every word of out
 * begins with 0. */

template <typename T, typename Update>
__device__ __forceinline__ void update(T *global, T *shared, Update apply)
{
    if (threadIdx.x < 8) shared[threadIdx.x] = static_cast<T>(threadIdx.x);
    sync_threads();
    apply(&global[threadIdx.x % 8]);
    apply(&shared[threadIdx.x % 8]);
    sync_threads();
    if (threadIdx.x < 8) global[threadIdx.x + 8] = shared[threadIdx.x];
}

__global__ void atomic_add_kernel(const uint32_t *in, uint32_t *out)
{
    uint32_t *word = shared_words();
    const uint32_t value = in[threadIdx.x];
    const uint64_t value64 = wide(in, threadIdx.x);
    update(out, word, [=](uint32_t *at) { atomic_add(at, value); });
    update(reinterpret_cast<uint64_t *>(out + 64), reinterpret_cast<uint64_t *>(word + 64),
           [=](uint64_t *at) { atomic_add(at, value64); });
}

__global__ void atomic_min_kernel(const uint32_t *in, uint32_t *out)
{
    uint32_t *word = shared_words();
    const uint32_t value = in[threadIdx.x];
    const uint64_t value64 = wide(in, threadIdx.x);
    if (threadIdx.x < 64) out[threadIdx.x] = out[threadIdx.x + 64] = kFullMask;
    sync_threads();
    update(out, word, [=](uint32_t *at) { atomic_min(at, value); });
    update(reinterpret_cast<uint64_t *>(out + 64), reinterpret_cast<uint64_t *>(word + 64),
           [=](uint64_t *at) { atomic_min(at, value64); });
}

__global__ void atomic_max_kernel(const uint32_t *in, uint32_t *out)
{
    uint32_t *word = shared_words();
    const uint32_t value = in[threadIdx.x];
    const uint64_t value64 = wide(in, threadIdx.x);
    update(out, word, [=](uint32_t *at) { atomic_max(at, value); });
    update(reinterpret_cast<uint64_t *>(out + 64), reinterpret_cast<uint64_t *>(word + 64),
           [=](uint64_t *at) { atomic_max(at, value64); });
}

/* Each thread on a word of its own: even ones expect what is there. */
__global__ void atomic_cas_kernel(const uint32_t *in, uint32_t *out)
{
    uint64_t *out64 = reinterpret_cast<uint64_t *>(out + 128);
    atomic_cas(&out[threadIdx.x], threadIdx.x % 2, in[threadIdx.x]);
    atomic_cas(&out64[threadIdx.x], static_cast<uint64_t>(threadIdx.x % 2), wide(in, threadIdx.x));
}

/* --- Asynchronous copies: two groups, the second with rows cut short */

template <int kBytes>
__device__ __forceinline__ void copy_rows(const uint32_t *in, uint32_t *out)
{
    constexpr int kWords = kBytes / 4, kRows = kInstructionWords / kWords;
    uint32_t *word = shared_words();
    for (int row = threadIdx.x; row < kRows / 2; row += kInstructionThreads)
        cp_async<kBytes>(word + row * kWords, in + row * kWords);
    cp_async_commit();
    for (int row = kRows / 2 + static_cast<int>(threadIdx.x); row < kRows; row += kInstructionThreads)
        cp_async<kBytes>(word + row * kWords, in + row * kWords, row % (kBytes + 1));
    cp_async_commit();
    cp_async_wait<1>();
    sync_threads();
    for (int i = threadIdx.x; i < kInstructionWords / 2; i += kInstructionThreads) out[i] = word[i];
    cp_async_wait<0>();
    sync_threads();
    for (int i = kInstructionWords / 2 + static_cast<int>(threadIdx.x); i < kInstructionWords;
         i += kInstructionThreads)
        out[i] = word[i];
}

__global__ void cp_async_4_kernel(const uint32_t *in, uint32_t *out)
{
    copy_rows<4>(in, out);
}

__global__ void cp_async_8_kernel(const uint32_t *in, uint32_t *out)
{
    copy_rows<8>(in, out);
}

__global__ void cp_async_16_kernel(const uint32_t *in, uint32_t *out)
{
    copy_rows<16>(in, out);
}

/* --- Matrices. One warp works, and thread l leaves its words at 4 l. */

template <typename Load>
__device__ __forceinline__ void load_matrices(const uint32_t *in, uint32_t *out, Load load)
{
    uint32_t *word = shared_words();
    for (int i = threadIdx.x; i < kInstructionWords; i += kInstructionThreads) word[i] = in[i];
    sync_threads();
    if (threadIdx.x >= 32) return;
    uint32_t tile[4];
    load(tile, word + 4 * (31 - threadIdx.x)); // rows of 16 bytes, last first
    for (int i = 0; i < 4; i++) out[4 * threadIdx.x + i] = tile[i];
}

__global__ void ldmatrix_x4_kernel(const uint32_t *in, uint32_t *out)
{
    load_matrices(in, out, [](uint32_t(&tile)[4], const void *row) { ldmatrix_x4(tile, row); });
}

__global__ void ldmatrix_x4_trans_kernel(const uint32_t *in, uint32_t *out)
{
    load_matrices(in, out, [](uint32_t(&tile)[4], const void *row) { ldmatrix_x4_trans(tile, row); });
}

/* Small integers: sums of their products are exact in any order. */
__device__ __forceinline__ float small(const uint32_t *in, int i)
{
    return static_cast<float>(static_cast<int>(in[i % kInstructionWords] % 17) - 8);
}

__device__ __forceinline__ uint32_t pack(float low, float high, __nv_bfloat16)
{
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t *>(&pair);
}

__device__ __forceinline__ uint32_t pack(float low, float high, __half)
{
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t *>(&pair);
}

/* a (i, k) = small(16 i + k), b (k, j) = small(8 k + j + 3), c (i, j) = small(8 i + j + 5) */
template <typename T>
__device__ __forceinline__ void multiply(const uint32_t *in, uint32_t *out)
{
    if (threadIdx.x >= 32) return;
    const int g = lane_index() / 4, p = 2 * (lane_index() % 4);
    uint32_t a[4], b[2];
    float d[4];
    for (int n = 0; n < 4; n++) {
        const int i = g + 8 * (n % 2), k = p + 8 * (n / 2);
        a[n] = pack(small(in, 16 * i + k), small(in, 16 * i + k + 1), T{});
        d[n] = small(in, 8 * (g + 8 * (n / 2)) + p + n % 2 + 5);
    }
    for (int n = 0; n < 2; n++) {
        const int k = p + 8 * n;
        b[n] = pack(small(in, 8 * k + g + 3), small(in, 8 * (k + 1) + g + 3), T{});
    }
    mma_m16n8k16<T>(d, a, b);
    for (int n = 0; n < 4; n++) out[4 * threadIdx.x + n] = float_bits(d[n]);
}

__global__ void mma_bf16_kernel(const uint32_t *in, uint32_t *out)
{
    multiply<__nv_bfloat16>(in, out);
}

__global__ void mma_f16_kernel(const uint32_t *in, uint32_t *out)
{
    multiply<__half>(in, out);
}

/* The same product with the fragments that ldmatrix brings, as the grouped products have them. */
__global__ void mma_ldmatrix_kernel(const uint32_t *in, uint32_t *out)
{
    uint32_t *word = shared_words();
    __nv_bfloat16 *a_tile = reinterpret_cast<__nv_bfloat16 *>(word); // [16, 16] a
    __nv_bfloat16 *b_tile =
        reinterpret_cast<__nv_bfloat16 *>(word + 128); // [8, 32]  b transposed, k = 0 .. 15 twice
    for (int i = threadIdx.x; i < 256; i += kInstructionThreads) {
        a_tile[i] = __float2bfloat16(small(in, i));
        b_tile[i] = __float2bfloat16(small(in, 8 * (i % 16) + i / 32 + 3));
    }
    sync_threads();
    if (threadIdx.x >= 32) return;
    const int lane = lane_index(), g = lane / 4, p = 2 * (lane % 4);
    uint32_t a[4], b[4];
    float d[4];
    ldmatrix_x4(a, a_tile + 16 * (lane % 16) + 8 * (lane / 16));
    ldmatrix_x4(b, b_tile + 32 * (lane % 8) + 8 * (lane / 8));
    for (int n = 0; n < 4; n++) d[n] = small(in, 8 * (g + 8 * (n / 2)) + p + n % 2 + 5);
    const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
    mma_m16n8k16<__nv_bfloat16>(d, a, first);
    mma_m16n8k16<__nv_bfloat16>(d, a, second);
    for (int n = 0; n < 4; n++) out[4 * threadIdx.x + n] = float_bits(d[n]);
}

__global__ void mma_tf32_kernel(const uint32_t *in, uint32_t *out)
{
    if (threadIdx.x >= 32) return;
    const int g = lane_index() / 4, q = lane_index() % 4;
    uint32_t a[4], b[2];
    float d[4];
    for (int n = 0; n < 4; n++) {
        a[n] = float_bits(small(in, 16 * (g + 8 * (n % 2)) + q + 4 * (n / 2))) | 0x1fffu; // low bits do not count
        d[n] = small(in, 8 * (g + 8 * (n / 2)) + 2 * q + n % 2 + 5);
    }
    for (int n = 0; n < 2; n++) b[n] = float_bits(small(in, 8 * (q + 4 * n) + g + 3));
    mma_m16n8k8_tf32(d, a, b);
    for (int n = 0; n < 4; n++) out[4 * threadIdx.x + n] = float_bits(d[n]);
}

/* --- Bits and fast arithmetic */

__global__ void popcount_kernel(const uint32_t *in, uint32_t *out)
{
    out[threadIdx.x] = static_cast<uint32_t>(popcount(in[threadIdx.x]));
}

__global__ void leading_zeros_kernel(const uint32_t *in, uint32_t *out)
{
    out[threadIdx.x] = static_cast<uint32_t>(leading_zeros(threadIdx.x ? in[threadIdx.x] >> threadIdx.x % 32 : 0));
}

__global__ void float_bits_kernel(const uint32_t *in, uint32_t *out)
{
    out[threadIdx.x] = float_bits(bits_float(in[threadIdx.x] >> 1) * 2);
}

__global__ void to_tf32_kernel(const uint32_t *in, uint32_t *out)
{
    out[threadIdx.x] = to_tf32(bits_float(in[threadIdx.x] % 0x7f800000u));
    out[threadIdx.x + 64] = to_tf32(-bits_float(0x3f801000u + 0x2000u * threadIdx.x)); // ties
}

__global__ void exp2_approx_kernel(const uint32_t *, uint32_t *out)
{
    for (int i = threadIdx.x; i < kInstructionWords; i += kInstructionThreads)
        out[i] = float_bits(exp2_approx((static_cast<float>(i) - 128) * 0.871f));
}

__global__ void reciprocal_approx_kernel(const uint32_t *in, uint32_t *out)
{
    for (int i = threadIdx.x; i < kInstructionWords; i += kInstructionThreads)
        out[i] = float_bits(reciprocal_approx(bits_float(0x01000000u + in[i] % 0x7d000000u)));
}

/* --- Vectors of global memory: thread t reads those from the end on */

__global__ void load_8_kernel(const uint32_t *in, uint32_t *out)
{
    const uint2 value = load_8(in + 2 * (63 - threadIdx.x));
    out[2 * threadIdx.x] = value.x;
    out[2 * threadIdx.x + 1] = value.y;
}

__global__ void load_16_kernel(const uint32_t *in, uint32_t *out)
{
    const uint4 value = load_16(in + 4 * (63 - threadIdx.x));
    out[4 * threadIdx.x] = value.x;
    out[4 * threadIdx.x + 1] = value.y;
    out[4 * threadIdx.x + 2] = value.z;
    out[4 * threadIdx.x + 3] = value.w;
}

__global__ void store_8_kernel(const uint32_t *in, uint32_t *out)
{
    store_8(out + 2 * threadIdx.x, make_uint2(in[threadIdx.x], in[threadIdx.x + 64]));
}

__global__ void store_16_kernel(const uint32_t *in, uint32_t *out)
{
    store_16(out + 4 * threadIdx.x,
             make_uint4(in[threadIdx.x], in[threadIdx.x + 64], in[threadIdx.x + 128], in[threadIdx.x + 192]));
}

__global__ void load_once_kernel(const uint32_t *in, uint32_t *out)
{
    reinterpret_cast<uint4 *>(out)[threadIdx.x] = load_once(reinterpret_cast<const uint4 *>(in) + threadIdx.x);
}

__global__ void store_once_kernel(const uint32_t *in, uint32_t *out)
{
    const uint4 value = {in[threadIdx.x], in[threadIdx.x + 64], in[threadIdx.x + 128], in[threadIdx.x + 192]};
    store_once(reinterpret_cast<uint4 *>(out) + threadIdx.x, value);
}

} // namespace

#define INSTRUCTION(name)                                                                                          \
    {                                                                                                              \
#name, name##_kernel, 0                                                                                    \
    }
#define APPROXIMATION(name, ulp)                                                                                   \
    {                                                                                                              \
#name, name##_kernel, ulp                                                                                  \
    }

const Instruction kInstructions[] = {
    INSTRUCTION(sync_threads), INSTRUCTION(sync_warp),         INSTRUCTION(barrier),
    INSTRUCTION(fence_device), INSTRUCTION(shuffle),           INSTRUCTION(shuffle_wide),
    INSTRUCTION(shuffle_xor),  INSTRUCTION(shuffle_up),        INSTRUCTION(shuffle_down),
    INSTRUCTION(ballot),       INSTRUCTION(match_any),         INSTRUCTION(reduce_add),
    INSTRUCTION(reduce_min),   INSTRUCTION(reduce_max),        INSTRUCTION(atomic_add),
    INSTRUCTION(atomic_min),   INSTRUCTION(atomic_max),        INSTRUCTION(atomic_cas),
    INSTRUCTION(cp_async_4),   INSTRUCTION(cp_async_8),        INSTRUCTION(cp_async_16),
    INSTRUCTION(ldmatrix_x4),  INSTRUCTION(ldmatrix_x4_trans), INSTRUCTION(mma_bf16),
    INSTRUCTION(mma_f16),      INSTRUCTION(mma_ldmatrix),      INSTRUCTION(mma_tf32),
    INSTRUCTION(popcount),     INSTRUCTION(leading_zeros),     INSTRUCTION(float_bits),
    INSTRUCTION(to_tf32),      APPROXIMATION(exp2_approx, 2),  APPROXIMATION(reciprocal_approx, 1),
    INSTRUCTION(load_8),       INSTRUCTION(load_16),           INSTRUCTION(store_8),
    INSTRUCTION(store_16),     INSTRUCTION(load_once),         INSTRUCTION(store_once),
};
const int kNumInstructions = sizeof kInstructions / sizeof *kInstructions;

uint32_t instruction_input(int i)
{
    const uint32_t x = (static_cast<uint32_t>(i) + 1) * 0x9E3779B1u;
    return (x ^ x >> 15) * 0x85EBCA77u;
}

cudaError_t instruction_run(const Instruction &instruction, std::vector<uint32_t> *out)
{
    constexpr size_t kBytes = kInstructionWords * sizeof(uint32_t);
    uint32_t host[kInstructionWords], *device = nullptr; // [2, 256] in, out
    for (int i = 0; i < kInstructionWords; i++) host[i] = instruction_input(i);
    out->resize(kInstructionWords);
    cudaError_t error = cudaMalloc(&device, 2 * kBytes);
    if (!error) error = cudaMemcpy(device, host, kBytes, cudaMemcpyHostToDevice);
    if (!error) error = cudaMemset(device + kInstructionWords, 0, kBytes);
    const Launch once = {dim3(1), dim3(kInstructionThreads), nullptr, shared_bytes<Words>()};
    if (!error) error = launch(once, instruction.kernel, device, device + kInstructionWords);
    if (!error) error = cudaMemcpy(out->data(), device + kInstructionWords, kBytes, cudaMemcpyDeviceToHost);
    const cudaError_t freed = cudaFree(device);
    return error ? error : freed;
}
