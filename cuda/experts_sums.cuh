/* What the experts' stages need beside their products: sums over rows, and rows that are only moved. */
#pragma once

#include "cuda/device.cuh"

namespace cumoe
{

/* The gradient of a bias: its expert's rows summed, in ascending order. */
struct BiasSum {
    cumoe_matrix_t gradient; // [groups, 1, width]; data NULL = not wanted
    bool add;                // to what is there; a group without rows is left alone, else written as zeros
    const int32_t *offset;   // [groups + 1]
    int32_t groups;
    int64_t width;
    const void *data; // [rows, width], of the rows or of what index says
    cumoe_dtype_t dtype;
    int64_t stride;
    const int32_t *index; // [rows] or NULL
    const void *weight;   // gate type; rows count so much; NULL = 1
    const int32_t *slot;  // [rows] of weight
};
cudaError_t bias_gradient(const cumoe_context_t &context, const BiasSum &sum, cudaStream_t stream);

/* exponent [E]: the largest |weight| of an expert's rows times 2^-exponent is within [1/2, 1), so that it makes no
 * hidden value larger; 0 where it is 0 or not finite. Weights are F32. */
cudaError_t weight_exponents(const cumoe_context_t &context, const cumoe_rows_t &rows, const float *weight,
                             int32_t *exponent, cudaStream_t stream);

/* dweight of every slot: the parts of its row in the order of panels, and <dy, b_down> of its expert; 0 without a
 * row. partial [R, panels] is of the gate type. */
cudaError_t write_dweight(const cumoe_context_t &context, const cumoe_down_backward_args_t &args,
                          const void *partial, int64_t panels, cudaStream_t stream);

/* Rows [R, width] from rows of tokens, or from the same rows. */
struct RowCopy {
    const void *from;
    int64_t from_stride;
    const int32_t *index; // [R] or NULL
    void *to[2];          // [R, width] each; the second may be NULL
    int64_t width;
    const int32_t *num_rows; // device memory
    int64_t max_rows;
};
cudaError_t copy_rows(const cumoe_context_t &context, const RowCopy &copy, cudaStream_t stream);

} // namespace cumoe
