/* How the exact products (cuda/gemm_exact.cuh) bring their factors from global to shared memory. */
#pragma once

#include "cuda/gemm_depth.cuh"
#include "cuda/run.cuh"

namespace cumoe
{

namespace exact
{

constexpr int kThreads = 128; // of a block
constexpr int kDepth = 8;     // of a step

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

/* Four neighbours to shared memory, floats in one access. (Of a struct the compiler makes one a member.) */
__device__ __forceinline__ void store_neighbours(const Run<float> &run, float *to)
{
    *reinterpret_cast<float4 *>(to) = make_float4(run.at[0], run.at[1], run.at[2], run.at[3]);
}
__device__ __forceinline__ void store_neighbours(const Run<double> &run, double *to)
{
    *reinterpret_cast<Run<double> *>(to) = run;
}

/* A thread's part of kLines lines of a step, on its way to shared memory [kDepth, kStride]. begin() takes up a
 * source, load() a step of it. */
template <typename Real, int kLines, int kStride>
struct Fetch {
    static constexpr int kAll = kLines * kDepth / kRun, kRuns = (kAll + kThreads - 1) / kThreads; // a thread's
    static_assert(kLines % kRun == 0 && kDepth % kRun == 0, "whole runs");

    RunBits<Real> held[kRuns]; // to widen a value is to wait for it: that is left to store()
    int64_t line_at[kRuns];    // where a run's line begins

    /* Where run I of this thread begins; false: there is none. */
    static __device__ __forceinline__ bool place(bool along_depth, int i, int &line, int &depth)
    {
        const int number = i * kThreads + static_cast<int>(threadIdx.x);
        constexpr int kAcross = kLines / kRun, kDown = kDepth / kRun; // runs of a depth, of a line
        line = along_depth ? number / kDown : number % kAcross * kRun;
        depth = along_depth ? number % kDown * kRun : number / kAcross;
        return kAll % kThreads == 0 || number < kAll;
    }

    __device__ __forceinline__ void begin(const Source &s)
    {
#pragma unroll
        for (int i = 0; i < kRuns; i++) {
            int line, depth;
            if (!place(s.along_depth, i, line, depth) || line >= s.lines) continue;
            line_at[i] = s.first + (s.line_index ? s.line_index[line] : line) * s.line_stride;
        }
    }

    /* From depth BEGIN on. Elsewhere nothing is read. */
    __device__ __forceinline__ void load(const Source &s, int64_t begin)
    {
#pragma unroll
        for (int i = 0; i < kRuns; i++) {
            int line, depth;
            if (!place(s.along_depth, i, line, depth)) continue;
            const int64_t k = begin + depth;
            if (line >= s.lines || k >= s.depths) {
                held[i] = {};
                continue;
            }
            const int64_t left = s.along_depth ? s.depths - k : s.lines - line;
            const int count = left < kRun ? static_cast<int>(left) : kRun;
            const int64_t at = line_at[i] + (s.depth_index ? s.depth_index[k] : k) * s.depth_stride;
            fetch_run(held[i], s.data, s.dtype, at, s.along_depth ? s.depth_stride : s.line_stride, count);
        }
    }

    __device__ __forceinline__ void store(const Source &s, Real *to)
    {
#pragma unroll
        for (int i = 0; i < kRuns; i++) {
            int line, depth;
            if (!place(s.along_depth, i, line, depth)) continue;
            Real *first = to + depth * kStride + line;
            const Run<Real> run = widen_run(held[i], s.dtype);
            if (s.along_depth) {
#pragma unroll
                for (int j = 0; j < kRun; j++) first[j * kStride] = run.at[j];
            } else {
                store_neighbours(run, first);
            }
        }
    }
};

} // namespace exact

} // namespace cumoe
