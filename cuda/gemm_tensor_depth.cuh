/* The mainloop of DepthProduct on tensor cores. */
#pragma once

#include "cuda/gemm_depth.cuh"
#include "cuda/gemm_tensor_stage.cuh"

namespace cumoe
{

namespace tensor
{

/* An operand of which 128 lines from a tile's first on are summed over rows. */
template <typename T>
struct DepthRows {
    using Share = DepthShare<T>;

    // Depths are unsigned: a stage may reach beyond 2^31 rows.
    const T *first;              // of this thread's chunk of lines, in row 0
    int32_t lines;               // from there on; may be negative
    int32_t row[Share::kCopies]; // of this thread in the next stage, -1 = behind the last. Read a stage early: what
                                 // an index says is there when the copies need it
    bool aligned;

    static __device__ __forceinline__ int32_t find_row(const Operand &operand, uint32_t depth, uint32_t end)
    {
        if (depth >= end) return -1;
        return operand.index ? operand.index[depth] : static_cast<int32_t>(depth);
    }

    __device__ __forceinline__ void find_rows(const Operand &operand, uint32_t depth, uint32_t end)
    {
#pragma unroll
        for (int i = 0; i < Share::kCopies; i++)
            row[i] = find_row(operand, depth + static_cast<uint32_t>(Share::depth() + i * Share::kApart), end);
    }

    __device__ __forceinline__ void begin(const Operand &operand, int64_t line, int32_t count)
    {
        const T *data = static_cast<const T *>(operand.data); // of all groups
        aligned = operand.line_stride == 1 && is_aligned(data, operand.depth_stride);
        lines = count - Share::line();
        first = data + (line + Share::line()) * operand.line_stride;
    }

    /* The stage that begins at DEPTH. */
    __device__ __forceinline__ void copy(const Operand &operand, unsigned char *stage, uint32_t depth, uint32_t end)
    {
        unsigned char *to = stage + Share::place();
        if (aligned) {
#pragma unroll
            for (int i = 0; i < Share::kCopies; i++) {
                const bool there = row[i] >= 0 && lines > 0;
                copy_chunk<T>(to + i * Share::kBytesApart, there ? first + row[i] * operand.depth_stride : first,
                              there ? lines : 0);
            }
            find_rows(operand, depth + kDepth<T>, end);
        } else {
#pragma unroll 1
            for (int i = 0; i < Share::kCopies; i++) {
                const int32_t at =
                    find_row(operand, depth + static_cast<uint32_t>(Share::depth() + i * Share::kApart), end);
                read_chunk<T>(to + i * Share::kBytesApart, first + at * operand.depth_stride, operand.line_stride,
                              at >= 0 ? lines : 0);
            }
        }
    }
};

} // namespace tensor

/* A tile of 128 x 128 of c. Sums begin at 0 and run over the group's rows in ascending order, zeros behind the
 * last: their bits do not depend on where the group stands. Up to 244 registers, none spilled. */
template <typename T>
struct TensorDepth {
    using Real = float;
    static constexpr int kThreads = tensor::kThreads, kRows = 128, kColumns = tensor::kColumns,
                         kStride = tensor::kStride, kBlocksPerSm = 2; // 69,632 bytes of shared memory
    static constexpr bool kBeginsFromC = false;
    static constexpr int kWarpRows = kRows / 2, kRowTiles = kWarpRows / 16;
    static constexpr int kBytesOfOperand = kRows * tensor::kDepthBytes, kBytesOfStage = 2 * kBytesOfOperand;
    static_assert(kRows == tensor::DepthMajor<T>::kLines && kColumns == kRows, "both operands lie alike");

    using Arrays = tensor::Arrays<kBytesOfStage, kRows>;

    static __device__ __forceinline__ void run(const DepthProduct &product, const DepthTile &tile,
                                               const Arrays &shared)
    {
        using namespace tensor;
        unsigned char *stages = reinterpret_cast<unsigned char *>(shared.sums);
        const int warp = threadIdx.x / 32, row = warp / 2 * kWarpRows, column = warp % 2 * kWarpColumns;
        const uint32_t begin = static_cast<uint32_t>(tile.begin), end = static_cast<uint32_t>(tile.end);
        const int32_t steps = static_cast<int32_t>((end - begin + kDepth<T> - 1) / kDepth<T>);
        const Reader<T, true> reader(row, column);
        Sums<kRowTiles> sum = {};

        // Multiply a stage while the next ones come; at first they only come.
        DepthRows<T> a, b;
        a.begin(product.a, tile.row, tile.rows);
        b.begin(product.b, tile.column, tile.columns);
        a.find_rows(product.a, begin, end);
        b.find_rows(product.b, begin, end);
#pragma unroll 1
        for (int32_t step = 1 - kStages; step < steps; step++) {
            cp_async_wait<kStages - 2>();
            sync_threads(); // the stage is there for all, and all have read the one that is filled next
            const int32_t next = step + kStages - 1;
            if (next < steps) {
                unsigned char *stage = stages + next % kStages * kBytesOfStage;
                const uint32_t depth = begin + static_cast<uint32_t>(next * kDepth<T>);
                a.copy(product.a, stage, depth, end);
                b.copy(product.b, stage + kBytesOfOperand, depth, end);
            }
            cp_async_commit();
            const unsigned char *stage = stages + step % kStages * kBytesOfStage;
            if (step >= 0 && row < tile.rows && column < tile.columns)
                multiply_stage<T, kRowTiles>(sum, reader, reader, stage, stage + kBytesOfOperand);
        }

        sync_threads(); // the stages are read: sums take their place
        write_sums<kRowTiles>(shared.sums, sum, row, column);
        sync_threads();
    }
};

} // namespace cumoe
