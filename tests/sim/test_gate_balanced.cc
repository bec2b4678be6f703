/* Gate BALANCED in the simulator. What is taken, against sorted lists of the g that the kernels made; everything,
 * and the backward pass, bit for bit against the CPU backend. */
#include "cuda/gate_balanced.cuh"
#include "tests/sim/buffer.h"
#include "tests/sim/check.h"
#include "tests/sim/gate_case.h"
#include "tests/sim/simulator.h"

#include <string>

extern "C" {
#include "host/cpu/cpu.h"
}

using gate_case::decode;
using gate_case::encode;
using gate_case::kBf16;
using gate_case::kF16;
using gate_case::kF32;
using gate_case::kF64;
using gate_case::size_of;

namespace
{

enum Kind {
    kAny,
    kFew,     // kinds of tokens: many equal g
    kEqual,   // all g are
    kWide,    // logits so far apart that most g are 0
    kHostile, // NaN, Inf and -Inf
};
enum Thresholds { kMiddle, kLow /* -1 */, kHigh /* 2 */, kNan, kMixed };

struct Case {
    const char *name;
    int64_t tokens, live;
    int32_t hidden, experts, top_k;
    bool training = true;
    Kind kind = kAny;
    Thresholds thresholds = kMiddle;
    cumoe_dtype_t dtype = kF32;
    int mask = 0; // 1: some tokens, 2: all
    int64_t max_rows = 0;
    int64_t values = cumoe::kGateValues;
    bool add = false;       // to the gradients
    bool optional = true;   // outputs that may be NULL are there, and so are all gradients
    bool given_loss = true; // loss_gradient is there
};

const Case kCases[] = {
    {"no token", 0, 0, 4, 3, 2},
    {"no token, thresholds", 0, 0, 4, 3, 2, false},
    {"no live token", 40, 0, 4, 3, 2},
    {"no live token, thresholds", 40, -1, 4, 3, 2, false},
    {"one token", 1, 1, 4, 3, 2},
    {"one token, thresholds", 1, 1, 4, 3, 2, false, kAny, kLow},
    {"one expert", 70, 70, 4, 1, 1},
    {"one expert, thresholds", 70, 66, 4, 1, 1, false, kAny, kMixed},
    {"all masked", 33, 33, 4, 5, 2, true, kAny, kMiddle, kF32, 2},
    {"all masked, thresholds", 33, 33, 4, 5, 2, false, kAny, kLow, kF32, 2},
    {"m is 1", 9, 9, 4, 20, 2},
    {"m is T", 12, 12, 4, 6, 6},
    {"more experts than tokens", 5, 5, 3, 90, 3, true, kAny, kMixed, kF32, 1},
    {"sizes off every tile", 150, 140, 7, 37, 3, true, kAny, kMiddle, kBf16, 1},
    {"blocks of tokens", 300, 290, 5, 9, 2, true, kAny, kMiddle, kF32, 1, 0, 1},
    {"ADD, in double", 130, 130, 5, 7, 3, true, kAny, kMiddle, kF64, 1, 0, 1, true},
    {"few kinds of tokens", 200, 190, 4, 8, 2, true, kFew, kMixed, kF32, 1},
    {"few kinds, in double", 90, 90, 4, 8, 3, true, kFew, kMiddle, kF64},
    {"all equal", 100, 97, 4, 8, 2, true, kEqual},
    {"all equal, several digits of tokens", 2500, 2490, 1, 3, 1, true, kEqual, kMiddle, kF16},
    {"most g are 0", 80, 80, 4, 8, 2, true, kWide, kMixed},
    {"hostile", 120, 111, 4, 9, 2, true, kHostile, kMixed, kF32, 1},
    {"hostile, in double", 60, 60, 4, 9, 4, true, kHostile, kMixed, kF64, 0, 0, 1, true},
    {"NaN thresholds", 40, 40, 4, 6, 2, true, kAny, kNan},
    {"low thresholds", 40, 40, 4, 6, 2, true, kHostile, kLow},
    {"high thresholds", 40, 40, 4, 6, 2, true, kAny, kHigh},
    {"nothing wanted", 40, 40, 4, 6, 2, true, kAny, kMiddle, kF32, 0, 0, 1, false, false},
    {"config's loss weights", 40, 40, 4, 6, 2, true, kAny, kMiddle, kF32, 0, 0, 1, true, true, false},
    {"several rounds of the scan", 33000, 70, 1, 2, 1, true, kFew, kMiddle, kF32, 1},
    {"more experts than shared sums", 40, 38, 2, 2060, 2, false, kFew, kMixed, kF32, 1},
    // By thresholds.
    {"inference", 150, 140, 7, 37, 3, false, kAny, kMiddle, kBf16, 1},
    {"inference in blocks", 300, 290, 5, 9, 2, false, kAny, kMiddle, kF32, 1, 0, 1},
    {"a cut", 200, 190, 4, 8, 2, false, kAny, kMiddle, kF32, 1, 60},
    {"a cut of more rows than T * K", 100, 100, 4, 8, 1, false, kAny, kLow, kF32, 0, 500},
    {"a cut in double", 90, 90, 4, 8, 2, false, kAny, kLow, kF64, 0, 100},
    {"a cut to one row", 90, 90, 4, 8, 2, false, kFew, kLow, kF32, 0, 1},
    {"a cut through equal ones", 100, 97, 4, 8, 2, false, kEqual, kLow, kF32, 1, 77},
    {"a cut through few kinds", 200, 190, 4, 8, 2, false, kFew, kMixed, kF16, 0, 111},
    {"a cut through zeros", 80, 80, 4, 8, 3, false, kWide, kLow, kF32, 0, 150},
    {"zeros at the thresholds", 80, 80, 4, 8, 3, false, kWide, kMixed},
    {"as many as there is room for", 20, 20, 4, 5, 5, false, kAny, kLow},
    {"a hostile cut", 120, 111, 4, 9, 2, false, kHostile, kLow, kF32, 1, 200},
    {"hostile inference, in double", 60, 60, 4, 9, 4, false, kHostile, kMixed, kF64},
    {"NaN thresholds of inference", 40, 40, 4, 6, 2, false, kAny, kNan},
    {"high thresholds of inference", 40, 40, 4, 6, 2, false, kAny, kHigh},
    {"ADD of inference", 40, 40, 4, 6, 2, false, kAny, kMiddle, kF32, 0, 0, 1, true},
    {"a cut of many", 2200, 2190, 1, 61, 2, false, kFew, kLow, kF32, 0, 5000},
    {"a cut of several chunks", 5000, 4990, 1, 3, 1, false, kAny, kLow, kF32, 1, 2345},
};

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
    template <typename T = void>
    T *at(bool on_device)
    {
        return null ? nullptr : reinterpret_cast<T *>(on_device ? device.data() : host.data());
    }
    template <typename T>
    std::vector<T> values() const
    {
        const std::vector<char> bytes = device.read();
        std::vector<T> values(bytes.size() / sizeof(T));
        if (!bytes.empty()) memcpy(values.data(), bytes.data(), values.size() * sizeof(T));
        return values;
    }
};

