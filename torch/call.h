// What the operators have in common: a configuration out of numbers, and all that forward and backward know of a
// call.
#ifndef CUMOE_TORCH_CALL_H
#define CUMOE_TORCH_CALL_H

#include "ranks.h"
#include "weights.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>

namespace cumoe_torch
{

// config.py: Config.numbers. One list of floats, as each list costs half a microsecond a call.
enum {
    GATE,
    ACTIVATION,
    GLU,
    TOP_K,
    NUM_GROUPS,
    TOP_K_GROUPS,
    RENORMALIZE,
    NOISE_STREAM,
    MAX_ROWS,
    RECOMPUTE,
    COMPUTE,
    MAX_SMS,
    SWIGLU_LIMIT,
    SWIGLU_ALPHA,
    SWIGLU_OFFSET,
    NOISE_EPSILON,
    SAVED_LAYOUT, // not read: makes traced graphs those of one library
    RANKS,        // number of a group, 0 = none
    NUM_EXPERTS,  // read with ranks alone: arrays have the experts of one
    EXCHANGE_CAPACITY,
    EXCHANGE_CHUNKS,
    PLAN, // number of the plan of this call, 0 = none
    NUM_NUMBERS
};

struct Sizes {
    int64_t hidden, intermediate, experts; // all experts
    bool bias;
};

template <typename Integer>
Integer to_integer(double value, const char *name)
{
    using Limits = std::numeric_limits<Integer>;
    if (!(value >= Limits::min() && value <= Limits::max() && value == std::floor(value))) {
        char text[32];
        std::snprintf(text, sizeof text, "%.17g", value);
        fail(std::string("cumoe: ") + name + " = " + text + ", but must be an integer in " +
             std::to_string(Limits::min()) + ".." + std::to_string(Limits::max()));
    }
    return static_cast<Integer>(value);
}

inline int32_t to_int32(double value, const char *name)
{
    return to_integer<int32_t>(value, name);
}

inline cumoe_config_t default_config()
{
    cumoe_config_t config;
    std::memset(&config, 0, sizeof config); // it is a key: padding counts
    check(cumoe_config_init(&config));
    for (float &weight : config.loss_weight) weight = 0; // upstream gradients come from autograd, or there are none
    return config;
}

inline void check_length(const Reals &numbers)
{
    if (numbers.size() != NUM_NUMBERS) fail("cumoe: a configuration of another version of the Python files");
}

// The group of a configuration; NULL = none.
inline std::shared_ptr<Group> group_of(const Reals &numbers)
{
    check_length(numbers);
    return numbers[RANKS] == 0 ? nullptr : find_group(static_cast<int64_t>(numbers[RANKS]));
}

inline cumoe_config_t make_config(const Reals &numbers, const Sizes &sizes, ScalarType type, const Group *group)
{
    check_length(numbers);
    cumoe_config_t config = default_config();
    config.hidden_size = to_int32(sizes.hidden, "hidden_size");
    config.intermediate_size = to_int32(sizes.intermediate, "intermediate_size");
    config.num_experts = to_int32(sizes.experts, "num_experts");
    config.expert_bias = sizes.bias;
    config.dtype = dtype_of(type, "x");
    config.gate = static_cast<cumoe_gate_kind_t>(to_int32(numbers[GATE], "gate"));
    config.activation = static_cast<cumoe_activation_t>(to_int32(numbers[ACTIVATION], "activation"));
    config.top_k = to_int32(numbers[TOP_K], "top_k");
    config.num_groups = to_int32(numbers[NUM_GROUPS], "num_groups");
    config.top_k_groups = to_int32(numbers[TOP_K_GROUPS], "top_k_groups");
    config.renormalize = to_int32(numbers[RENORMALIZE], "renormalize");
    config.noise_stream = to_integer<uint32_t>(numbers[NOISE_STREAM], "noise_stream");
    config.max_rows = to_int32(numbers[MAX_ROWS], "max_rows");
    config.recompute = to_int32(numbers[RECOMPUTE], "recompute");
    config.compute = static_cast<cumoe_compute_t>(to_int32(numbers[COMPUTE], "compute"));
    config.max_sms = to_int32(numbers[MAX_SMS], "max_sms");
    config.swiglu_limit = static_cast<float>(numbers[SWIGLU_LIMIT]);
    config.swiglu_alpha = static_cast<float>(numbers[SWIGLU_ALPHA]);
    config.swiglu_offset = static_cast<float>(numbers[SWIGLU_OFFSET]);
    config.noise_epsilon = static_cast<float>(numbers[NOISE_EPSILON]);
    config.ep = group ? group->ep : nullptr;
    config.exchange_capacity = to_integer<int32_t>(numbers[EXCHANGE_CAPACITY], "exchange_capacity");
    config.exchange_chunks = to_int32(numbers[EXCHANGE_CHUNKS], "exchange_chunks");
    return config;
}

// What forward keeps for backward, in bytes: base + per_token * max(0, T - from). Fewer tokens than `from` have no
// more rows in a BALANCED layer (cumoe_layer_max_rows()), and base is for as many rows.
struct SavedBound {
    int64_t base, per_token, from;

