/* A layer's experts for tests of their stages alone: rows, weights in any layout, and the error that a stage may
 * make. */
#ifndef CUMOE_SIM_EXPERTS_PROBLEM_H
#define CUMOE_SIM_EXPERTS_PROBLEM_H

#include "cuda/device.cuh"
#include "host/tile.h"
#include "tests/sim/check.h"
#include "tests/sim/experts_array.h"

#include <random>

namespace experts
{

/* --- Activations, from the comments of cumoe_activation_t */

inline double sigmoid(double x)
{
    return 1 / (1 + exp(-x));
}
inline double phi(double x)
{
    return 0.5 * erfc(-x / sqrt(2.0));
}

inline double activation(const cumoe_config_t &config, double up, double glu)
{
    const double limit = static_cast<double>(config.swiglu_limit), alpha = static_cast<double>(config.swiglu_alpha);
    switch (config.activation) {
    case CUMOE_ACTIVATION_RELU:
        return fmax(up, 0);
    case CUMOE_ACTIVATION_SWIGLU:
        return glu * sigmoid(glu) * up;
    case CUMOE_ACTIVATION_GELU:
        return up * phi(up);
    case CUMOE_ACTIVATION_GELU_TANH:
        return 0.5 * up * (1 + tanh(sqrt(2 / M_PI) * (up + 0.044715 * up * up * up)));
    case CUMOE_ACTIVATION_SILU:
        return up * sigmoid(up);
    case CUMOE_ACTIVATION_RELU2:
        return fmax(up, 0) * fmax(up, 0);
    case CUMOE_ACTIVATION_GEGLU:
        return glu * phi(glu) * up;
    case CUMOE_ACTIVATION_GEGLU_TANH:
        return 0.5 * glu * (1 + tanh(sqrt(2 / M_PI) * (glu + 0.044715 * glu * glu * glu))) * up;
    case CUMOE_ACTIVATION_SWIGLU_CLAMPED: {
        const double g = fmin(glu, limit), u = fmax(-limit, fmin(up, limit));
        return g * sigmoid(alpha * g) * (u + static_cast<double>(config.swiglu_offset));
    }
    default:
        return up;
    }
}

/* --- A case */

struct Shape {
    const char *name;
    int64_t T, H, I;
    int32_t E, K;
    int only; // all slots name this expert; -1: random ones, some none
};

inline const Shape kShapes[] = {
    {"no token", 0, 8, 8, 2, 1, -1},
    {"one token", 1, 1, 1, 1, 1, 0},
    {"odd sizes", 37, 13, 19, 5, 2, -1},
    {"more than a tile of rows", 150, 24, 16, 3, 2, -1},
    {"all on one expert", 70, 16, 40, 6, 1, 4},
    {"more than a tile of columns", 11, 137, 141, 3, 2, -1},
    {"K = E", 20, 17, 8, 3, 3, -1},
    {"aligned", 40, 32, 48, 4, 2, -1},
    {"many experts", 9, 12, 20, 40, 2, -1},
    {"tiles of 128 rows", 210, 16, 24, 2, 1, -1},
};

enum Order { ROWS, COLUMNS, SPREAD, kNumOrders }; // which dimension of the weights is contiguous; none

struct Case {
    Shape shape;
    cumoe_dtype_t dtype;
    bool tf32;
    cumoe_activation_t activation;
    cumoe_glu_placement_t glu;
    Order order;
    bool bias, add;
    cumoe_dtype_t gradient_dtype;
    int hidden;                   // 0: NULL, 1: beside z, 2: z itself where there is no glu
    int padding;                  // of the rows of x and dy
    double weight_scale, z_scale; // of what comes in
    uint64_t seed;
};

/* Where the elements of an expert matrix [E, rows, cols] stand; two halves in one array where glu says so. */
struct Layout {
    int64_t expert, row, col; // strides
    int64_t size;
};

inline Layout make_layout(Order order, int64_t E, int64_t rows, int64_t cols)
{
    if (order == ROWS) return {rows * cols, cols, 1, E * rows * cols};
    if (order == COLUMNS) return {rows * cols + 8, 1, rows, E * (rows * cols + 8)};
    const int64_t row = 3 * cols + 2;
    return {rows * row + 5, row, 3, E * (rows * row + 5)};
}

struct Problem {
    Case c;
    cumoe_context_t context = {};
    cumoe::Device device = {};
    std::mt19937_64 random;
    int64_t T, H, I, E, K, R = 0;
    bool is_glu, linear;
    int64_t z_width, stride; // of rows of z, of x and dy
    int halves;              // of w_up
    double eps_sum, eps;     // of sums and products; of the token type
    cumoe_dtype_t gate;