template <typename T>
std::vector<char> bytes_of(const std::vector<T> &values)
{
    const char *begin = reinterpret_cast<const char *>(values.data());
    return std::vector<char>(begin, begin + values.size() * sizeof(T));
}

struct Numbers {
    std::vector<double> x, w_gate, thresholds;
    std::vector<uint8_t> mask;
    std::vector<char> x_bytes, w_gate_bytes, threshold_bytes, dweight_bytes, loss_bytes;
    cumoe_dtype_t real;
};

Numbers make_numbers(const Case &c, int64_t slots, uint64_t seed)
{
    std::mt19937_64 random(seed);
    std::normal_distribution<double> normal;
    const size_t T = static_cast<size_t>(c.tokens), E = static_cast<size_t>(c.experts),
                 H = static_cast<size_t>(c.hidden);
    const auto draw = [&](size_t count, double scale) {
        std::vector<double> values(count);
        for (double &v : values) v = scale * normal(random);
        return values;
    };
    Numbers n = {};
    n.real = c.dtype == kF64 ? kF64 : kF32;
    n.x = draw(T * H, c.kind == kWide ? 300 : 1);
    n.w_gate = draw(E * H, 1);
    for (size_t e = 0; e < E; e++) {
        const double low = c.experts == 1 ? 0.5 : 0.8 / static_cast<double>(E);
        const double values[] = {low, -1, 2, NAN, e % 4 == 0 ? -1 : e % 4 == 1 ? NAN : e % 4 == 2 ? low : 0};
        n.thresholds.push_back(values[c.thresholds]);
    }
    for (size_t t = 0; t < T; t++) n.mask.push_back(c.mask == 0 || (c.mask == 1 && random() % 4 > 0));
    for (size_t t = 0; c.kind == kFew && t < T; t++) // three of them
        for (size_t h = 0; h < H; h++) n.x[t * H + h] = n.x[t % 3 * H + h];
    for (double &x : n.x)
        if (c.kind == kEqual) x = 0;
    for (size_t e = 0; c.kind == kHostile && e < E; e++) n.w_gate[e * H] = std::fabs(n.w_gate[e * H]) + 0.1;
    for (size_t t = 0; c.kind == kHostile && t < T; t++) {
        const double values[] = {NAN, INFINITY, -INFINITY, 1e30, -1e30};
        if (t % 7 < 5) n.x[t * H] = values[t % 7];
        if (t % 7 == 5) n.x[t * H + 1] = INFINITY; // to some experts +Inf, to others -Inf
    }
    if (c.kind == kHostile) { // experts that may take none, and only some
        n.w_gate[E * H - 1] = NAN;
        n.w_gate[(E - 2) * H + 2] = -INFINITY;
    }
    // What is masked or not live may hold anything.
    for (size_t t = 0; t < T; t++)
        for (size_t h = 0; h < H; h++)
            if (static_cast<int64_t>(t) >= c.live || !n.mask[t]) n.x[t * H + h] = NAN;
    std::vector<double> dweight = draw(static_cast<size_t>(slots), 1), loss = draw(CUMOE_NUM_LOSSES, 1);
    n.x_bytes = encode(c.dtype, n.x);
    n.w_gate_bytes = encode(n.real, n.w_gate);
    n.threshold_bytes = encode(n.real, n.thresholds);
    n.dweight_bytes = encode(n.real, dweight);
    n.loss_bytes = encode(n.real, loss);
    return n;
}

