/* The grouped products of the experts, by type of arithmetic; each table is made in a file of its own, so that they
 * are compiled side by side. */
#pragma once

#include "cuda/experts_epilogue.cuh"
#include "cuda/gemm_depth.cuh"

namespace cumoe
{

/* row_tile: rows of a tile of the map, of cumoe__row_tile(). */
struct ExpertProducts {
    cudaError_t (*up)(const cumoe_context_t &, int32_t row_tile, const RowsProduct &, const StoreActivated &,
                      cudaStream_t);
    cudaError_t (*rows)(const cumoe_context_t &, int32_t row_tile, const RowsProduct &, const StoreRows &,
                        cudaStream_t); // down, and the gradient of rows
    cudaError_t (*down_backward)(const cumoe_context_t &, int32_t row_tile, const RowsProduct &,
                                 const StoreActivatedBackward &, cudaStream_t);
    cudaError_t (*depth)(const cumoe_context_t &, const DepthProduct &, cudaStream_t);
    int32_t panel_columns; // of StoreActivatedBackward.partial
};

extern const ExpertProducts kExactF32, kExactF64, kTensorBf16, kTensorF16, kTensorTf32;

} // namespace cumoe
