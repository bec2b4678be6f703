/* The device behind a handle, as kernels and the table of the backend need to know it. device.cu fills it. */
#pragma once

#include "host/backend.h"

#include <cuda_runtime.h>

struct nvtxDomainRegistration_st;

namespace cumoe
{

struct Device {
    int ordinal;
    int num_sms;
    int capability;                              // 10 * major + minor
    nvtxDomainRegistration_st *domain = nullptr; // of profilers' ranges; NULL where no profiler listens
};

inline const Device &device_of(const cumoe_context_t &context)
{
    return *static_cast<const Device *>(context.device);
}

/* The grid of a kernel whose blocks walk over WORK pieces: as many as run at a time. It hangs on host facts alone.
 */
inline dim3 resident_blocks(const cumoe_context_t &context, int64_t work, int blocks_per_sm)
{
    const int device = device_of(context).num_sms, wanted = context.config.max_sms;
    const int64_t resident = static_cast<int64_t>(wanted > 0 && wanted < device ? wanted : device) * blocks_per_sm;
    return dim3(static_cast<unsigned>(work < resident ? work : resident));
}

/* One call of the library: while it lives, its device is the thread's current one. At its end the caller's device
 * is back, and so is his last error: ours is taken out of CUDA's memory of it, a pending one of his is not. */
class DeviceCall
{
  public:
    explicit DeviceCall(int ordinal);
    ~DeviceCall();
    DeviceCall(const DeviceCall &) = delete;
    DeviceCall &operator=(const DeviceCall &) = delete;

    /* Of entering the device: nothing else may be called after one. */
    cudaError_t error() const
    {
        return error_;
    }

    /* The status of what CUDA said, with a sentence for the public FUNCTION. */
    cumoe_status_t status(const char *function, cudaError_t error) const;

  private:
    cudaError_t pending_, error_;
    int ordinal_, previous_ = 0;
};

/* The table's functions for devices, memory and streams. */
cumoe_status_t device_open(int32_t ordinal, void **device, char *description, size_t description_size);
void device_close(void *device);
cumoe_status_t memory_alloc(void *device, size_t size, void **ptr);
void memory_free(void *device, void *ptr);
cumoe_status_t memory_copy(void *device, void *dst, const void *src, size_t size, cumoe_copy_t kind,
                           cumoe_stream_t stream);
cumoe_status_t memory_set(void *device, void *ptr, int value, size_t size, cumoe_stream_t stream);
cumoe_status_t stream_create(void *device, cumoe_stream_t *stream);
void stream_destroy(void *device, cumoe_stream_t stream);
cumoe_status_t stream_synchronize(void *device, cumoe_stream_t stream);
cumoe_status_t lane_create(void *device, cumoe_lane_t *lane);
void lane_destroy(void *device, cumoe_lane_t *lane);
cumoe_status_t mark_set(void *device, const char *function, void *mark, cumoe_stream_t stream);
cumoe_status_t mark_wait(void *device, const char *function, void *mark, cumoe_stream_t stream);

/* And those for groups of ranks: comm_nccl.cu. */
cumoe_status_t group_id(const char *function, cumoe_ep_id *id);
cumoe_status_t group_join(const char *function, const cumoe_handle_t *handle, const cumoe_ep_args *args,
                          cumoe_ep_t **ep);

} // namespace cumoe
