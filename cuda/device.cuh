/* The device behind a handle, as kernels need to know it. device.cu fills it. */
#pragma once

#include "host/backend.h"

#include <cuda_runtime.h>

namespace cumoe
{

struct Device {
    int ordinal;
    int num_sms;
    int capability; // 10 * major + minor
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

} // namespace cumoe
