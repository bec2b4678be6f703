/* What the tensor-core mainloops share: how a stage of an operand lies in shared memory, how it gets there, and how
 * a warp multiplies it.
 *
 * T is BF16, F16, or float, which stands for TF32. A stage holds 64 bytes of depth: 32 values of 16 bits or 16
 * floats. Everything is made of chunks of 16 bytes, which a copy moves and a row of ldmatrix is. An operand lies as
 * it does in global memory, chunks of depth or chunks of lines; ldmatrix transposes what needs it. Values of one
 * line and depth meet in the same instruction in either case, so that no bit follows the layout. */
#pragma once

#include "cuda/gemm.cuh"
#include "cuda/ptx.cuh"

#include <type_traits>

namespace cumoe
{

namespace tensor
{

constexpr int kThreads = 128;   // 2 x 2 warps; see Sums
constexpr int kColumns = 128;   // of a tile, all parts together
constexpr int kStride = 136;    // of sums: 8 more than columns, so that eight rows begin in different banks
constexpr int kStages = 4;      // three on their way while one is multiplied; with 128 rows their 65,536 bytes fit
                                // where the sums will be
constexpr int kChunkBytes = 16; // of a copy
constexpr int kDepthBytes = 64; // of a stage
constexpr int kStepBytes = 32;  // of depth, of one matrix instruction whatever T is
constexpr int kColumnTiles = 8; // of 8 columns: a warp has 64
constexpr int kWarpColumns = 64;

template <typename T>
constexpr int kChunk = kChunkBytes / static_cast<int>(sizeof(T)); // values
template <typename T>
constexpr int kDepth = kDepthBytes / static_cast<int>(sizeof(T)); // values

/* Bytes from the beginning of a stage to a chunk of depth of a line. The eight lines that ldmatrix reads at a time
 * lie in different banks: two lines share 128 bytes, and each pair of lines has its chunks in another order. */
struct LineMajor {
    static constexpr int kChunks = kDepthBytes / kChunkBytes; // of a line
    static __device__ __forceinline__ int place(int line, int chunk)
    {
        return line * kDepthBytes + (chunk ^ (line / 2 % kChunks)) * kChunkBytes;
    }
};

/* The same to a chunk of lines at a depth; the stage has 128 lines. 16-bit values are read eight depths by one
 * chunk at a time, floats four depths by two chunks. */
template <typename T>
struct DepthMajor {
    static constexpr int kLines = 128, kChunks = kLines / kChunk<T>;
    static __device__ __forceinline__ int place(int depth, int chunk)
    {
        const int order = sizeof(T) == 2 ? depth % 8 : depth % 4 * 2;
        return depth * kLines * static_cast<int>(sizeof(T)) + (chunk ^ order) * kChunkBytes;
    }
};

/* The stages, and when the last of them is read, the sums: in the same memory. */
template <int kBytesOfStage, int kRows>
struct Arrays {
    static constexpr size_t kStageFloats = kStages * kBytesOfStage / sizeof(float),
                            kSumFloats = static_cast<size_t>(kRows) * kStride,
                            kFloats = kStageFloats > kSumFloats ? kStageFloats : kSumFloats;

    float *sums; // [kRows, kStride]
    __host__ __device__ explicit Arrays(SharedArena &arena) : sums(arena.take<float>(kFloats, 128)) {}
};

/* --- Into a stage */

/* A thread's share of a stage that is LineMajor: one chunk of every 32nd line. */
struct LineShare {
    static constexpr int kChunks = LineMajor::kChunks, kApart = kThreads / kChunks,
                         kBytesApart = kApart * kDepthBytes;
    static_assert(kApart % (2 * kChunks) == 0, "a thread's lines have one order of chunks");

    static __device__ __forceinline__ int line()
    {
        return static_cast<int>(threadIdx.x) / kChunks;
    }
    template <typename T>
    static __device__ __forceinline__ int depth()
    {
        return static_cast<int>(threadIdx.x) % kChunks * kChunk<T>;
    }
    static __device__ __forceinline__ int place()
    {
        return LineMajor::place(line(), static_cast<int>(threadIdx.x) % kChunks);
    }
};

/* A thread's share of a stage that is DepthMajor: the same chunk of lines at several depths. */
template <typename T>
struct DepthShare {
    static constexpr int kChunks = DepthMajor<T>::kChunks, kApart = kThreads / kChunks,
                         kCopies = kDepth<T> / kApart,
                         kBytesApart = kApart * DepthMajor<T>::kLines * static_cast<int>(sizeof(T));
    static_assert(kApart % (sizeof(T) == 2 ? 8 : 4) == 0, "a thread's depths have one order of chunks");

