/* The selection bias of SIGMOID_TOPK, moved towards balance. */
#include "cuda/gate_sums.cuh"

#include "cuda/launch.cuh"

namespace cumoe
{

namespace
{

/* One block. The mean of the counts is compared times E, so that it is exact. */
template <typename Real>
__global__ void __launch_bounds__(kSumThreads, 1)
    gate_bias_kernel(int64_t num_experts, const int32_t *expert_count, float rate, Real *gate_bias)
{
    SharedArena arena;
    const SumArrays shared(arena);
    int64_t own = 0;
    for (int64_t e = threadIdx.x; e < num_experts; e += kSumThreads) own += expert_count[e];
    const int64_t total = static_cast<int64_t>(block_sum(static_cast<uint64_t>(own), shared.integer));
    for (int64_t e = threadIdx.x; e < num_experts; e += kSumThreads) {
        const int64_t above = expert_count[e] * num_experts - total;
        const float step = above > 0 ? -rate : above < 0 ? rate : 0;
        gate_bias[e] += static_cast<Real>(step);
    }
}

} // namespace

cudaError_t gate_bias_update(const cumoe_context_t &context, void *gate_bias, const int32_t *expert_count,
                             float rate, cudaStream_t stream)
{
    const Launch how = {dim3(1), dim3(kSumThreads), stream, shared_bytes<SumArrays>()};
    const int64_t num_experts = context.config.num_experts;
    if (context.config.dtype == CUMOE_F64)
        return launch(how, gate_bias_kernel<double>, num_experts, expert_count, rate,
                      static_cast<double *>(gate_bias));
    return launch(how, gate_bias_kernel<float>, num_experts, expert_count, rate, static_cast<float *>(gate_bias));
}

} // namespace cumoe
