// PyTorch operators on cumoe's C interface, through PyTorch's stable ABI: one binary for PyTorch 2.11 and later,
// with CUDA or without. All that stands here is translation: tensors to pointers and strides, lists of numbers to a
// configuration, statuses to exceptions. Shapes without values, gradients and autocast are Python's (cumoe/ops.py).
#include <cumoe/cumoe.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <dlfcn.h>
#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace
{

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;
using Ints = std::vector<int64_t>;
using Reals = std::vector<double>;
using DeviceGuard = std::optional<torch::stable::accelerator::DeviceGuard>;

[[noreturn]] void fail(const std::string &sentence)
{
    throw std::runtime_error(sentence);
}

void check(cumoe_status_t status)
{
    if (status == CUMOE_OUT_OF_MEMORY) fail(std::string("cumoe: out of memory: ") + cumoe_last_error());
    if (status != CUMOE_SUCCESS) fail(cumoe_last_error());
}

// ---- devices ----

struct Device {
    int32_t type = 0, index = -1;
    bool operator==(const Device &other) const
    {
        return type == other.type && index == other.index;
    }
    bool is_cuda() const
    {
        return type == aoti_torch_device_type_cuda();
    }
    std::string name() const
    {
        return is_cuda() ? "cuda:" + std::to_string(index) : "cpu";
    }
    // The library goes back to the thread's device, and where PyTorch has not used that one yet, CUDA would make a
    // context on it.
    DeviceGuard guard() const
    {
        return is_cuda() ? DeviceGuard(std::in_place, index) : std::nullopt;
    }
};

Device device_of(const Tensor &tensor)
{
    Device device;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device.type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &device.index));
    return device;
}

// PyTorch's current stream. The function is in libtorch_cuda alone, which a PyTorch without CUDA lacks.
cumoe_stream_t current_stream(const Device &device)
{
    if (!device.is_cuda()) return nullptr;
    using get_t = AOTITorchError (*)(int32_t, void **);
    static const get_t get = [] {
        const char *name = "aoti_torch_get_current_cuda_stream";
        void *symbol = dlsym(RTLD_DEFAULT, name);
        if (!symbol)
            if (void *library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD)) symbol = dlsym(library, name);
        return reinterpret_cast<get_t>(symbol);
    }();
    if (!get) fail("cumoe: this PyTorch has no CUDA: libtorch_cuda.so is not loaded");
    void *stream = nullptr;
    TORCH_ERROR_CODE_CHECK(get(device.index, &stream));
    return static_cast<cumoe_stream_t>(stream);
}

// One handle per device, one layer per configuration and device, for as long as the process lives: the maps are
// never destroyed, as threads may outlive static objects.
const cumoe_handle_t *find_handle(const Device &device)
{
    static std::mutex mutex;
    static auto &handles = *new std::map<int32_t, cumoe_handle_t *>; // by CUDA ordinal; -1 = the CPU
    const int32_t key = device.is_cuda() ? device.index : -1;
    std::lock_guard<std::mutex> lock(mutex);
    cumoe_handle_t *&handle = handles[key];
    if (!handle)
        check(cumoe_handle_create(&handle, key < 0 ? CUMOE_BACKEND_CPU : CUMOE_BACKEND_CUDA, key < 0 ? 0 : key));
    return handle;
}

const cumoe_layer_t *find_layer(const Device &device, const cumoe_config_t &config)
{
    struct Key {
        cumoe_config_t config; // without holes that hold anything: make_config()
        Device device;
        bool operator<(const Key &other) const
        {
            return std::memcmp(this, &other, sizeof *this) < 0;
        }
    };
    static_assert(sizeof(Key) == sizeof config + sizeof device, "keys are compared as bytes");
    static std::mutex mutex;
    static auto &layers = *new std::map<Key, cumoe_layer_t *>;
    static thread_local std::pair<Key, const cumoe_layer_t *> last; // as a rule it is the one before
    const Key key = {config, device};
    if (last.second && std::memcmp(&last.first, &key, sizeof key) == 0) return last.second;
    std::lock_guard<std::mutex> lock(mutex);
    cumoe_layer_t *&layer = layers[key];
    if (!layer) check(cumoe_layer_create(&layer, find_handle(device), &config));
    last = {key, layer};
    return layer;
}

