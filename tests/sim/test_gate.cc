/* The gate in the simulator. Forward: against double loops, choices within rounding. Backward: the gradients in F64
 * against central differences of those loops. Both, and hostile numbers: bit for bit against the CPU backend. */
#include "tests/sim/buffer.h"
#include "tests/sim/check.h"
#include "tests/sim/gate_cases.h"
#include "tests/sim/simulator.h"

#include <string>

extern "C" {
#include "host/cpu/cpu.h"
}

using namespace gate_case;

namespace
{

/* Host bytes, and their copy on the device; an array of no bytes is there, but for NULL ones. */
struct Array {
    std::vector<char> host;
    Buffer<char> device;
    bool null;
    explicit Array(std::vector<char> bytes, bool is_null = false)
        : host(std::move(bytes)), device(host), null(is_null)
    {
    }
    explicit Array(size_t bytes, bool is_null = false) : Array(std::vector<char>(bytes, '\x3f'), is_null) {}
    void *at(bool on_device)
    {
        return null ? nullptr : on_device ? static_cast<void *>(device.data()) : host.data();
    }
    template <typename T>
    T *of(bool on_device)
    {
        return static_cast<T *>(at(on_device));
    }
    bool same() const
    {
        return device.read() == host;
    }
};

template <typename T>
std::vector<char> bytes_of(const std::vector<T> &values)
{
    const char *begin = reinterpret_cast<const char *>(values.data());
    return std::vector<char>(begin, begin + values.size() * sizeof(T));
}

/* --- The call, on the device and on the CPU. */

struct Run {
    const Case &c;
    const Numbers n;
    cumoe::Device device = {0, 1, 80}; // so that a team gets several tokens
    cumoe_context_t context = {};
    Array x, w_gate, w_noise, bias, mask, call_in, index, index_weight, dweight, loss_gradient;
    Array call, tokens, expert, weight, importance, load;                           // of the routing
    Array primary_group, primary_weight, primary_load, primary_count;               // of HIERARCHICAL
    Array w_gate_primary, w_noise_primary, dw_gate_primary, dw_noise_primary;       // the same
    Array count, importance_out, load_out, losses, statistics;                      // optional outputs
    Array dx_gate, dw_gate, dw_noise, workspace, backward_workspace, cpu_workspace; // backward

    static size_t scratch(const cumoe_context_t &context, const Case &c, bool backward)
    {
        return cumoe::gate_scratch(context, c.tokens, backward, nullptr, c.values).size;
    }
    static cumoe_context_t make_context(const Case &c, cumoe::Device *device)
    {
        cumoe_context_t context = {};
        context.ranks.count = 1;
        (void)cumoe_config_init(&context.config);
        context.config.hidden_size = c.hidden;
        context.config.intermediate_size = 1;
        context.config.num_experts = c.experts;
        context.config.top_k = c.top_k;
        context.config.gate = c.gate;
        context.config.renormalize = c.renormalize;
        context.config.num_groups = c.groups;
        context.config.top_k_groups = c.top_k_groups;
        context.config.loss_weight[CUMOE_LOSS_SWITCH] = 0.3f;
        context.config.loss_weight[CUMOE_LOSS_Z] = 0.2f;
        context.config.dtype = c.dtype;
        context.config.noise_stream = 3;
        if (c.hostile) context.config.noise_epsilon = 0;
        context.config.max_threads = 1;
        context.device = device;
        return context;
    }

