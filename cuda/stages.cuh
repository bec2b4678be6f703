/* What the files of cuda/ offer to backend.cu: the seam's stage functions, with CUDA's error in place of a status.
 * Arguments are as host/backend.h promises them. */
#pragma once

#include "cuda/device.cuh"

namespace cumoe
{

size_t gate_workspace(const cumoe_context_t &context, int64_t num_tokens);
size_t gate_backward_workspace(const cumoe_context_t &context, int64_t num_tokens);
size_t permute_workspace(const cumoe_context_t &context, int64_t num_tokens);
size_t up_workspace(const cumoe_context_t &context, int64_t num_tokens);
size_t down_workspace(const cumoe_context_t &context, int64_t num_tokens);
size_t down_backward_workspace(const cumoe_context_t &context, int64_t num_tokens);
size_t up_backward_workspace(const cumoe_context_t &context, int64_t num_tokens);

cudaError_t gate(const cumoe_context_t &, const cumoe_gate_args_t &, cudaStream_t);
cudaError_t permute(const cumoe_context_t &, const cumoe_permute_args_t &, cudaStream_t);
cudaError_t up(const cumoe_context_t &, const cumoe_up_args_t &, cudaStream_t);
cudaError_t down(const cumoe_context_t &, const cumoe_down_args_t &, cudaStream_t);
cudaError_t combine(const cumoe_context_t &, const cumoe_combine_args_t &, cudaStream_t);
cudaError_t down_backward(const cumoe_context_t &, const cumoe_down_backward_args_t &, cudaStream_t);
cudaError_t gate_backward(const cumoe_context_t &, const cumoe_gate_backward_args_t &, cudaStream_t);
cudaError_t up_backward(const cumoe_context_t &, const cumoe_up_backward_args_t &, cudaStream_t);
cudaError_t permute_backward(const cumoe_context_t &, const cumoe_permute_backward_args_t &, cudaStream_t);

int gate_sums(const cumoe_context_t &, const cumoe_gate_args_t &, cumoe_sum_t (&sums)[CUMOE_GATE_MAX_SUMS]);
cudaError_t gate_finish(const cumoe_context_t &, const cumoe_gate_args_t &, cudaStream_t);
cudaError_t dispatch_mark(const cumoe_context_t &, const cumoe_dispatch_args_t &, cudaStream_t);
cudaError_t dispatch_count(const cumoe_context_t &, const cumoe_dispatch_args_t &, cudaStream_t);
cudaError_t dispatch_pack(const cumoe_context_t &, const cumoe_dispatch_args_t &, cudaStream_t);
cudaError_t arrive_begin(const cumoe_context_t &, const cumoe_arrive_args_t &, cudaStream_t);
cudaError_t arrive_end(const cumoe_context_t &, const cumoe_arrive_args_t &, cudaStream_t);
cudaError_t gather(const cumoe_context_t &, const cumoe_gather_args_t &, cudaStream_t);

cudaError_t gate_bias_update(const cumoe_context_t &, void *gate_bias, const int32_t *expert_count, float rate,
                             cudaStream_t);
cudaError_t weights_init(const cumoe_context_t &, uint64_t seed, const cumoe_weights_t &, cudaStream_t);
cudaError_t optimizer_step(const cumoe_context_t &, const cumoe_optimizer_args_t &, const cumoe_parameter_t *,
                           int count, cudaStream_t);

} // namespace cumoe
