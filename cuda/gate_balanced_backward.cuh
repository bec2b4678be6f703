/* Gate BALANCED, backward: what gate_backward.cu takes from it. */
#pragma once

#include "cuda/gate_gradient.cuh"

namespace cumoe
{

/* The gradients of the logits of a block of tokens, whose slots are token_slot [T + 1]. */
template <typename Real>
cudaError_t balanced_gradient(const cumoe_context_t &context, const RowGradients &in, const int32_t *token_slot,
                              cudaStream_t stream);

/* Those of the thresholds. */
template <typename Real>
cudaError_t balanced_thresholds(const cumoe_context_t &context, const cumoe_gate_backward_args_t &args,
                                cudaStream_t stream);

} // namespace cumoe
