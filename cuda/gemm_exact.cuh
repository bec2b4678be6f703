/* Grouped products by ordinary fused multiply-adds, in float, or in double where the layer is F64: one chain over
 * the depth in ascending order for every element, which is what host/cpu/gemm.c promises as well. Factors have any
 * type and any strides: they are widened on their way from global to shared memory, through registers, while the
 * step before is multiplied. */
#pragma once

#include "cuda/epilogue.cuh"
#include "cuda/gemm.cuh"
#include "cuda/gemm_depth.cuh"
#include "cuda/run.cuh"

namespace cumoe
{

/* c = the product (+ bias), stored. */
cudaError_t exact_rows_product(const cumoe_context_t &context, const RowsProduct &product,
                               const StoreRows &epilogue, cudaStream_t stream);

cudaError_t exact_depth_product(const cumoe_context_t &context, const DepthProduct &product, cudaStream_t stream);

namespace exact
{

constexpr int kRows = 64;
constexpr int kDepth = 8;                                 // of a step
constexpr int kThreadRows = 8, kThreadColumns = 2 * kRun; // a thread's sums: 8 x 8, in double 8 x 4
constexpr int kThreadsAcross = 16, kThreads = kRows / kThreadRows * kThreadsAcross;

template <typename Real>
struct Shape {
    static constexpr int kVector = 16 / sizeof(Real);      // of an access of 16 bytes
    static constexpr int kBand = kThreadsAcross * kVector; // neighbouring columns; a thread has one vector
    static constexpr int kBands = 2;                       // of each, so that a warp reads whole bands
    static constexpr int kColumns = kBands * kBand;
    static constexpr int kStride = kColumns + kVector;                              // of the sums
    static constexpr int kStrideA = kRows + kVector, kStrideB = kColumns + kVector; // of a step, [kDepth, kStride]
    static constexpr int kStep = kDepth * (kStrideA + kStrideB);
    static constexpr int kSteps = 2;                               // one is multiplied, the other filled
    static constexpr int kBlocksPerSm = sizeof(Real) == 4 ? 3 : 2; // what the registers allow

    static_assert(kRows % kVector == 0 && kBand % kVector == 0, "vectors in shared memory are aligned");
};

/* Steps, and behind them the sums: one after the other in the same memory. */
template <typename Real>
struct Arrays {
    Real *steps; // [kSteps, kDepth, kStrideA], then b
    Real *sums;  // [kRows, kStride]
    __host__ __device__ explicit Arrays(SharedArena &arena)
    {
        using Shape = exact::Shape<Real>;
        constexpr size_t kSteps = Shape::kSteps * Shape::kStep, kSums = kRows * Shape::kStride;
        unsigned char *bytes = arena.take<unsigned char>((kSteps > kSums ? kSteps : kSums) * sizeof(Real));
        steps = reinterpret_cast<Real *>(bytes);
        sums = reinterpret_cast<Real *>(bytes);
    }
};

/* A vector of 16 bytes in shared memory. */
template <typename Real>
struct alignas(16) Vector {
    Real at[Shape<Real>::kVector];
};

/* The lines and depths of a factor that a tile needs: element (line, depth) stands at
 * first + line * line_stride + depth * depth_stride, line or depth replaced by its index where there is one. */
struct Source {
    const void *data;
    cumoe_dtype_t dtype;
    int64_t first, line_stride, depth_stride;
    const int32_t *line_index, *depth_index;
    int32_t lines; // there are; those up to the tile's are zeros
    int64_t depths;
    bool along_depth; // runs go along the depth, else along the lines
};

__device__ __forceinline__ Source row_source(const Operand &operand, const Tile &tile, int64_t depths)
{
    Source s = {operand.data, operand.dtype, 0,   operand.line_stride, operand.depth_stride, nullptr, nullptr,
                tile.rows,    depths,        true};
    if (operand.index)
        s.line_index = operand.index + tile.row;
    else
        s.first = tile.row * operand.line_stride;
    s.along_depth = operand.index || operand.depth_stride <= operand.line_stride;
    return s;
}

__device__ __forceinline__ Source column_source(const Operand &operand, const Tile &tile, int64_t depths)
{
    return {operand.data,
            operand.dtype,
            tile.group * operand.group_stride + tile.column * operand.line_stride,
            operand.line_stride,
            operand.depth_stride,
            nullptr,
            nullptr,
            tile.columns,
            depths,
            operand.depth_stride <= operand.line_stride};
}

/* LINES lines from LINE on; the depth is the rows of the tile's group. */
__device__ __forceinline__ Source depth_source(const Operand &operand, const DepthTile &tile, int64_t line,
                                               int32_t lines)
{
    Source s = {operand.data,
                operand.dtype,
                line * operand.line_stride,
                operand.line_stride,
                operand.depth_stride,
                nullptr,
                nullptr,
                lines,
                tile.end - tile.begin,
                false};
    if (operand.index)
        s.depth_index = operand.index + tile.begin;
    else
        s.first += tile.begin * operand.depth_stride;
    return s;
}

/* A thread's part of kLines lines of a step, on its way to shared memory [kDepth, kStride]. */
template <typename Real, int kLines, int kStride>
struct Fetch {
    static constexpr int kAll = kLines * kDepth / kRun, kRuns = (kAll + kThreads - 1) / kThreads; // a thread's
    static_assert(kLines % kRun == 0 && kDepth % kRun == 0, "whole runs");

