/* The exact products of rows (cuda/gemm_exact.cuh) where c is small, as the logits of a gate are: few tiles of
 * 64 x 128 leave most of the device idle, and each is as slow as its chains are long. A tile of 16 x 32 gives every
 * scheduler of a multiprocessor one warp with four chains a thread, which is what the latency of a multiply-add
 * asks for; one of 32 x 64 reads half as much shared memory a multiply-add, for where there are enough of them.
 *
 * Steps are deep, so that one of them takes longer to multiply than the next to arrive from global memory. They
 * stand in shared memory with the depth inside: a thread reads four depths of a line at once. And what is read from
 * global memory is whole aligned runs of four: fits_small_rows() says whether a product has nothing else. */
#pragma once

#include "cuda/gemm.cuh"
#include "cuda/run.cuh"

namespace cumoe
{

namespace small
{

constexpr int kThreadsDown = 8, kThreadsAcross = 16, kThreads = kThreadsDown * kThreadsAcross;

/* A thread has kSide rows and kSide columns, kThreadsDown and kThreadsAcross apart. */
template <int kSide>
struct Shape {
    static_assert(kSide == 2 || kSide == 4, "others are not used");
    static constexpr int kRows = kSide * kThreadsDown, kColumns = kSide * kThreadsAcross;
    static constexpr int kDepth = kSide == 2 ? 128 : 32; // of a step
    static constexpr int kLine = kDepth + kRun;          // of a step in shared memory: 8 lines fill all banks
    static constexpr int kStride = kColumns + 4;         // of the sums
    static constexpr int kBlocksPerSm = 2;               // with 3, sm_120 spills

    static_assert(kLine % 32 == 4 && kStride % 4 == 0, "vectors are aligned, and 8 neighbours meet in no bank");
};

/* A step, and behind the last the sums, in the same memory. */
template <int kSide>
struct Arrays {
    using Shape = small::Shape<kSide>;
    float *a, *b; // [kRows, kLine], [kColumns, kLine]
    float *sums;  // [kRows, kStride]
    __host__ __device__ explicit Arrays(SharedArena &arena)
    {
        constexpr size_t kStep = (Shape::kRows + Shape::kColumns) * Shape::kLine,
                         kSums = Shape::kRows * Shape::kStride;
        static_assert(kSums <= kStep, "the sums fit");
        a = sums = arena.take<float>(kStep);
        b = a + Shape::kRows * Shape::kLine;
    }
};

/* Lines of a factor that a tile needs. Element (line, depth) stands at
 * data + (first + line * line_stride + depth * depth_stride) elements. */
struct Source {
    const void *data;
    cumoe_dtype_t dtype;
    int64_t first, line_stride, depth_stride;
    int32_t lines; // there are; those up to the tile's are zeros
};

/* Whether runs lie along the depth; else along the lines. */
__host__ __device__ __forceinline__ bool is_along_depth(const Source &s)
{
    return s.depth_stride == 1;
}

/* A thread's part of kLines lines of a step of kDepth, on its way to shared memory [kLines, kLine]. What is on its
 * way are the bits as they were: to widen a value is to wait for it, and that is put off until the step before is
 * multiplied. */
template <int kLines, int kDepth, int kLine>
struct Fetch {
    static constexpr int kRuns = kLines * kDepth / kRun / kThreads;             // a thread's
    static constexpr int kDown = kDepth / kRun;                                 // runs of a line
    static constexpr int kDeep = kDepth < kThreads / 2 ? kDepth : kThreads / 2; // depths of pairs of runs of lines
    static constexpr int kPairs = kThreads / 2 / kDeep;                         // of those, side by side
    static_assert(kLines % (2 * kRun) == 0 && kThreads % kDown == 0 && kDepth % kDeep == 0 &&
                      kRuns * kRun * kThreads == kLines * kDepth &&
                      kRuns * kDeep * kPairs * 2 * kRun == kLines * kDepth,
                  "whole runs each");

    uint4 bits[kRuns];
    const char *from; // the first run's

    /* Where run I of this thread begins. Along the depth a warp reads 512 bytes or two times 256 of floats; along
     * the lines 16 times 32, which is a sector, and writes to all banks. */
    static __device__ __forceinline__ void place(bool along_depth, int i, int &line, int &depth)
    {
        const int thread = static_cast<int>(threadIdx.x) % kThreads;
        if (along_depth) {
            line = thread / kDown + i * (kThreads / kDown);
            depth = thread % kDown * kRun;
        } else {
            line = (thread % 2 + (thread / 2 / kDeep + i / (kDepth / kDeep) * kPairs) * 2) * kRun;
            depth = thread / 2 % kDeep + i % (kDepth / kDeep) * kDeep;
        }
    }

    static __device__ __forceinline__ int64_t size_of(const Source &s)
    {
        return s.dtype == CUMOE_F32 ? 4 : 2;
    }

