/* The optimizer step in the simulator. Adam equals a plain loop in the same arithmetic to the last bit; factored
 * Adam is compared with its formula in long double. Each step is judged from the state that the last one left. */
#include "cuda/stages.cuh"
#include "tests/sim/check.h"
#include "tests/sim/simulator.h"
#include "tests/sim/values.h"

#include <algorithm>
#include <random>

namespace
{

enum class Layout { PLAIN, ROWS_APART, EXPERTS_APART, TRANSPOSED, EVERY_THIRD, OFF_BY_ONE };

struct Case {
    const char *name;
    bool factored;
    cumoe_dtype_t dtype, gradient_dtype;
    int64_t experts, rows, cols;
    Layout value, gradient;
    bool with_gradient = true;
};

const Case kCases[] = {
    {"one value", false, CUMOE_F32, CUMOE_F32, 1, 1, 1, Layout::PLAIN, Layout::PLAIN},
    {"F32, all in one row", false, CUMOE_F32, CUMOE_F32, 3, 10, 12, Layout::PLAIN, Layout::PLAIN},
    {"F32, several tiles", false, CUMOE_F32, CUMOE_F32, 1, 70, 1100, Layout::ROWS_APART, Layout::PLAIN},
    {"F64", false, CUMOE_F64, CUMOE_F64, 2, 9, 6, Layout::PLAIN, Layout::PLAIN},
    {"F64, transposed", false, CUMOE_F64, CUMOE_F64, 2, 9, 7, Layout::TRANSPOSED, Layout::PLAIN},
    {"BF16, F32 gradients, experts apart", false, CUMOE_BF16, CUMOE_F32, 3, 34, 40, Layout::EXPERTS_APART,
     Layout::PLAIN},
    {"F16, F16 gradients", false, CUMOE_F16, CUMOE_F16, 2, 5, 36, Layout::PLAIN, Layout::EXPERTS_APART},
    {"odd columns", false, CUMOE_F32, CUMOE_F32, 2, 33, 37, Layout::PLAIN, Layout::PLAIN},
    {"BF16, all transposed", false, CUMOE_BF16, CUMOE_BF16, 2, 65, 34, Layout::TRANSPOSED, Layout::TRANSPOSED},
    {"BF16, no alignment", false, CUMOE_BF16, CUMOE_F32, 2, 40, 16, Layout::OFF_BY_ONE, Layout::PLAIN},
    {"a bias, every third", false, CUMOE_F32, CUMOE_F32, 4, 1, 50, Layout::EVERY_THIRD, Layout::EVERY_THIRD},
    {"BF16 without gradient", false, CUMOE_BF16, CUMOE_F32, 2, 9, 14, Layout::TRANSPOSED, Layout::PLAIN, false},
    {"F32 without gradient", true, CUMOE_F32, CUMOE_F32, 2, 9, 14, Layout::PLAIN, Layout::PLAIN, false},
    {"factored, one value", true, CUMOE_F32, CUMOE_F32, 1, 1, 1, Layout::PLAIN, Layout::PLAIN},
    {"factored, F32", true, CUMOE_F32, CUMOE_F32, 3, 70, 40, Layout::PLAIN, Layout::PLAIN},
    {"factored, one long row", true, CUMOE_F32, CUMOE_F32, 1, 1, 4200, Layout::PLAIN, Layout::PLAIN},
    {"factored, F64", true, CUMOE_F64, CUMOE_F64, 2, 35, 33, Layout::PLAIN, Layout::TRANSPOSED},
    {"factored, BF16", true, CUMOE_BF16, CUMOE_F32, 2, 40, 72, Layout::ROWS_APART, Layout::PLAIN},
    {"factored, F16, all transposed", true, CUMOE_F16, CUMOE_F16, 2, 37, 45, Layout::TRANSPOSED,
     Layout::TRANSPOSED},
    {"factored, more experts than blocks", true, CUMOE_F32, CUMOE_F32, 9, 40, 6, Layout::PLAIN, Layout::PLAIN},
    {"factored, one column", true, CUMOE_F32, CUMOE_F32, 2, 300, 1, Layout::PLAIN, Layout::PLAIN},
};

struct Call {
    int64_t step, skip;
    double learning_rate, gradient_scale;
};

const Call kCalls[] = {{1, 1, 0.01, 1}, {1, 0, 0.01, 0}, {2, 1, 0.01, 1}, {2, 0, 0.003, 0.25}, {30, 0, 0.02, 2}};
const float kBeta1 = 0.9f, kBeta2 = 0.99f, kEpsilon = 1e-6f, kDecay = 0.05f;

/* Strides of a layout, and the first element. */
struct Place {
    int64_t expert, row, col, first;
};

Place place_of(Layout layout, const Case &c)
{
    switch (layout) {
    case Layout::ROWS_APART:
        return {c.rows * (c.cols + 4), c.cols + 4, 1, 0};
    case Layout::EXPERTS_APART:
        return {2 * c.rows * c.cols, c.cols, 1, c.rows * c.cols};
    case Layout::TRANSPOSED:
        return {c.rows * c.cols + 3, 1, c.rows, 0};
    case Layout::EVERY_THIRD:
        return {3 * c.rows * c.cols, 3 * c.cols, 3, 0};
    case Layout::OFF_BY_ONE:
        return {c.rows * c.cols, c.cols, 1, 1};
    default:
        return {c.rows * c.cols, c.cols, 1, 0};
    }
}

/* Element i of [experts, rows, cols] in memory. */
size_t element_of(const Case &c, const Place &p, int64_t i)
{
    return static_cast<size_t>(p.first + i / (c.rows * c.cols) * p.expert + i / c.cols % c.rows * p.row +
                               i % c.cols * p.col);
}

typedef std::vector<double> Numbers;

/* What a step changes, in the order [experts, rows, cols]. An array that is not there is empty. */
struct State {
    Numbers value, master, moment1, moment2, row_mean, col_mean, average;
};

class Run
{
  public:
    Run(const Case &c, uint64_t seed, bool on_device)
        : c_(c), seed_(seed), on_device_(on_device), values_(c.experts * c.rows * c.cols),
          wide_(c.dtype == CUMOE_F64 ? CUMOE_F64 : CUMOE_F32), value_place_(place_of(c.value, c)),
          gradient_place_(place_of(c.gradient, c)),
          value_(c.dtype, spread(random_numbers(1), value_place_, c.dtype)), gradient_numbers_(random_numbers(7)),
          gradient_(c.gradient_dtype, spread(gradient_numbers_, gradient_place_, c.gradient_dtype)),
          state_(static_cast<size_t>(take_all(nullptr, nullptr)))
    {
        for (double &number : gradient_numbers_) number = stored(number, c.gradient_dtype);
    }
    void steps()
    {
        for (const Call &call : kCalls) {
            const State before = read();
            const std::vector<double> outside = value_.read();
            step(call);
            check(call, before, read());
            check_gaps(outside, value_.read());
        }
    }