    Run<Real> run[kRuns];

    /* Where run I of this thread begins; false: there is none. */
    static __device__ __forceinline__ bool place(bool along_depth, int i, int &line, int &depth)
    {
        const int number = i * kThreads + static_cast<int>(threadIdx.x);
        constexpr int kAcross = kLines / kRun, kDown = kDepth / kRun; // runs of a depth, of a line
        line = along_depth ? number / kDown : number % kAcross * kRun;
        depth = along_depth ? number % kDown * kRun : number / kAcross;
        return kAll % kThreads == 0 || number < kAll;
    }

    /* From depth BEGIN on. Elsewhere nothing is read. */
    __device__ __forceinline__ void load(const Source &s, int64_t begin)
    {
#pragma unroll
        for (int i = 0; i < kRuns; i++) {
            int line, depth;
            if (!place(s.along_depth, i, line, depth)) continue;
            const int64_t k = begin + depth;
            const int64_t left = s.along_depth ? s.depths - k : s.lines - line;
            const int count = left < kRun ? static_cast<int>(left) : kRun;
            if (line >= s.lines || k >= s.depths) {
                run[i] = {};
                continue;
            }
            const int64_t at = s.first + (s.line_index ? s.line_index[line] : line) * s.line_stride +
                               (s.depth_index ? s.depth_index[k] : k) * s.depth_stride;
            load_run(run[i], s.data, s.dtype, at, s.along_depth ? s.depth_stride : s.line_stride, count);
        }
    }

    __device__ __forceinline__ void store(const Source &s, Real *to) const
    {
#pragma unroll
        for (int i = 0; i < kRuns; i++) {
            int line, depth;
            if (!place(s.along_depth, i, line, depth)) continue;
            Real *first = to + depth * kStride + line;
            if (s.along_depth) {
#pragma unroll
                for (int j = 0; j < kRun; j++) first[j * kStride] = run[i].at[j];
            } else {
                *reinterpret_cast<Run<Real> *>(first) = run[i];
            }
        }
    }
};

/* The sums of a thread: rows row .. row + 7 of the tile, and in each band of columns a vector from COLUMN on. */
template <typename Real>
struct Sums {
    using Shape = exact::Shape<Real>;
    static constexpr int kVector = Shape::kVector;

    Real at[kThreadRows][Shape::kBands * kVector];