    __device__ __forceinline__ void begin(const Source &s)
    {
        int line, depth;
        place(is_along_depth(s), 0, line, depth);
        from = static_cast<const char *>(s.data) +
               (s.first + line * s.line_stride + depth * s.depth_stride) * size_of(s);
    }

    /* The next step, of which DEPTHS are there, a multiple of kRun. Elsewhere nothing is read. */
    __device__ __forceinline__ void load(const Source &s, int depths)
    {
        const bool along_depth = is_along_depth(s);
        const int64_t line_bytes = s.line_stride * size_of(s), depth_bytes = s.depth_stride * size_of(s);
        int first_line, first_depth;
        place(along_depth, 0, first_line, first_depth);
#pragma unroll
        for (int i = 0; i < kRuns; i++) {
            int line, depth;
            place(along_depth, i, line, depth);
            const char *run = from + (line - first_line) * line_bytes + (depth - first_depth) * depth_bytes;
            bits[i] = make_uint4(0, 0, 0, 0);
            if (line >= s.lines || depth >= depths) continue;
            if (s.dtype == CUMOE_F32) {
                bits[i] = load_16(run);
            } else {
                const uint2 two = load_8(run);
                bits[i].x = two.x;
                bits[i].y = two.y;
            }
        }
        from += kDepth * depth_bytes;
    }

    __device__ __forceinline__ void store(const Source &s, float *to) const
    {
        const bool along_depth = is_along_depth(s);
#pragma unroll
        for (int i = 0; i < kRuns; i++) {
            int line, depth;
            place(along_depth, i, line, depth);
            float *first = to + line * kLine + depth;
            const float4 run = widen(bits[i], s.dtype);
            if (along_depth) {
                *reinterpret_cast<float4 *>(first) = run;
            } else {
                first[0] = run.x;
                first[kLine] = run.y;
                first[2 * kLine] = run.z;
                first[3 * kLine] = run.w;
            }
        }
    }

    static __device__ __forceinline__ float4 widen(const uint4 &bits, cumoe_dtype_t dtype)
    {
        if (dtype == CUMOE_F32)
            return make_float4(bits_float(bits.x), bits_float(bits.y), bits_float(bits.z), bits_float(bits.w));
        if (dtype == CUMOE_BF16)
            return make_float4(bits_float(bits.x << 16), bits_float(bits.x & 0xffff0000u), bits_float(bits.y << 16),
                               bits_float(bits.y & 0xffff0000u));
        return make_float4(half(bits.x), half(bits.x >> 16), half(bits.y), half(bits.y >> 16));
    }

    static __device__ __forceinline__ float half(uint32_t bits)
    {
        __half_raw raw;
        raw.x = static_cast<unsigned short>(bits & 0xffff);
        return __half2float(raw);
    }
};

template <int kSide>
struct Sums {
    using Shape = small::Shape<kSide>;
    float at[kSide][kSide] = {};

    /* A warp has 4 x 8 threads: its vectors of a and of b come from neighbouring lines. */
    static __device__ __forceinline__ int row(int i)
    {
        const int thread = static_cast<int>(threadIdx.x);
        return i * kThreadsDown + first_row_of_warp() + thread % 32 / 8;
    }
    static __device__ __forceinline__ int first_row_of_warp()
    {
        return static_cast<int>(threadIdx.x) / 64 * 4;
    }
    static __device__ __forceinline__ int column(int j)
    {
        const int thread = static_cast<int>(threadIdx.x);
        return j * kThreadsAcross + thread / 32 % 2 * 8 + thread % 8;
    }

    /* The next DEPTHS, a multiple of kRun, of the chains of the first kHigh rows. */
    template <int kHigh>
    __device__ __forceinline__ void multiply(const float *a, const float *b, int depths)
    {
        a += row(0) * Shape::kLine;
        b += column(0) * Shape::kLine;
        if (depths == Shape::kDepth) { // nearly always, and without a count
#pragma unroll(16 / kSide)
            for (int k = 0; k < Shape::kDepth; k += kRun) multiply_run<kHigh>(a + k, b + k);
        } else {
#pragma unroll 1
            for (int k = 0; k < depths; k += kRun) multiply_run<kHigh>(a + k, b + k);
        }
    }

    template <int kHigh>
    __device__ __forceinline__ void multiply_run(const float *a, const float *b)
    {
        Run<float> rows[kHigh], columns[kSide];
#pragma unroll
        for (int i = 0; i < kHigh; i++)
            rows[i] = *reinterpret_cast<const Run<float> *>(a + i * kThreadsDown * Shape::kLine);
#pragma unroll
        for (int j = 0; j < kSide; j++)
            columns[j] = *reinterpret_cast<const Run<float> *>(b + j * kThreadsAcross * Shape::kLine);
#pragma unroll
        for (int k = 0; k < kRun; k++)
#pragma unroll
            for (int i = 0; i < kHigh; i++)
#pragma unroll
                for (int j = 0; j < kSide; j++) at[i][j] = fmaf(rows[i].at[k], columns[j].at[k], at[i][j]);
    }

