#include "cuda/gemm_exact.cuh"

namespace cumoe
{

namespace
{

template <typename Real>
cudaError_t rows_product(const cumoe_context_t &context, const RowsProduct &product, const StoreRows &epilogue,
                         cudaStream_t stream)
{
    if (product.parts == 2) return launch_rows_product<ExactRows<Real, 2>>(context, product, epilogue, stream);
    return launch_rows_product<ExactRows<Real, 1>>(context, product, epilogue, stream);
}

} // namespace

cudaError_t exact_rows_product(const cumoe_context_t &context, const RowsProduct &product,
                               const StoreRows &epilogue, cudaStream_t stream)
{
    const bool wide = context.config.dtype == CUMOE_F64;
    return (wide ? rows_product<double> : rows_product<float>)(context, product, epilogue, stream);
}

cudaError_t exact_depth_product(const cumoe_context_t &context, const DepthProduct &product, cudaStream_t stream)
{
    const bool wide = context.config.dtype == CUMOE_F64;
    return (wide ? launch_depth_product<ExactDepth<double>>
                 : launch_depth_product<ExactDepth<float>>)(context, product, stream);
}

} // namespace cumoe