  private:
    Numbers random_numbers(uint64_t salt)
    {
        std::mt19937_64 random(seed_ * 16 + salt);
        std::normal_distribution<double> normal;
        Numbers numbers;
        for (int64_t i = 0; i < values_; i++)
            numbers.push_back(i / c_.cols % 9 == 4 || random() % 20 == 0 ? 0 : normal(random));
        return numbers;
    }

    /* Numbers where a layout has them; gaps are 77. */
    Numbers spread(const Numbers &numbers, const Place &place, cumoe_dtype_t dtype)
    {
        Numbers out(element_of(c_, {place.expert, place.row, place.col, place.first}, values_ - 1) + 4, 77);
        for (int64_t i = 0; i < values_; i++)
            out[element_of(c_, place, i)] = stored(numbers[static_cast<size_t>(i)], dtype);
        return out;
    }

    /* The arrays of the state in p, and their names in read(); the bytes of all. */
    int64_t take_all(char *base, cumoe_parameter_t *p)
    {
        const int64_t size = static_cast<int64_t>(size_of(wide_));
        int64_t used = 0;
        const auto take = [&](bool present, int64_t count, void *cumoe_parameter_t::*array) {
            if (!present) return;
            if (p) p->*array = base + used;
            used += (count * size + 63) / 64 * 64;
        };
        take(size_of(c_.dtype) == 2, values_, &cumoe_parameter_t::master);
        take(!c_.factored, values_, &cumoe_parameter_t::moment1);
        take(!c_.factored, values_, &cumoe_parameter_t::moment2);
        take(c_.factored, c_.experts * c_.rows, &cumoe_parameter_t::row_mean);
        take(c_.factored, c_.experts * c_.cols, &cumoe_parameter_t::col_mean);
        take(c_.factored, c_.experts, &cumoe_parameter_t::average);
        return used;
    }

