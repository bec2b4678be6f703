#include "tests/sim/gemm_probe.cuh"

#include "cuda/gemm_tensor.cuh"
#include "cuda/gemm_tensor_depth.cuh"

using namespace cumoe;

namespace
{

struct StoreSums {
    float *c;
    int64_t n, row_stride;

    template <typename Mainloop>
    __device__ __forceinline__ void run(const Tile &tile, const float *sums) const
    {
        constexpr int kPart = Mainloop::kColumns / Mainloop::kParts;
        for (int i = threadIdx.x; i < tile.rows * Mainloop::kColumns; i += Mainloop::kThreads) {
            const int row = i / Mainloop::kColumns, part = i % Mainloop::kColumns / kPart, column = i % kPart;
            if (column < tile.columns)
                c[(tile.row + row) * row_stride + part * n + tile.column + column] =
                    sums[row * Mainloop::kStride + part * kPart + column];
        }
    }
};

template <typename T, int kRows>
cudaError_t launch_rows(const cumoe_context_t &context, const RowsProduct &product, const StoreSums &epilogue,
                        cudaStream_t stream)
{
    if (product.parts == 2) return launch_rows_product<TensorRows<T, kRows, 2>>(context, product, epilogue, stream);
    return launch_rows_product<TensorRows<T, kRows, 1>>(context, product, epilogue, stream);
}

template <typename T>
cudaError_t launch_rows(const cumoe_context_t &context, const RowsProduct &product, int rows_of_tile,
                        const StoreSums &epilogue, cudaStream_t stream)
{
    return rows_of_tile == 128 ? launch_rows<T, 128>(context, product, epilogue, stream)
                               : launch_rows<T, 64>(context, product, epilogue, stream);
}

} // namespace

cudaError_t probe_rows(const cumoe_context_t &context, const RowsProduct &product, int rows_of_tile, float *c,
                       int64_t row_stride, cudaStream_t stream)
{
    const StoreSums epilogue = {c, product.n, row_stride};
    if (product.a[0].dtype == CUMOE_BF16)
        return launch_rows<__nv_bfloat16>(context, product, rows_of_tile, epilogue, stream);
    if (product.a[0].dtype == CUMOE_F16)
        return launch_rows<__half>(context, product, rows_of_tile, epilogue, stream);
    return launch_rows<float>(context, product, rows_of_tile, epilogue, stream);
}

cudaError_t probe_depth(const cumoe_context_t &context, const DepthProduct &product, cudaStream_t stream)
{
    if (product.a.dtype == CUMOE_BF16)
        return launch_depth_product<TensorDepth<__nv_bfloat16>>(context, product, stream);
    if (product.a.dtype == CUMOE_F16) return launch_depth_product<TensorDepth<__half>>(context, product, stream);
    return launch_depth_product<TensorDepth<float>>(context, product, stream);
}