/* --- The call, on the device and on the CPU. */

struct Run {
    const Case &c;
    cumoe::Device device;
    cumoe_context_t context;
    const int64_t live, max_rows, max_slots;
    const Numbers n;
    const size_t T, E, H, slots, real;
    Array x, w_gate, thresholds, mask, call_in, dweight, loss_gradient;
    Array call, tokens, expert, weight, importance, load, token_slot, slot_token, excess;
    Array count, importance_out, load_out, batch_threshold, losses, statistics;
    Array dx_gate, dw_gate, dthresholds, workspace, backward_workspace, cpu_workspace;

    static cumoe_context_t make_context(const Case &c, cumoe::Device *device)
    {
        cumoe_context_t context = {};
        context.ranks.count = 1;
        (void)cumoe_config_init(&context.config);
        context.config.hidden_size = c.hidden;
        context.config.intermediate_size = 1;
        context.config.num_experts = c.experts;
        context.config.top_k = c.top_k;
        context.config.gate = CUMOE_GATE_BALANCED;
        context.config.max_rows = c.max_rows;
        context.config.dtype = c.dtype;
        context.config.max_threads = 1;
        context.device = device;
        return context;
    }
    size_t scratch(bool backward) const
    {
        const size_t size = cumoe::gate_scratch(context, c.tokens, backward, nullptr, c.values).size;
        return backward ? size : cumoe::balanced_scratch(context, c.tokens, nullptr, size).end;
    }

