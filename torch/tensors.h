// Devices, and tensors through PyTorch's stable ABI: where they are, what they hold, and new ones.
#ifndef CUMOE_TORCH_TENSORS_H
#define CUMOE_TORCH_TENSORS_H

#include <cumoe/cumoe.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <dlfcn.h>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

namespace cumoe_torch
{

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;
using Ints = std::vector<int64_t>;
using Reals = std::vector<double>;
using DeviceGuard = std::optional<torch::stable::accelerator::DeviceGuard>;

[[noreturn]] inline void fail(const std::string &sentence)
{
    throw std::runtime_error(sentence);
}

inline void check(cumoe_status_t status)
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

// A CUDA ordinal, -1 = the CPU.
inline Device device_number(int64_t ordinal)
{
    return {ordinal < 0 ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda(),
            static_cast<int32_t>(ordinal)};
}

inline Device device_of(const Tensor &tensor)
{
    Device device;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device.type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &device.index));
    return device;
}

// PyTorch's current stream. The function is in libtorch_cuda alone, which a PyTorch without CUDA lacks.
inline cumoe_stream_t current_stream(const Device &device)
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
inline const cumoe_handle_t *find_handle(const Device &device)
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

struct LayerKey {
    cumoe_config_t config; // without holes that hold anything: make_config()
    Device device;
    bool operator<(const LayerKey &other) const
    {
        return std::memcmp(this, &other, sizeof *this) < 0;
    }
};
static_assert(sizeof(LayerKey) == sizeof(cumoe_config_t) + sizeof(Device), "keys are compared as bytes");
using Layers = std::map<LayerKey, cumoe_layer_t *>;

inline const cumoe_layer_t *find_layer(const Device &device, const cumoe_config_t &config)
{
    static std::mutex mutex;
    static auto &layers = *new Layers;
    static thread_local std::pair<LayerKey, const cumoe_layer_t *> last; // as a rule it is the one before
    const LayerKey key = {config, device};
    if (last.second && std::memcmp(&last.first, &key, sizeof key) == 0) return last.second;
    std::lock_guard<std::mutex> lock(mutex);
    cumoe_layer_t *&layer = layers[key];
    if (!layer) check(cumoe_layer_create(&layer, find_handle(device), &config));
    last = {key, layer};
    return layer;
}

// ---- types and tensors ----

inline cumoe_dtype_t dtype_of(ScalarType type, const char *name)
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
inline ScalarType gate_type(ScalarType type)
{
    return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline int32_t number_of(ScalarType type)
{
    return static_cast<int32_t>(torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)));
}

inline size_t element_size(ScalarType type)
{
    return aoti_torch_dtype_element_size(number_of(type));
}

// A failure of PyTorch's comes out of its stable ABI without its kind and its sentence. ops.py looks for this
// sentence and asks PyTorch for the same memory again, so that the user gets PyTorch's own error.
[[noreturn]] inline void fail_to_allocate(int64_t elements, ScalarType type, const Device &device)
{
    const size_t bytes = static_cast<size_t>(elements) * element_size(type);
    fail("cumoe: PyTorch gave no tensor of " + std::to_string(bytes) + " bytes on " + device.name());
}

inline Tensor make(const Ints &size, ScalarType type, const Device &device)
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
inline Tensor make_like(const Tensor &tensor)
{
    try {
        return torch::stable::empty_like(tensor);
    } catch (const std::exception &) {
        fail_to_allocate(tensor.numel(), tensor.scalar_type(), device_of(tensor));
    }
}

inline Tensor copied_to(Tensor made, const Tensor &from)
{
    torch::stable::copy_(made, from);
    return made;
}

inline Ints size_of(const Tensor &tensor)
{
    const auto sizes = tensor.sizes();
    return Ints(sizes.begin(), sizes.end());
}

// A tensor without elements has no address; the library wants one where an array belongs.
inline void *address(const Tensor &tensor)
{
    alignas(16) static char nothing[16];
    void *data = tensor.data_ptr();
    return data ? data : nothing;
}

inline bool is_aligned(const Tensor &tensor, size_t alignment = 16)
{
    return reinterpret_cast<uintptr_t>(tensor.data_ptr()) % alignment == 0;
}

inline Tensor dense(const Tensor &tensor, size_t alignment = 16)
{
    if (tensor.is_contiguous() && is_aligned(tensor, alignment)) return tensor;
    return copied_to(make(size_of(tensor), tensor.scalar_type(), device_of(tensor)), tensor);
}

inline Tensor converted(const Tensor &tensor, ScalarType type)
{
    return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}

inline std::string shape_text(const Ints &size)
{
    std::string text = "[";
    for (size_t i = 0; i < size.size(); i++) text += (i ? ", " : "") + std::to_string(size[i]);
    return text + "]";
}

inline void expect_shape(const Tensor &tensor, const Ints &size, const char *name)
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

inline Rows rows_of(const Tensor &tensor)
{
    const int64_t rows = tensor.size(0), columns = tensor.size(1), stride = rows > 1 ? tensor.stride(0) : columns;
    if ((columns == 1 || tensor.stride(1) == 1) && stride >= columns && is_aligned(tensor)) return {tensor, stride};
    return {dense(tensor), columns};
}

} // namespace cumoe_torch

#endif
