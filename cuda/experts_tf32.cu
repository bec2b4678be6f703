#include "cuda/experts_tensor.cuh"

namespace cumoe
{

const ExpertProducts kTensorTf32 = tensor_experts::products<float>();

} // namespace cumoe