    cumoe_parameter_t parameter()
    {
        cumoe_parameter_t p = {};
        const Place &v = value_place_, &g = gradient_place_;
        char *values = static_cast<char *>(value_.data()), *gradients = static_cast<char *>(gradient_.data());
        p.value = {values + static_cast<size_t>(v.first) * size_of(c_.dtype), c_.dtype, v.expert, v.row, v.col};
        p.gradient = {gradients + static_cast<size_t>(g.first) * size_of(c_.gradient_dtype), c_.gradient_dtype,
                      g.expert, g.row, g.col};
        if (!c_.with_gradient) p.gradient.data = nullptr;
        p.experts = c_.experts, p.rows = c_.rows, p.cols = c_.cols;
        take_all(state_.data(), &p);
        return p;
    }

    State read()
    {
        const std::vector<char> bytes = state_.read();
        cumoe_parameter_t p = parameter();
        const auto array = [&](const void *data, int64_t count) {
            Numbers numbers;
            for (int64_t i = 0; data && i < count; i++)
                numbers.push_back(
                    decode(&bytes[static_cast<size_t>(static_cast<const char *>(data) - state_.data()) +
                                  static_cast<size_t>(i) * size_of(wide_)],
                           wide_));
            return numbers;
        };
        const Numbers all = value_.read();
        State state;
        for (int64_t i = 0; i < values_; i++) state.value.push_back(all[element_of(c_, value_place_, i)]);
        state.master = array(p.master, values_);
        state.moment1 = array(p.moment1, values_);
        state.moment2 = array(p.moment2, values_);
        state.row_mean = array(p.row_mean, c_.experts * c_.rows);
        state.col_mean = array(p.col_mean, c_.experts * c_.cols);
        state.average = array(p.average, c_.experts);
        return state;
    }

    void step(const Call &call)
    {
        const cumoe_optimizer_call_t numbers = {call.learning_rate, call.gradient_scale, call.step, call.skip};
        Buffer<cumoe_optimizer_call_t> device_call(std::vector<cumoe_optimizer_call_t>{numbers});
        const cumoe::Device device = {0, 1, 80}; // one SM: blocks have several pieces of work each
        cumoe_context_t context = {};
        context.config.dtype = c_.dtype;
        context.device = const_cast<cumoe::Device *>(&device);
        cumoe_optimizer_args_t args = {};
        args.beta1 = kBeta1, args.beta2 = kBeta2, args.epsilon = kEpsilon, args.weight_decay = kDecay;
        if (on_device_)
            args.call = device_call.data();
        else
            args.values = numbers;
        args.state = state_.data();
        args.state_size = static_cast<size_t>(take_all(nullptr, nullptr));
        const cumoe_parameter_t p = parameter();
        EXPECT(cumoe::optimizer_step(context, args, &p, 1, nullptr) == cudaSuccess, "%s", c_.name);
        EXPECT(cudaStreamSynchronize(nullptr) == cudaSuccess, "%s", c_.name);
    }

