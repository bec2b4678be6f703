/* Grouped products by ordinary fused multiply-adds, in float, or in double where the layer is F64: one chain over
 * the depth in ascending order for every element, which is what host/cpu/gemm.c promises as well. Factors have any
 * type and any strides: they are widened on their way from global to shared memory, through registers, while the
 * step before is multiplied. */
#pragma once

#include "cuda/epilogue.cuh"
#include "cuda/gemm.cuh"
#include "cuda/gemm_depth.cuh"
#include "cuda/gemm_exact_fetch.cuh"

namespace cumoe
{

/* c = the product (+ bias), stored. */
cudaError_t exact_rows_product(const cumoe_context_t &context, const RowsProduct &product,
                               const StoreRows &epilogue, cudaStream_t stream);

cudaError_t exact_depth_product(const cumoe_context_t &context, const DepthProduct &product, cudaStream_t stream);

namespace exact
{

constexpr int kRows = 64;
constexpr int kThreadRows = 8, kThreadColumns = 2 * kRun; // a thread's sums: 8 x 8, in double 8 x 4
constexpr int kThreadsAcross = 16;

static_assert(kThreads == kRows / kThreadRows * kThreadsAcross, "a thread's sums are those of one tile");

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
        if (depths == kDepth) { // nearly always, and without a count
#pragma unroll 2
            for (int k = 0; k < kDepth; k++) multiply_depth(a + k * Shape::kStrideA, b + k * Shape::kStrideB);
        } else {
#pragma unroll 1
            for (int k = 0; k < depths; k++) multiply_depth(a + k * Shape::kStrideA, b + k * Shape::kStrideB);
        }
    }

    __device__ __forceinline__ void multiply_depth(const Real *a, const Real *b)
    {
        Vector<Real> rows[kThreadRows / kVector], columns[Shape::kBands];
#pragma unroll
        for (int i = 0; i < kThreadRows / kVector; i++)
            rows[i] = *reinterpret_cast<const Vector<Real> *>(a + row() + i * kVector);
#pragma unroll
        for (int j = 0; j < Shape::kBands; j++)
            columns[j] = *reinterpret_cast<const Vector<Real> *>(b + column(j * kVector));
#pragma unroll
        for (int i = 0; i < kThreadRows; i++)
#pragma unroll
            for (int j = 0; j < Shape::kBands * kVector; j++)
                at[i][j] = fma(rows[i / kVector].at[i % kVector], columns[j / kVector].at[j % kVector], at[i][j]);
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

/* Mainloop of rows. With two parts a band of columns is one of them. kBlocks run at a time on a multiprocessor; a
 * long epilogue needs the registers of one of them. */
template <typename T, int kNumParts, int kBlocks = exact::Shape<T>::kBlocksPerSm>
struct ExactRows {
    using Real = T;
    using Shape = exact::Shape<Real>;
    using Arrays = exact::Arrays<Real>;
    static constexpr int kThreads = exact::kThreads, kRows = exact::kRows, kColumns = Shape::kColumns;
    static constexpr int kParts = kNumParts, kStride = Shape::kStride, kBlocksPerSm = kBlocks;
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
        for (int p = 0; p < kParts; p++) {
            source_b[p] = exact::column_source(product.b[p], tile, product.k);
            b[p].begin(source_b[p]);
        }
        a.begin(source_a);

        int64_t depth = 0, left = product.k; // of the next step; of the term that is multiplied
        sums.clear();
        for (int64_t step = -1; step < steps; step++) {
            // The next step goes into registers while this one is multiplied, then into the other half.
            const int64_t next = step + 1;
            if (next < steps) {
                if (next == steps_of_term) {
                    source_a = exact::row_source(product.a[1], tile, product.k);
                    source_b[0] = exact::column_source(product.b[1], tile, product.k);
                    a.begin(source_a);
                    b[0].begin(source_b[0]);
                    depth = 0;
                }
                a.load(source_a, depth);
#pragma unroll
                for (int p = 0; p < kParts; p++) b[p].load(source_b[p], depth);
                depth += exact::kDepth;
            }
            if (step >= 0) {
                const int depths = static_cast<int>(min64(left, exact::kDepth));
                const Real *at = shared.steps + step % 2 * Shape::kStep;
                sums.multiply(at, at + exact::kDepth * Shape::kStrideA, depths);
                left -= depths;
                if (left == 0) left = product.k; // of the second term
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
        a.begin(source_a);
        b.begin(source_b);

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
