/* Grouped products. Two kinds, as on the CPU (host/cpu/gemm.h):
 *
 *   RowsProduct    c[row, n] = sum over k of a(row, k) b(e; n, k), e the expert of the row: forward, and the
 *                  gradients of rows. Walks over the tile map of cumoe_rows_t.
 *   DepthProduct   c(e; m, n) = sum over the rows of e of a(row, m) b(row, n): the gradients of weights.
 *
 * A kernel is a mainloop, which leaves the sums of a tile in shared memory, and an epilogue, which reads them
 * there. Every sum runs over its depth in ascending order, whatever the tile, so that no bit depends on T, on the
 * position of a row or on its neighbours. */
#pragma once

#include "cuda/device.cuh"
#include "cuda/launch.cuh"
#include "cuda/shared.cuh"

namespace cumoe
{

/* Element (group, line, depth) of a factor stands at
 * data + group * group_stride + line * line_stride + depth * depth_stride, strides in elements. */
struct Operand {
    const void *data;
    cumoe_dtype_t dtype;
    int64_t group_stride, line_stride, depth_stride;
    const int32_t *index; // rows stand for index[row]: gathered tokens; NULL = for themselves
};

struct RowsProduct {
    int32_t parts, terms; // one of them is 1. Parts: sums a[0] b[0] and a[0] b[1], each of n columns.
                          // Terms: one sum a[0] b[0] + a[1] b[1], the second behind the first
    int64_t n, k;
    Operand a[2], b[2];       // lines of a are rows, of b columns of c
    const int32_t *tile;      // of cumoe_rows_t; NULL = one group, rows 0 .. live_rows() - 1
    const int32_t *offset;    // of cumoe_rows_t, where tile is
    const cumoe_call_t *call; // where tile is NULL
    int64_t first_token;      // where tile is NULL: row 0 stands for this token, and so do the pointers
    int64_t max_rows;         // T * K, or of tokens
    int32_t groups;           // 1 where tile is NULL
};

struct DepthProduct {
    int64_t m, n;
    Operand a, b;             // lines of a are rows of c, of b columns of c; depths are rows, and index is theirs
    const int32_t *offset;    // [groups + 1], in device memory; NULL = one group, rows 0 .. live_rows() - 1
    const cumoe_call_t *call; // where offset is NULL, and so are the next two
    int64_t first_token, max_rows;
    int32_t groups;
    void *c;
    cumoe_dtype_t c_dtype;
    int64_t c_group_stride, c_row_stride, c_col_stride;
    bool add;                // to what is there; a group without rows is left alone, else written as zeros
    const int32_t *exponent; // [groups] the sums of a group are multiplied by 2^exponent; NULL = by 1
};

__host__ __device__ __forceinline__ int64_t min64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* Rows of a product whose row 0 is token FIRST of a call: those of live tokens, at most MAX. */
__device__ __forceinline__ int64_t live_rows(const cumoe_call_t *call, int64_t first, int64_t max)
{
    const int64_t live = call->live_tokens - first;
    return live < 0 ? 0 : min64(live, max);
}

/* A piece of c. */
struct Tile {
    int32_t group;
    int64_t row;     // first
    int32_t rows;    // 1 .. kRows of the mainloop
    int64_t column;  // first, of each part
    int32_t columns; // 1 .. kColumns / kParts
};

/* A mainloop of rows is a struct with
 *
 *     using Real                          the type of the sums, float or double
 *     kThreads, kRows, kColumns, kParts   of a block and its tile; kColumns counts all parts
 *     kBlocksPerSm                        that run at a time
 *     kStride                             >= kColumns, of the sums; a multiple of 16 bytes
 *     struct Arrays {Real *sums; ...}     shared memory, carved from a SharedArena; sums [kRows, kStride]
 *     static __device__ void run(const RowsProduct &, const Tile &, const Arrays &)
 *
 * run() is called by all threads of the block with no access to the arrays pending, and ends with a barrier behind
 * which sums[r * kStride + part * (kColumns / kParts) + column] is there for r < rows and column < columns; what
 * stands elsewhere may be anything.
 *
 * An epilogue is a struct with
 *
 *     template <typename Mainloop> __device__ void run(const Tile &, const typename Mainloop::Real *sums) const
 *
 * called by all threads of the block. */
template <typename Mainloop, typename Epilogue>
__global__ void __launch_bounds__(Mainloop::kThreads, Mainloop::kBlocksPerSm)
    rows_product_kernel(RowsProduct product, Epilogue epilogue)
{
    SharedArena arena;
    const typename Mainloop::Arrays shared(arena);
    constexpr int kColumns = Mainloop::kColumns / Mainloop::kParts;
    constexpr int64_t kGroup = 8; // row tiles that take turns while a block of columns of b stays in the L2 cache

    const int64_t live = product.tile ? 0 : live_rows(product.call, product.first_token, product.max_rows);
    const int64_t row_tiles = product.tile ? product.tile[0] : (live + Mainloop::kRows - 1) / Mainloop::kRows;
    const int64_t column_tiles = (product.n + kColumns - 1) / kColumns;
    for (int64_t work = blockIdx.x; work < row_tiles * column_tiles; work += gridDim.x) {
        const int64_t first = work / (kGroup * column_tiles) * kGroup;
        const int64_t height = min64(row_tiles - first, kGroup);
        const int64_t within = work - first * column_tiles, row_tile = first + within % height;

        Tile tile;
        tile.column = within / height * kColumns;
        tile.columns = static_cast<int32_t>(min64(product.n - tile.column, kColumns));
        int64_t end;
        if (product.tile) {
            tile.group = product.tile[2 + 2 * row_tile];
            tile.row = product.tile[3 + 2 * row_tile];
            end = min64(tile.row + product.tile[1], product.offset[tile.group + 1]);
        } else {
            tile.group = 0;
            tile.row = row_tile * Mainloop::kRows;
            end = min64(tile.row + Mainloop::kRows, live);
        }
        for (; tile.row < end; tile.row += Mainloop::kRows) { // once, but for tiles of more rows
            tile.rows = static_cast<int32_t>(min64(end - tile.row, Mainloop::kRows));
            Mainloop::run(product, tile, shared);
            epilogue.template run<Mainloop>(tile, shared.sums);
            sync_threads(); // the sums are read
        }
    }
}

template <typename Mainloop, typename Epilogue>
cudaError_t launch_rows_product(const cumoe_context_t &context, const RowsProduct &product,
                                const Epilogue &epilogue, cudaStream_t stream)
{
    constexpr int kColumns = Mainloop::kColumns / Mainloop::kParts;
    const int64_t tiles = product.max_rows / Mainloop::kRows + min64(product.max_rows, product.groups);
    const int64_t work = tiles * ((product.n + kColumns - 1) / kColumns);
    return launch({resident_blocks(context, work, Mainloop::kBlocksPerSm), dim3(Mainloop::kThreads), stream,
                   shared_bytes<typename Mainloop::Arrays>()},
                  rows_product_kernel<Mainloop, Epilogue>, product, epilogue);
}

} // namespace cumoe
