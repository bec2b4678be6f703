/* A product of matrices in the way of the portable grouped products, to try the simulator on: gathered rows, copies
 * in stages, fragments by ldmatrix, edges cut anywhere. */
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stdint.h>

struct Product {
    const __nv_bfloat16 *a; // [*, K] rows gathered by row
    const __nv_bfloat16 *b; // [N, K]
    const int32_t *row;     // [M]
    float *c;               // [M, N]
    int M, N, K;            // K is a multiple of 8: copies of 16 bytes
};

/* c = a[row] b^T. Each sum goes by ascending k. */
cudaError_t pipeline_product(const Product &product, cudaStream_t stream);
