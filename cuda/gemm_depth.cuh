/* The skeleton of DepthProduct (cuda/gemm.cuh): gradients of weights, a tile of c at a time. */
#pragma once

#include "cuda/gemm.cuh"
#include "cuda/real.cuh"
#include "cuda/run.cuh"

namespace cumoe
{

/* A piece of c, and the depth it is summed over. */
struct DepthTile {
    int32_t group;
    int64_t row, column;   // first
    int32_t rows, columns; // 1 .. kRows, 1 .. kColumns
    int64_t begin, end;    // rows of the group; none: the sums are zeros
};

/* A mainloop of depth is a struct with
 *
 *     using Real                    the type of the sums, float or double
 *     kThreads, kRows, kColumns     of a block and its tile; the latter are multiples of kRun
 *     kBlocksPerSm                  that run at a time
 *     kStride                       >= kColumns, of the sums; a multiple of 16 bytes
 *     kBeginsFromC                  its chains begin from c where product.add and no exponent say so; else from 0
 *     struct Arrays {Real *sums; ...}
 *     static __device__ void run(const DepthProduct &, const DepthTile &, const Arrays &)
 *
 * run() as for a mainloop of rows: nothing is pending when it is called, it ends with a barrier behind the sums. */

/* Whether the tile's sums include what c held. */
template <typename Mainloop>
__device__ __forceinline__ bool begins_from_c(const DepthProduct &product)
{
    return Mainloop::kBeginsFromC && product.add && !product.exponent;
}

/* The sums of a tile go to c, in runs of columns. */
template <typename Mainloop>
__device__ __forceinline__ void store_depth_tile(const DepthProduct &product, const DepthTile &tile,
                                                 const typename Mainloop::Real *sums)
{
    using Real = typename Mainloop::Real;
    constexpr int kOfRow = Mainloop::kColumns / kRun, kRowsApart = Mainloop::kThreads / kOfRow;
    constexpr int kTogether = 16 / static_cast<int>(sizeof(Real)); // rows, of which c is on its way
    static_assert(Mainloop::kThreads % kOfRow == 0, "a thread has the same columns in each of its rows");
    const int column = static_cast<int>(threadIdx.x) % kOfRow * kRun, left = tile.columns - column,
              count = left < kRun ? left : kRun;
    if (count <= 0) return;
    const int exponent = product.exponent ? product.exponent[tile.group] : 0;
    const bool add = product.add && !begins_from_c<Mainloop>(product);
    const int64_t first = tile.group * product.c_group_stride + tile.row * product.c_row_stride +
                          (tile.column + column) * product.c_col_stride;
    int row = static_cast<int>(threadIdx.x) / kOfRow;
    int64_t at = first + row * product.c_row_stride;
#pragma unroll 1
    while (row < tile.rows) {
        // Step by step: products of the stride would be kept in registers all along.
        RunBits<Real> old[kTogether];
        int64_t from = at;
#pragma unroll
        for (int i = 0; i < kTogether; i++) {
            if (add && row + i * kRowsApart < tile.rows)
                fetch_run(old[i], product.c, product.c_dtype, from, product.c_col_stride, count);
            from += kRowsApart * product.c_row_stride;
        }
#pragma unroll
        for (int i = 0; i < kTogether; i++) {
            if (row >= tile.rows) break;
            Run<Real> value = *reinterpret_cast<const Run<Real> *>(sums + row * Mainloop::kStride + column);
            if (exponent)
#pragma unroll
                for (int j = 0; j < kRun; j++) value.at[j] = ldexp(value.at[j], exponent);
            if (add) {
                const Run<Real> before = widen_run(old[i], product.c_dtype);
#pragma unroll
                for (int j = 0; j < kRun; j++) value.at[j] += before.at[j];
            }
            store_run(value, product.c, product.c_dtype, at, product.c_col_stride, count);
            row += kRowsApart;
            at += kRowsApart * product.c_row_stride;
        }
    }
}

template <typename Mainloop>
__global__ void __launch_bounds__(Mainloop::kThreads, Mainloop::kBlocksPerSm)
    depth_product_kernel(DepthProduct product)
{
    static_assert(Mainloop::kRows % kRun == 0 && Mainloop::kColumns % kRun == 0, "tiles are stored in runs");
    SharedArena arena;
    const typename Mainloop::Arrays shared(arena);
    const int64_t row_tiles = (product.m + Mainloop::kRows - 1) / Mainloop::kRows;
    const int64_t column_tiles = (product.n + Mainloop::kColumns - 1) / Mainloop::kColumns;
    const int64_t tiles = row_tiles * column_tiles;
    for (int64_t work = blockIdx.x; work < tiles * product.groups; work += gridDim.x) {
        DepthTile tile;
        tile.group = static_cast<int32_t>(work / tiles);
        tile.row = work % tiles % row_tiles * Mainloop::kRows;
        tile.column = work % tiles / row_tiles * Mainloop::kColumns;
        tile.rows = static_cast<int32_t>(min64(product.m - tile.row, Mainloop::kRows));
        tile.columns = static_cast<int32_t>(min64(product.n - tile.column, Mainloop::kColumns));
        tile.begin = product.offset ? product.offset[tile.group] : 0;
        tile.end = product.offset ? product.offset[tile.group + 1]
                                  : live_rows(product.call, product.first_token, product.max_rows);
        if (product.add && tile.begin == tile.end) continue; // the whole block

        Mainloop::run(product, tile, shared);
        store_depth_tile<Mainloop>(product, tile, shared.sums);
        sync_threads(); // the sums are read
    }
}

/* The transposed product where c is contiguous along its rows: a and b change places, each sum stays the same. */
inline DepthProduct along_columns(DepthProduct product)
{
    if (product.c_row_stride >= product.c_col_stride) return product;
    const DepthProduct given = product;
    product.m = given.n;
    product.n = given.m;
    product.a = given.b;
    product.b = given.a;
    product.c_row_stride = given.c_col_stride;
    product.c_col_stride = given.c_row_stride;
    return product;
}

template <typename Mainloop>
cudaError_t launch_depth_product(const cumoe_context_t &context, const DepthProduct &given, cudaStream_t stream)
{
    const DepthProduct product = along_columns(given);
    const int64_t row_tiles = (product.m + Mainloop::kRows - 1) / Mainloop::kRows;
    const int64_t column_tiles = (product.n + Mainloop::kColumns - 1) / Mainloop::kColumns;
    return launch({resident_blocks(context, row_tiles * column_tiles * product.groups, Mainloop::kBlocksPerSm),
                   dim3(Mainloop::kThreads), stream, shared_bytes<typename Mainloop::Arrays>()},
                  depth_product_kernel<Mainloop>, product);
}

} // namespace cumoe