    static __device__ __forceinline__ int depth()
    {
        return static_cast<int>(threadIdx.x) / kChunks;
    }
    static __device__ __forceinline__ int line()
    {
        return static_cast<int>(threadIdx.x) % kChunks * kChunk<T>;
    }
    static __device__ __forceinline__ int place()
    {
        return DepthMajor<T>::place(depth(), static_cast<int>(threadIdx.x) % kChunks);
    }
};

/* The bits of a value; nothing is known of its type but the size. */
template <typename T>
using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;

/* A chunk: COUNT > 0 values that lie behind each other at a multiple of 16 bytes, those beyond the chunk left out,
 * and zeros behind them. It comes asynchronously. With COUNT = 0 the source is not read. */
template <typename T>
__device__ __forceinline__ void copy_chunk(unsigned char *to, const T *from, int count)
{
    cp_async<kChunkBytes>(to, from, (count < kChunk<T> ? count : kChunk<T>)*static_cast<int>(sizeof(T)));
}

/* The same of values STRIDE apart, at any address; COUNT may be negative. Four bytes at a time come asynchronously
 * where they can be copied as they are; else the chunk is there at once. */
template <typename T>
__device__ __forceinline__ void read_chunk(unsigned char *to, const T *from, int64_t stride, int count)
{
    constexpr int kBytes = 4, kPieces = kChunkBytes / kBytes, kValues = kBytes / static_cast<int>(sizeof(T));
    const bool as_they_are = kValues == 1 || (stride == 1 && reinterpret_cast<uintptr_t>(from) % kBytes == 0);
    if (as_they_are) {
#pragma unroll
        for (int i = 0; i < kPieces; i++) {
            const int left = count - i * kValues, values = left < 0 ? 0 : left < kValues ? left : kValues;
            cp_async<kBytes>(to + i * kBytes, from, values * static_cast<int>(sizeof(T)));
            from += kValues * stride; // step by step: products of the stride would be kept in registers all along
        }
        return;
    }
    uint32_t word[kPieces] = {};
#pragma unroll
    for (int i = 0; i < kChunk<T>; i++) {
        const uint32_t bits = i < count ? *reinterpret_cast<const Bits<T> *>(from) : 0u;
        word[i / kValues] |= bits << i % kValues * 8 * sizeof(T);
        from += stride;
    }
    *reinterpret_cast<uint4 *>(to) = make_uint4(word[0], word[1], word[2], word[3]);
}

/* Whether copies of 16 bytes can begin at DATA and at each STRIDE behind it. */
template <typename T>
__device__ __forceinline__ bool is_aligned(const T *data, int64_t stride)
{
    const uint64_t bytes = static_cast<uint64_t>(stride) * sizeof(T);
    return (reinterpret_cast<uintptr_t>(data) | bytes) % kChunkBytes == 0;
}

/* The first element of a group. */
template <typename T>
__device__ __forceinline__ const T *group_data(const Operand &operand, int32_t group)
{
    return static_cast<const T *>(operand.data) + group * operand.group_stride;
}

/* --- A warp's share of a product */

/* From memory to an operand of the matrix instruction. */
template <typename T>
__device__ __forceinline__ void round_fragments([[maybe_unused]] uint32_t (&fragment)[4])
{
    if constexpr (std::is_same_v<T, float>)
        for (int i = 0; i < 4; i++) fragment[i] = to_tf32(bits_float(fragment[i]));
}

/* Reads a warp's lines of a stage, from a multiple of 32 on (of 64 where it is DepthMajor), as operands of matrix
 * instructions: load_a() 16 lines of a, number I of them, for one instruction; load_b() 16 lines of b for two. Only
 * what hangs on the lane is kept, in bytes from the beginning of a stage; another chunk is an exclusive or away, as
 * the order of chunks is one. */
template <typename T, bool kDepthMajor>
struct Reader {
    int a, b; // a lane's row of ldmatrix

    __device__ __forceinline__ Reader(int line_of_a, int line_of_b)
    {
        const int lane = threadIdx.x % 32;
        a = LineMajor::place(line_of_a + lane % 16, lane / 16);
        b = LineMajor::place(line_of_b + lane / 16 * 8 + lane % 8, lane / 8 % 2);
    }
    __device__ __forceinline__ void load_a(uint32_t (&fragment)[4], const unsigned char *stage, int i,
                                           int step) const
    {
        ldmatrix_x4(fragment, stage + (a ^ step * kStepBytes) + i * 16 * kDepthBytes);
        round_fragments<T>(fragment);
    }
    __device__ __forceinline__ void load_b(uint32_t (&fragment)[4], const unsigned char *stage, int j,
                                           int step) const
    {
        ldmatrix_x4(fragment, stage + (b ^ step * kStepBytes) + j * 16 * kDepthBytes);
        round_fragments<T>(fragment);
    }
};

/* 16-bit values: 16 lines are two chunks. */
template <typename T>
struct Reader<T, true> {
    static constexpr int kDepthOfStep = 16, kDepthApart = DepthMajor<T>::kLines * 2; // bytes
    static_assert(sizeof(T) == 2, "floats are below");
    int a, b;

