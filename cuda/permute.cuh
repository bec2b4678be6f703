/* Stage permute, forward: the rows of the experts, by a stable counting sort of the slots. */
#pragma once

#include "cumoe/stages.h"

#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>

namespace cumoe
{

/* Shared memory holds a counter for every expert and warp; more experts are sorted. */
constexpr int32_t kPermuteMaxExperts = 4096;

/* Bytes; grows with T. */
size_t permute_workspace(int64_t num_tokens, int32_t num_experts, int32_t top_k);

/* As cumoe_permute(), with everything in device memory, num_experts within 1 .. kPermuteMaxExperts. */
cudaError_t permute(const cumoe_permute_args_t &args, int32_t num_experts, int32_t top_k, cudaStream_t stream);

} // namespace cumoe
