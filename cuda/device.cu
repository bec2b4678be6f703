/* Devices, their memory and their streams: the only file that allocates, waits, or takes an error back. */
#include "cuda/device.cuh"

#include "host/error.h"

#include <limits.h>
#include <nvtx3/nvToolsExt.h>
#include <stdio.h>
#include <stdlib.h>

namespace cumoe
{

namespace
{

constexpr int kOldestCapability = 80;

const Device &of(const void *device)
{
    return *static_cast<const Device *>(device);
}

/* Whether there is a device ORDINAL that the kernels are made for; else a sentence. */
cumoe_status_t find_device(int ordinal, cudaDeviceProp *properties)
{
    int count = 0, driver = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess) {
        if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
        return cumoe__fail(
            CUMOE_UNSUPPORTED_DEVICE,
            "cumoe_handle_create: no CUDA device can be used: %s (%s); the driver is for CUDA %d.%d, this library "
            "for %d.%d",
            cudaGetErrorString(error), cudaGetErrorName(error), driver / 1000, driver % 1000 / 10,
            CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
    }
    CUMOE_REQUIRE(ordinal < count, UNSUPPORTED_DEVICE,
                  "cumoe_handle_create: ordinal = %d, but there are %d CUDA devices, and the first is 0", ordinal,
                  count);
    error = cudaGetDeviceProperties(properties, ordinal);
    CUMOE_REQUIRE(error == cudaSuccess, UNSUPPORTED_DEVICE,
                  "cumoe_handle_create: CUDA device %d cannot be used: %s (%s)", ordinal, cudaGetErrorString(error),
                  cudaGetErrorName(error));
    CUMOE_REQUIRE(10 * properties->major + properties->minor >= kOldestCapability, UNSUPPORTED_DEVICE,
                  "cumoe_handle_create: CUDA device %d, %s, has compute capability %d.%d, but must have %d.%d or "
                  "later",
                  ordinal, properties->name, properties->major, properties->minor, kOldestCapability / 10,
                  kOldestCapability % 10);
    return CUMOE_SUCCESS;
}

/* Makes the device's context now: a device that is there may still be taken by others, or full. cudaSetDevice()
 * does that, also for the thread's device of today, which DeviceCall has no reason to set. */
cumoe_status_t start_device(int ordinal)
{
    const DeviceCall call(ordinal);
    const cudaError_t error = call.error() != cudaSuccess ? call.error() : cudaSetDevice(ordinal);
    CUMOE_REQUIRE(error == cudaSuccess, UNSUPPORTED_DEVICE,
                  "cumoe_handle_create: CUDA device %d cannot be used: %s (%s)", ordinal, cudaGetErrorString(error),
                  cudaGetErrorName(error));
    return CUMOE_SUCCESS;
}

} // namespace

DeviceCall::DeviceCall(int ordinal) : pending_(cudaPeekAtLastError()), ordinal_(ordinal)
{
    error_ = cudaGetDevice(&previous_);
    if (error_ != cudaSuccess)
        previous_ = ordinal_; // unknown: nothing to go back to
    else if (previous_ != ordinal_)
        error_ = cudaSetDevice(ordinal_);
}

/* cudaSetDevice() makes a context on the caller's device where there was none: a thread that has never chosen a
 * device and uses a handle of another than 0 gets one on 0. To avoid it, contexts would have to be pushed and
 * popped by the driver's functions; such a thread calls cudaSetDevice() once before. */
DeviceCall::~DeviceCall()
{
    if (previous_ != ordinal_) (void)cudaSetDevice(previous_);
    if (pending_ == cudaSuccess) (void)cudaGetLastError();
}

cumoe_status_t DeviceCall::status(const char *function, cudaError_t error) const
{
    if (error == cudaSuccess) return CUMOE_SUCCESS;
    return cumoe__fail(error == cudaErrorMemoryAllocation ? CUMOE_OUT_OF_MEMORY : CUMOE_CUDA_ERROR,
                       "%s: CUDA device %d: %s (%s)", function, ordinal_, cudaGetErrorString(error),
                       cudaGetErrorName(error));
}

cumoe_status_t device_open(int32_t ordinal, void **device, char *description, size_t description_size)
{
    cudaDeviceProp properties;
    const cudaError_t pending = cudaPeekAtLastError();
    cumoe_status_t status = find_device(ordinal, &properties);
    if (pending == cudaSuccess) (void)cudaGetLastError();
    if (status == CUMOE_SUCCESS) status = start_device(ordinal);
    if (status != CUMOE_SUCCESS) return status;

    Device *made = static_cast<Device *>(malloc(sizeof *made));
    CUMOE_REQUIRE(made, OUT_OF_MEMORY, "cumoe_handle_create: no host memory for the device");
    const int capability = 10 * properties.major + properties.minor;
    *made = {ordinal, properties.multiProcessorCount, capability, nvtxDomainCreateA("cumoe")};
    snprintf(description, description_size, "%s, sm_%d, %d SMs, %zu GiB, CUDA %d.%d", properties.name, capability,
             properties.multiProcessorCount, properties.totalGlobalMem >> 30, CUDART_VERSION / 1000,
             CUDART_VERSION % 1000 / 10);
    *device = made;
    return CUMOE_SUCCESS;
}

void device_close(void *device)
{
    nvtxDomainDestroy(of(device).domain);
    free(device);
}

cumoe_status_t memory_alloc(void *device, size_t size, void **ptr)
{
    CUMOE_REQUIRE(size <= SIZE_MAX / 2, OUT_OF_MEMORY, "cumoe_memory_alloc: size = %zu, more than any device has",
                  size);
    const DeviceCall call(of(device).ordinal);
    void *made = nullptr;
    const cudaError_t error = call.error() != cudaSuccess ? call.error() : cudaMalloc(&made, size);
    CUMOE_REQUIRE(error != cudaErrorMemoryAllocation, OUT_OF_MEMORY,
                  "cumoe_memory_alloc: size = %zu, but CUDA device %d: %s (%s)", size, of(device).ordinal,
                  cudaGetErrorString(error), cudaGetErrorName(error));
    CUMOE_TRY(call.status("cumoe_memory_alloc", error));
    *ptr = made;
    return CUMOE_SUCCESS;
}

/* An address is enough to free by: it is done even where the device cannot be entered. */
void memory_free(void *device, void *ptr)
{
    const DeviceCall call(of(device).ordinal);
    (void)cudaFree(ptr);
}

cumoe_status_t memory_copy(void *device, void *dst, const void *src, size_t size, cumoe_copy_t kind,
                           cumoe_stream_t stream)
{
    const cudaMemcpyKind direction = kind == CUMOE_COPY_TO_DEVICE ? cudaMemcpyHostToDevice
                                     : kind == CUMOE_COPY_TO_HOST ? cudaMemcpyDeviceToHost
                                                                  : cudaMemcpyDeviceToDevice;
    const DeviceCall call(of(device).ordinal);
    const cudaError_t error =
        call.error() != cudaSuccess ? call.error() : cudaMemcpyAsync(dst, src, size, direction, stream);
    return call.status("cumoe_memory_copy", error);
}

cumoe_status_t memory_set(void *device, void *ptr, int value, size_t size, cumoe_stream_t stream)
{
    const DeviceCall call(of(device).ordinal);
    const cudaError_t error =
        call.error() != cudaSuccess ? call.error() : cudaMemsetAsync(ptr, value, size, stream);
    return call.status("cumoe_memory_set", error);
}

/* It waits for the default stream, and that for it: work that was enqueued without a stream is done before. */
cumoe_status_t stream_create(void *device, cumoe_stream_t *stream)
{
    const DeviceCall call(of(device).ordinal);
    cudaStream_t made = nullptr;
    const cudaError_t error = call.error() != cudaSuccess ? call.error() : cudaStreamCreate(&made);
    CUMOE_TRY(call.status("cumoe_stream_create", error));
    *stream = made;
    return CUMOE_SUCCESS;
}

void stream_destroy(void *device, cumoe_stream_t stream)
{
    const DeviceCall call(of(device).ordinal);
    (void)cudaStreamDestroy(stream);
}

cumoe_status_t stream_synchronize(void *device, cumoe_stream_t stream)
{
    const DeviceCall call(of(device).ordinal);
    const cudaError_t error = call.error() != cudaSuccess ? call.error() : cudaStreamSynchronize(stream);
    return call.status("cumoe_stream_synchronize", error);
}

/* It waits for marks alone, not for the default stream: exchanges are to run beside what the caller enqueued there.
 * Their few blocks come before those of products that wait for a place: CUDA takes the nearest priority that it
 * has.
 */
cumoe_status_t lane_create(void *device, cumoe_lane_t *lane)
{
    const DeviceCall call(of(device).ordinal);
    cumoe_lane_t made = {};
    cudaError_t error = call.error();
    if (error == cudaSuccess) error = cudaStreamCreateWithPriority(&made.stream, cudaStreamNonBlocking, INT_MIN);
    for (void *&mark : made.marks) {
        cudaEvent_t event = nullptr;
        if (error == cudaSuccess) error = cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
        mark = event;
    }
    if (error != cudaSuccess) lane_destroy(device, &made);
    CUMOE_TRY(call.status("cumoe_layer_create", error));
    *lane = made;
    return CUMOE_SUCCESS;
}

void lane_destroy(void *device, cumoe_lane_t *lane)
{
    const DeviceCall call(of(device).ordinal);
    for (void *mark : lane->marks)
        if (mark) (void)cudaEventDestroy(static_cast<cudaEvent_t>(mark));
    if (lane->stream) (void)cudaStreamDestroy(lane->stream);
}

cumoe_status_t mark_set(void *device, const char *function, void *mark, cumoe_stream_t stream)
{
    const DeviceCall call(of(device).ordinal);
    const cudaError_t error =
        call.error() != cudaSuccess ? call.error() : cudaEventRecord(static_cast<cudaEvent_t>(mark), stream);
    return call.status(function, error);
}

cumoe_status_t mark_wait(void *device, const char *function, void *mark, cumoe_stream_t stream)
{
    const DeviceCall call(of(device).ordinal);
    const cudaError_t error =
        call.error() != cudaSuccess ? call.error() : cudaStreamWaitEvent(stream, static_cast<cudaEvent_t>(mark), 0);
    return call.status(function, error);
}

} // namespace cumoe
