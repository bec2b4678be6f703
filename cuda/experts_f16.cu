#include "cuda/experts_tensor.cuh"

namespace cumoe
{

const ExpertProducts kTensorF16 = tensor_experts::products<__half>();

} // namespace cumoe