// ---- types and tensors ----

cumoe_dtype_t dtype_of(ScalarType type, const char *name)
{
    switch (type) {
    case ScalarType::Double:
        return CUMOE_F64;
    case ScalarType::Float:
        return CUMOE_F32;
    case ScalarType::BFloat16:
        return CUMOE_BF16;
    case ScalarType::Half:
        return CUMOE_F16;
    case ScalarType::Int:
        return CUMOE_I32;
    case ScalarType::Long:
        return CUMOE_I64;
    default:
        fail(std::string("cumoe: ") + name + " has a type that cumoe does not know: must be float64, float32, " +
             "bfloat16 or float16, and of indices int32 or int64");
    }
}

// "Gate type": float32, or float64 with float64.
ScalarType gate_type(ScalarType type)
{
    return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

int32_t number_of(ScalarType type)
{
    return static_cast<int32_t>(torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)));
}

// A failure of PyTorch's comes out of its stable ABI without its kind and its sentence. ops.py looks for this
// sentence and asks PyTorch for the same memory again, so that the user gets PyTorch's own error.
[[noreturn]] void fail_to_allocate(int64_t elements, ScalarType type, const Device &device)
{
    const size_t bytes = static_cast<size_t>(elements) * aoti_torch_dtype_element_size(number_of(type));
    fail("cumoe: PyTorch gave no tensor of " + std::to_string(bytes) + " bytes on " + device.name());
}

Tensor make(const Ints &size, ScalarType type, const Device &device)
{
    Ints stride(size.size());
    int64_t step = 1;
    for (size_t i = size.size(); i-- > 0; step *= size[i]) stride[i] = step;
    AtenTensorHandle made;
    if (aoti_torch_empty_strided(static_cast<int64_t>(size.size()), size.data(), stride.data(), number_of(type),
                                 device.type, device.index, &made) != TORCH_SUCCESS)
        fail_to_allocate(step, type, device);
    return Tensor(made);
}

// Without the gaps that it may have.
Tensor make_like(const Tensor &tensor)
{
    try {
        return torch::stable::empty_like(tensor);
    } catch (const std::exception &) {
        fail_to_allocate(tensor.numel(), tensor.scalar_type(), device_of(tensor));
    }
}

Tensor copied_to(Tensor made, const Tensor &from)
{
    torch::stable::copy_(made, from);
    return made;
}

Ints size_of(const Tensor &tensor)
{
    const auto sizes = tensor.sizes();
    return Ints(sizes.begin(), sizes.end());
}

// A tensor without elements has no address; the library wants one where an array belongs.
void *address(const Tensor &tensor)
{
    alignas(16) static char nothing[16];
    void *data = tensor.data_ptr();
    return data ? data : nothing;
}

bool is_aligned(const Tensor &tensor)
{
    return reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0;
}

Tensor dense(const Tensor &tensor)
{
    if (tensor.is_contiguous() && is_aligned(tensor)) return tensor;
    return copied_to(make(size_of(tensor), tensor.scalar_type(), device_of(tensor)), tensor);
}

Tensor converted(const Tensor &tensor, ScalarType type)
{
    return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}

std::string shape_text(const Ints &size)
{
    std::string text = "[";
    for (size_t i = 0; i < size.size(); i++) text += (i ? ", " : "") + std::to_string(size[i]);
    return text + "]";
}

void expect_shape(const Tensor &tensor, const Ints &size, const char *name)
{
    const auto sizes = tensor.sizes();
    bool same = sizes.size() == size.size();
    for (size_t i = 0; same && i < size.size(); i++) same = sizes[i] == size[i];
    if (!same)
        fail(std::string("cumoe: ") + name + " has shape " + shape_text(size_of(tensor)) + ", but must be " +
             shape_text(size));
}

// Rows as the library takes them: the last index contiguous, any distance between rows, aligned. Else a copy.
struct Rows {
    Tensor tensor;
    int64_t stride;
};