    explicit SavedBound(const cumoe_layer_t *layer, const cumoe_config_t &config)
    {
        size_t bytes, bytes_per_token;
        check(cumoe_layer_saved_bound(layer, &bytes, &bytes_per_token));
        base = static_cast<int64_t>(bytes);
        per_token = static_cast<int64_t>(bytes_per_token);
        const bool balanced = config.gate == CUMOE_GATE_BALANCED;
        const int64_t rows = std::max<int64_t>(config.max_rows, config.num_experts);
        from = balanced ? (rows + config.top_k - 1) / config.top_k : 0;
    }
};

// PyTorch's, for config.max_threads.
inline int32_t num_threads(const Device &device)
{
    return device.is_cuda() ? 0 : static_cast<int32_t>(torch::stable::get_num_threads());
}

// A configuration without arrays. `sizes`: hidden, intermediate, experts, bias. `type`: a cumoe_dtype_t.
inline cumoe_config_t bare_config(const Reals &numbers, const Ints &sizes, int64_t type, const Group *group)
{
    const ScalarType types[] = {ScalarType::Double, ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
    if (sizes.size() != 4 || type < CUMOE_F64 || type > CUMOE_F16)
        fail("cumoe: a configuration of another version of the Python files");
    return make_config(numbers, {sizes[0], sizes[1], sizes[2], sizes[3] != 0}, types[type - CUMOE_F64], group);
}

// What forward and backward have in common.
struct Call {
    Device device;
    DeviceGuard guard;
    ScalarType type, gate;
    int64_t tokens, own_experts; // those that the arrays have
    std::shared_ptr<Group> group;
    std::shared_ptr<Plan> plan; // goes before its group
    cumoe_glu_placement_t glu;
    Sizes sizes;
    cumoe_config_t config;
    const cumoe_layer_t *layer;
    cumoe_stream_t stream;
    std::optional<Rows> x;

    Call(const Tensor &x_given, Arrays &arrays, const Reals &numbers)
    {
        device = device_of(x_given);
        guard = device.guard();
        type = x_given.scalar_type();
        gate = gate_type(type);
        if (x_given.dim() != 2)
            fail("cumoe: x has " + std::to_string(x_given.dim()) +
                 " dimensions, but must have 2: [tokens, hidden]");
        const Tensor &down = *arrays[W_DOWN];
        if (down.dim() != 3)
            fail("cumoe: w_down has " + std::to_string(down.dim()) + " dimensions, but must have 3: [experts, " +
                 "hidden, intermediate]");
        tokens = x_given.size(0);
        group = group_of(numbers);
        own_experts = down.size(0);
        sizes = {x_given.size(1), down.size(2), group ? to_int32(numbers[NUM_EXPERTS], "num_experts") : own_experts,
                 arrays[B_DOWN].has_value()};
        config = make_config(numbers, sizes, type, group.get());
        if (config.activation == CUMOE_ACTIVATION_IDENTITY && sizes.intermediate != sizes.hidden)
            fail("cumoe: w_down has shape " + shape_text(size_of(down)) +
                 ", but with identity must be [experts, hidden, hidden]");
        config.max_threads = num_threads(device);
        glu = static_cast<cumoe_glu_placement_t>(to_int32(numbers[GLU], "glu"));
        check_arrays(arrays);
        layer = group ? layer_of_group(numbers) : find_layer(device, config);
        stream = current_stream(device);
        x = rows_of(x_given);
    }

    Tensor scratch(size_t size) const
    {
        return make({static_cast<int64_t>(size)}, ScalarType::Byte, device);
    }

    void expect_device(const Tensor &tensor, const char *name) const
    {
        if (!(device_of(tensor) == device)) fail(std::string("cumoe: ") + name + " is on another device than x");
    }

    // A tensor of this type on this device: behind its pointer the library could not see another.
    void expect_kind(const Tensor &tensor, ScalarType wanted, const char *name) const
    {
        expect_device(tensor, name);
        if (tensor.scalar_type() != wanted)
            fail(std::string("cumoe: ") + name + " is " + torch::headeronly::toString(tensor.scalar_type()) +
                 ", but must be " + torch::headeronly::toString(wanted));
    }

    // With a plan, both are what it found.
    size_t saved_size() const
    {
        if (plan) return plan->sizes.saved_size;
        if (group) {
            size_t workspace, saved;
            check(cumoe_layer_buffer_sizes(layer, tokens, &workspace, &saved));
            return saved;
        }
        const SavedBound bound(layer, config);
        return static_cast<size_t>(bound.base + bound.per_token * std::max<int64_t>(0, tokens - bound.from));
    }

    size_t workspace_size(bool with_saved) const
    {
        if (plan) return plan->sizes.workspace_size;
        size_t workspace, saved;
        check(cumoe_layer_buffer_sizes(layer, tokens, &workspace, with_saved ? &saved : nullptr));
        return workspace;
    }

  private:
    const cumoe_layer_t *layer_of_group(const Reals &numbers)
    {
        if (!(device == group->device))
            fail("cumoe: x is on " + device.name() + ", but the group of ranks is of " + group->device.name());
        const cumoe_layer_t *found = group->layer(config);
        int32_t first, count;
        check(cumoe_layer_experts_of_rank(found, cumoe_ep_rank(group->ep), &first, &count));
        if (own_experts != count)
            fail("cumoe: w_down has " + std::to_string(own_experts) + " experts, but this rank has " +
                 std::to_string(count) + " of " + std::to_string(sizes.experts) + ", from " +
                 std::to_string(first) + " on");
        if (numbers[PLAN] != 0) plan = group->plan(static_cast<int64_t>(numbers[PLAN]), found);
        return found;
    }

    Tensor converted_gate(const Tensor &tensor, const char *name) const
    {
        switch (tensor.scalar_type()) {
        case ScalarType::Double:
        case ScalarType::Float:
        case ScalarType::BFloat16:
        case ScalarType::Half:
            return converted(tensor, gate);
        default:
            fail(std::string("cumoe: ") + name + " is " + torch::headeronly::toString(tensor.scalar_type()) +
                 ", but must be Double, Float, BFloat16 or Half");
        }
    }

    // Shapes, types and devices, which the library cannot see behind pointers. Gate arrays of another type than the
    // library takes are converted.
    void check_arrays(Arrays &arrays) const
    {
        const int64_t E = sizes.experts, H = sizes.hidden, I = sizes.intermediate, G = config.num_groups;
        const int64_t own = own_experts;
        const int64_t up = glu == CUMOE_GLU_SEPARATE ? I : 2 * I;
        const Ints shapes[NUM_ARRAYS] = {{E, H},       {E, H},      {G, H},      {G, H},    {E},      {E},
                                         {own, up, H}, {own, I, H}, {own, H, I}, {own, up}, {own, I}, {own, H}};
        for (int i = 0; i < NUM_ARRAYS; i++) {
            if (!arrays[i]) continue;
            const char *name = array_names[i];
            expect_shape(*arrays[i], shapes[i], name);
            expect_device(*arrays[i], name);
            if (is_gate(i))
                arrays[i] = converted_gate(*arrays[i], name);
            else if (arrays[i]->scalar_type() != type)
                fail(std::string("cumoe: ") + name + " is " +
                     torch::headeronly::toString(arrays[i]->scalar_type()) + ", but x is " +
                     torch::headeronly::toString(type) + ": both must have one type");
        }
    }
};

// Seed and offset of the noise, or the first three or all four numbers of cumoe_call_t, on the device. They become
// four there: the first token is 0, and more tokens than there can be are live.
inline Tensor call_numbers(const Call &call, const Tensor &given)
{
    call.expect_device(given, "call");
    const int64_t count = given.numel();
    if (given.scalar_type() != ScalarType::Long || count < 2 || count > 4)
        fail("cumoe: call must be int64 with 2 elements (seed, offset), 3 (seed, offset, first token) or 4 (seed, "
             "offset, first token, live tokens)");
    if (count == 4) return dense(given);
    const cumoe_handle_t *handle = find_handle(call.device);
    Tensor made = make({4}, ScalarType::Long, call.device);
    char *const to = static_cast<char *>(made.data_ptr());
    const Tensor from = dense(given);
    const size_t size = static_cast<size_t>(count) * 8;
    check(cumoe_memory_copy(handle, to, from.data_ptr(), size, CUMOE_COPY_ON_DEVICE, call.stream));
    check(cumoe_memory_set(handle, to + 16, 0, 24 - size, call.stream));
    check(cumoe_memory_set(handle, to + 24, 0x7f, 8, call.stream));
    return made;
}

// External routing has as many choices as it is called with.
inline Reals with_top_k(Reals numbers, const Tensor &choices, const char *name)
{
    if (choices.dim() != 2)
        fail(std::string("cumoe: ") + name + " has " + std::to_string(choices.dim()) +
             " dimensions, but must have 2: [tokens, choices]");
    if (numbers.size() > TOP_K) numbers[TOP_K] = static_cast<double>(choices.size(1));
    return numbers;
}

struct External {
    Tensor index, weight;

    External(const Call &call, const Tensor &index_given, const Tensor &weight_given)
    {
        expect_shape(index_given, {call.tokens, call.config.top_k}, "index");
        expect_shape(weight_given, {call.tokens, call.config.top_k}, "weight");
        call.expect_device(index_given, "index");
        call.expect_device(weight_given, "weight");
        index = dense(index_given);
        weight = dense(weight_given);
    }
};

inline Maybe mask_of(const Call &call, const Maybe &given)
{
    if (!given) return std::nullopt;
    expect_shape(*given, {call.tokens}, "token_mask");
    call.expect_device(*given, "token_mask");
    if (given->scalar_type() != ScalarType::Bool && given->scalar_type() != ScalarType::Byte)
        fail("cumoe: token_mask must be bool or uint8");
    return dense(*given);
}

} // namespace cumoe_torch

#endif