    std::vector<int32_t> offset, row_token, row_slot, slot_row, tile, row_expert;
    std::vector<std::unique_ptr<Buffer<int32_t>>> ints;
    cumoe_rows_t rows = {};
    Layout up_layout, down_layout;
    Array w_up, w_glu, w_down, b_up, b_glu, b_down, weight;
    cumoe_weights_t weights = {};

    explicit Problem(const Case &which);
    void make_rows();
    void make_weights();
    double uniform()
    {
        return std::uniform_real_distribution<double>(-1, 1)(random);
    }
    void fill(Array &array, double scale = 1)
    {
        for (double &v : array.values) v = round_to(uniform() * scale, array.dtype());
    }
    int64_t up_at(bool glu, int64_t e, int64_t i, int64_t h) const;
    int64_t bias_at(bool glu, int64_t e, int64_t i) const;
    Array &up_array(bool glu)
    {
        return glu && c.glu == CUMOE_GLU_SEPARATE ? w_glu : w_up;
    }
    Array &bias_array(bool glu)
    {
        return glu && c.glu == CUMOE_GLU_SEPARATE ? b_glu : b_up;
    }
    double w(bool glu, int64_t e, int64_t i, int64_t h)
    {
        return up_array(glu).values(up_at(glu, e, i, h));
    }
    int64_t down_at(int64_t e, int64_t h, int64_t i) const
    {
        return e * down_layout.expert + h * down_layout.row + i * down_layout.col;
    }
    double wd(int64_t e, int64_t h, int64_t i) const
    {
        return w_down.values(down_at(e, h, i));
    }
    double act(double up, double glu) const
    {
        return activation(context.config, up, glu);
    }
    double limit() const
    {
        return static_cast<double>(context.config.swiglu_limit);
    }
    int64_t token(int64_t row) const
    {
        return row_token[static_cast<size_t>(row)];
    }
    int64_t slot(int64_t row) const
    {
        return row_slot[static_cast<size_t>(row)];
    }
    int64_t expert(int64_t row) const
    {
        return row_expert[static_cast<size_t>(row)];
    }
    double act_error(double up, double glu) const
    {
        if (linear || c.activation == CUMOE_ACTIVATION_RELU) return 0;
        return (gate == CUMOE_F64 ? 1e-13 : 3e-6) * (1 + fabs(up)) * (1 + fabs(up)) * (1 + fabs(glu));
    }
    void near(double got, double expected, double error, const char *what, int64_t i, int64_t j)
    {
        const bool good = fabs(got - expected) <= error + tiny(c.dtype); // NaN is never good
        EXPECT(good, "%s type %d%s act %d glu %d order %d seed %llu: %s [%lld, %lld] = %.9g, expected %.9g +- %.3g",
               c.shape.name, c.dtype, c.tf32 ? " tf32" : "", c.activation, c.glu, c.order,
               static_cast<unsigned long long>(c.seed), what, static_cast<long long>(i), static_cast<long long>(j),
               got, expected, error);
    }
    /* Error of a sum of COUNT products whose magnitudes add up to SIZE. */
    double sum_error(int64_t count, double size) const
    {
        return (2 * static_cast<double>(count) * eps_sum + (c.tf32 ? 0x1p-10 : 0)) * size;
    }
    Array token_array();
    Array rows_array(int64_t width, double scale = 1);
    Array no_array(int64_t width) const // an output
    {
        return Array(static_cast<size_t>(T * K * width), c.dtype);
    }
    void check_rest(const Values &got, int64_t begin, const char *what)
    {
        for (size_t i = static_cast<size_t>(begin); i < got.size(); i++)
            EXPECT(isnan(got[i]), "%s: %s: written at %zu, behind its end", c.shape.name, what, i);
    }
};

inline Problem::Problem(const Case &which)
    : c(which), random(which.seed), T(c.shape.T), H(c.shape.H), I(c.shape.I), E(c.shape.E), K(c.shape.K)
{
    if (c.activation == CUMOE_ACTIVATION_IDENTITY) I = H;
    is_glu = cumoe__is_glu(c.activation);
    linear = c.activation == CUMOE_ACTIVATION_IDENTITY;
    if (!is_glu) c.glu = CUMOE_GLU_SEPARATE;
    halves = is_glu ? 2 : 1;
    z_width = halves * I;
    stride = H + c.padding;
    gate = c.dtype == CUMOE_F64 ? CUMOE_F64 : CUMOE_F32;
    eps_sum = unit(gate);
    eps = unit(c.dtype);
    cumoe_config_t &config = context.config;
    config.hidden_size = static_cast<int32_t>(H);
    config.intermediate_size = static_cast<int32_t>(I);
    config.num_experts = static_cast<int32_t>(E);
    config.top_k = static_cast<int32_t>(K);
    config.dtype = c.dtype;
    config.compute = c.tf32 ? CUMOE_COMPUTE_TF32 : CUMOE_COMPUTE_EXACT;
    config.activation = c.activation;
    config.swiglu_limit = 0.61f;
    config.swiglu_alpha = 1.702f;
    config.swiglu_offset = 0.75f;
    config.expert_bias = c.bias;
    device.num_sms = 2;
    device.capability = 80;
    context.device = &device;
    make_rows();
    make_weights();
}

inline void Problem::make_rows()
{
    std::vector<int32_t> expert(static_cast<size_t>(T * K));
    for (int32_t &e : expert) {
        e = c.shape.only >= 0 ? c.shape.only : static_cast<int32_t>(random() % static_cast<uint64_t>(E + 1)) - 1;
        if (c.shape.only < 0 && E > 4 && e == 2) e = 1; // one without rows in the middle
    }
    slot_row.assign(expert.size(), -1);
    offset.assign(1, 0);
    row_token.assign(expert.size(), -1);
    row_slot = row_token;
    for (int32_t e = 0; e < E; e++) {
        for (size_t slot = 0; slot < expert.size(); slot++) {
            if (expert[slot] != e) continue;
            slot_row[slot] = static_cast<int32_t>(R);
            row_slot[static_cast<size_t>(R)] = static_cast<int32_t>(slot);
            row_token[static_cast<size_t>(R)] = static_cast<int32_t>(slot / static_cast<size_t>(K));
            row_expert.push_back(e);
            R++;
        }
        offset.push_back(static_cast<int32_t>(R));
    }
    const int32_t tile_rows = cumoe__row_tile(&context.config, T);
    tile = {0, tile_rows};
    for (int32_t e = 0; e < E; e++)
        for (int32_t row = offset[static_cast<size_t>(e)]; row < offset[static_cast<size_t>(e) + 1];
             row += tile_rows) {
            tile.insert(tile.end(), {e, row});
            tile[0]++;
        }
    const auto upload = [&](const std::vector<int32_t> &values) {
        ints.push_back(std::make_unique<Buffer<int32_t>>(values));
        return ints.back()->data();
    };
    rows = {upload(offset), upload(row_token), upload(row_slot), upload(slot_row), upload(tile)};
    weight = Array(expert.size(), gate);
    for (size_t slot = 0; slot < expert.size(); slot++)
        weight.values[slot] = expert[slot] < 0 ? 0 : round_to(uniform() * c.weight_scale, gate);
}

inline int64_t Problem::up_at(bool glu, int64_t e, int64_t i, int64_t h) const
{
    int64_t row = i;
    if (c.glu == CUMOE_GLU_FIRST) row = glu ? i : I + i;
    if (c.glu == CUMOE_GLU_LAST) row = glu ? I + i : i;
    if (c.glu == CUMOE_GLU_INTERLEAVED) row = glu ? 2 * i : 2 * i + 1;
    return e * up_layout.expert + row * up_layout.row + h * up_layout.col;
}

inline int64_t Problem::bias_at(bool glu, int64_t e, int64_t i) const
{
    if (c.glu == CUMOE_GLU_SEPARATE) return e * I + i;
    if (c.glu == CUMOE_GLU_INTERLEAVED) return e * 2 * I + 2 * i + (glu ? 0 : 1);
    return e * 2 * I + i + (glu == (c.glu == CUMOE_GLU_LAST) ? I : 0);
}

inline void Problem::make_weights()
{
    const int64_t up_rows = c.glu == CUMOE_GLU_SEPARATE ? I : 2 * I;
    up_layout = make_layout(c.order, E, up_rows, H);
    down_layout = make_layout(c.order, E, H, I);
    weights.dtype = c.dtype;
    weights.glu = c.glu;
    weights.up_expert_stride = up_layout.expert, weights.up_row_stride = up_layout.row;
    weights.up_col_stride = up_layout.col;
    weights.down_expert_stride = down_layout.expert, weights.down_row_stride = down_layout.row;
    weights.down_col_stride = down_layout.col;
    w_down = Array(static_cast<size_t>(down_layout.size), c.dtype);
    for (int64_t e = 0; e < E; e++)
        for (int64_t h = 0; h < H; h++)
            for (int64_t i = 0; i < I; i++) w_down.values(down_at(e, h, i)) = round_to(uniform(), c.dtype);
    weights.w_down = w_down.data();
    if (c.activation != CUMOE_ACTIVATION_IDENTITY) {
        w_up = Array(static_cast<size_t>(up_layout.size), c.dtype);
        if (is_glu && c.glu == CUMOE_GLU_SEPARATE) w_glu = Array(static_cast<size_t>(up_layout.size), c.dtype);
        for (int half = 0; half < halves; half++)
            for (int64_t e = 0; e < E; e++)
                for (int64_t i = 0; i < I; i++)
                    for (int64_t h = 0; h < H; h++)
                        up_array(half).values(up_at(half, e, i, h)) =
                            round_to(uniform() / sqrt(static_cast<double>(H)), c.dtype);
        weights.w_up = w_up.data();
        if (!w_glu.values.empty()) weights.w_glu = w_glu.data();
    }
    if (!c.bias) return;
    b_down = Array(static_cast<size_t>(E * H), c.dtype);
    fill(b_down);
    weights.b_down = b_down.data();
    if (c.activation == CUMOE_ACTIVATION_IDENTITY) return;
    b_up = Array(static_cast<size_t>(E * up_rows), c.dtype);
    fill(b_up);
    weights.b_up = b_up.data();
    if (!is_glu || c.glu != CUMOE_GLU_SEPARATE) return;
    b_glu = Array(static_cast<size_t>(E * I), c.dtype);
    fill(b_glu);
    weights.b_glu = b_glu.data();
}

/* [rows, width], of which the first R are there, random. */
inline Array Problem::rows_array(int64_t width, double scale)
{
    Array array(static_cast<size_t>(T * K * width), c.dtype);
    for (int64_t i = 0; i < R * width; i++) array.values(i) = round_to(uniform() * scale, c.dtype);
    return array;
}

/* Rows of tokens [T, H + padding]; those of tokens without a row are NaN. */
inline Array Problem::token_array()
{
    Array array(static_cast<size_t>(T * stride), c.dtype);
    for (int64_t row = 0; row < R; row++)
        for (int64_t h = 0; h < H; h++) {
            double &v = array.values(token(row) * stride + h);
            if (isnan(v)) v = round_to(uniform(), c.dtype);
        }
    return array;
}

/* A gradient: what is there before, and what must be there. */
struct Gradient {
    Array array;
    Values value, error; // of elements that the layout has
    std::vector<bool> is_element;
    Gradient(size_t size = 0, cumoe_dtype_t dtype = CUMOE_F32)
        : array(size, dtype), value(size), error(size), is_element(size)
    {
    }
    void add(int64_t at, double more, double more_error)
    {
        value(at) += more;
        error(at) += more_error;
    }
};

inline void expect_gradient(Problem &t, Gradient &g, const char *what)
{
    const Values got = g.array.read();
    for (size_t i = 0; i < got.size(); i++) {
        if (!g.is_element[i]) {
            EXPECT(isnan(got[i]), "%s: %s: written between elements, at %zu", t.c.shape.name, what, i);
            continue;
        }
        const double old = t.c.add ? g.array.values[i] : 0;
        t.near(got[i], old + g.value[i],
               g.error[i] + t.eps_sum * 200 * fabs(old) + unit(t.c.gradient_dtype) * fabs(old + g.value[i]) +
                   (g.error[i] > 0 ? tiny(t.c.gradient_dtype) : 0),
               what, static_cast<int64_t>(i), -1);
    }
}

inline void begin_gradient(Problem &t, Gradient &g)
{
    for (size_t i = 0; i < g.value.size(); i++)
        if (g.is_element[i] && t.c.add) g.array.values[i] = round_to(t.uniform(), t.c.gradient_dtype);
}

} // namespace experts

#endif