    Run(const Case &which, uint64_t seed)
        : c(which), n(make_numbers(which, seed)), context(make_context(which, &device)), x(n.x_bytes),
          w_gate(n.w_gate_bytes, c.gate == kOutside), w_noise(n.w_noise_bytes, !noisy()),
          bias(n.bias_bytes, c.gate != kSigmoid || c.scores == kPlain), mask(bytes_of(n.mask), !c.mask),
          call_in(bytes_of(std::vector<cumoe_call_t>{{kSeed, kOffset, kFirstToken, c.live}}), c.live == c.tokens),
          index(bytes_of(n.index), c.gate != kOutside), index_weight(n.index_weight_bytes, c.gate != kOutside),
          dweight(n.dweight_bytes), loss_gradient(n.loss_bytes, !c.given_loss), call(sizeof(cumoe_call_t)),
          tokens(8), expert(slots() * 4), weight(slots() * real()), importance(experts() * 8), load(experts() * 8),
          primary_group(choices() * 4, c.gate != kGroups), primary_weight(choices() * real(), c.gate != kGroups),
          primary_load(groups() * 8, c.gate != kGroups), primary_count(groups() * 4, c.gate != kGroups),
          w_gate_primary(n.w_gate_primary_bytes, c.gate != kGroups),
          w_noise_primary(n.w_noise_primary_bytes, c.gate != kGroups),
          dw_gate_primary(groups() * static_cast<size_t>(n.H) * real(), !c.gradients || c.gate != kGroups),
          dw_noise_primary(groups() * static_cast<size_t>(n.H) * real(), !c.gradients || c.gate != kGroups),
          count(experts() * 4, !c.optional), importance_out(experts() * real(), !c.optional),
          load_out(experts() * real(), !c.optional), losses(CUMOE_NUM_LOSSES * real(), !c.optional),
          statistics(sizeof(cumoe_statistics_t), !c.optional),
          dx_gate(static_cast<size_t>(n.T * n.H) * real(), !c.gradients),
          dw_gate(experts() * static_cast<size_t>(n.H) * real(), !c.gradients),
          dw_noise(experts() * static_cast<size_t>(n.H) * real(), !c.gradients || !noisy()),
          workspace(scratch(context, c, false)), backward_workspace(scratch(context, c, true)),
          cpu_workspace(64 + std::max(cumoe__cpu_gate_workspace(&context, n.T),
                                      cumoe__cpu_gate_backward_workspace(&context, n.T)))
    {
    }
    size_t slots() const
    {
        return static_cast<size_t>(n.T * n.K);
    }
    bool noisy() const
    {
        return c.gate == kNoisy || c.gate == kGroups;
    }
    size_t choices() const
    {
        return static_cast<size_t>(n.T * c.top_k_groups);
    }
    size_t groups() const
    {
        return static_cast<size_t>(c.groups);
    }
    size_t experts() const
    {
        return static_cast<size_t>(n.E);
    }
    size_t real() const
    {
        return size_of(n.real);
    }

    cumoe_weights_t weights(bool on_device)
    {
        cumoe_weights_t w = {};
        w.gate_dtype = n.weight_dtype;
        w.w_gate = w_gate.at(on_device);
        w.w_noise = w_noise.at(on_device);
        w.gate_bias = bias.at(on_device);
        w.w_gate_primary = w_gate_primary.at(on_device);
        w.w_noise_primary = w_noise_primary.at(on_device);
        return w;
    }
    cumoe_routing_t routing(bool d)
    {
        cumoe_routing_t r = {};
        r.call = call.of<cumoe_call_t>(d);
        r.tokens = tokens.of<int64_t>(d);
        r.expert = expert.of<int32_t>(d);
        r.weight = weight.at(d);
        r.importance = importance.of<int64_t>(d);
        r.load = load.of<int64_t>(d);
        r.primary_group = primary_group.of<int32_t>(d);
        r.primary_weight = primary_weight.at(d);
        r.primary_load = primary_load.of<int64_t>(d);
        r.primary_count = primary_count.of<int32_t>(d);
        return r;
    }
    void *aligned_cpu_workspace()
    {
        return reinterpret_cast<void *>((reinterpret_cast<uintptr_t>(cpu_workspace.host.data()) + 63) / 64 * 64);
    }

