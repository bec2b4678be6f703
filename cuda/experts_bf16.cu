#include "cuda/experts_tensor.cuh"

namespace cumoe
{

const ExpertProducts kTensorBf16 = tensor_experts::products<__nv_bfloat16>();

} // namespace cumoe
