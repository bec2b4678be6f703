/* The mainloop of RowsProduct on tensor cores: cp.async, ldmatrix and mma.sync, for sm_80 and up. */
#pragma once

#include "cuda/gemm_tensor_stage.cuh"

namespace cumoe
{

namespace tensor
{

/* Operand a: rows of a tile, gathered. */
template <typename T, int kRows>
struct RowsSource {
    static constexpr int kCopies = kRows / LineShare::kApart;

    const T *first;       // of this thread's chunk of the next stage, in row 0
    int32_t row[kCopies]; // of this thread, -1 = not in the tile
    bool aligned;

    static __device__ __forceinline__ int32_t find_row(const Operand &a, const Tile &tile, int i)
    {
        const int line = LineShare::line() + i * LineShare::kApart;
        if (line >= tile.rows) return -1;
        return a.index ? a.index[tile.row + line] : static_cast<int32_t>(tile.row) + line;
    }

    __device__ __forceinline__ void begin(const Operand &a, const Tile &tile)
    {
        const T *data = static_cast<const T *>(a.data); // of all groups
        aligned = a.depth_stride == 1 && is_aligned(data, a.line_stride);
        first = data + LineShare::depth<T>() * a.depth_stride;
#pragma unroll
        for (int i = 0; i < kCopies; i++) row[i] = find_row(a, tile, i);
    }

    /* The next stage, for which DEPTHS are left. */
    __device__ __forceinline__ void copy(const Operand &a, const Tile &tile, unsigned char *stage, int32_t depths)
    {
        unsigned char *to = stage + LineShare::place();
        const int32_t count = depths - LineShare::depth<T>();
        if (aligned) {
#pragma unroll
            for (int i = 0; i < kCopies; i++) {
                const bool there = row[i] >= 0 && count > 0;
                copy_chunk<T>(to + i * LineShare::kBytesApart, there ? first + row[i] * a.line_stride : first,
                              there ? count : 0);
            }
        } else {
#pragma unroll 1
            for (int i = 0; i < kCopies; i++) {
                const int32_t at = find_row(a, tile, i);
                read_chunk<T>(to + i * LineShare::kBytesApart, first + at * a.line_stride, a.depth_stride,
                              at >= 0 ? count : 0);
            }
        }
        first += kDepth<T> * a.depth_stride;
    }
};

/* Operand b where its depths stand behind each other: columns of a tile. With two parts, the second half of the
 * lines are columns of the second part. */
template <typename T, int kParts>
struct LineColumns {
    static constexpr bool kDepthMajor = false;
    static constexpr int kCopies = kColumns / LineShare::kApart, kCopiesOfPart = kCopies / kParts;

    const T *first[kParts]; // of this thread's chunk of the next stage, in its first column of a part
    bool aligned;

    __device__ __forceinline__ void begin(const RowsProduct &product, int term, const Tile &tile)
    {
        aligned = true;
        for (int part = 0; part < kParts; part++) {
            const Operand &b = product.b[kParts == 1 ? term : part];
            const T *data = group_data<T>(b, tile.group);
            aligned = aligned && b.depth_stride == 1 && is_aligned(data, b.line_stride);
            first[part] =
                data + (tile.column + LineShare::line()) * b.line_stride + LineShare::depth<T>() * b.depth_stride;
        }
    }

    __device__ __forceinline__ void copy(const RowsProduct &product, int term, const Tile &tile,
                                         unsigned char *stage, int32_t depths)
    {
        unsigned char *to = stage + LineShare::place();
        const int32_t count = depths - LineShare::depth<T>();
#pragma unroll
        for (int part = 0; part < kParts; part++) {
            const Operand &b = product.b[kParts == 1 ? term : part];
            const T *from = first[part];
            if (aligned) {
#pragma unroll
                for (int i = 0; i < kCopiesOfPart; i++) {
                    const bool there = LineShare::line() + i * LineShare::kApart < tile.columns && count > 0;
                    copy_chunk<T>(to + i * LineShare::kBytesApart, there ? from : first[part], there ? count : 0);
                    from += LineShare::kApart * b.line_stride;
                }
            } else {
#pragma unroll 1
                for (int i = 0; i < kCopiesOfPart; i++) {
                    const bool there = LineShare::line() + i * LineShare::kApart < tile.columns;
                    read_chunk<T>(to + i * LineShare::kBytesApart, from, b.depth_stride, there ? count : 0);
                    from += LineShare::kApart * b.line_stride;
                }
            }
            first[part] += kDepth<T> * b.depth_stride;
            to += kCopiesOfPart * LineShare::kBytesApart;
        }
    }
};

/* Operand b where its lines stand behind each other. */
template <typename T, int kParts>
struct DepthColumns {
    static constexpr bool kDepthMajor = true;
    static constexpr int kPart = kColumns / kParts;
    static_assert(kPart % kChunk<T> == 0, "no chunk has columns of both parts");
    using Share = DepthShare<T>;

    const T *first; // of this thread's chunk, at its first depth of the next stage
    bool aligned;

    static __device__ __forceinline__ const Operand &my_operand(const RowsProduct &product, int term)
    {
        return product.b[kParts == 1 ? term : Share::line() / kPart];
    }

    __device__ __forceinline__ void begin(const RowsProduct &product, int term, const Tile &tile)
    {
        const Operand &b = my_operand(product, term);
        const T *data = group_data<T>(b, tile.group);
        aligned = b.line_stride == 1 && is_aligned(data, b.depth_stride);
        first = data + (tile.column + Share::line() % kPart) * b.line_stride + Share::depth() * b.depth_stride;
    }