    void forward(bool d)
    {
        const cumoe_weights_t w = weights(d);
        cumoe_gate_args_t args = {};
        args.num_tokens = n.T;
        args.weights = &w;
        args.x = x.at(d);
        args.x_stride = n.stride;
        args.token_mask = mask.of<uint8_t>(d);
        args.training = c.training;
        args.seed = kSeed;
        args.offset = kOffset;
        args.first_token = kFirstToken;
        args.call = call_in.of<cumoe_call_t>(d);
        args.index = index.at(d);
        args.index_dtype = CUMOE_I64;
        args.index_weight = index_weight.at(d);
        args.index_weight_dtype = c.dtype;
        args.routing = routing(d);
        args.expert_count = count.of<int32_t>(d);
        args.importance = importance_out.at(d);
        args.load = load_out.at(d);
        args.losses = losses.at(d);
        args.statistics = statistics.of<cumoe_statistics_t>(d);
        args.workspace = d ? workspace.at(true) : aligned_cpu_workspace();
        if (d)
            EXPECT(cumoe::gate_by_blocks(context, args, c.values, nullptr) == cudaSuccess, "%s", c.name);
        else
            (void)cumoe__cpu_gate(&context, &args, nullptr);
    }

    void backward(bool d)
    {
        const cumoe_weights_t w = weights(d);
        cumoe_weights_t g = {};
        g.gate_dtype = n.real;
        g.w_gate = dw_gate.at(d);
        g.w_noise = dw_noise.at(d);
        g.w_gate_primary = dw_gate_primary.at(d);
        g.w_noise_primary = dw_noise_primary.at(d);
        cumoe_gate_backward_args_t args = {};
        args.num_tokens = n.T;
        args.weights = &w;
        args.x = x.at(d);
        args.x_stride = n.stride;
        args.token_mask = mask.of<uint8_t>(d);
        args.training = c.training;
        args.routing = routing(d);
        args.dweight = dweight.at(d);
        args.loss_gradient = loss_gradient.at(d);
        args.dx_gate = dx_gate.at(d);
        args.gradients = &g;
        args.gradient_mode = c.add ? CUMOE_GRADIENT_ADD : CUMOE_GRADIENT_WRITE;
        args.workspace = d ? backward_workspace.at(true) : aligned_cpu_workspace();
        if (d)
            EXPECT(cumoe::gate_backward_by_blocks(context, args, c.values, nullptr) == cudaSuccess, "%s", c.name);
        else
            (void)cumoe__cpu_gate_backward(&context, &args, nullptr);
    }
};

template <typename T>
std::vector<T> values_of(const Array &array)
{
    const std::vector<char> bytes = array.device.read();
    std::vector<T> values(bytes.size() / sizeof(T));
    if (!bytes.empty()) memcpy(values.data(), bytes.data(), bytes.size());
    return values;
}

bool near(double value, double expected, double limit)
{
    if (std::isnan(expected)) return std::isnan(value); // its bits are the machine's
    return value == expected || std::fabs(value - expected) <= limit * (1 + std::fabs(expected));
}

/* F32 logits are chains of H terms; noise multiplies their error. */
double limit_of(const Numbers &n)
{
    return n.real == kF64 ? 1e-11 : 3e-6 * std::sqrt(static_cast<double>(n.H));
}

void check_forward(const Run &run)
{
    const Case &c = run.c;
    const Numbers &n = run.n;
    const Expected expected = plain_loops(c, n);
    const double limit = limit_of(n);
    const std::vector<int32_t> expert = values_of<int32_t>(run.expert);
    const std::vector<double> weight = decode(n.real, run.weight.device.read());
    for (int64_t t = 0; t < n.T; t++) {
        const bool counts = t < n.live && n.mask[static_cast<size_t>(t)];
        for (int64_t j = 0; j < n.K; j++) {
            const size_t slot = static_cast<size_t>(t * n.K + j);
            EXPECT(near(weight[slot], counts ? expected.weight[slot] : 0, limit), "%s: weight %zu: %g, not %g",
                   c.name, slot, weight[slot], expected.weight[slot]);
            EXPECT(counts ? expert[slot] >= 0 && expert[slot] < n.E : expert[slot] == -1, "%s: expert %zu: %d",
                   c.name, slot, expert[slot]);
            if (!counts || expert[slot] < 0) continue;
            const double *noisy = expected.noisy.data() + t * n.E;
            const int wanted = expected.order[static_cast<size_t>(t)][static_cast<size_t>(j)];
            EXPECT(near(noisy[expert[slot]], noisy[wanted], limit), "%s: choice %zu: %d, not %d", c.name, slot,
                   expert[slot], wanted);
        }
    }
    const std::vector<int64_t> importance = values_of<int64_t>(run.importance), load = values_of<int64_t>(run.load);
    const double unit = 1 / static_cast<double>(int64_t{1} << CUMOE_FIXED_POINT_BITS(n.real));
    for (size_t e = 0; e < importance.size(); e++) {
        const double sums = 10 * limit * static_cast<double>(1 + n.T);
        EXPECT(near(static_cast<double>(importance[e]) * unit, expected.importance[e], sums), "%s: importance %zu",
               c.name, e);
        EXPECT(near(static_cast<double>(load[e]) * unit, expected.load[e], sums), "%s: load %zu: %g, not %g",
               c.name, e, static_cast<double>(load[e]) * unit, expected.load[e]);
    }
    if (!c.optional) return;
    const std::vector<double> losses = decode(n.real, run.losses.device.read());
    for (size_t i = 0; i < losses.size(); i++)
        EXPECT(near(losses[i], i < 2 ? expected.loss[i] : 0, 100 * limit), "%s: loss %zu: %g, not %g", c.name, i,
               losses[i], expected.loss[i]);
}

/* <gradients, direction> against central differences of the loss. F64. */
void check_gradients(const Run &run, uint64_t seed)
{
    const Case &c = run.c;
    std::mt19937_64 random(seed);
    std::normal_distribution<double> normal;
    const std::vector<double> dx = decode(kF64, run.dx_gate.device.read()),
                              dw = decode(kF64, run.dw_gate.device.read()),
                              dn = decode(kF64, run.dw_noise.device.read());
    const std::vector<double> old = decode(kF64, run.dw_gate.host);
    for (int which = 0; which < (c.gate == kNoisy ? 3 : 2); which++) {
        Numbers moved[2] = {run.n, run.n};
        const double step = 1e-6;
        double slope = 0;
        const auto move = [&](std::vector<double> Numbers::*array, size_t at, double gradient) {
            const double direction = normal(random);
            slope += direction * gradient;
            (moved[0].*array)[at] -= step * direction;
            (moved[1].*array)[at] += step * direction;
        };
        for (int64_t t = 0; which == 0 && t < run.n.live; t++)
            for (int64_t h = 0; h < run.n.H; h++)
                if (run.n.mask[static_cast<size_t>(t)])
                    move(&Numbers::x, static_cast<size_t>(t * run.n.stride + h),
                         dx[static_cast<size_t>(t * run.n.H + h)]);
        for (size_t i = 0; which == 1 && i < dw.size(); i++)
            move(&Numbers::w_gate, i, dw[i] - (c.add ? old[i] : 0));
        for (size_t i = 0; which == 2 && i < dn.size(); i++)
            move(&Numbers::w_noise, i, dn[i] - (c.add ? old[0] : 0));
        double value[2];
        for (int side = 0; side < 2; side++) {
            const Expected at = plain_loops(c, moved[side]);
            value[side] = 0;
            for (size_t i = 0; i < at.weight.size(); i++) value[side] += at.weight[i] * run.n.dweight[i];
            value[side] += at.loss[0] * run.n.loss_gradient[0];
            if (c.gate == kNoisy && c.training && run.n.K < run.n.E)
                value[side] += at.loss[1] * run.n.loss_gradient[1];
        }
        const double expected = (value[1] - value[0]) / (2 * step);
        EXPECT(near(slope, expected, 1e-6), "%s: slope %d: %.10g, not %.10g", c.name, which, slope, expected);
    }
}

/* What the CPU backend has computed in host memory: bit for bit, but for what hangs on CV^2, whose squares are
 * summed in another order. That is lost in the rounding of F32. */
void check_same(const Run &run, bool backward)
{
    const Case &c = run.c;
    const auto same = [&](const Array &array, const char *name) {
        if (array.null || array.same()) return;
        const std::vector<char> device = array.device.read();
        size_t at = 0;
        while (device[at] == array.host[at]) at++;
        EXPECT(false, "%s: %s differs from the CPU's at byte %zu of %zu", c.name, name, at, device.size());
    };
    const auto nearly_same = [&](const Array &array, const char *name) {
        const bool sliced = cumoe::gate_slices(run.context.config, c.tokens) > 1 && &array != &run.dx_gate;
        const double limit = run.n.real == kF64 ? 1e-13 : sliced ? 2e-5 : 0;
        const std::vector<double> a = decode(run.n.real, array.device.read()), b = decode(run.n.real, array.host);
        for (size_t i = 0; i < a.size() && !array.null; i++)
            EXPECT(near(a[i], b[i], limit) &&
                       (limit > 0 || std::signbit(a[i]) == std::signbit(b[i]) || b[i] != b[i]),
                   "%s: %s %zu: %.17g, not %.17g", c.name, name, i, a[i], b[i]);
    };
    same(run.call, "call");
    same(run.expert, "expert");
    same(run.weight, "weight");
    same(run.importance, "fixed importance");
    same(run.load, "fixed load");
    same(run.primary_group, "primary_group");
    same(run.primary_weight, "primary_weight");
    same(run.primary_load, "primary_load");
    same(run.primary_count, "primary_count");
    same(run.count, "expert_count");
    same(run.importance_out, "importance");
    same(run.load_out, "load");
    if (!run.statistics.null) {
        const cumoe_statistics_t a = values_of<cumoe_statistics_t>(run.statistics)[0];
        cumoe_statistics_t b;
        memcpy(&b, run.statistics.host.data(), sizeof b);
        EXPECT(memcmp(&a, &b, offsetof(cumoe_statistics_t, cv_importance)) == 0, "%s: counters", c.name);
        EXPECT(near(a.cv_importance, b.cv_importance, 1e-13) && near(a.cv_load, b.cv_load, 1e-13) &&
                   near(a.max_over_mean_load, b.max_over_mean_load, 1e-13) &&
                   a.max_over_mean_count == b.max_over_mean_count && a.reserved[3] == 0,
               "%s: statistics", c.name);
    }
    if (!run.losses.null) {
        const std::vector<double> a = decode(run.n.real, run.losses.device.read()),
                                  b = decode(run.n.real, run.losses.host);
        for (size_t i = 0; i < a.size(); i++)
            EXPECT(near(a[i], b[i], run.n.real == kF64 ? 1e-13 : 1e-7), "%s: loss %zu", c.name, i);
    }
    if (!backward) return;
    nearly_same(run.dx_gate, "dx_gate");
    nearly_same(run.dw_gate, "dw_gate");
    nearly_same(run.dw_noise, "dw_noise");
    nearly_same(run.dw_gate_primary, "dw_gate_primary");
    nearly_same(run.dw_noise_primary, "dw_noise_primary");
}

void run_case(const Case &c, uint64_t seed)
{
    sim_set_seed(seed);
    Run run(c, seed);
    run.forward(true);
    const bool in_loops = c.gate == kNoisy || c.gate == kDense; // the others have the CPU backend alone
    if (!c.hostile && in_loops) check_forward(run);
    run.forward(false);
    if (c.gate != kOutside) {
        run.backward(true);
        if (c.dtype == kF64 && c.gradients && in_loops && run.n.live > 0) check_gradients(run, seed);
        run.backward(false);
    }
    check_same(run, c.gate != kOutside);
}

/* Sums over many tokens and experts, which together pass 2^64: the gradients are those of sums that are 2^41 times
 * smaller, divided by that. */
void check_huge_sums()
{
    const int64_t units[] = {3, 2, 1, 1, 1, 0}; // together 2^3
    const Case c = {"huge sums", 12, 12, 5, 6, 2, kNoisy, kF64};
    std::vector<double> gradients[2];
    for (int huge = 0; huge < 2; huge++) {
        Run run(c, 1);
        run.forward(true);
        const std::vector<double> nothing(run.slots());
        (void)cudaMemcpy(run.dweight.at(true), nothing.data(), 8 * nothing.size(), cudaMemcpyHostToDevice);
        std::vector<int64_t> sums;
        for (int64_t value : units) sums.push_back(value << (huge ? 61 : 20));
        (void)cudaMemcpy(run.importance.at(true), sums.data(), 8 * sums.size(), cudaMemcpyHostToDevice);
        (void)cudaMemcpy(run.load.at(true), sums.data(), 8 * sums.size(), cudaMemcpyHostToDevice);
        run.backward(true);
        for (const Array *array : {&run.dx_gate, &run.dw_gate, &run.dw_noise})
            for (double value : decode(kF64, array->device.read()))
                gradients[huge].push_back(std::ldexp(value, huge ? 41 : 0));
    }
    double largest = 0;
    for (double value : gradients[0]) largest = std::max(largest, std::fabs(value));
    EXPECT(largest > 1, "%s: gradients of at most %g", c.name, largest);
    EXPECT(gradients[0] == gradients[1], "%s: not those of small ones", c.name);
}

/* Scratch of HIERARCHICAL: 4 T (G + K1 E/G) values, and maps; nothing of T * E. */
void check_groups_workspace()
{
    const Case cases[] = {
        with_groups({"512 of 256", 8192, 8192, 4096, 131072, 4}, 512, 2),
        with_groups({"256 of 16", 8192, 8192, 1024, 4096, 4, kNoisy, kF64}, 256, 4),
        with_groups({"64 of 2048", 4096, 4096, 512, 1 << 17, 8}, 64, 2),
    };
    cumoe::Device device = {0, 132, 90};
    for (const Case &c : cases) {
        const cumoe_context_t context = Run::make_context(c, &device);
        const size_t real = c.dtype == kF64 ? 8 : 4, T = static_cast<size_t>(c.tokens);
        const size_t choices = T * static_cast<size_t>(c.top_k_groups);
        const size_t values =
            T * static_cast<size_t>(c.groups) + choices * static_cast<size_t>(c.experts / c.groups);
        const size_t others = 40 * choices + 64 * static_cast<size_t>(c.experts) + (size_t{40} << 20);
        for (bool backward : {false, true}) {
            const size_t size = cumoe::gate_scratch(context, c.tokens, backward, nullptr).size;
            EXPECT(size <= 4 * values * real + others, "%s: %zu bytes of scratch", c.name, size);
        }
    }
}

} // namespace

int main(int argc, char **argv)
{
    const std::string only = argc > 1 ? argv[1] : "";
    int failed = 0;
    for (uint64_t seed = 1; seed <= 3; seed++)
        for (const Case &c : kCases) {
            if (!only.empty() && only != c.name) continue;
            if (seed > 1 && (c.experts > 1000 || c.tokens > 1000)) continue; // they take long
            const int before = check::failures;
            run_case(c, seed);
            if (check::failures == before) continue;
            printf("%s failed with seed %llu\n", c.name, static_cast<unsigned long long>(seed));
            if (++failed == 3) return check::result(); // mutants are many
        }
    if (only.empty()) {
        check_huge_sums();
        check_groups_workspace();
    }
    EXPECT(sim_num_objects() == 0, "%lld left", static_cast<long long>(sim_num_objects()));
    return check::result();
}
