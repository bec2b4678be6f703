/* What becomes of the sums of a tile of rows. Threads go over it in runs of columns. */
#pragma once

#include "cuda/gemm.cuh"
#include "cuda/run.cuh"
#include "host/weights_layout.h"

namespace cumoe
{

/* The runs of a tile: a thread has those at one column, in row() and every kRowsApart further on. */
template <typename Mainloop>
struct TileRuns {
    static constexpr int kPartColumns = Mainloop::kColumns / Mainloop::kParts;
    static constexpr int kOfRow = kPartColumns / kRun, kRowsApart = Mainloop::kThreads / kOfRow;
    static_assert(kPartColumns % kRun == 0 && Mainloop::kStride * sizeof(typename Mainloop::Real) % 16 == 0,
                  "runs are read as vectors");
    static_assert(Mainloop::kThreads % kOfRow == 0, "threads stand in whole rows");

    static __device__ __forceinline__ int row()
    {
        return static_cast<int>(threadIdx.x) / kOfRow;
    }
    static __device__ __forceinline__ int column()
    {
        return static_cast<int>(threadIdx.x) % kOfRow * kRun;
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

/* The COUNT elements of a bias [groups, 1, n] from COLUMN on; without one they are never added. */
template <typename Real>
__device__ __forceinline__ Run<Real> load_bias(const cumoe_matrix_t &bias, int32_t group, int64_t column, int count)
{
    Run<Real> value = {};
    if (bias.data)
        load_run(value, bias.data, bias.dtype, group * bias.expert_stride + column * bias.col_stride,
                 bias.col_stride, count);
    return value;
}

template <typename Real>
__device__ __forceinline__ void add_bias(Run<Real> &run, const cumoe_matrix_t &bias, const Run<Real> &value)
{
    if (!bias.data) return; // -0 + 0 would not be -0
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
        using Real = typename Mainloop::Real;
        using Runs = TileRuns<Mainloop>;
        const int column = Runs::column(), count = Runs::count(tile, column);
        if (count <= 0) return;
        const Run<Real> bias_run = load_bias<Real>(bias, tile.group, tile.column + column, count);
        for (int row = Runs::row(); row < tile.rows; row += Runs::kRowsApart) {
#pragma unroll
            for (int part = 0; part < Mainloop::kParts; part++) {
                Run<Real> value = read_sums<Mainloop>(sums, row, part, column);
                add_bias(value, bias, bias_run);
                store_run(value, c, dtype,
                          (tile.row + row) * row_stride + part * part_stride + tile.column + column, 1, count);
            }
        }
    }
};

} // namespace cumoe