    __device__ __forceinline__ void store(float *sums) const
    {
#pragma unroll
        for (int i = 0; i < kSide; i++)
#pragma unroll
            for (int j = 0; j < kSide; j++) sums[row(i) * Shape::kStride + column(j)] = at[i][j];
    }
};

} // namespace small

/* Whether a product can be made by ExactSmallRows: see above. It hangs on host facts alone. */
inline bool is_in_runs(const Operand &operand, int64_t lines, int64_t depths)
{
    const int64_t size = operand.dtype == CUMOE_F32 ? 4 : 2;
    const int64_t along = operand.depth_stride == 1 ? depths : lines;
    const int64_t across = operand.depth_stride == 1 ? operand.line_stride : operand.depth_stride;
    return (operand.depth_stride == 1 || operand.line_stride == 1) && along % kRun == 0 && across % kRun == 0 &&
           operand.group_stride % kRun == 0 && depths % kRun == 0 &&
           reinterpret_cast<uintptr_t>(operand.data) % static_cast<uintptr_t>(size * kRun) == 0;
}

inline bool fits_small_rows(const RowsProduct &product)
{
    bool fits = true;
    for (int i = 0; i < product.terms; i++)
        fits = fits && !product.a[i].index && product.a[i].depth_stride == 1 &&
               is_in_runs(product.a[i], product.max_rows, product.k);
    for (int i = 0; i < product.terms * product.parts; i++)
        fits = fits && is_in_runs(product.b[i], product.n, product.k);
    return fits;
}

/* Mainloop of rows. Bits are those of ExactRows: every sum is the same chain. */
template <int kSide, int kNumParts>
struct ExactSmallRows {
    using Real = float;
    using Shape = small::Shape<kSide>;
    using Arrays = small::Arrays<kSide>;
    static constexpr int kThreads = small::kThreads, kRows = Shape::kRows, kColumns = Shape::kColumns;
    static constexpr int kParts = kNumParts, kStride = Shape::kStride, kBlocksPerSm = Shape::kBlocksPerSm;
    static constexpr int kPartColumns = kColumns / kParts;

    static __device__ __forceinline__ void run(const RowsProduct &product, const Tile &tile, const Arrays &shared)
    {
        small::Fetch<kRows, Shape::kDepth, Shape::kLine> a;
        small::Fetch<kPartColumns, Shape::kDepth, Shape::kLine> b[kParts];
        small::Source source_a = {}, source_b[kParts] = {};
        small::Sums<kSide> sums;
        int64_t left = 0;           // depths of the term that are not yet read
        int32_t terms = 0;          // that are read or begun
        int depths = 0, coming = 0; // of the step in shared memory, and of the one in registers
        for (;; depths = coming) {
            // The next step, a piece of the depth of one term, goes into registers while this one is multiplied.
            const bool more = left > 0 || terms < product.terms;
            if (left == 0 && more) {
                source_a = row_source(product.a[terms], tile);
                a.begin(source_a);
#pragma unroll
                for (int p = 0; p < kParts; p++) {
                    source_b[p] = column_source(product.b[terms + p], tile);
                    b[p].begin(source_b[p]);
                }
                left = product.k;
                terms++;
            }
            if (more) {
                coming = static_cast<int>(min64(left, Shape::kDepth));
                a.load(source_a, coming);
#pragma unroll
                for (int p = 0; p < kParts; p++) b[p].load(source_b[p], coming);
                left -= coming;
            }
            // Rows that the tile does not have are left out, by warps and by the rows of a thread.
            if (depths > 0 && small::Sums<kSide>::first_row_of_warp() < tile.rows) {
                if (tile.rows <= small::kThreadsDown)
                    sums.template multiply<1>(shared.a, shared.b, depths);
                else
                    sums.template multiply<kSide>(shared.a, shared.b, depths);
            }
            sync_threads(); // the step is read
            if (!more) break;
            a.store(source_a, shared.a);
#pragma unroll
            for (int p = 0; p < kParts; p++) b[p].store(source_b[p], shared.b + p * kPartColumns * Shape::kLine);
            sync_threads(); // the next step is there
        }
        sums.store(shared.sums);
        sync_threads();
    }

    static __device__ __forceinline__ small::Source row_source(const Operand &operand, const Tile &tile)
    {
        return {operand.data,        operand.dtype,        tile.row * operand.line_stride,
                operand.line_stride, operand.depth_stride, tile.rows};
    }

    static __device__ __forceinline__ small::Source column_source(const Operand &operand, const Tile &tile)
    {
        return {operand.data,
                operand.dtype,
                tile.group * operand.group_stride + tile.column * operand.line_stride,
                operand.line_stride,
                operand.depth_stride,
                tile.columns};
    }
};

} // namespace cumoe
