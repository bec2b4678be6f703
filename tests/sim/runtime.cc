/* The CUDA runtime's functions that the backend calls: devices, memory, errors, launches. Declared by the toolkit's
 * own headers. What is missing here fails to link. */
#include "tests/sim/core.h"
#include "tests/sim/simulator.h"
#include "tests/sim/stream.h"

#include <algorithm>
#include <map>
#include <stdio.h>
#include <string.h>

namespace sim
{

std::recursive_mutex mutex;

namespace
{

constexpr int kMaxDevices = 16, kNumMultiprocessors = 4; // few, so that persistent blocks have several tiles each
constexpr size_t kSharedWithoutAsking = 48 * 1024;

struct {
    int count = 1, major = 8, minor = 0;
    size_t memory = size_t{80} << 30;
} devices;

thread_local int device_of_thread;
thread_local cudaError_t last_error;
int64_t num_calls, call_to_fail;
std::map<const void *, size_t> shared_asked; // by kernel

/* What one block may have, on request. */
int max_shared()
{
    const int capability = 10 * devices.major + devices.minor;
    if (capability == 80 || capability == 87) return 163 * 1024;
    return capability == 86 || capability == 89 || capability >= 120 ? 99 * 1024 : 227 * 1024;
}

bool is_device(const void *address, size_t bytes)
{
    int device;
    return is_device_memory(address, bytes, &device);
}

/* Whether the addresses are what KIND says. */
bool fits(const void *to, const void *from, size_t bytes, cudaMemcpyKind kind)
{
    const bool to_device = is_device(to, bytes), from_device = is_device(from, bytes);
    switch (kind) {
    case cudaMemcpyHostToHost:
        return !to_device && !from_device;
    case cudaMemcpyHostToDevice:
        return to_device && !from_device;
    case cudaMemcpyDeviceToHost:
        return !to_device && from_device;
    case cudaMemcpyDeviceToDevice:
        return to_device && from_device;
    default:
        return true;
    }
}

cudaError_t check_launch(const cudaLaunchConfig_t &config, const void *kernel)
{
    const dim3 grid = config.gridDim, size = config.blockDim;
    const uint64_t threads = static_cast<uint64_t>(size.x) * size.y * size.z;
    if (threads == 0 || threads > kMaxThreads || size.z > 64) return cudaErrorInvalidConfiguration;
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaErrorInvalidConfiguration;
    if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) return cudaErrorInvalidConfiguration;
    const auto asked = shared_asked.find(kernel);
    if (config.dynamicSmemBytes > std::max(kSharedWithoutAsking, asked == shared_asked.end() ? 0 : asked->second))
        return cudaErrorInvalidValue;
    for (unsigned i = 0; i < config.numAttrs; i++)
        if (config.attrs[i].id != cudaLaunchAttributeProgrammaticStreamSerialization || devices.major < 9)
            return cudaErrorNotSupported;
    return cudaSuccess;
}

} // namespace

int current_device()
{
    return device_of_thread;
}

size_t memory_of_device(int)
{
    return devices.memory;
}

cudaError_t keep_error(cudaError_t error)
{
    if (error) last_error = error;
    return error;
}

cudaError_t enter(cudaError_t failure)
{
    num_calls++;
    if (devices.count == 0) return cudaErrorNoDevice;
    return call_to_fail > 0 && --call_to_fail == 0 ? failure : cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t &config, std::unique_ptr<const Body> body)
{
    SIM_ENTER(cudaErrorLaunchOutOfResources);
    if (const cudaError_t error = check_launch(config, body->kernel)) return keep_error(error);
    const Kernel kernel = {std::move(body), config.gridDim, config.blockDim, config.dynamicSmemBytes,
                           find_stream(config.stream)->device};
    return keep_error(
        enqueue(config.stream, [kernel] { return run_kernel(kernel) ? cudaSuccess : cudaErrorLaunchFailure; }));
}

} // namespace sim

using namespace sim;

void sim_set_devices(int count, int major, int minor, size_t memory)
{
    devices = {std::min(count, kMaxDevices), major, minor, memory};
}

void sim_fail_call(int64_t call)
{
    call_to_fail = call;
}

int64_t sim_num_calls(void)
{
    return num_calls;
}

int64_t sim_num_objects(void)
{
    return static_cast<int64_t>(num_allocations() + num_streams_and_events());
}

extern "C" {

cudaError_t cudaGetDeviceCount(int *count)
{
    *count = 0;
    SIM_ENTER();
    *count = devices.count;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int *device)
{
    SIM_ENTER();
    *device = device_of_thread;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device)
{
    SIM_ENTER();
    if (device < 0 || device >= devices.count) return keep_error(cudaErrorInvalidDevice);
    if (devices.memory == 0) return keep_error(cudaErrorMemoryAllocation); // as no context fits
    device_of_thread = device;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device)
{
    SIM_ENTER();
    if (device < 0 || device >= devices.count) return keep_error(cudaErrorInvalidDevice);
    switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
        *value = devices.major;
        break;
    case cudaDevAttrComputeCapabilityMinor:
        *value = devices.minor;
        break;
    case cudaDevAttrMultiProcessorCount:
        *value = kNumMultiprocessors;
        break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
        *value = kSharedWithoutAsking;
        break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        *value = max_shared();
        break;
    case cudaDevAttrMaxThreadsPerBlock:
        *value = kMaxThreads;
        break;
    case cudaDevAttrWarpSize:
        *value = kWarp;
        break;
    default:
        return keep_error(cudaErrorInvalidValue);
    }
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int device)
{
    SIM_ENTER();
    if (device < 0 || device >= devices.count) return keep_error(cudaErrorInvalidDevice);
    *properties = {};
    snprintf(properties->name, sizeof properties->name, "simulated GPU");
    properties->major = devices.major;
    properties->minor = devices.minor;
    properties->multiProcessorCount = kNumMultiprocessors;
    properties->totalGlobalMem = devices.memory;
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version)
{
    *version = devices.count ? CUDART_VERSION : 0; // 0: there is no driver
    return cudaSuccess;
}

