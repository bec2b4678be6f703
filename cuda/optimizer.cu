/* The optimizer step: what the first one clears and fills, then one array of parameters after the other. */
#include "cuda/optimizer.cuh"

namespace cumoe
{

namespace
{

constexpr int kThreads = 256, kBlocksPerSm = 6;

/* state [num_words] becomes 0 in the first step. */
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    optimizer_clear_kernel(StepSource source, uint32_t *state, int64_t num_words)
{
    const cumoe_optimizer_call_t *call = source.call;
    if (call ? call->skip != 0 || call->step > 1 : !source.step.first) return;
    const int64_t vectors = num_words / 4, step = static_cast<int64_t>(gridDim.x) * kThreads;
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    for (int64_t i = thread; i < vectors; i += step) reinterpret_cast<uint4 *>(state)[i] = make_uint4(0, 0, 0, 0);
    if (4 * vectors + thread < num_words) state[4 * vectors + thread] = 0;
}

/* In the first step masters begin as the parameters: those of arrays that are not updated. */
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    optimizer_fill_kernel(StepSource source, cumoe_parameter_t p)
{
    const cumoe_optimizer_call_t *call = source.call;
    if (call ? call->skip != 0 || call->step > 1 : !source.step.first) return;
    const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads, values = p.experts * p.rows * p.cols;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < values; i += step) {
        const int64_t row = i / p.cols, col = i - row * p.cols, expert = row / p.rows;
        const cumoe_matrix_t &m = p.value;
        static_cast<float *>(p.master)[i] =
            load<float>(m.data, m.dtype,
                        expert * m.expert_stride + (row - expert * p.rows) * m.row_stride + col * m.col_stride);
    }
}

StepSource source_of(const cumoe_optimizer_args_t &args)
{
    StepSource source = {};
    source.call = args.call;
    source.constants = {static_cast<double>(args.beta1), static_cast<double>(args.beta2),
                        static_cast<double>(args.epsilon), static_cast<double>(args.weight_decay)};
    if (!args.call) source.step = step_of(source.constants, args.values);
    return source;
}

cudaError_t step_array(const cumoe_context_t &context, const StepSource &source, const cumoe_parameter_t &p,
                       cudaStream_t stream)
{
    if (!p.gradient.data) {
        if (!p.master || (!source.call && !source.step.first)) return cudaSuccess;
        const dim3 blocks =
            resident_blocks(context, divide_up(p.experts * p.rows * p.cols, kThreads), kBlocksPerSm);
        return launch({blocks, kThreads, stream}, optimizer_fill_kernel, source, p);
    }
    const cudaError_t error = p.row_mean ? optimizer_means(context, source, p, stream) : cudaSuccess;
    return error == cudaSuccess ? optimizer_update(context, source, p, stream) : error;
}

} // namespace

cudaError_t optimizer_step(const cumoe_context_t &context, const cumoe_optimizer_args_t &args,
                           const cumoe_parameter_t *parameters, int count, cudaStream_t stream)
{
    const StepSource source = source_of(args);
    if (!source.call && source.step.skip) return cudaSuccess;
    if (source.call || source.step.first) {
        const int64_t words = static_cast<int64_t>(args.state_size / sizeof(uint32_t));
        const dim3 blocks = resident_blocks(context, divide_up(words, 4 * kThreads), kBlocksPerSm);
        const cudaError_t error = launch({blocks, kThreads, stream}, optimizer_clear_kernel, source,
                                         static_cast<uint32_t *>(args.state), words);
        if (error != cudaSuccess) return error;
    }
    for (int i = 0; i < count; i++) {
        const cudaError_t error = step_array(context, source, parameters[i], stream);
        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}

} // namespace cumoe