    Run(const Case &which, uint64_t seed)
        : c(which), device{0, seed % 2 ? 1 : 3, 80}, context(make_context(c, &device)),
          live(std::clamp<int64_t>(c.live, 0, c.tokens)), max_rows(cumoe__max_rows(&context.config, c.tokens)),
          max_slots(cumoe__max_slots(&context.config, c.tokens)), n(make_numbers(c, max_slots, seed)),
          T(static_cast<size_t>(c.tokens)), E(static_cast<size_t>(c.experts)), H(static_cast<size_t>(c.hidden)),
          slots(static_cast<size_t>(max_slots)), real(size_of(n.real)), x(n.x_bytes), w_gate(n.w_gate_bytes),
          thresholds(n.threshold_bytes), mask(bytes_of(n.mask), c.mask == 0),
          call_in(bytes_of(std::vector<cumoe_call_t>{{0, 0, 0, c.live}}), c.live == c.tokens),
          dweight(n.dweight_bytes), loss_gradient(n.loss_bytes, !c.given_loss), call(sizeof(cumoe_call_t)),
          tokens(8), expert(slots * 4), weight(slots * real), importance(E * 8), load(E * 8),
          token_slot((T + 1) * 4), slot_token(slots * 4), excess(E * 4), count(E * 4, !c.optional),
          importance_out(E * real, !c.optional), load_out(E * real, !c.optional),
          batch_threshold(E * real, !c.optional || !c.training), losses(CUMOE_NUM_LOSSES * real, !c.optional),
          statistics(sizeof(cumoe_statistics_t), !c.optional), dx_gate(T * H * real, !c.optional),
          dw_gate(E * H * real, !c.optional), dthresholds(E * real, !c.optional), workspace(scratch(false)),
          backward_workspace(scratch(true)),
          cpu_workspace(64 + std::max(cumoe__cpu_gate_workspace(&context, c.tokens),
                                      cumoe__cpu_gate_backward_workspace(&context, c.tokens)))
    {
    }

