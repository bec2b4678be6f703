/* Means of squared gradients along rows and columns.
 *
 * A sum of n squares is made of 32 sums, of every 32nd square each, whose halves are then added to each other until
 * one is left. So is it for rows and for columns of any layout, and no bit depends on the layout or the grid. */
#include "cuda/optimizer.cuh"

namespace cumoe
{

namespace
{

constexpr int kWarp = 32;
constexpr int kThreads = 256, kWarps = kThreads / kWarp, kBlocksPerSm = 8;
constexpr int kTileThreads = kWarp * kWarp, kTileBlocksPerSm = 2;
constexpr int64_t kFold = 64; // squares that are summed at a time: short sums lose less

/* Rows or columns of all experts: line l of an expert has elements at l * line_stride + i * element_stride. */
struct Lines {
    cumoe_matrix_t gradient;
    int64_t experts, lines, elements;
    int64_t line_stride, element_stride;
    void *mean; // [experts, lines]
};

/* Of the elements of a line every 32nd, from PART on. */
template <typename Real>
__device__ __forceinline__ Real part_of_sum(const Lines &lines, int64_t first, int64_t part, Real scale)
{
    Real total = 0;
    for (int64_t begin = part; begin < lines.elements; begin += kWarp * kFold) {
        const int64_t limit = begin + kWarp * kFold, end = limit < lines.elements ? limit : lines.elements;
        Real sum = 0;
        for (int64_t i = begin; i < end; i += kWarp) {
            const Real g =
                scale * load<Real>(lines.gradient.data, lines.gradient.dtype, first + i * lines.element_stride);
            sum += g * g;
        }
        total += sum;
    }
    return total;
}

template <typename Real>
__device__ __forceinline__ Real warp_sum(Real value)
{
    for (int half = kWarp / 2; half > 0; half /= 2) value += shuffle_xor(kFullMask, value, half);
    return value;
}

template <typename Real>
__device__ __forceinline__ void update_mean(const Step &step, const Lines &lines, int64_t at, Real sum)
{
    const Real beta2 = static_cast<Real>(step.beta2), least = static_cast<Real>(step.rest2 * 1e-30);
    const Real part = static_cast<Real>(step.rest2 / static_cast<double>(lines.elements));
    Real *mean = static_cast<Real *>(lines.mean) + at;
    *mean = beta2 * *mean + (least + part * sum);
}

/* Elements of a line side by side: a warp for each line. */
template <typename Real>
__global__ void __launch_bounds__(kThreads, 1) optimizer_means_along_kernel(StepSource source, Lines lines)
{
    SharedArena arena;
    const Step step = read_step(source, StepArrays(arena));
    const int lane = threadIdx.x % kWarp;
    const int64_t work = step.skip ? 0 : lines.experts * lines.lines;
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
    for (int64_t at = warp; at < work; at += static_cast<int64_t>(gridDim.x) * kWarps) {
        const int64_t expert = at / lines.lines, line = at - expert * lines.lines;
        const int64_t first = expert * lines.gradient.expert_stride + line * lines.line_stride;
        const Real part = part_of_sum(lines, first, lane, static_cast<Real>(step.gradient_scale));
        const Real sum = warp_sum(part);
        if (lane == 0) update_mean(step, lines, at, sum);
    }
}

template <typename Real>
struct AcrossArrays {
    StepArrays step;
    Real *part; // [32 parts, 33] of 32 lines; the last column only keeps the others in different banks
    __host__ __device__ explicit AcrossArrays(SharedArena &arena)
        : step(arena), part(arena.take<Real>(kWarp * (kWarp + 1)))
    {
    }
};

/* Lines side by side: a block for 32 of them, where each warp has one part of every line. */
template <typename Real>
__global__ void __launch_bounds__(kTileThreads, 1) optimizer_means_across_kernel(StepSource source, Lines lines)
{
    SharedArena arena;
    const AcrossArrays<Real> shared(arena);
    const Step step = read_step(source, shared.step);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int64_t groups = (lines.lines + kWarp - 1) / kWarp, work = step.skip ? 0 : lines.experts * groups;
    for (int64_t at = blockIdx.x; at < work; at += gridDim.x) {
        const int64_t expert = at / groups, first_line = (at - expert * groups) * kWarp;
        if (first_line + lane < lines.lines) {
            const int64_t first = expert * lines.gradient.expert_stride + (first_line + lane) * lines.line_stride;
            shared.part[warp * (kWarp + 1) + lane] =
                part_of_sum(lines, first, warp, static_cast<Real>(step.gradient_scale));
        }
        sync_threads(); // the parts are there
        if (first_line + warp < lines.lines) {
            const Real sum = warp_sum(shared.part[lane * (kWarp + 1) + warp]);
            if (lane == 0) update_mean(step, lines, expert * lines.lines + first_line + warp, sum);
        }
        sync_threads(); // and read
    }
}

struct AverageArrays {
    StepArrays step;
    double *sum; // [kWarps]
    __host__ __device__ explicit AverageArrays(SharedArena &arena) : step(arena), sum(arena.take<double>(kWarps)) {}
};

/* average [experts] of row_mean [experts, rows]: a block for each expert. */
template <typename Real>
__global__ void __launch_bounds__(kThreads, 1)
    optimizer_average_kernel(StepSource source, const Real *row_mean, int64_t rows, Real *average)
{
    SharedArena arena;
    const AverageArrays shared(arena);
    const Step step = read_step(source, shared.step);
    const int64_t expert = blockIdx.x;
    double sum = 0;
    for (int64_t i = threadIdx.x; i < rows; i += kThreads) sum += static_cast<double>(row_mean[expert * rows + i]);
    sum = warp_sum(sum);
    if (threadIdx.x % kWarp == 0) shared.sum[threadIdx.x / kWarp] = sum;
    sync_threads();
    if (threadIdx.x != 0 || step.skip) return;
    double total = 0;
    for (int warp = 0; warp < kWarps; warp++) total += shared.sum[warp];
    average[expert] = static_cast<Real>(total / static_cast<double>(rows));
}

template <typename Real>
cudaError_t launch_lines(const cumoe_context_t &context, const StepSource &source, const Lines &lines,
                         cudaStream_t stream)
{
    if (lines.element_stride <= lines.line_stride) {
        const dim3 blocks = resident_blocks(context, divide_up(lines.experts * lines.lines, kWarps), kBlocksPerSm);
        return launch({blocks, kThreads, stream, shared_bytes<StepArrays>()}, optimizer_means_along_kernel<Real>,
                      source, lines);
    }
    const dim3 blocks = resident_blocks(context, lines.experts * divide_up(lines.lines, kWarp), kTileBlocksPerSm);
    return launch({blocks, kTileThreads, stream, shared_bytes<AcrossArrays<Real>>()},
                  optimizer_means_across_kernel<Real>, source, lines);
}

template <typename Real>
cudaError_t launch_means(const cumoe_context_t &context, const StepSource &source, const cumoe_parameter_t &p,
                         cudaStream_t stream)
{
    const int64_t row = p.gradient.row_stride, col = p.gradient.col_stride;
    cudaError_t error =
        launch_lines<Real>(context, source, {p.gradient, p.experts, p.rows, p.cols, row, col, p.row_mean}, stream);
    if (error != cudaSuccess) return error;
    error =
        launch_lines<Real>(context, source, {p.gradient, p.experts, p.cols, p.rows, col, row, p.col_mean}, stream);
    if (error != cudaSuccess) return error;
    return launch({dim3(static_cast<unsigned>(p.experts)), kThreads, stream, shared_bytes<AverageArrays>()},
                  optimizer_average_kernel<Real>, source, static_cast<const Real *>(p.row_mean), p.rows,
                  static_cast<Real *>(p.average));
}

} // namespace

cudaError_t optimizer_means(const cumoe_context_t &context, const StepSource &source, const cumoe_parameter_t &p,
                            cudaStream_t stream)
{
    return context.config.dtype == CUMOE_F64 ? launch_means<double>(context, source, p, stream)
                                             : launch_means<float>(context, source, p, stream);
}

} // namespace cumoe