    static __device__ __forceinline__ int row()
    {
        return static_cast<int>(threadIdx.x) / kThreadsAcross * kThreadRows;
    }
    static __device__ __forceinline__ int column(int j)
    {
        return j / kVector * Shape::kBand + static_cast<int>(threadIdx.x) % kThreadsAcross * kVector + j % kVector;
    }

    __device__ __forceinline__ void clear()
    {
#pragma unroll
        for (int i = 0; i < kThreadRows; i++)
#pragma unroll
            for (int j = 0; j < Shape::kBands * kVector; j++) at[i][j] = 0;
    }

    /* The next DEPTHS of the chains; a [kDepth, kStrideA], b [kDepth, kStrideB]. */
    __device__ __forceinline__ void multiply(const Real *a, const Real *b, int depths)
    {
#pragma unroll 4
        for (int k = 0; k < depths; k++) {
            Vector<Real> rows[kThreadRows / kVector], columns[Shape::kBands];
#pragma unroll
            for (int i = 0; i < kThreadRows / kVector; i++)
                rows[i] = *reinterpret_cast<const Vector<Real> *>(a + k * Shape::kStrideA + row() + i * kVector);
#pragma unroll
            for (int j = 0; j < Shape::kBands; j++)
                columns[j] = *reinterpret_cast<const Vector<Real> *>(b + k * Shape::kStrideB + column(j * kVector));
#pragma unroll
            for (int i = 0; i < kThreadRows; i++)
#pragma unroll
                for (int j = 0; j < Shape::kBands * kVector; j++)
                    at[i][j] =
                        fma(rows[i / kVector].at[i % kVector], columns[j / kVector].at[j % kVector], at[i][j]);
        }
    }

    /* To sums [kRows, kStride]. */
    __device__ __forceinline__ void store(Real *sums) const
    {
#pragma unroll
        for (int i = 0; i < kThreadRows; i++)
#pragma unroll
            for (int j = 0; j < Shape::kBands; j++) {
                Vector<Real> vector;
#pragma unroll
                for (int v = 0; v < kVector; v++) vector.at[v] = at[i][j * kVector + v];
                *reinterpret_cast<Vector<Real> *>(sums + (row() + i) * Shape::kStride + column(j * kVector)) =
                    vector;
            }
    }
};

} // namespace exact

/* Mainloop of rows. With two parts a band of columns is one of them. */
template <typename T, int kNumParts>
struct ExactRows {
    using Real = T;
    using Shape = exact::Shape<Real>;
    using Arrays = exact::Arrays<Real>;
    static constexpr int kThreads = exact::kThreads, kRows = exact::kRows, kColumns = Shape::kColumns;
    static constexpr int kParts = kNumParts, kStride = Shape::kStride, kBlocksPerSm = Shape::kBlocksPerSm;
    static constexpr int kPartColumns = kColumns / kParts;

    static_assert(kParts == 1 || (kParts == 2 && Shape::kBands == 2), "parts are bands");

