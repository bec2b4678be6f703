/* The one way to start a kernel. */
#pragma once

#include <cuda_runtime.h>
#include <stddef.h>

namespace cumoe
{

struct Launch {
    dim3 grid; // a 0 in it: there is nothing to do, and nothing is launched
    dim3 block;
    cudaStream_t stream;
    size_t shared_bytes = 0;                         // of shared_bytes<Arrays>()
    const cudaLaunchAttribute *attributes = nullptr; // [num_attributes] as for cudaLaunchKernelEx
    unsigned num_attributes = 0;
};

/* Returns the launch's own error. Allocates and synchronizes nothing, and may be captured. */
template <typename... Parameters, typename... Arguments>
[[nodiscard]] cudaError_t launch(const Launch &how, void (*kernel)(Parameters...), Arguments... arguments)
{
    if (how.grid.x == 0 || how.grid.y == 0 || how.grid.z == 0) return cudaSuccess;

    // More than this is given on request only. The request is cheap, and repeating it keeps no state.
    constexpr size_t kSharedWithoutAsking = 48 * 1024;
    if (how.shared_bytes > kSharedWithoutAsking) {
        const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                       static_cast<int>(how.shared_bytes));
        if (error != cudaSuccess) return error;
    }

    cudaLaunchConfig_t config = {};
    config.gridDim = how.grid;
    config.blockDim = how.block;
    config.dynamicSmemBytes = how.shared_bytes;
    config.stream = how.stream;
    config.attrs = const_cast<cudaLaunchAttribute *>(how.attributes); // only read; the field lacks the const
    config.numAttrs = how.num_attributes;
    return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

} // namespace cumoe
