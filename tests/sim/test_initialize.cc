/* Initial values in the simulator: every element of every layout against its name, (seed, matrix, expert, element).
 */
#include "cuda/stages.cuh"
#include "host/philox.h"
#include "tests/sim/check.h"
#include "tests/sim/simulator.h"
#include "tests/sim/values.h"

#include <memory>

namespace
{

struct Case {
    const char *name;
    cumoe_dtype_t dtype, gate_dtype;
    cumoe_gate_kind_t gate;
    cumoe_activation_t activation;
    cumoe_glu_placement_t glu;
    bool bias, transposed;
    int32_t experts, hidden, intermediate;
};

const Case kCases[] = {
    {"smallest", CUMOE_F32, CUMOE_F32, CUMOE_GATE_EXTERNAL, CUMOE_ACTIVATION_RELU, CUMOE_GLU_SEPARATE, true, false,
     1, 1, 1},
    {"plain F32", CUMOE_F32, CUMOE_F32, CUMOE_GATE_SOFTMAX, CUMOE_ACTIVATION_RELU, CUMOE_GLU_SEPARATE, true, false,
     3, 37, 21},
    {"noisy F64", CUMOE_F64, CUMOE_F64, CUMOE_GATE_NOISY_TOPK, CUMOE_ACTIVATION_RELU, CUMOE_GLU_SEPARATE, false,
     false, 2, 9, 14},
    {"separate halves", CUMOE_BF16, CUMOE_F32, CUMOE_GATE_NOISY_TOPK, CUMOE_ACTIVATION_SWIGLU, CUMOE_GLU_SEPARATE,
     true, false, 2, 33, 10},
    {"glu first, transposed", CUMOE_F16, CUMOE_F16, CUMOE_GATE_SOFTMAX, CUMOE_ACTIVATION_SWIGLU, CUMOE_GLU_FIRST,
     true, true, 3, 18, 7},
    {"interleaved, transposed", CUMOE_BF16, CUMOE_BF16, CUMOE_GATE_SOFTMAX, CUMOE_ACTIVATION_GEGLU,
     CUMOE_GLU_INTERLEAVED, true, true, 3, 18, 7},
    {"many elements", CUMOE_F32, CUMOE_F32, CUMOE_GATE_SOFTMAX, CUMOE_ACTIVATION_RELU, CUMOE_GLU_SEPARATE, false,
     false, 5, 130, 70},
};

/* What an element has to be. */
double expected_value(cumoe_dtype_t dtype, uint32_t matrix, uint64_t seed, int32_t expert, int64_t element,
                      double std)
{
    if (std == 0) return stored(0, dtype);
    const float normal = cumoe_noise_normal(seed, matrix, static_cast<uint64_t>(element / 4), expert,
                                            CUMOE_NOISE_WEIGHTS, static_cast<int32_t>(element % 4));
    return stored(std * static_cast<double>(normal), dtype);
}

/* An array [E, rows * parts, cols] of which part p has rows p, p + parts, ... (interleaved) or rows p * rows .. */
struct Array {
    const char *name;
    cumoe_dtype_t dtype;
    int64_t rows, cols;
    int parts;
    uint32_t matrix[2]; // of the parts
    double std;
    bool interleaved;
    int64_t expert_stride, row_stride, col_stride;
    std::unique_ptr<Values> values;
};

void check_array(const Case &c, const Array &a, uint64_t seed)
{
    const std::vector<double> values = a.values->read();
    std::vector<double> expected(values.size(), NAN);
    for (int32_t e = 0; e < c.experts; e++)
        for (int part = 0; part < a.parts; part++)
            for (int64_t i = 0; i < a.rows * a.cols; i++) {
                const int64_t row = i / a.cols, col = i % a.cols;
                const int64_t line = a.interleaved ? row * a.parts + part : part * a.rows + row;
                expected[static_cast<size_t>(e * a.expert_stride + line * a.row_stride + col * a.col_stride)] =
                    expected_value(a.dtype, a.matrix[part], seed, e, i, a.std);
            }
    for (size_t i = 0; i < values.size(); i++)
        EXPECT(same(values[i], expected[i]), "%s, %s, seed %llu, at %zu: %g, not %g", c.name, a.name,
               static_cast<unsigned long long>(seed), i, values[i], expected[i]);
}

void *make(Array *a, int32_t experts)
{
    const int64_t last =
        (experts - 1) * a->expert_stride + (a->rows * a->parts - 1) * a->row_stride + (a->cols - 1) * a->col_stride;
    a->values = std::make_unique<Values>(a->dtype, static_cast<size_t>(last + 1));
    return a->values->data();
}

void run(const Case &c, uint64_t seed)
{
    sim_set_seed(seed);
    const int64_t H = c.hidden, I = c.intermediate;
    const bool glu = c.activation != CUMOE_ACTIVATION_RELU, separate = c.glu == CUMOE_GLU_SEPARATE;
    const bool interleaved = c.glu == CUMOE_GLU_INTERLEAVED, first = c.glu == CUMOE_GLU_FIRST || interleaved;
    const int parts = separate ? 1 : 2;
    const uint32_t gate = 1, up = 2, half = 3, down = 4, low = parts == 2 && first ? half : up;
    const double up_std = 1 / std::sqrt(static_cast<double>(H)), down_std = 1 / std::sqrt(static_cast<double>(I));
    const int64_t gap = 5, up_rows = I * parts, up_row = c.transposed ? 1 : H, up_col = c.transposed ? up_rows : 1;
    const int64_t up_expert = up_rows * H + gap, down_row = c.transposed ? 1 : I, down_col = c.transposed ? H : 1;

    cumoe_weights_t w = {};
    w.dtype = c.dtype;
    w.gate_dtype = c.gate_dtype;
    w.glu = c.glu;
    w.up_expert_stride = up_expert, w.up_row_stride = up_row, w.up_col_stride = up_col;
    w.down_expert_stride = H * I + gap, w.down_row_stride = down_row, w.down_col_stride = down_col;
    std::vector<Array> arrays;
    const auto add = [&](bool present, Array a) -> void * {
        if (!present) return nullptr;
        arrays.push_back(std::move(a));
        return make(&arrays.back(), c.experts);
    };
    const bool noisy = c.gate == CUMOE_GATE_NOISY_TOPK, with_gate = c.gate != CUMOE_GATE_EXTERNAL;
    const int64_t in_up = I * parts;
    w.w_gate = add(with_gate, {"w_gate", c.gate_dtype, 1, H, 1, {gate, 0}, noisy ? 0 : 0.02, false, H, H, 1, {}});
    w.w_noise = add(noisy, {"w_noise", c.gate_dtype, 1, H, 1, {gate, 0}, 0, false, H, H, 1, {}});
    w.w_up = add(true, {"w_up",
                        c.dtype,
                        I,
                        H,
                        parts,
                        {low, low == up ? half : up},
                        up_std,
                        interleaved,
                        up_expert,
                        up_row,
                        up_col,
                        {}});
    w.w_glu =
        add(glu && separate, {"w_glu", c.dtype, I, H, 1, {half, 0}, up_std, false, up_expert, up_row, up_col, {}});
    w.w_down =
        add(true, {"w_down", c.dtype, H, I, 1, {down, 0}, down_std, false, H * I + gap, down_row, down_col, {}});
    w.b_up = add(c.bias, {"b_up", c.dtype, 1, in_up, 1, {up, 0}, 0, false, in_up, 0, 1, {}});
    w.b_glu = add(c.bias && glu && separate, {"b_glu", c.dtype, 1, I, 1, {half, 0}, 0, false, I, 0, 1, {}});
    w.b_down = add(c.bias, {"b_down", c.dtype, 1, H, 1, {down, 0}, 0, false, H, 0, 1, {}});

    const cumoe::Device device = {0, 1, 80}; // one SM: blocks have several pieces of work each
    cumoe_context_t context = {};
    context.config.num_experts = c.experts;
    context.ranks = {1, 0, 0, c.experts};
    context.config.hidden_size = c.hidden;
    context.config.intermediate_size = c.intermediate;
    context.config.dtype = c.dtype;
    context.config.gate = c.gate;
    context.config.activation = c.activation;
    context.config.expert_bias = c.bias;
    context.device = const_cast<cumoe::Device *>(&device);
    EXPECT(cumoe::weights_init(context, seed, w, nullptr) == cudaSuccess, "%s", c.name);
    for (const Array &a : arrays) check_array(c, a, seed);
}

} // namespace

int main()
{
    for (uint64_t seed = 1; seed <= 2; seed++)
        for (const Case &c : kCases) run(c, seed << 33 | seed);
    EXPECT(sim_num_objects() == 0, "%lld left", static_cast<long long>(sim_num_objects()));
    return check::result();
}
