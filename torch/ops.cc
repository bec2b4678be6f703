// PyTorch operators on cumoe's C interface, through PyTorch's stable ABI: one binary for PyTorch 2.11 and later,
// with CUDA or without. All that stands here is translation: tensors to pointers and strides, lists of numbers to a
// configuration, statuses to exceptions. Shapes without values, gradients and autocast are Python's (cumoe/ops.py).
#include "call.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

using namespace cumoe_torch;

namespace
{

cumoe_forward_args_t forward_args(const Call &call, const Weights &weights, const Tensor &y)
{
    cumoe_forward_args_t args = {};
    args.struct_size = sizeof args;
    args.num_tokens = call.tokens;
    args.weights = &weights.c;
    args.x = address(call.x->tensor);
    args.x_stride = call.x->stride;
    args.y = address(y);
    return args;
}

// Where all ranks tell each other how many rows will come: how large the buffers of the call are.
void make_plan(const Call &call, cumoe_forward_args_t args)
{
    size_t workspace_size, routing_size;
    check(cumoe_layer_buffer_sizes(call.layer, call.tokens, &workspace_size, nullptr));
    check(cumoe_ep_routing_size(call.layer, call.tokens, &routing_size));
    const Tensor workspace = call.scratch(workspace_size);
    call.plan->routing = call.scratch(routing_size);
    args.workspace = address(workspace);
    args.workspace_size = workspace_size;
    args.routing = address(*call.plan->routing);
    args.routing_size = routing_size;
    check(cumoe_ep_plan(call.layer, &args, call.plan->plan, &call.plan->sizes, call.stream));
}

// Plan and routing, as forward and backward both take them.
template <typename Args>
void set_plan(const Call &call, Args &args)
{
    if (!call.plan) return;
    args.plan = call.plan->plan;
    args.routing = address(*call.plan->routing);
    args.routing_size = static_cast<size_t>(call.plan->routing->numel());
}

// Forward of both operators, with all but the buffers in `args`. What is kept for backward comes back.
Tensor run_forward(const Call &call, cumoe_forward_args_t &args, bool keep)
{
    if (call.plan) make_plan(call, args);
    const Tensor saved = call.scratch(keep ? call.saved_size() : 0);
    const Tensor workspace = call.scratch(call.workspace_size(keep));
    args.workspace = address(workspace);
    args.workspace_size = static_cast<size_t>(workspace.numel());
    if (keep) {
        args.saved = address(saved);
        args.saved_size = static_cast<size_t>(saved.numel());
    }
    set_plan(call, args);
    check(cumoe_layer_forward(call.layer, &args, call.stream));
    return saved;
}

// Backward of both operators. `wanted`: x, the arrays, index_weight; the tensors that come back are those.
std::vector<Tensor> run_backward(const Call &call, const Arrays &arrays, const Tensor &dy, const Maybe &dlosses,
                                 const Maybe &token_mask, const Tensor &saved, bool training, bool partial,
                                 const std::vector<bool> &wanted, const Maybe &index_weight)
{
    if (wanted.size() != 2 + NUM_ARRAYS)
        fail("cumoe: wanted must have " + std::to_string(2 + NUM_ARRAYS) + " values");
    expect_shape(dy, {call.tokens, call.sizes.hidden}, "dy");
    call.expect_kind(dy, call.type, "dy");
    call.expect_kind(saved, ScalarType::Byte, "saved");
    if (!saved.is_contiguous()) fail("cumoe: saved is not as a forward call made it: it must be contiguous");
    if (call.plan && !call.plan->routing) fail("cumoe: a backward call with a plan that no forward call made");
    if (saved.numel() != static_cast<int64_t>(call.saved_size())) // what it holds is believed
        fail("cumoe: saved has " + std::to_string(saved.numel()) +
             " bytes, but a forward call of this size makes " + std::to_string(call.saved_size()));
    if (dlosses) {
        expect_shape(*dlosses, {CUMOE_NUM_LOSSES}, "dlosses");
        call.expect_kind(*dlosses, call.gate, "dlosses");
    }
    const Rows dy_rows = rows_of(dy);
    const Weights weights(arrays, call.type, call.glu, call.device);
    const Tensor workspace = call.scratch(call.workspace_size(true));
    cumoe_backward_args_t args = {};
    args.struct_size = sizeof args;
    args.num_tokens = call.tokens;
    args.weights = &weights.c;
    args.x = address(call.x->tensor);
    args.x_stride = call.x->stride;
    args.dy = address(dy_rows.tensor);
    args.dy_stride = dy_rows.stride;
    if (token_mask) args.token_mask = static_cast<const uint8_t *>(address(*token_mask));
    args.training = training;
    const Maybe losses = dlosses ? Maybe(dense(*dlosses)) : std::nullopt;
    if (losses) args.loss_gradient = losses->data_ptr();

    Maybe dx, dindex_weight;
    Arrays gradients;
    if (wanted[0]) dx = make({call.tokens, call.sizes.hidden}, call.type, call.device);
    if (dx && partial) torch::stable::zero_(*dx); // rows that are not live
    for (int i = 0; i < NUM_ARRAYS; i++) {
        if (!wanted[1 + i] || !arrays[i]) continue;
        // Expert matrices: the layout of the parameter, so that nothing is transposed on the way to it.
        gradients[i] = is_matrix(i) ? make_like(*arrays[i])
                                    : make(size_of(*arrays[i]), is_gate(i) ? call.gate : call.type, call.device);
    }
    if (wanted[1 + NUM_ARRAYS] && !index_weight)
        fail("cumoe: this gate has no weights from outside to have gradients");
    if (wanted[1 + NUM_ARRAYS]) dindex_weight = make({call.tokens, call.config.top_k}, call.gate, call.device);
    if (dx) args.dx = address(*dx);
    if (dindex_weight) args.dindex_weight = address(*dindex_weight);
    const Weights gradient_weights(gradients, call.type, call.glu, call.device);
    args.gradients = &gradient_weights.c;
    args.workspace = address(workspace);
    args.workspace_size = static_cast<size_t>(workspace.numel());
    args.saved = saved.data_ptr();
    args.saved_size = static_cast<size_t>(saved.numel());
    set_plan(call, args);
    check(cumoe_layer_backward(call.layer, &args, call.stream));

    std::vector<Tensor> out;
    if (dx) out.push_back(*dx);
    for (const Maybe &gradient : gradients)
        if (gradient) out.push_back(*gradient);
    if (dindex_weight) out.push_back(converted(*dindex_weight, index_weight->scalar_type()));
    return out;
}

#define ARRAY_PARAMETERS                                                                                           \
    Maybe w_gate, Maybe w_noise, Maybe w_gate_primary, Maybe w_noise_primary, Maybe thresholds, Maybe gate_bias,   \
        EXPERT_PARAMETERS
#define EXPERT_PARAMETERS Maybe w_up, Maybe w_glu, Tensor w_down, Maybe b_up, Maybe b_glu, Maybe b_down
#define ALL_ARRAYS                                                                                                 \
    {                                                                                                              \
        w_gate, w_noise, w_gate_primary, w_noise_primary, thresholds, gate_bias, w_up, w_glu, w_down, b_up, b_glu, \
            b_down                                                                                                 \
    }
#define EXPERT_ARRAYS                                                                                              \
    {                                                                                                              \
        {}, {}, {}, {}, {}, {}, w_up, w_glu, w_down, b_up, b_glu, b_down                                           \
    }

using MoeOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

MoeOutputs moe(Tensor x, ARRAY_PARAMETERS, Maybe token_mask, Maybe call_given, Reals numbers, bool training,
               bool keep)
{
    Arrays arrays = ALL_ARRAYS;
    const Call call(x, arrays, numbers);
    if (call.config.gate == CUMOE_GATE_EXTERNAL) fail("cumoe: external routing is the operator experts()");
    const bool balanced = call.config.gate == CUMOE_GATE_BALANCED;
    const Weights weights(arrays, call.type, call.glu, call.device);
    int64_t slots;
    check(cumoe_layer_max_rows(call.layer, call.tokens, nullptr, &slots));
    const int64_t T = call.tokens, E = call.sizes.experts;
    const int64_t K = call.config.gate == CUMOE_GATE_SOFTMAX ? E : call.config.top_k;
    const Ints choices = balanced ? Ints{slots} : Ints{T, K};

    Tensor y = make({T, call.sizes.hidden}, call.type, call.device);
    if (call_given && call_given->numel() == 4) torch::stable::zero_(y); // rows that are not live
    const Tensor losses = make({CUMOE_NUM_LOSSES}, call.gate, call.device);
    const Tensor chosen_expert = make(choices, ScalarType::Int, call.device);
    const Tensor chosen_weight = make(choices, call.gate, call.device);
    const Tensor chosen_offset = make({balanced ? T + 1 : 0}, ScalarType::Int, call.device);
    const Tensor expert_count = make({E}, ScalarType::Int, call.device);
    const int64_t width = (E + 3) / 4 * 4; // rows are 16-byte aligned
    Tensor sums = make({balanced && training ? 3 : 2, width}, call.gate, call.device);
    if (width != E) torch::stable::zero_(sums); // what stands between the rows
    const Tensor statistics = make({sizeof(cumoe_statistics_t) / 8}, ScalarType::Long, call.device);

    const Maybe mask = mask_of(call, token_mask);
    const Maybe numbers_of_call = call_given ? Maybe(call_numbers(call, *call_given)) : std::nullopt;
    cumoe_forward_args_t args = forward_args(call, weights, y);
    args.training = training;
    if (mask) args.token_mask = static_cast<const uint8_t *>(address(*mask));
    if (numbers_of_call) args.call = static_cast<const cumoe_call_t *>(numbers_of_call->data_ptr());
    args.losses = losses.data_ptr();
    args.chosen_expert = static_cast<int32_t *>(address(chosen_expert));
    args.chosen_weight = address(chosen_weight);
    if (balanced) args.chosen_offset = static_cast<int32_t *>(chosen_offset.data_ptr());
    args.expert_count = static_cast<int32_t *>(expert_count.data_ptr());
    const size_t row = static_cast<size_t>(width) * (call.gate == ScalarType::Double ? 8 : 4);
    char *const first = static_cast<char *>(sums.data_ptr());
    args.importance = first;
    args.load = first + row;
    if (balanced && training) args.batch_threshold = first + 2 * row;
    args.statistics = static_cast<cumoe_statistics_t *>(statistics.data_ptr());
    const Tensor saved = run_forward(call, args, keep);
    return {y, losses, saved, chosen_expert, chosen_weight, chosen_offset, expert_count, sums, statistics};
}

std::vector<Tensor> moe_backward(Tensor dy, Maybe dlosses, Tensor saved, Tensor x, ARRAY_PARAMETERS,
                                 Maybe token_mask, Reals numbers, bool training, bool partial,
                                 std::vector<bool> wanted)
{
    Arrays arrays = ALL_ARRAYS;
    const Call call(x, arrays, numbers);
    return run_backward(call, arrays, dy, dlosses, mask_of(call, token_mask), saved, training, partial, wanted,
                        std::nullopt);
}

std::tuple<Tensor, Tensor> experts(Tensor x, Tensor index, Tensor weight, EXPERT_PARAMETERS, Reals numbers,
                                   bool keep)
{
    Arrays arrays = EXPERT_ARRAYS;
    const Call call(x, arrays, with_top_k(numbers, index, "index"));
    const External external(call, index, weight);
    const Weights weights(arrays, call.type, call.glu, call.device);
    const Tensor y = make({call.tokens, call.sizes.hidden}, call.type, call.device);
    cumoe_forward_args_t args = forward_args(call, weights, y);
    args.index = address(external.index);
    args.index_dtype = dtype_of(index.scalar_type(), "index");
    args.index_weight = address(external.weight);
    args.index_weight_dtype = dtype_of(weight.scalar_type(), "weight");
    return {y, run_forward(call, args, keep)};
}

std::vector<Tensor> experts_backward(Tensor dy, Tensor saved, Tensor x, Tensor weight, EXPERT_PARAMETERS,
                                     Reals numbers, std::vector<bool> wanted)
{
    Arrays arrays = EXPERT_ARRAYS;
    const Call call(x, arrays, with_top_k(numbers, weight, "weight"));
    return run_backward(call, arrays, dy, std::nullopt, std::nullopt, saved, false, false, wanted, weight);
}

// What the library says of a configuration on a device: an exception with its sentence, or the numbers of
// SavedBound. `device`: a CUDA ordinal, -1 = the CPU.
std::tuple<int64_t, int64_t, int64_t> saved_bound(Reals numbers, Ints sizes, int64_t type, int64_t device)
{
    const cumoe_config_t config = bare_config(numbers, sizes, type, nullptr);
    const Device where = device_number(device);
    const DeviceGuard guard = where.guard();
    const SavedBound bound(find_layer(where, config), config);
    return {bound.base, bound.per_token, bound.from};
}

void gate_bias_update(Tensor gate_bias, Tensor expert_count, double rate)
{
    const Device device = device_of(gate_bias);
    const DeviceGuard guard = device.guard();
    const ScalarType type = gate_bias.scalar_type();
    const int64_t experts = gate_bias.numel();
    if (type != gate_type(type)) fail("cumoe: gate_bias must be float32 or float64");
    expect_shape(gate_bias, {experts}, "gate_bias");
    expect_shape(expert_count, {experts}, "expert_count");
    if (expert_count.scalar_type() != ScalarType::Int || !(device_of(expert_count) == device))
        fail("cumoe: expert_count must be int32, on the device of gate_bias");
    cumoe_config_t config = default_config();
    config.gate = CUMOE_GATE_SIGMOID_TOPK;
    config.hidden_size = config.intermediate_size = config.top_k = 1;
    config.num_experts = to_int32(static_cast<double>(experts), "num_experts");
    config.dtype = dtype_of(type, "gate_bias");
    const Tensor count = dense(expert_count), moved = copied_to(make({experts}, type, device), gate_bias);
    check(cumoe_gate_bias_update(find_layer(device, config), moved.data_ptr(),
                                 static_cast<const int32_t *>(count.data_ptr()), static_cast<float>(rate),
                                 current_stream(device)));
    torch::stable::copy_(gate_bias, moved); // tells autograd that it changed
}

int64_t version()
{
    if (cumoe_version() / 100 != CUMOE_VERSION / 100)
        fail("cumoe: libcumoe.so is version " + std::to_string(cumoe_version()) +
             ", but the operators were built for " + std::to_string(CUMOE_VERSION));
    return cumoe_version();
}

} // namespace

