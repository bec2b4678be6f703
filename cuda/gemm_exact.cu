#include "cuda/gemm_exact.cuh"
#include "cuda/gemm_exact_small.cuh"

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

template <int kSide>
cudaError_t small_rows_product(const cumoe_context_t &context, const RowsProduct &product,
                               const StoreRows &epilogue, cudaStream_t stream)
{
    if (product.parts == 2)
        return launch_rows_product<ExactSmallRows<kSide, 2>>(context, product, epilogue, stream);
    return launch_rows_product<ExactSmallRows<kSide, 1>>(context, product, epilogue, stream);
}

/* Tiles of ROWS x COLUMNS of all parts, if the rows of all groups were spread evenly. */
int64_t tiles_of(const RowsProduct &product, int64_t rows, int64_t columns)
{
    const int64_t part = columns / product.parts;
    return (product.max_rows + rows - 1) / rows * ((product.n + part - 1) / part);
}

} // namespace

/* Which shape is a matter of speed alone: all give the same bits. A shape is taken where its tiles are enough to
 * keep the device busy. In double, which is for checks, and for factors off the alignment of runs there is one. */
cudaError_t exact_rows_product(const cumoe_context_t &context, const RowsProduct &product,
                               const StoreRows &epilogue, cudaStream_t stream)
{
    if (context.config.dtype == CUMOE_F64) return rows_product<double>(context, product, epilogue, stream);
    const int64_t sms = device_of(context).num_sms;
    const bool wasteful = product.n * product.parts <= exact::Shape<float>::kColumns / 2; // half a tile or more
    if (!fits_small_rows(product) ||
        (!wasteful && tiles_of(product, exact::kRows, exact::Shape<float>::kColumns) > 3 * sms / 4))
        return rows_product<float>(context, product, epilogue, stream);
    using Medium = small::Shape<4>;
    const bool many = tiles_of(product, Medium::kRows, Medium::kColumns) > sms;
    return (many ? small_rows_product<4> : small_rows_product<2>)(context, product, epilogue, stream);
}

cudaError_t exact_depth_product(const cumoe_context_t &context, const DepthProduct &product, cudaStream_t stream)
{
    const bool wide = context.config.dtype == CUMOE_F64;
    return (wide ? launch_depth_product<ExactDepth<double>>
                 : launch_depth_product<ExactDepth<float>>)(context, product, stream);
}

} // namespace cumoe
