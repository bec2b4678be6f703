/* The experts' products by tensor cores, for the files that make one type's each. */
#pragma once

#include "cuda/experts_products.cuh"
#include "cuda/gemm_tensor.cuh"
#include "cuda/gemm_tensor_depth.cuh"

namespace cumoe
{

namespace tensor_experts
{

template <typename T, int kParts, typename Epilogue>
cudaError_t product(const cumoe_context_t &context, int32_t row_tile, const RowsProduct &product,
                    const Epilogue &epilogue, cudaStream_t stream)
{
    if (row_tile > 64) return launch_rows_product<TensorRows<T, 128, kParts>>(context, product, epilogue, stream);
    return launch_rows_product<TensorRows<T, 64, kParts>>(context, product, epilogue, stream);
}

template <typename T>
cudaError_t up(const cumoe_context_t &context, int32_t row_tile, const RowsProduct &up,
               const StoreActivated &epilogue, cudaStream_t stream)
{
    return (up.parts == 2 ? product<T, 2, StoreActivated> : product<T, 1, StoreActivated>)(context, row_tile, up,
                                                                                           epilogue, stream);
}

template <typename T>
constexpr ExpertProducts products()
{
    static_assert(TensorRows<T, 64, 1>::kColumns == TensorRows<T, 128, 1>::kColumns,
                  "no sum hangs on the row tile");
    return {up<T>, product<T, 1, StoreRows>, product<T, 1, StoreActivatedBackward>,
            launch_depth_product<TensorDepth<T>>, TensorRows<T, 64, 1>::kColumns};
}

} // namespace tensor_experts

} // namespace cumoe