    cumoe_weights_t weights(bool d)
    {
        cumoe_weights_t w = {};
        w.gate_dtype = n.real;
        w.w_gate = w_gate.at(d);
        w.thresholds = thresholds.at(d);
        return w;
    }
    cumoe_routing_t routing(bool d)
    {
        cumoe_routing_t r = {};
        r.call = call.at<cumoe_call_t>(d);
        r.tokens = tokens.at<int64_t>(d);
        r.expert = expert.at<int32_t>(d);
        r.weight = weight.at(d);
        r.importance = importance.at<int64_t>(d);
        r.load = load.at<int64_t>(d);
        r.token_slot = token_slot.at<int32_t>(d);
        r.slot_token = slot_token.at<int32_t>(d);
        r.excess = excess.at<int32_t>(d);
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
        args.num_tokens = c.tokens;
        args.weights = &w;
        args.x = x.at(d);
        args.x_stride = c.hidden;
        args.token_mask = mask.at<uint8_t>(d);
        args.training = c.training;
        args.call = call_in.at<cumoe_call_t>(d);
        args.routing = routing(d);
        args.expert_count = count.at<int32_t>(d);
        args.importance = importance_out.at(d);
        args.load = load_out.at(d);
        args.batch_threshold = batch_threshold.at(d);
        args.losses = losses.at(d);
        args.statistics = statistics.at<cumoe_statistics_t>(d);
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
        g.thresholds = dthresholds.at(d);
        cumoe_gate_backward_args_t args = {};
        args.num_tokens = c.tokens;
        args.weights = &w;
        args.x = x.at(d);
        args.x_stride = c.hidden;
        args.token_mask = mask.at<uint8_t>(d);
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

/* --- The rules, from g as the kernels made it. */

void check_rules(const Run &run)
{
    const Case &c = run.c;
    const size_t live = static_cast<size_t>(run.live);
    const std::vector<char> scratch = run.workspace.device.read();
    const size_t before = cumoe::gate_scratch(run.context, c.tokens, false, nullptr, c.values).size;
    const size_t at = reinterpret_cast<size_t>(cumoe::balanced_scratch(run.context, c.tokens, nullptr, before).g);
    const std::vector<double> g = decode(
        run.n.real, std::vector<char>(scratch.begin() + static_cast<ptrdiff_t>(at),
                                      scratch.begin() + static_cast<ptrdiff_t>(at + run.T * run.E * run.real)));
    int64_t counted = 0;
    for (size_t t = 0; t < live; t++) counted += run.n.mask[t];
    struct Element {
        double g;
        size_t t, e;
    };
    const auto sooner = [](const Element &a, const Element &b) {
        return a.g != b.g ? a.g > b.g : a.t != b.t ? a.t < b.t : a.e < b.e;
    };

    // Who is taken, and what the thresholds would take.
    std::vector<std::vector<size_t>> taken(run.T); // experts, ascending
    std::vector<Element> candidates;
    const int64_t m = counted ? std::max<int64_t>(1, c.top_k * counted / c.experts) : 0;
    const std::vector<int32_t> excess = run.excess.values<int32_t>();
    for (size_t e = 0; e < run.E; e++) {
        std::vector<Element> usable;
        int32_t above = 0;
        for (size_t t = 0; t < live; t++) {
            const Element element = {g[e * run.T + t], t, e};
            EXPECT(element.g == -1 || (element.g >= 0 && element.g <= 1), "%s: g = %g", c.name, element.g);
            if (element.g < 0) continue;
            usable.push_back(element);
            if (!(element.g > run.n.thresholds[e])) continue;
            candidates.push_back(element);
            above++;
        }
        std::sort(usable.begin(), usable.end(), sooner);
        usable.resize(std::min(usable.size(), static_cast<size_t>(m)));
        for (const Element &element : usable)
            if (c.training) taken[element.t].push_back(e);
        const int32_t expected = c.training ? above - static_cast<int32_t>(usable.size()) : 0;
        EXPECT(excess[e] == expected, "%s: excess %zu: %d, not %d", c.name, e, excess[e], expected);
        if (run.batch_threshold.null) continue;
        const double least = decode(run.n.real, run.batch_threshold.device.read())[e];
        EXPECT(least == (usable.empty() ? 0 : usable.back().g), "%s: batch threshold %zu: %g", c.name, e, least);
    }
    if (!c.training) {
        std::sort(candidates.begin(), candidates.end(), sooner);
        const size_t room = static_cast<size_t>(cumoe__max_rows_of_thresholds(&run.context.config, c.tokens));
        if (!run.statistics.null)
            EXPECT(run.statistics.values<cumoe_statistics_t>()[0].dropped_rows ==
                       static_cast<int64_t>(candidates.size() - std::min(room, candidates.size())),
                   "%s: dropped rows", c.name);
        candidates.resize(std::min(candidates.size(), room));
        for (const Element &element : candidates) taken[element.t].push_back(element.e);
        for (std::vector<size_t> &experts : taken) std::sort(experts.begin(), experts.end());
    }

    // Their slots.
    const std::vector<int32_t> expert = run.expert.values<int32_t>(), slot_token = run.slot_token.values<int32_t>(),
                               token_slot = run.token_slot.values<int32_t>();
    const std::vector<double> weight = decode(run.n.real, run.weight.device.read());
    size_t slot = 0;
    for (size_t t = 0; t < run.T; t++) {
        EXPECT(token_slot[t] == static_cast<int32_t>(slot), "%s: token_slot %zu: %d, not %zu", c.name, t,
               token_slot[t], slot);
        double sum = 0;
        for (const size_t e : taken[t]) sum += g[e * run.T + t];
        for (const size_t e : taken[t]) {
            const double expected = sum > 0 ? g[e * run.T + t] / sum : 0;
            EXPECT(expert[slot] == static_cast<int32_t>(e), "%s: expert %zu: %d, not %zu", c.name, slot,
                   expert[slot], e);
            EXPECT(slot_token[slot] == static_cast<int32_t>(t), "%s: slot_token %zu: %d", c.name, slot,
                   slot_token[slot]);
            EXPECT(std::fabs(weight[slot] - expected) < 1e-5, "%s: weight %zu: %g, not %g", c.name, slot,
                   weight[slot], expected);
            slot++;
        }
        // A token of NaN has a slot of its own.
        if (slot < run.slots && taken[t].empty() && std::isnan(weight[slot]) &&
            slot_token[slot] == static_cast<int32_t>(t)) {
            EXPECT(c.kind == kHostile && expert[slot] == -1, "%s: NaN of token %zu", c.name, t);
            slot++;
        }
    }
    EXPECT(token_slot[run.T] == static_cast<int32_t>(slot), "%s: %d slots, not %zu", c.name, token_slot[run.T],
           slot);
    for (; slot < run.slots; slot++)
        EXPECT(expert[slot] == -1 && weight[slot] == 0, "%s: slot %zu is not in use", c.name, slot);
}

/* --- What the CPU backend has computed in host memory. */

bool near(double value, double expected, double limit)
{
    return std::fabs(value - expected) <= limit * (1 + std::fabs(expected)) || value == expected ||
           (std::isnan(value) && std::isnan(expected));
}

void check_same(const Run &run)
{
    const Case &c = run.c;
    const auto same = [&](const Array &array, const char *name, size_t bytes = SIZE_MAX) {
        const std::vector<char> device = array.device.read();
        for (size_t i = 0; !array.null && i < std::min(bytes, device.size()); i++)
            if (device[i] != array.host[i]) {
                EXPECT(false, "%s: %s differs from the CPU's at byte %zu of %zu", c.name, name, i, device.size());
                return;
            }
    };
    // But for what hangs on sums of squares in double, and on gradients in slices.
    const auto nearly_same = [&](const Array &array, const char *name, double single) {
        if (array.null) return;
        const std::vector<double> a = decode(run.n.real, array.device.read()), b = decode(run.n.real, array.host);
        for (size_t i = 0; i < a.size(); i++)
            EXPECT(near(a[i], b[i], run.n.real == kF64 ? 1e-12 : single), "%s: %s %zu: %.17g, not %.17g", c.name,
                   name, i, a[i], b[i]);
    };
    same(run.call, "call");
    same(run.tokens, "tokens");
    same(run.token_slot, "token_slot");
    const size_t used = static_cast<size_t>(run.token_slot.values<int32_t>()[run.T]);
    same(run.expert, "expert", used * 4);
    same(run.slot_token, "slot_token", used * 4);
    same(run.weight, "weight", used * run.real);
    same(run.excess, "excess");
    same(run.importance, "fixed importance");
    same(run.load, "fixed load");
    same(run.count, "expert_count");
    same(run.importance_out, "importance");
    same(run.load_out, "load");
    same(run.batch_threshold, "batch_threshold");
    nearly_same(run.losses, "loss", 1e-6);
    same(run.statistics, "counters", offsetof(cumoe_statistics_t, cv_importance));
    if (!run.dthresholds.null) same(run.dthresholds, "dthresholds");
    const bool sliced = cumoe::gate_slices(run.context.config, c.tokens) > 1;
    if (run.n.real == kF64)
        nearly_same(run.dx_gate, "dx_gate", 0);
    else
        same(run.dx_gate, "dx_gate", static_cast<size_t>(run.live) * run.H * run.real);
    if (run.n.real == kF64 || sliced)
        nearly_same(run.dw_gate, "dw_gate", 2e-5);
    else
        same(run.dw_gate, "dw_gate");
}

void run_case(const Case &c, uint64_t seed)
{
    sim_set_seed(seed);
    Run run(c, seed);
    run.forward(true);
    check_rules(run);
    run.forward(false);
    run.backward(true);
    run.backward(false);
    check_same(run);
}

/* --- The selection bias. */

template <typename Real>
void check_bias(cumoe_dtype_t dtype, std::vector<int32_t> count)
{
    cumoe::Device device = {0, 1, 80};
    cumoe_context_t context = {};
    context.config.num_experts = static_cast<int32_t>(count.size());
    context.config.dtype = dtype;
    context.device = &device;
    std::vector<Real> bias(count.size());
    for (size_t e = 0; e < bias.size(); e++) bias[e] = static_cast<Real>(e) / 7;
    Buffer<Real> device_bias(bias);
    Buffer<int32_t> device_count(count);
    EXPECT(cumoe::gate_bias_update(context, device_bias.data(), device_count.data(), 0.001f, nullptr) ==
               cudaSuccess,
           "bias");
    (void)cumoe__cpu_gate_bias_update(&context, bias.data(), count.data(), 0.001f, nullptr);
    EXPECT(device_bias.read() == bias, "bias of %zu experts", count.size());
}

void check_biases()
{
    std::mt19937_64 random(5);
    for (const size_t experts : {1, 3, 300}) {
        std::vector<int32_t> count(experts);
        for (int32_t &n : count) n = static_cast<int32_t>(random() % 4) + INT32_MAX - 5; // their sum passes 2^32
        check_bias<float>(kF32, count);
        check_bias<double>(kF64, count);
        check_bias<float>(kBf16, std::vector<int32_t>(experts, 7));
    }
}

} // namespace

int main(int argc, char **argv)
{
    const std::string only = argc > 1 ? argv[1] : "";
    for (uint64_t seed = 1; seed <= 3; seed++)
        for (const Case &c : kCases) {
            if (!only.empty() && only != c.name) continue;
            if (seed > 1 && (c.experts > 1000 || c.tokens > 1000)) continue; // they take long
            run_case(c, seed);
            if (!check::failures) continue;
            printf("%s failed with seed %llu\n", c.name, static_cast<unsigned long long>(seed));
            return check::result();
        }
    if (only.empty()) check_biases();
    EXPECT(sim_num_objects() == 0, "%lld left", static_cast<long long>(sim_num_objects()));
    return check::result();
}