    void equal(const char *what, const Call &call, const Numbers &found, const Numbers &expected,
               double tolerance = 0, const Numbers *scale = nullptr)
    {
        EXPECT(found.size() == expected.size(), "%s: %s", c_.name, what);
        for (size_t i = 0; i < found.size() && i < expected.size(); i++) {
            const double off = std::fabs(found[i] - expected[i]);
            const bool near = scale ? off <= tolerance * (*scale)[i] : same(found[i], expected[i]);
            EXPECT(near, "%s, seed %llu, call on device %d, step %lld skip %lld: %s %zu is %.17g, not %.17g",
                   c_.name, static_cast<unsigned long long>(seed_), on_device_, static_cast<long long>(call.step),
                   static_cast<long long>(call.skip), what, i, found[i], expected[i]);
        }
    }

    void check_gaps(const Numbers &before, const Numbers &after)
    {
        std::vector<bool> is_value(before.size());
        for (int64_t i = 0; i < values_; i++) is_value[element_of(c_, value_place_, i)] = true;
        for (size_t i = 0; i < before.size(); i++)
            EXPECT(is_value[i] || same(before[i], after[i]), "%s: a gap is written", c_.name);
    }

    void check(const Call &call, State before, const State &after)
    {
        State expected = before;
        Numbers scale;
        const bool first = call.step == 1;
        if (!call.skip) {
            if (first) {
                for (Numbers *array : {&expected.moment1, &expected.moment2, &expected.row_mean, &expected.col_mean,
                                       &expected.average})
                    std::fill(array->begin(), array->end(), 0);
                if (!expected.master.empty()) expected.master = expected.value;
            }
            if (c_.with_gradient && c_.factored)
                factored(call, &expected, &scale);
            else if (c_.with_gradient && wide_ == CUMOE_F64)
                adam<double>(call, &expected);
            else if (c_.with_gradient)
                adam<float>(call, &expected);
        }
        if (call.skip || !c_.with_gradient || !c_.factored) {
            equal("moment1", call, after.moment1, expected.moment1);
            equal("moment2", call, after.moment2, expected.moment2);
            equal("row_mean", call, after.row_mean, expected.row_mean);
            equal("col_mean", call, after.col_mean, expected.col_mean);
            equal("average", call, after.average, expected.average);
            equal("master", call, after.master, expected.master);
            equal("value", call, after.value, expected.value);
            return;
        }
        // Two sums of squares, of which the root is taken; some roundings beside. A sum is a chain of at most 64
        // squares, one of such sums, and 5 halvings.
        const auto chain = [](int64_t n) {
            return static_cast<double>(std::min<int64_t>(n / 32 + 1, 64) + n / 2048 + 1 + 5 + 6);
        };
        const double unit = wide_ == CUMOE_F64 ? 0x1p-53 : 0x1p-24;
        const double of_rows = chain(c_.cols), of_cols = chain(c_.rows);
        equal("row_mean", call, after.row_mean, expected.row_mean, unit * of_rows, &expected.row_mean);
        equal("col_mean", call, after.col_mean, expected.col_mean, unit * of_cols, &expected.col_mean);
        equal("average", call, after.average, expected.average, unit * (of_rows + 1), &expected.average);
        const double tolerance = unit * (of_rows + of_cols / 2 + 12);
        const Numbers &updated = expected.master.empty() ? expected.value : expected.master;
        equal("updated", call, after.master.empty() ? after.value : after.master, updated, tolerance, &scale);
        Numbers rounded = after.master;
        for (double &number : rounded) number = stored(number, c_.dtype);
        if (!after.master.empty()) equal("value", call, after.value, rounded);
    }

