#include "cuda/experts_products.cuh"
#include "cuda/gemm_exact.cuh"

namespace cumoe
{

namespace
{

template <typename Real, int kParts, typename Epilogue>
cudaError_t product(const cumoe_context_t &context, int32_t, const RowsProduct &product, const Epilogue &epilogue,
                    cudaStream_t stream)
{
    return launch_rows_product<ExactRows<Real, kParts>>(context, product, epilogue, stream);
}

template <typename Real>
cudaError_t down_backward(const cumoe_context_t &context, int32_t, const RowsProduct &product,
                          const StoreActivatedBackward &epilogue, cudaStream_t stream)
{
    return launch_rows_product<ExactRows<Real, 1, 2>>(context, product, epilogue, stream);
}

template <typename Real>
cudaError_t up(const cumoe_context_t &context, int32_t row_tile, const RowsProduct &up,
               const StoreActivated &epilogue, cudaStream_t stream)
{
    return (up.parts == 2 ? product<Real, 2, StoreActivated>
                          : product<Real, 1, StoreActivated>)(context, row_tile, up, epilogue, stream);
}

cudaError_t rows(const cumoe_context_t &context, int32_t, const RowsProduct &product, const StoreRows &epilogue,
                 cudaStream_t stream)
{
    return exact_rows_product(context, product, epilogue, stream);
}

template <typename Real>
constexpr ExpertProducts products()
{
    return {up<Real>, rows, down_backward<Real>, exact_depth_product, ExactRows<Real, 1>::kColumns};
}

} // namespace

const ExpertProducts kExactF32 = products<float>(), kExactF64 = products<double>();

} // namespace cumoe