cudaError_t cudaGetLastError()
{
    const cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

cudaError_t cudaPeekAtLastError()
{
    return last_error;
}

const char *cudaGetErrorName(cudaError_t error)
{
    switch (error) {
#define SIM_NAME(name)                                                                                             \
    case name:                                                                                                     \
        return #name
        SIM_NAME(cudaSuccess);
        SIM_NAME(cudaErrorInvalidValue);
        SIM_NAME(cudaErrorMemoryAllocation);
        SIM_NAME(cudaErrorInvalidConfiguration);
        SIM_NAME(cudaErrorInvalidDevice);
        SIM_NAME(cudaErrorNoDevice);
        SIM_NAME(cudaErrorNotSupported);
        SIM_NAME(cudaErrorLaunchFailure);
        SIM_NAME(cudaErrorLaunchOutOfResources);
        SIM_NAME(cudaErrorStreamCaptureUnsupported);
        SIM_NAME(cudaErrorStreamCaptureInvalidated);
        SIM_NAME(cudaErrorStreamCaptureImplicit);
#undef SIM_NAME
    default:
        return "cudaErrorUnknown";
    }
}

const char *cudaGetErrorString(cudaError_t error)
{
    return cudaGetErrorName(error);
}

cudaError_t cudaMalloc(void **address, size_t bytes)
{
    SIM_ENTER(cudaErrorMemoryAllocation);
    *address = nullptr;
    if (!allows_allocation()) return keep_error(cudaErrorStreamCaptureUnsupported);
    if (bytes == 0) return cudaSuccess;
    *address = device_allocate(device_of_thread, bytes);
    return *address ? cudaSuccess : keep_error(cudaErrorMemoryAllocation);
}

cudaError_t cudaFree(void *address)
{
    SIM_LOCK;
    const cudaError_t injected = enter();
    if (!address) return keep_error(injected);
    if (!allows_allocation()) return keep_error(cudaErrorStreamCaptureUnsupported);
    const cudaError_t error = drain_all();
    if (!device_free(address)) return keep_error(cudaErrorInvalidValue);
    return keep_error(injected ? injected : error);
}

cudaError_t cudaMemGetInfo(size_t *available, size_t *total)
{
    SIM_ENTER();
    device_memory(device_of_thread, available, total);
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind)
{
    SIM_ENTER();
    if (bytes == 0) return cudaSuccess;
    if (!allows_allocation()) return keep_error(cudaErrorStreamCaptureImplicit);
    if (!fits(to, from, bytes, kind)) return keep_error(cudaErrorInvalidValue);
    const cudaError_t error = cudaStreamSynchronize(nullptr);
    if (!error) memcpy(to, from, bytes);
    return error;
}

/* Memory of the host is taken as pageable: it is read before the call returns, and written as well. */
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream)
{
    SIM_ENTER();
    if (bytes == 0) return cudaSuccess;
    if (!fits(to, from, bytes, kind)) return keep_error(cudaErrorInvalidValue);
    const bool capturing = find_stream(stream)->capture;
    if (!capturing && !is_device(from, bytes)) {
        const char *begin = static_cast<const char *>(from);
        const std::vector<char> staged(begin, begin + bytes);
        return keep_error(enqueue(stream, [=] {
            memcpy(to, staged.data(), bytes);
            return cudaSuccess;
        }));
    }
    const cudaError_t error = enqueue(stream, [=] {
        memcpy(to, from, bytes);
        return cudaSuccess;
    });
    if (error || capturing || is_device(to, bytes)) return keep_error(error);
    return keep_error(drain(find_stream(stream)));
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream)
{
    SIM_ENTER();
    if (bytes == 0) return cudaSuccess;
    if (!is_device(to, bytes)) return keep_error(cudaErrorInvalidValue);
    return keep_error(enqueue(stream, [=] {
        memset(to, value, bytes);
        return cudaSuccess;
    }));
}

cudaError_t cudaMemset(void *to, int value, size_t bytes)
{
    return cudaMemsetAsync(to, value, bytes, nullptr);
}

cudaError_t cudaFuncSetAttribute(const void *kernel, cudaFuncAttribute attribute, int value)
{
    SIM_ENTER();
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess; // the others are hints
    if (value < 0 || value > max_shared()) return keep_error(cudaErrorInvalidValue);
    shared_asked[kernel] = static_cast<size_t>(value);
    return cudaSuccess;
}
}
