/* The tensor-core mainloops with an epilogue that only stores, to test them without the stages of a layer. */
#pragma once

#include "cuda/gemm.cuh"

/* T = BF16, F16, or F32 for TF32: the type of the factors of PRODUCT. c: part p of (row, column) at
 * row * row_stride + p * n + column, float. */
cudaError_t probe_rows(const cumoe_context_t &context, const cumoe::RowsProduct &product, int rows_of_tile,
                       float *c, int64_t row_stride, cudaStream_t stream);
cudaError_t probe_depth(const cumoe_context_t &context, const cumoe::DepthProduct &product, cudaStream_t stream);