Rows rows_of(const Tensor &tensor)
{
    const int64_t rows = tensor.size(0), columns = tensor.size(1), stride = rows > 1 ? tensor.stride(0) : columns;
    if ((columns == 1 || tensor.stride(1) == 1) && stride >= columns && is_aligned(tensor)) return {tensor, stride};
    return {dense(tensor), columns};
}

// ---- a call ----

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

bool is_matrix(int array)
{
    return array == W_UP || array == W_GLU || array == W_DOWN;
}

bool is_gate(int array)
{
    return array <= GATE_BIAS;
}

// config.py: Config.numbers
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
    NOISE_EPSILON,
    SAVED_LAYOUT, // not read: makes traced graphs those of one library
    NUM_NUMBERS
};

struct Sizes {
    int64_t hidden, intermediate, experts;
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

int32_t to_int32(double value, const char *name)
{
    return to_integer<int32_t>(value, name);
}

cumoe_config_t default_config()
{
    cumoe_config_t config;
    std::memset(&config, 0, sizeof config); // it is a key: padding counts
    check(cumoe_config_init(&config));
    for (float &weight : config.loss_weight) weight = 0; // upstream gradients come from autograd, or there are none
    return config;
}

cumoe_config_t make_config(const Reals &numbers, const Sizes &sizes, ScalarType type)
{
    if (numbers.size() != NUM_NUMBERS) fail("cumoe: a configuration of another version of the Python files");
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
    config.noise_epsilon = static_cast<float>(numbers[NOISE_EPSILON]);
    return config;
}

// The strides of an expert matrix or its gradient, in the words of cumoe_weights_t. Where an index has one value
// alone its stride means nothing, and 0 says so.
void set_strides(const Tensor &tensor, const char *name, int64_t *expert, int64_t *row, int64_t *column)
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

    Weights(const Arrays &arrays, ScalarType type, cumoe_glu_placement_t glu)
    {
        std::memset(&c, 0, sizeof c);
        c.struct_size = sizeof c;
        c.dtype = dtype_of(type, "x");
        c.glu = glu;
        void **const pointers[NUM_ARRAYS] = {&c.w_gate,     &c.w_noise,   &c.w_gate_primary, &c.w_noise_primary,
                                             &c.thresholds, &c.gate_bias, &c.w_up,           &c.w_glu,
                                             &c.w_down,     &c.b_up,      &c.b_glu,          &c.b_down};
        for (int i : {W_UP, W_GLU}) copy_up = copy_up || (arrays[i] && !is_aligned(*arrays[i]));
        for (int i = 0; i < NUM_ARRAYS; i++)
            if (arrays[i]) *pointers[i] = address(is_matrix(i) ? matrix(i, *arrays[i]) : plain(*arrays[i]));
    }

  private:
    bool copy_up = false;

    const Tensor &plain(const Tensor &tensor)
    {
        kept.push_back(dense(tensor));
        return kept.back();
    }