    static __device__ __forceinline__ void run(const RowsProduct &product, const Tile &tile, const Arrays &shared)
    {
        // A step is a piece of the depth of one term.
        const int64_t steps_of_term = (product.k + exact::kDepth - 1) / exact::kDepth;
        const int64_t steps = steps_of_term * product.terms;
        exact::Fetch<Real, kRows, Shape::kStrideA> a;
        exact::Fetch<Real, kPartColumns, Shape::kStrideB> b[kParts];
        exact::Sums<Real> sums;
        exact::Source source_a = exact::row_source(product.a[0], tile, product.k), source_b[kParts];
#pragma unroll
        for (int p = 0; p < kParts; p++) source_b[p] = exact::column_source(product.b[p], tile, product.k);

        sums.clear();
        for (int64_t step = -1; step < steps; step++) {
            // The next step goes into registers while this one is multiplied, then into the other half.
            const int64_t next = step + 1;
            if (next < steps) {
                if (next == steps_of_term) {
                    source_a = exact::row_source(product.a[1], tile, product.k);
                    source_b[0] = exact::column_source(product.b[1], tile, product.k);
                }
                const int64_t depth = next % steps_of_term * exact::kDepth;
                a.load(source_a, depth);
#pragma unroll
                for (int p = 0; p < kParts; p++) b[p].load(source_b[p], depth);
            }
            if (step >= 0) {
                const int64_t left = product.k - step % steps_of_term * exact::kDepth;
                const Real *at = shared.steps + step % 2 * Shape::kStep;
                sums.multiply(at, at + exact::kDepth * Shape::kStrideA,
                              static_cast<int>(min64(left, exact::kDepth)));
            }
            if (next < steps) {
                Real *to = shared.steps + next % 2 * Shape::kStep;
                a.store(source_a, to);
#pragma unroll
                for (int p = 0; p < kParts; p++)
                    b[p].store(source_b[p], to + exact::kDepth * Shape::kStrideA + p * kPartColumns);
            }
            sync_threads(); // the next step is there; behind the last, the steps are read
        }
        sums.store(shared.sums);
        sync_threads();
    }
};

/* Mainloop of depth. */
template <typename T>
struct ExactDepth {
    using Real = T;
    using Shape = exact::Shape<Real>;
    using Arrays = exact::Arrays<Real>;
    static constexpr int kThreads = exact::kThreads, kRows = exact::kRows, kColumns = Shape::kColumns;
    static constexpr int kStride = Shape::kStride, kBlocksPerSm = 2; // with 3, sm_120 spills
    static constexpr bool kBeginsFromC = true;

    static __device__ __forceinline__ void run(const DepthProduct &product, const DepthTile &tile,
                                               const Arrays &shared)
    {
        const int64_t depths = tile.end - tile.begin, steps = (depths + exact::kDepth - 1) / exact::kDepth;
        exact::Fetch<Real, kRows, Shape::kStrideA> a;
        exact::Fetch<Real, kColumns, Shape::kStrideB> b;
        exact::Sums<Real> sums;
        const exact::Source source_a = exact::depth_source(product.a, tile, tile.row, tile.rows);
        const exact::Source source_b = exact::depth_source(product.b, tile, tile.column, tile.columns);

        sums.clear();
        if (begins_from_c<ExactDepth>(product)) load_c(product, tile, sums);
        for (int64_t step = -1; step < steps; step++) {
            const int64_t next = step + 1;
            if (next < steps) {
                a.load(source_a, next * exact::kDepth);
                b.load(source_b, next * exact::kDepth);
            }
            if (step >= 0) {
                const Real *at = shared.steps + step % 2 * Shape::kStep;
                sums.multiply(at, at + exact::kDepth * Shape::kStrideA,
                              static_cast<int>(min64(depths - step * exact::kDepth, exact::kDepth)));
            }
            if (next < steps) {
                Real *to = shared.steps + next % 2 * Shape::kStep;
                a.store(source_a, to);
                b.store(source_b, to + exact::kDepth * Shape::kStrideA);
            }
            sync_threads(); // the next step is there; behind the last, the steps are read
        }
        sums.store(shared.sums);
        sync_threads();
    }

    /* The chains begin from what is there. */
    static __device__ __forceinline__ void load_c(const DepthProduct &product, const DepthTile &tile,
                                                  exact::Sums<Real> &sums)
    {
        const int64_t first = tile.group * product.c_group_stride + tile.row * product.c_row_stride +
                              tile.column * product.c_col_stride;
#pragma unroll
        for (int i = 0; i < exact::kThreadRows; i++)
#pragma unroll
            for (int j = 0; j < Shape::kBands * Shape::kVector; j++) {
                const int row = sums.row() + i, column = sums.column(j);
                if (row < tile.rows && column < tile.columns)
                    sums.at[i][j] = load<Real>(product.c, product.c_dtype,
                                               first + row * product.c_row_stride + column * product.c_col_stride);
            }
    }
};

} // namespace cumoe
