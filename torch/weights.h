// Arrays of a layer as the C interface takes them.
#ifndef CUMOE_TORCH_WEIGHTS_H
#define CUMOE_TORCH_WEIGHTS_H

#include "tensors.h"

namespace cumoe_torch
{

// In the order of the operators' arguments.
enum {
    W_GATE,
    W_NOISE,
    W_GATE_PRIMARY,
    W_NOISE_PRIMARY,
    THRESHOLDS,
    GATE_BIAS,
    W_UP,
    W_GLU,
    W_DOWN,
    B_UP,
    B_GLU,
    B_DOWN,
    NUM_ARRAYS
};
const char *const array_names[NUM_ARRAYS] = {"w_gate",     "w_noise",   "w_gate_primary", "w_noise_primary",
                                             "thresholds", "gate_bias", "w_up",           "w_glu",
                                             "w_down",     "b_up",      "b_glu",          "b_down"};
using Arrays = Maybe[NUM_ARRAYS];

inline bool is_matrix(int array)
{
    return array == W_UP || array == W_GLU || array == W_DOWN;
}

inline bool is_gate(int array)
{
    return array <= GATE_BIAS;
}

// The strides of an expert matrix or its gradient, in the words of cumoe_weights_t. Where an index has one value
// alone its stride means nothing, and 0 says so.
inline void set_strides(const Tensor &tensor, const char *name, int64_t *expert, int64_t *row, int64_t *column)
{
    int64_t *const strides[] = {expert, row, column};
    for (int i = 0; i < 3; i++) {
        *strides[i] = tensor.size(i) > 1 ? tensor.stride(i) : 0;
        if (tensor.size(i) > 1 && *strides[i] == 0)
            fail(std::string("cumoe: ") + name + " is expanded (a stride is 0), but must have elements of its own");
    }
}

// The arrays of a layer, or of its gradients, as the C interface takes them. What had to be copied lives in `kept`.
struct Weights {
    cumoe_weights_t c;
    std::vector<Tensor> kept;

    Weights(const Arrays &arrays, ScalarType type, cumoe_glu_placement_t glu, const Device &device)
        : of_experts(device.is_cuda() ? 16 : element_size(type))
    {
        std::memset(&c, 0, sizeof c);
        c.struct_size = sizeof c;
        c.dtype = dtype_of(type, "x");
        c.glu = glu;
        void **const pointers[NUM_ARRAYS] = {&c.w_gate,     &c.w_noise,   &c.w_gate_primary, &c.w_noise_primary,
                                             &c.thresholds, &c.gate_bias, &c.w_up,           &c.w_glu,
                                             &c.w_down,     &c.b_up,      &c.b_glu,          &c.b_down};
        for (int i : {W_UP, W_GLU}) copy_up = copy_up || (arrays[i] && !is_aligned(*arrays[i], of_experts));
        for (int i = 0; i < NUM_ARRAYS; i++)
            if (arrays[i]) *pointers[i] = address(is_matrix(i) ? matrix(i, *arrays[i]) : plain(i, *arrays[i]));
    }

  private:
    const size_t of_experts; // their alignment: on the CPU a file may be mapped
    bool copy_up = false;

    const Tensor &plain(int array, const Tensor &tensor)
    {
        kept.push_back(dense(tensor, is_gate(array) ? 16 : of_experts));
        return kept.back();
    }

    // w_up and w_glu, which have strides in common, are copied together: the copy of a view that has gaps has none.
    const Tensor &matrix(int array, const Tensor &given)
    {
        const bool copied = array == W_DOWN ? !is_aligned(given, of_experts) : copy_up;
        kept.push_back(copied ? copied_to(make_like(given), given) : given);
        const Tensor &tensor = kept.back();
        int64_t expert = 0, row = 0, column = 0;
        set_strides(tensor, array_names[array], &expert, &row, &column);
        if (array == W_DOWN) {
            c.down_expert_stride = expert, c.down_row_stride = row, c.down_col_stride = column;
        } else if (array == W_GLU && c.w_up &&
                   (expert != c.up_expert_stride || row != c.up_row_stride || column != c.up_col_stride)) {
            fail("cumoe: w_glu has other strides than w_up");
        } else {
            c.up_expert_stride = expert, c.up_row_stride = row, c.up_col_stride = column;
        }
        return tensor;
    }
};

} // namespace cumoe_torch

#endif
