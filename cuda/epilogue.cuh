/* What becomes of the sums of a tile of rows. Threads go over it in runs of columns. */
#pragma once

#include "cuda/gemm.cuh"
#include "cuda/run.cuh"
#include "host/weights_layout.h"

namespace cumoe
{

/* The runs of a tile, by thread: run NUMBER is columns .. of a row. */
template <typename Mainloop>
struct TileRuns {
    static constexpr int kPartColumns = Mainloop::kColumns / Mainloop::kParts;
    static constexpr int kOfRow = kPartColumns / kRun;
    static_assert(kPartColumns % kRun == 0 && Mainloop::kStride * sizeof(typename Mainloop::Real) % 16 == 0,
                  "runs are read as vectors");

    static __device__ __forceinline__ int row(int number)
    {
        return number / kOfRow;
    }
    static __device__ __forceinline__ int column(int number)
    {
        return number % kOfRow * kRun;
    }
    /* Columns of a run that the tile has; none: 0 or less. */
    static __device__ __forceinline__ int count(const Tile &tile, int column)
    {
        return tile.columns - column < kRun ? tile.columns - column : kRun;
    }
};

/* A run of the sums of a part. */
template <typename Mainloop>
__device__ __forceinline__ Run<typename Mainloop::Real> read_sums(const typename Mainloop::Real *sums, int row,
                                                                  int part, int column)
{
    using Real = typename Mainloop::Real;
    return *reinterpret_cast<const Run<Real> *>(sums + row * Mainloop::kStride +
                                                part * TileRuns<Mainloop>::kPartColumns + column);
}

/* Add the COUNT elements of a bias [groups, 1, n] from COLUMN on. */
template <typename Real>
__device__ __forceinline__ void add_bias(Run<Real> &run, const cumoe_matrix_t &bias, int32_t group, int64_t column,
                                         int count)
{
    if (!bias.data) return;
    Run<Real> value;
    load_run(value, bias.data, bias.dtype, group * bias.expert_stride + column * bias.col_stride, bias.col_stride,
             count);
#pragma unroll
    for (int i = 0; i < kRun; i++) run.at[i] += value.at[i];
}

/* c [rows, parts * n]: part p of column i stands at row * row_stride + p * part_stride + i; rounded to its type. */
struct StoreRows {
    void *c;
    cumoe_dtype_t dtype; // F64 where the sums are double, else F32, BF16 or F16
    int64_t row_stride, part_stride;
    cumoe_matrix_t bias; // [groups, 1, n] of one part; data NULL = none

    template <typename Mainloop>
    __device__ __forceinline__ void run(const Tile &tile, const typename Mainloop::Real *sums) const
    {
        using Runs = TileRuns<Mainloop>;
        for (int i = threadIdx.x; i < tile.rows * Runs::kOfRow; i += Mainloop::kThreads) {
            const int row = Runs::row(i), column = Runs::column(i), count = Runs::count(tile, column);
            if (count <= 0) continue;
#pragma unroll
            for (int part = 0; part < Mainloop::kParts; part++) {
                Run<typename Mainloop::Real> value = read_sums<Mainloop>(sums, row, part, column);
                add_bias(value, bias, tile.group, tile.column + column, count);
                store_run(value, c, dtype,
                          (tile.row + row) * row_stride + part * part_stride + tile.column + column, 1, count);
            }
        }
    }
};

} // namespace cumoe
