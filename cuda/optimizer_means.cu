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
constexpr int kThreads = 256, kWarps = kThreads / kWarp, kBlocksPerSm = 4;
constexpr int kAcrossThreads = 512, kAcrossWarps = kAcrossThreads / kWarp, kAcrossBlocksPerSm = 2;
constexpr int64_t kFold = 64; // squares that are summed at a time: short sums lose less

/* The numbers of a step that means hang on: without powers, so that every thread works them out. */
struct MeansStep {
    double gradient_scale, beta2, rest2; // as in Step
    bool skip;
};

__device__ __forceinline__ MeansStep means_step_of(const StepSource &source)
{
    const cumoe_optimizer_call_t *call = source.call;
    if (!call) return {source.step.gradient_scale, source.step.beta2, source.step.rest2, source.step.skip != 0};
    return {gradient_scale_of(*call), source.constants.beta2, 1 - source.constants.beta2, call->skip != 0};
}

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
__device__ __forceinline__ void update_mean(const MeansStep &step, const Lines &lines, int64_t at, Real sum)
{
    const Real beta2 = static_cast<Real>(step.beta2), least = static_cast<Real>(step.rest2 * 1e-30);
    const Real part = static_cast<Real>(step.rest2 / static_cast<double>(lines.elements));
    Real *mean = static_cast<Real *>(lines.mean) + at;
    *mean = beta2 * *mean + (least + part * sum);
}

/* Elements of a line side by side: a warp for each line. */
template <typename Real>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    optimizer_means_along_kernel(StepSource source, Lines lines)
{
    const MeansStep step = means_step_of(source);
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
    Real *part; // [32 parts, 33] of 32 lines; the last column only keeps the others in different banks
    __host__ __device__ explicit AcrossArrays(SharedArena &arena) : part(arena.take<Real>(kWarp * (kWarp + 1))) {}
};

/* Lines side by side: a block for 32 of them, where each warp has some of the 32 parts of every line. */
template <typename Real>
__global__ void __launch_bounds__(kAcrossThreads, kAcrossBlocksPerSm)
    optimizer_means_across_kernel(StepSource source, Lines lines)
{
    SharedArena arena;
    const AcrossArrays<Real> shared(arena);
    const MeansStep step = means_step_of(source);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int64_t groups = (lines.lines + kWarp - 1) / kWarp, work = step.skip ? 0 : lines.experts * groups;
    for (int64_t at = blockIdx.x; at < work; at += gridDim.x) {
        const int64_t expert = at / groups, first_line = (at - expert * groups) * kWarp;
        if (first_line + lane < lines.lines) {
            const int64_t first = expert * lines.gradient.expert_stride + (first_line + lane) * lines.line_stride;
            for (int part = warp; part < kWarp; part += kAcrossWarps)
                shared.part[part * (kWarp + 1) + lane] =
                    part_of_sum(lines, first, part, static_cast<Real>(step.gradient_scale));
        }
        sync_threads(); // the parts are there
        for (int line = warp; line < kWarp && first_line + line < lines.lines; line += kAcrossWarps) {
            const Real sum = warp_sum(shared.part[lane * (kWarp + 1) + line]);
            if (lane == 0) update_mean(step, lines, expert * lines.lines + first_line + line, sum);
        }
        sync_threads(); // and read
    }
}

struct AverageArrays {
    double *sum; // [kWarps]
    __host__ __device__ explicit AverageArrays(SharedArena &arena) : sum(arena.take<double>(kWarps)) {}
};

/* average [experts] of row_mean [experts, rows]: a block for an expert at a time. */
template <typename Real>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    optimizer_average_kernel(StepSource source, const Real *row_mean, int64_t experts, int64_t rows, Real *average)
{
    SharedArena arena;
    const AverageArrays shared(arena);
    if (means_step_of(source).skip) return; // the whole grid
    for (int64_t expert = blockIdx.x; expert < experts; expert += gridDim.x) {
        double sum = 0;
        for (int64_t i = threadIdx.x; i < rows; i += kThreads)
            sum += static_cast<double>(row_mean[expert * rows + i]);
        sum = warp_sum(sum);
        if (threadIdx.x % kWarp == 0) shared.sum[threadIdx.x / kWarp] = sum;
        sync_threads();
        if (threadIdx.x == 0) {
            double total = 0;
            for (int warp = 0; warp < kWarps; warp++) total += shared.sum[warp];
            average[expert] = static_cast<Real>(total / static_cast<double>(rows));
        }
        sync_threads(); // sum is read; the next expert's may be written
    }
}

template <typename Real>
cudaError_t launch_lines(const cumoe_context_t &context, const StepSource &source, const Lines &lines,
                         cudaStream_t stream)
{
    if (lines.element_stride <= lines.line_stride) {
        const dim3 blocks = resident_blocks(context, divide_up(lines.experts * lines.lines, kWarps), kBlocksPerSm);
        return launch({blocks, kThreads, stream}, optimizer_means_along_kernel<Real>, source, lines);
    }
    const dim3 blocks = resident_blocks(context, lines.experts * divide_up(lines.lines, kWarp), kAcrossBlocksPerSm);
    return launch({blocks, kAcrossThreads, stream, shared_bytes<AcrossArrays<Real>>()},
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
    return launch(
        {resident_blocks(context, p.experts, kBlocksPerSm), kThreads, stream, shared_bytes<AverageArrays>()},
        optimizer_average_kernel<Real>, source, static_cast<const Real *>(p.row_mean), p.experts, p.rows,
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