    __device__ __forceinline__ Reader(int line_of_a, int line_of_b)
    {
        const int in_matrix = threadIdx.x % 8, matrix = threadIdx.x % 32 / 8;
        a = DepthMajor<T>::place(matrix / 2 * 8 + in_matrix, line_of_a / 8 + matrix % 2);
        b = DepthMajor<T>::place(matrix % 2 * 8 + in_matrix, line_of_b / 8 + matrix / 2);
    }
    __device__ __forceinline__ void load_a(uint32_t (&fragment)[4], const unsigned char *stage, int i,
                                           int step) const
    {
        ldmatrix_x4_trans(fragment, stage + (a ^ i * 2 * kChunkBytes) + step * kDepthOfStep * kDepthApart);
    }
    __device__ __forceinline__ void load_b(uint32_t (&fragment)[4], const unsigned char *stage, int j,
                                           int step) const
    {
        ldmatrix_x4_trans(fragment, stage + (b ^ j * 2 * kChunkBytes) + step * kDepthOfStep * kDepthApart);
    }
};

/* Floats, one by one: 16 lines are four chunks, of which the order changes two bits. */
template <>
struct Reader<float, true> {
    static constexpr int kDepthOfStep = 8, kDepthApart = DepthMajor<float>::kLines * 4;
    int a, b; // the value of a lane's depth and line

    __device__ __forceinline__ Reader(int line_of_a, int line_of_b)
    {
        const int depth = threadIdx.x % 4, line = threadIdx.x % 32 / 4;
        a = DepthMajor<float>::place(depth, (line_of_a + line) / 4) + line % 4 * 4;
        b = DepthMajor<float>::place(depth, (line_of_b + line) / 4) + line % 4 * 4;
    }
    /* The value DEPTHS and 8 * EIGHTS lines on. */
    static __device__ __forceinline__ uint32_t value(const unsigned char *stage, int at, int depths, int eights)
    {
        const unsigned char *low = stage + (at ^ eights % 4 * 2 * kChunkBytes);
        return *reinterpret_cast<const uint32_t *>(low + eights / 4 * 8 * kChunkBytes + depths * kDepthApart);
    }
    __device__ __forceinline__ void load_a(uint32_t (&fragment)[4], const unsigned char *stage, int i,
                                           int step) const
    {
#pragma unroll
        for (int v = 0; v < 4; v++) fragment[v] = value(stage, a, step * kDepthOfStep + v / 2 * 4, 2 * i + v % 2);
        round_fragments<float>(fragment);
    }
    __device__ __forceinline__ void load_b(uint32_t (&fragment)[4], const unsigned char *stage, int j,
                                           int step) const
    {
#pragma unroll
        for (int v = 0; v < 4; v++) fragment[v] = value(stage, b, step * kDepthOfStep + v % 2 * 4, 2 * j + v / 2);
        round_fragments<float>(fragment);
    }
};

template <typename T>
__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2])
{
    if constexpr (std::is_same_v<T, float>)
        mma_m16n8k8_tf32(sum, a, b);
    else
        mma_m16n8k16<T>(sum, a, b);
}

/* The sums of a warp: kRowTiles of 16 rows by 8 of 8 columns, up to 64 x 64. Smaller ones would ask shared memory
 * for fragments more often than it can give them while the tensor cores work. */
template <int kRowTiles>
using Sums = float[kRowTiles][kColumnTiles][4];

/* sum += a b^T over a stage, by ascending depth. */
template <typename T, int kRowTiles, typename ReaderA, typename ReaderB>
__device__ __forceinline__ void multiply_stage(Sums<kRowTiles> &sum, const ReaderA &from_a, const ReaderB &from_b,
                                               const unsigned char *a, const unsigned char *b)
{
#pragma unroll
    for (int step = 0; step < kDepthBytes / kStepBytes; step++) {
        uint32_t a_fragment[kRowTiles][4], b_fragment[kColumnTiles / 2][4];
#pragma unroll
        for (int i = 0; i < kRowTiles; i++) from_a.load_a(a_fragment[i], a, i, step);
#pragma unroll
        for (int j = 0; j < kColumnTiles / 2; j++) from_b.load_b(b_fragment[j], b, j, step);
#pragma unroll
        for (int i = 0; i < kRowTiles; i++)
#pragma unroll
            for (int j = 0; j < kColumnTiles; j++) {
                const uint32_t pair[2] = {b_fragment[j / 2][j % 2 * 2], b_fragment[j / 2][j % 2 * 2 + 1]};
                multiply_add<T>(sum[i][j], a_fragment[i], pair);
            }
    }
}

/* To shared memory, where an epilogue looks for them. */
template <int kRowTiles>
__device__ __forceinline__ void write_sums(float *to, const Sums<kRowTiles> &sum, int row, int column)
{
    const int lane = threadIdx.x % 32;
    float *first = to + (row + lane / 4) * kStride + column + 2 * (lane % 4);
#pragma unroll
    for (int i = 0; i < kRowTiles; i++)
#pragma unroll
        for (int j = 0; j < kColumnTiles; j++) {
            float *at = first + 16 * i * kStride + 8 * j;
            *reinterpret_cast<float2 *>(at) = make_float2(sum[i][j][0], sum[i][j][1]);
            *reinterpret_cast<float2 *>(at + 8 * kStride) = make_float2(sum[i][j][2], sum[i][j][3]);
        }
}

} // namespace tensor

} // namespace cumoe
