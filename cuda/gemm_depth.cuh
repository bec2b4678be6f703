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

/* The sums of a tile go to c, in runs along the dimension in which c is contiguous. */
template <typename Mainloop>
__device__ __forceinline__ void store_depth_tile(const DepthProduct &product, const DepthTile &tile,
                                                 const typename Mainloop::Real *sums)
{
    using Real = typename Mainloop::Real;
    const bool along_rows = product.c_row_stride < product.c_col_stride;
    const int64_t step = along_rows ? product.c_row_stride : product.c_col_stride;
    const int64_t first =
        tile.group * product.c_group_stride + tile.row * product.c_row_stride + tile.column * product.c_col_stride;
    const int exponent = product.exponent ? product.exponent[tile.group] : 0;
    const bool add = product.add && !begins_from_c<Mainloop>(product);
    const int length = along_rows ? tile.rows : tile.columns, lines = along_rows ? tile.columns : tile.rows;
    const int runs = (along_rows ? Mainloop::kRows : Mainloop::kColumns) / kRun;
    for (int i = threadIdx.x; i < lines * runs; i += Mainloop::kThreads) {
        const int line = i / runs, begin = i % runs * kRun, left = length - begin,
                  count = left < kRun ? left : kRun;
        if (count <= 0) continue;
        const int row = along_rows ? begin : line, column = along_rows ? line : begin;
        const int64_t at = first + row * product.c_row_stride + column * product.c_col_stride;
        Run<Real> value = {}, old = {};
        if (add) load_run(old, product.c, product.c_dtype, at, step, count);
#pragma unroll
        for (int j = 0; j < kRun; j++) {
            if (j >= count) break;
            const Real sum = sums[(row + (along_rows ? j : 0)) * Mainloop::kStride + column + (along_rows ? 0 : j)];
            value.at[j] = exponent ? ldexp(sum, exponent) : sum;
            if (add) value.at[j] += old.at[j];
        }
        store_run(value, product.c, product.c_dtype, at, step, count);
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

template <typename Mainloop>
cudaError_t launch_depth_product(const cumoe_context_t &context, const DepthProduct &product, cudaStream_t stream)
{
    const int64_t row_tiles = (product.m + Mainloop::kRows - 1) / Mainloop::kRows;
    const int64_t column_tiles = (product.n + Mainloop::kColumns - 1) / Mainloop::kColumns;
    return launch({resident_blocks(context, row_tiles * column_tiles * product.groups, Mainloop::kBlocksPerSm),
                   dim3(Mainloop::kThreads), stream, shared_bytes<typename Mainloop::Arrays>()},
                  depth_product_kernel<Mainloop>, product);
}

} // namespace cumoe