    // Parameters that are mapped from a file may stand at any address: they are copied. w_up and w_glu, which have
    // strides in common, only together: the copy of a view that has gaps has none.
    const Tensor &matrix(int array, const Tensor &given)
    {
        const bool copied = array == W_DOWN ? !is_aligned(given) : copy_up;
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

// What forward and backward have in common.
struct Call {
    Device device;
    DeviceGuard guard;
    ScalarType type, gate;
    int64_t tokens;
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
        sizes = {x_given.size(1), down.size(2), down.size(0), arrays[B_DOWN].has_value()};
        config = make_config(numbers, sizes, type);
        if (config.activation == CUMOE_ACTIVATION_IDENTITY && sizes.intermediate != sizes.hidden)
            fail("cumoe: w_down has shape " + shape_text(size_of(down)) +
                 ", but with identity must be [experts, hidden, hidden]");
        if (!device.is_cuda()) config.max_threads = static_cast<int32_t>(torch::stable::get_num_threads());
        glu = static_cast<cumoe_glu_placement_t>(to_int32(numbers[GLU], "glu"));
        check_arrays(arrays);
        layer = find_layer(device, config);
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

    size_t saved_size() const
    {
        const SavedBound bound(layer, config);
        return static_cast<size_t>(bound.base + bound.per_token * std::max<int64_t>(0, tokens - bound.from));
    }

    size_t workspace_size(bool with_saved) const
    {
        size_t workspace, saved;
        check(cumoe_layer_buffer_sizes(layer, tokens, &workspace, with_saved ? &saved : nullptr));
        return workspace;
    }

  private:
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
        const int64_t up = glu == CUMOE_GLU_SEPARATE ? I : 2 * I;
        const Ints shapes[NUM_ARRAYS] = {{E, H},     {E, H},    {G, H},    {G, H},  {E},    {E},
                                         {E, up, H}, {E, I, H}, {E, H, I}, {E, up}, {E, I}, {E, H}};
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

// Seed and offset of the noise, or all four numbers of cumoe_call_t, on the device. Two become four there: the
// first token is 0, and more tokens than there can be are live.
Tensor call_numbers(const Call &call, const Tensor &given)
{
    call.expect_device(given, "call");
    const int64_t count = given.numel();
    if (given.scalar_type() != ScalarType::Long || (count != 2 && count != 4))
        fail("cumoe: call must be int64 with 2 elements (seed, offset) or 4 (seed, offset, first token, live "
             "tokens)");
    if (count == 4) return dense(given);
    const cumoe_handle_t *handle = find_handle(call.device);
    Tensor made = make({4}, ScalarType::Long, call.device);
    char *const to = static_cast<char *>(made.data_ptr());
    const Tensor from = dense(given);
    check(cumoe_memory_copy(handle, to, from.data_ptr(), 16, CUMOE_COPY_ON_DEVICE, call.stream));
    check(cumoe_memory_set(handle, to + 16, 0, 8, call.stream));
    check(cumoe_memory_set(handle, to + 24, 0x7f, 8, call.stream));
    return made;
}

// External routing has as many choices as it is called with.
Reals with_top_k(Reals numbers, const Tensor &choices, const char *name)
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

cumoe_forward_args_t forward_args(const Call &call, const Weights &weights, const Tensor &y, const Tensor &saved,
                                  const Tensor &workspace)
{
    cumoe_forward_args_t args = {};
    args.struct_size = sizeof args;
    args.num_tokens = call.tokens;
    args.weights = &weights.c;
    args.x = address(call.x->tensor);
    args.x_stride = call.x->stride;
    args.y = address(y);
    args.workspace = address(workspace);
    args.workspace_size = static_cast<size_t>(workspace.numel());
    if (saved.numel()) {
        args.saved = saved.data_ptr();
        args.saved_size = static_cast<size_t>(saved.numel());
    }
    return args;
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
    if (saved.numel() != static_cast<int64_t>(call.saved_size())) // what it holds is believed
        fail("cumoe: saved has " + std::to_string(saved.numel()) +
             " bytes, but a forward call of this size makes " + std::to_string(call.saved_size()));
    if (dlosses) {
        expect_shape(*dlosses, {CUMOE_NUM_LOSSES}, "dlosses");
        call.expect_kind(*dlosses, call.gate, "dlosses");
    }
    const Rows dy_rows = rows_of(dy);
    const Weights weights(arrays, call.type, call.glu);
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
    const Weights gradient_weights(gradients, call.type, call.glu);
    args.gradients = &gradient_weights.c;
    args.workspace = address(workspace);
    args.workspace_size = static_cast<size_t>(workspace.numel());
    args.saved = saved.data_ptr();
    args.saved_size = static_cast<size_t>(saved.numel());
    check(cumoe_layer_backward(call.layer, &args, call.stream));

    std::vector<Tensor> out;
    if (dx) out.push_back(*dx);
    for (const Maybe &gradient : gradients)
        if (gradient) out.push_back(*gradient);
    if (dindex_weight) out.push_back(converted(*dindex_weight, index_weight->scalar_type()));
    return out;
}

Maybe mask_of(const Call &call, const Maybe &given)
{
    if (!given) return std::nullopt;
    expect_shape(*given, {call.tokens}, "token_mask");
    call.expect_device(*given, "token_mask");
    if (given->scalar_type() != ScalarType::Bool && given->scalar_type() != ScalarType::Byte)
        fail("cumoe: token_mask must be bool or uint8");
    return dense(*given);
}

// ---- the operators ----

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
    const Weights weights(arrays, call.type, call.glu);
    int64_t slots;
    check(cumoe_layer_max_rows(call.layer, call.tokens, nullptr, &slots));
    const int64_t T = call.tokens, E = call.sizes.experts;
    const int64_t K = call.config.gate == CUMOE_GATE_SOFTMAX ? E : call.config.top_k;
    const Ints choices = balanced ? Ints{slots} : Ints{T, K};

    Tensor y = make({T, call.sizes.hidden}, call.type, call.device);
    if (call_given && call_given->numel() == 4) torch::stable::zero_(y); // rows that are not live
    const Tensor losses = make({CUMOE_NUM_LOSSES}, call.gate, call.device);
    const Tensor saved = call.scratch(keep ? call.saved_size() : 0);
    const Tensor chosen_expert = make(choices, ScalarType::Int, call.device);
    const Tensor chosen_weight = make(choices, call.gate, call.device);
    const Tensor chosen_offset = make({balanced ? T + 1 : 0}, ScalarType::Int, call.device);
    const Tensor expert_count = make({E}, ScalarType::Int, call.device);
    const int64_t width = (E + 3) / 4 * 4; // rows are 16-byte aligned
    Tensor sums = make({balanced && training ? 3 : 2, width}, call.gate, call.device);
    if (width != E) torch::stable::zero_(sums); // what stands between the rows
    const Tensor statistics = make({sizeof(cumoe_statistics_t) / 8}, ScalarType::Long, call.device);
    const Tensor workspace = call.scratch(call.workspace_size(keep));

    const Maybe mask = mask_of(call, token_mask);
    const Maybe numbers_of_call = call_given ? Maybe(call_numbers(call, *call_given)) : std::nullopt;
    cumoe_forward_args_t args = forward_args(call, weights, y, saved, workspace);
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
    check(cumoe_layer_forward(call.layer, &args, call.stream));
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
    const Weights weights(arrays, call.type, call.glu);
    const Tensor y = make({call.tokens, call.sizes.hidden}, call.type, call.device);
    const Tensor saved = call.scratch(keep ? call.saved_size() : 0);
    const Tensor workspace = call.scratch(call.workspace_size(keep));
    cumoe_forward_args_t args = forward_args(call, weights, y, saved, workspace);
    args.index = address(external.index);
    args.index_dtype = dtype_of(index.scalar_type(), "index");
    args.index_weight = address(external.weight);
    args.index_weight_dtype = dtype_of(weight.scalar_type(), "weight");
    check(cumoe_layer_forward(call.layer, &args, call.stream));
    return {y, saved};
}

std::vector<Tensor> experts_backward(Tensor dy, Tensor saved, Tensor x, Tensor weight, EXPERT_PARAMETERS,
                                     Reals numbers, std::vector<bool> wanted)
{
    Arrays arrays = EXPERT_ARRAYS;
    const Call call(x, arrays, with_top_k(numbers, weight, "weight"));
    return run_backward(call, arrays, dy, std::nullopt, std::nullopt, saved, false, false, wanted, weight);
}

// What the library says of a configuration on a device: an exception with its sentence, or the numbers of
// SavedBound. `sizes`: hidden, intermediate, experts, bias. `device`: a CUDA ordinal, -1 = the CPU.
std::tuple<int64_t, int64_t, int64_t> saved_bound(Reals numbers, Ints sizes, int64_t type, int64_t device)
{
    const ScalarType types[] = {ScalarType::Double, ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
    if (sizes.size() != 4 || type < CUMOE_F64 || type > CUMOE_F16)
        fail("cumoe: a configuration of another version of the Python files");
    const cumoe_config_t config =
        make_config(numbers, {sizes[0], sizes[1], sizes[2], sizes[3] != 0}, types[type - CUMOE_F64]);
    const Device where = {device < 0 ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda(),
                          static_cast<int32_t>(device)};
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
