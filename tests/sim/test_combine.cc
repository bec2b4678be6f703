/* Sums of a token's rows in the simulator, against plain loops in the same order: equal to the last bit. */
#include "cuda/stages.cuh"
#include "tests/sim/check.h"
#include "tests/sim/simulator.h"
#include "tests/sim/values.h"

#include <algorithm>
#include <random>

namespace
{

struct Case {
    const char *name;
    cumoe_dtype_t dtype;
    int64_t tokens, live;
    int32_t hidden, top_k, gap; // gap: what a stride is more than H
    bool vary = false;          // slots vary in number, up to 2 K
};

const Case kCases[] = {
    {"no token", CUMOE_F32, 0, 0, 8, 2, 0},
    {"one token, one column", CUMOE_F32, 1, 1, 1, 1, 0},
    {"one token of 16 bits, one column", CUMOE_BF16, 1, 1, 1, 2, 0},
    {"no live token", CUMOE_F16, 5, 0, 8, 2, 0},
    {"whole vectors, F32", CUMOE_F32, 70, 70, 64, 2, 4},
    {"whole vectors, BF16", CUMOE_BF16, 37, 35, 72, 8, 8},
    {"whole vectors, F16", CUMOE_F16, 37, 35, 72, 3, 16},
    {"whole vectors, F64", CUMOE_F64, 37, 37, 10, 5, 2},
    {"two blocks for a token", CUMOE_BF16, 3, 3, 2056, 2, 0},
    {"more choices than in flight", CUMOE_F32, 9, 9, 12, 19, 0},
    {"64 choices", CUMOE_BF16, 5, 4, 8, 64, 0},
    {"odd width, F32", CUMOE_F32, 20, 19, 37, 3, 0},
    {"odd width, BF16", CUMOE_BF16, 20, 20, 257, 2, 0},
    {"odd width, F16", CUMOE_F16, 20, 20, 3, 2, 1},
    {"odd width, F64", CUMOE_F64, 11, 11, 301, 2, 0},
    {"odd stride, BF16", CUMOE_BF16, 20, 20, 16, 2, 3},
    {"no token that varies", CUMOE_F32, 0, 0, 8, 2, 0, true},
    {"varying, whole vectors", CUMOE_BF16, 37, 35, 72, 3, 8, true},
    {"varying, more than in flight", CUMOE_F32, 29, 29, 12, 9, 0, true},
    {"varying, odd width, F64", CUMOE_F64, 21, 20, 11, 2, 0, true},
};

struct Data {
    std::vector<int32_t> token_slot, slot_row; // [T + 1], [S]
    std::vector<double> weight, rows, start;   // [S], [R, H], [T, H]
};

/* Rows in random order, some slots without; some tokens without any, of these some with NaN as their weights; and
 * some with NaN in a slot without a row, behind others. */
Data make_data(const Case &c, uint64_t seed)
{
    std::mt19937_64 random(seed);
    std::normal_distribution<double> normal;
    std::vector<int32_t> token_slot = {0};
    for (int64_t t = 0; t < c.tokens; t++) {
        const uint64_t most = 2 * static_cast<uint64_t>(c.top_k) + 1;
        token_slot.push_back(token_slot.back() + (c.vary ? static_cast<int32_t>(random() % most) : c.top_k));
    }
    const size_t slots = static_cast<size_t>(token_slot.back());
    const size_t hidden = static_cast<size_t>(c.hidden);
    const cumoe_dtype_t wide = c.dtype == CUMOE_F64 ? CUMOE_F64 : CUMOE_F32;
    Data data = {token_slot, std::vector<int32_t>(slots), {}, {}, {}};
    for (size_t i = 0; i < slots; i++) data.slot_row[i] = static_cast<int32_t>(i);
    std::shuffle(data.slot_row.begin(), data.slot_row.end(), random);
    for (size_t i = 0; i < slots; i++) {
        if (random() % 5 == 0) data.slot_row[i] = -1;
        data.weight.push_back(data.slot_row[i] < 0 ? 0 : stored(normal(random), wide));
    }
    for (size_t t = 0; t < static_cast<size_t>(c.tokens); t++) {
        const size_t first = static_cast<size_t>(token_slot[t]), end = static_cast<size_t>(token_slot[t + 1]);
        const uint64_t kind = random() % 7;
        for (size_t slot = kind == 2 && end > first ? end - 1 : first; kind < 3 && slot < end; slot++) {
            data.slot_row[slot] = -1;
            data.weight[slot] = kind ? NAN : 0;
        }
    }
    for (size_t i = 0; i < slots * hidden; i++)
        data.rows.push_back(random() % 50 ? stored(normal(random), c.dtype) : random() % 2 ? NAN : -0.0);
    for (size_t i = 0; i < static_cast<size_t>(c.tokens) * hidden; i++)
        data.start.push_back(random() % 50 ? stored(normal(random), wide) : -0.0);
    return data;
}

/* One element of the result: Real is float or double. */
template <typename Real>
double plain_loop(const Case &c, const Data &data, bool weighted, const std::vector<double> &start, size_t t,
                  size_t h)
{
    const size_t hidden = static_cast<size_t>(c.hidden);
    Real sum = start.empty() ? 0 : static_cast<Real>(start[t * hidden + h]);
    for (size_t slot = static_cast<size_t>(data.token_slot[t]); slot < static_cast<size_t>(data.token_slot[t + 1]);
         slot++) {
        if (data.slot_row[slot] < 0) {
            if (weighted && std::isnan(data.weight[slot])) sum = NAN;
            continue;
        }
        const Real row = static_cast<Real>(data.rows[static_cast<size_t>(data.slot_row[slot]) * hidden + h]);
        const Real product = weighted ? static_cast<Real>(data.weight[slot]) * row : row;
        sum += product;
    }
    return stored(static_cast<double>(sum), c.dtype);
}

void compare(const Case &c, const Data &data, bool weighted, const std::vector<double> &start,
             const std::vector<double> &values, size_t stride, uint64_t seed)
{
    const size_t hidden = static_cast<size_t>(c.hidden);
    for (size_t i = 0; i < values.size(); i++) {
        const size_t t = i / stride, h = i % stride;
        double expected = NAN; // not written
        if (h < hidden && t < static_cast<size_t>(c.live))
            expected = c.dtype == CUMOE_F64 ? plain_loop<double>(c, data, weighted, start, t, h)
                                            : plain_loop<float>(c, data, weighted, start, t, h);
        EXPECT(same(values[i], expected), "%s, weighted %d, start %d, seed %llu, token %zu, column %zu: %g, not %g",
               c.name, weighted, !start.empty(), static_cast<unsigned long long>(seed), t, h, values[i], expected);
    }
}

void run(const Case &c, uint64_t seed)
{
    sim_set_seed(seed);
    const Data data = make_data(c, seed);
    const cumoe_dtype_t wide = c.dtype == CUMOE_F64 ? CUMOE_F64 : CUMOE_F32;
    const size_t stride = static_cast<size_t>(c.hidden + c.gap);
    const size_t elements =
        c.tokens ? static_cast<size_t>(c.tokens - 1) * stride + static_cast<size_t>(c.hidden) : 0;
    const cumoe::Device device = {0, 4, 80};
    cumoe_context_t context = {};
    context.config.hidden_size = c.hidden;
    context.config.top_k = c.top_k;
    context.config.dtype = c.dtype;
    context.device = const_cast<cumoe::Device *>(&device);
    Buffer<cumoe_call_t> call(std::vector<cumoe_call_t>{{0, 0, 0, c.live}});
    Buffer<int32_t> slot_row(data.slot_row), token_slot(data.token_slot);
    Values weight(wide, data.weight), rows(c.dtype, data.rows), start(wide, data.start);
    {
        Values y(c.dtype, elements);
        cumoe_combine_args_t args = {};
        args.num_tokens = c.tokens;
        args.routing.call = call.data();
        args.routing.token_slot = c.vary ? token_slot.data() : nullptr;
        args.routing.weight = weight.data();
        args.rows.slot_row = slot_row.data();
        args.output = rows.data();
        args.y = y.data();
        args.y_stride = static_cast<int64_t>(stride);
        EXPECT(cumoe::combine(context, args, nullptr) == cudaSuccess, "%s", c.name);
        compare(c, data, true, {}, y.read(), stride, seed);
    }
    for (const bool with_start : {false, true}) {
        Values dx(c.dtype, elements);
        cumoe_permute_backward_args_t args = {};
        args.num_tokens = c.tokens;
        args.routing.call = call.data();
        args.routing.token_slot = c.vary ? token_slot.data() : nullptr;
        args.rows.slot_row = slot_row.data();
        args.drows = rows.data();
        args.dx_gate = with_start ? start.data() : nullptr;
        args.dx = dx.data();
        args.dx_stride = static_cast<int64_t>(stride);
        EXPECT(cumoe::permute_backward(context, args, nullptr) == cudaSuccess, "%s", c.name);
        compare(c, data, false, with_start ? data.start : std::vector<double>(), dx.read(), stride, seed);
    }
}

} // namespace

int main()
{
    for (uint64_t seed = 1; seed <= 3; seed++)
        for (const Case &c : kCases) run(c, seed);
    EXPECT(sim_num_objects() == 0, "%lld left", static_cast<long long>(sim_num_objects()));
    return check::result();
}