#define EXPERT_SCHEMA "Tensor? w_up, Tensor? w_glu, Tensor w_down, Tensor? b_up, Tensor? b_glu, Tensor? b_down, "
#define ARRAY_SCHEMA                                                                                               \
    "Tensor? w_gate, Tensor? w_noise, Tensor? w_gate_primary, Tensor? w_noise_primary, Tensor? thresholds, "       \
    "Tensor? gate_bias, " EXPERT_SCHEMA

#define MOE_SCHEMA                                                                                                 \
    "(Tensor x, " ARRAY_SCHEMA "Tensor? token_mask, Tensor? call, float[] numbers, bool training, "                \
    "bool keep) -> (Tensor y, Tensor losses, Tensor saved, Tensor chosen_expert, Tensor chosen_weight, "           \
    "Tensor chosen_offset, Tensor expert_count, Tensor sums, Tensor statistics)"
#define EXPERTS_SCHEMA                                                                                             \
    "(Tensor x, Tensor index, Tensor weight, " EXPERT_SCHEMA "float[] numbers, bool keep) -> "                     \
    "(Tensor y, Tensor saved)"

// moe and experts, which ops.py gives gradients, are for graphs; moe_forward and experts_forward are the same
// without, which is quicker.
STABLE_TORCH_LIBRARY(cumoe, m)
{
    m.def("moe" MOE_SCHEMA);
    m.def("moe_forward" MOE_SCHEMA);
    m.def("moe_backward(Tensor dy, Tensor? dlosses, Tensor saved, Tensor x, " ARRAY_SCHEMA
          "Tensor? token_mask, float[] numbers, bool training, bool partial, bool[] wanted) -> "
          "Tensor[]");
    m.def("experts" EXPERTS_SCHEMA);
    m.def("experts_forward" EXPERTS_SCHEMA);
    m.def("experts_backward(Tensor dy, Tensor saved, Tensor x, Tensor weight, " EXPERT_SCHEMA
          "float[] numbers, bool[] wanted) -> Tensor[]");
    m.def("gate_bias_update(Tensor(a!) gate_bias, Tensor expert_count, float rate) -> ()");
    m.def("saved_bound(float[] numbers, int[] sizes, int type, int device) -> (int, int, int)");
    m.def("version() -> int");
}

#define IMPLEMENT(key)                                                                                             \
    STABLE_TORCH_LIBRARY_IMPL(cumoe, key, m)                                                                       \
    {                                                                                                              \
        m.impl("moe", TORCH_BOX(&moe));                                                                            \
        m.impl("moe_forward", TORCH_BOX(&moe));                                                                    \
        m.impl("moe_backward", TORCH_BOX(&moe_backward));                                                          \
        m.impl("experts", TORCH_BOX(&experts));                                                                    \
        m.impl("experts_forward", TORCH_BOX(&experts));                                                            \
        m.impl("experts_backward", TORCH_BOX(&experts_backward));                                                  \
        m.impl("gate_bias_update", TORCH_BOX(&gate_bias_update));                                                  \
    }
IMPLEMENT(CPU)
IMPLEMENT(CUDA)

STABLE_TORCH_LIBRARY_IMPL(cumoe, CompositeExplicitAutograd, m)
{
    m.impl("saved_bound", TORCH_BOX(&saved_bound));
    m.impl("version", TORCH_BOX(&version));
}