    __device__ __forceinline__ void copy(const RowsProduct &product, int term, const Tile &tile,
                                         unsigned char *stage, int32_t depths)
    {
        unsigned char *to = stage + Share::place();
        const Operand &b = my_operand(product, term);
        const int32_t count = tile.columns - Share::line() % kPart;
        const T *from = first;
        if (aligned) {
#pragma unroll
            for (int i = 0; i < Share::kCopies; i++) {
                const bool there = Share::depth() + i * Share::kApart < depths && count > 0;
                copy_chunk<T>(to + i * Share::kBytesApart, there ? from : first, there ? count : 0);
                from += Share::kApart * b.depth_stride;
            }
        } else {
#pragma unroll 1
            for (int i = 0; i < Share::kCopies; i++) {
                const bool there = Share::depth() + i * Share::kApart < depths;
                read_chunk<T>(to + i * Share::kBytesApart, from, b.line_stride, there ? count : 0);
                from += Share::kApart * b.depth_stride;
            }
        }
        first += kDepth<T> * b.depth_stride;
    }
};

/* Both operands of the stages of a tile, in turn: all of the first term, then all of the second. */
template <typename T, int kRows, typename Columns>
struct RowsFeed {
    RowsSource<T, kRows> a;
    Columns b;
    int32_t term, depths; // of the next stage: its term, and the depths from there to the term's end

    __device__ __forceinline__ void begin_term(const RowsProduct &product, const Tile &tile, int32_t next)
    {
        term = next;
        depths = static_cast<int32_t>(product.k);
        a.begin(product.a[term], tile);
        b.begin(product, term, tile);
    }

    __device__ __forceinline__ void copy(const RowsProduct &product, const Tile &tile, unsigned char *stage)
    {
        if (depths <= 0) begin_term(product, tile, term + 1);
        a.copy(product.a[term], tile, stage, depths);
        b.copy(product, term, tile, stage + kRows * kDepthBytes, depths);
        depths -= kDepth<T>;
    }
};

} // namespace tensor

/* A tile of kRows x 128 sums; with two parts, 64 columns of each. Sums are float, and run by ascending k in steps
 * of one matrix instruction, whatever the tile: a row has the same bits with 64 and 128 rows.
 *
 * Any strides will do. Copies of 16 bytes need an operand whose data and rows (of a, of b or of b transposed) begin
 * at multiples of 16 bytes, and a's depth_stride to be 1; otherwise that operand comes 4 bytes at a time, or, where
 * 16-bit values do not lie in such pairs, one by one, for which the block waits.
 *
 * ptxas gives up to 241 registers with 64 rows and 255 with 128, and spills none, for sm_80, sm_90, sm_100 and
 * sm_120; the bounds of two blocks allow 255. */
template <typename T, int kRowsOfTile, int kPartsOfTile>
struct TensorRows {
    using Real = float;
    static constexpr int kThreads = tensor::kThreads, kRows = kRowsOfTile, kColumns = tensor::kColumns,
                         kParts = kPartsOfTile, kStride = tensor::kStride,
                         kBlocksPerSm = 2; // 69,632 and 49,152 bytes of shared memory
    static constexpr int kWarpRows = kRows / 2, kRowTiles = kWarpRows / 16;
    static constexpr int kBytesOfStage = (kRows + kColumns) * tensor::kDepthBytes;
    static_assert(kRows == 64 || kRows == 128, "the rows of host/tile.h");
    static_assert(kParts == 1 || kParts == 2, "as in RowsProduct");
    static_assert(kColumns == 2 * tensor::kWarpColumns, "2 x 2 warps");

    using Arrays = tensor::Arrays<kBytesOfStage, kRows>;

    static __device__ __forceinline__ void run(const RowsProduct &product, const Tile &tile, const Arrays &shared)
    {
        // The rows of b's matrix in memory are lines where depths stand behind each other, else depths.
        if (product.b[0].depth_stride == 1)
            walk<tensor::LineColumns<T, kParts>>(product, tile, shared);
        else
            walk<tensor::DepthColumns<T, kParts>>(product, tile, shared);
    }

  private:
    template <typename Columns>
    static __device__ __forceinline__ void walk(const RowsProduct &product, const Tile &tile, const Arrays &shared)
    {
        using namespace tensor;
        unsigned char *stages = reinterpret_cast<unsigned char *>(shared.sums);
        const int warp = threadIdx.x / 32, row = warp / 2 * kWarpRows, column = warp % 2 * kWarpColumns;
        const int32_t steps = product.terms * static_cast<int32_t>((product.k + kDepth<T> - 1) / kDepth<T>);
        const Reader<T, false> a(row, 0);
        const Reader<T, Columns::kDepthMajor> b(0, column);
        Sums<kRowTiles> sum = {};

        // Multiply a stage while the next ones come; at first they only come.
        RowsFeed<T, kRows, Columns> feed;
        feed.begin_term(product, tile, 0);
#pragma unroll 1
        for (int32_t step = 1 - kStages; step < steps; step++) {
            cp_async_wait<kStages - 2>();
            sync_threads(); // the stage is there for all, and all have read the one that is filled next
            const int32_t next = step + kStages - 1;
            if (next < steps) feed.copy(product, tile, stages + next % kStages * kBytesOfStage);
            cp_async_commit();
            const unsigned char *stage = stages + step % kStages * kBytesOfStage;
            if (step >= 0 && row < tile.rows)
                multiply_stage<T, kRowTiles>(sum, a, b, stage, stage + kRows * kDepthBytes);
        }

        sync_threads(); // the stages are read: sums take their place
        write_sums<kRowTiles>(shared.sums, sum, row, column);
        sync_threads();
    }
};

} // namespace cumoe