    template <typename Real>
    void adam(const Call &call, State *state)
    {
        const double t = static_cast<double>(call.step), beta1 = static_cast<double>(kBeta1),
                     beta2 = static_cast<double>(kBeta2);
        const Real scale = static_cast<Real>(call.gradient_scale == 0 ? 1 : call.gradient_scale);
        const Real keep1 = static_cast<Real>(beta1), keep2 = static_cast<Real>(beta2);
        const Real rest1 = static_cast<Real>(1 - beta1), rest2 = static_cast<Real>(1 - beta2);
        const Real rate = static_cast<Real>(call.learning_rate / (1 - std::pow(beta1, t)));
        const Real root = static_cast<Real>(1 / std::sqrt(1 - std::pow(beta2, t)));
        const Real decay = static_cast<Real>(call.learning_rate * static_cast<double>(kDecay));
        for (size_t i = 0; i < state->value.size(); i++) {
            double *updated = state->master.empty() ? &state->value[i] : &state->master[i];
            const Real g = scale * static_cast<Real>(gradient_numbers_[i]);
            const Real m = keep1 * static_cast<Real>(state->moment1[i]) + rest1 * g;
            const Real v = keep2 * static_cast<Real>(state->moment2[i]) + rest2 * (g * g);
            Real w = static_cast<Real>(*updated);
            w -= rate * m / (std::sqrt(v) * root + static_cast<Real>(kEpsilon)) + decay * w;
            state->moment1[i] = static_cast<double>(m);
            state->moment2[i] = static_cast<double>(v);
            *updated = static_cast<double>(w);
            state->value[i] = stored(*updated, c_.dtype);
        }
    }

    /* The formula of cumoe/optimizer.h; scale [values]: the summands of an updated value. */
    void factored(const Call &call, State *state, Numbers *scale)
    {
        typedef long double Long;
        const size_t rows = static_cast<size_t>(c_.rows), cols = static_cast<size_t>(c_.cols);
        const Long factor = call.gradient_scale == 0 ? 1 : call.gradient_scale, beta2 = kBeta2;
        const Long rate = call.learning_rate, correction = 1 - std::pow(beta2, static_cast<Long>(call.step));
        for (size_t e = 0; e < static_cast<size_t>(c_.experts); e++) {
            const double *gradient = &gradient_numbers_[e * rows * cols];
            std::vector<Long> r(rows), c(cols);
            Long average = 0;
            for (size_t i = 0; i < rows; i++)
                for (size_t j = 0; j < cols; j++) {
                    const Long g = factor * gradient[i * cols + j], square = g * g + 1e-30L;
                    r[i] += square / static_cast<Long>(cols);
                    c[j] += square / static_cast<Long>(rows);
                }
            for (size_t i = 0; i < rows; i++) {
                r[i] = beta2 * state->row_mean[e * rows + i] + (1 - beta2) * r[i];
                average += r[i] / static_cast<Long>(rows);
                state->row_mean[e * rows + i] = static_cast<double>(r[i]);
            }
            for (size_t j = 0; j < cols; j++) {
                c[j] = beta2 * state->col_mean[e * cols + j] + (1 - beta2) * c[j];
                state->col_mean[e * cols + j] = static_cast<double>(c[j]);
            }
            state->average[e] = static_cast<double>(average);
            for (size_t i = 0; i < rows; i++)
                for (size_t j = 0; j < cols; j++) {
                    const size_t at = (e * rows + i) * cols + j;
                    double *updated = state->master.empty() ? &state->value[at] : &state->master[at];
                    const Long v = r[i] * c[j] / average, w = *updated;
                    const Long change = rate * factor * gradient[i * cols + j] / std::sqrt(v / correction);
                    *updated = static_cast<double>(w - change - rate * kDecay * w);
                    scale->push_back(static_cast<double>(std::fabs(change) + std::fabs(w)));
                }
        }
    }

    const Case &c_;
    uint64_t seed_;
    bool on_device_;
    int64_t values_;
    cumoe_dtype_t wide_; // of the arithmetic
    Place value_place_, gradient_place_;
    Values value_;
    Numbers gradient_numbers_;
    Values gradient_;
    Buffer<char> state_;
};

} // namespace

int main()
{
    for (uint64_t seed = 1; seed <= 2; seed++)
        for (const Case &c : kCases)
            for (const bool on_device : {false, true}) {
                sim_set_seed(seed);
                Run(c, seed, on_device).steps();
            }
    EXPECT(sim_num_objects() == 0, "%lld left", static_cast<long long>(sim_num_objects()));
    return check::result();
}
