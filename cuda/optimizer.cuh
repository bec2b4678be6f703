/* What the files of the optimizer step share: the numbers of a step.
 *
 * They hang on cumoe_optimizer_call_t, which may be device memory that only a kernel can read, and there is no
 * scratch memory to leave them in: each block works them out anew, in double precision, by its first thread.
 * Without such a call the host has done so, and its powers may differ in the last bit. */
#pragma once

#include "cuda/launch.cuh"
#include "cuda/shared.cuh"
#include "cuda/stages.cuh"
#include "cuda/vector.cuh"

namespace cumoe
{

/* The numbers of one step, by which the kernels multiply, as in host/cpu/optimizer.c. */
struct Step {
    double gradient_scale;
    double beta1, rest1, beta2, rest2; // rest = 1 - beta
    double rate, root;                 // learning_rate / (1 - beta1^t), 1 / sqrt(1 - beta2^t)
    double epsilon, decay;
    double factored_rate; // learning_rate * sqrt(1 - beta2^t)
    int32_t skip, first;  // 0 or 1: no padding, which would be copied unwritten
};

/* What is the same in all steps. */
struct Constants {
    double beta1, beta2, epsilon, weight_decay;
};

__host__ __device__ __forceinline__ double gradient_scale_of(const cumoe_optimizer_call_t &call)
{
    return call.gradient_scale == 0 ? 1 : call.gradient_scale;
}

__host__ __device__ __forceinline__ Step step_of(const Constants &constants, const cumoe_optimizer_call_t &call)
{
    const double beta1 = constants.beta1, beta2 = constants.beta2;
    const double t = call.step > 1 ? static_cast<double>(call.step) : 1;
    const double root = sqrt(1 - pow(beta2, t));
    Step step;
    step.gradient_scale = gradient_scale_of(call);
    step.beta1 = beta1;
    step.rest1 = 1 - beta1;
    step.beta2 = beta2;
    step.rest2 = 1 - beta2;
    step.rate = call.learning_rate / (1 - pow(beta1, t));
    step.root = 1 / root;
    step.epsilon = constants.epsilon;
    step.decay = call.learning_rate * constants.weight_decay;
    step.factored_rate = call.learning_rate * root;
    step.skip = call.skip != 0;
    step.first = call.step <= 1;
    return step;
}

struct StepSource {
    const cumoe_optimizer_call_t *call; // NULL: step is known
    Constants constants;
    Step step;
};

struct StepArrays {
    Step *step; // [1]
    __host__ __device__ explicit StepArrays(SharedArena &arena) : step(arena.take<Step>(1)) {}
};

/* By all threads of a block, at its beginning. */
__device__ __forceinline__ Step read_step(const StepSource &source, const StepArrays &shared)
{
    if (!source.call) return source.step; // the same for all
    if (threadIdx.x == 0) *shared.step = step_of(source.constants, *source.call);
    sync_threads();
    return *shared.step;
}

/* The means of the squared gradients: row_mean, col_mean and average. */
cudaError_t optimizer_means(const cumoe_context_t &context, const StepSource &source, const cumoe_parameter_t &p,
                            cudaStream_t stream);

/* The values, by Adam or from the means. */
cudaError_t optimizer_update(const cumoe_context_t &context, const StepSource &source, const cumoe_parameter_t &p,
                             cudaStream_t stream);

/* Inner loops go along the shorter stride. */
__host__ __device__ __forceinline__ bool is_transposed(const cumoe_matrix_t &m)
{
    return m.row_stride > 0 && m.row_stride < m.col_stride;
}

__host__ __device__ __forceinline__ int64_t divide_up(int64_t count, int64_t by)
{
    return (count + by - 1) / by;
}

} // namespace cumoe
