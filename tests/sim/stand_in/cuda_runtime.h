/* In front of the toolkit's header of this name when g++ compiles the files of cuda/ for the simulator: the same
 * types and the same functions, and kernels that are ordinary functions. */
#pragma once

#include "tests/sim/device.h"

#include <cuda_runtime_api.h>
#include <tuple>
#include <vector_functions.h>

#undef __launch_bounds__
#undef __grid_constant__
#define __launch_bounds__(...)
#define __grid_constant__

/* Of the thread that runs. */
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace sim
{

template <typename... Parameters>
struct Call : Body {
    Call(void (*code)(Parameters...), Parameters... arguments) : code_(code), arguments_(arguments...)
    {
        bytes = sizeof *this;
        kernel = reinterpret_cast<const void *>(code);
    }
    void run() const override
    {
        std::apply(code_, arguments_);
    }

  private:
    void (*code_)(Parameters...);
    std::tuple<Parameters...> arguments_;
};

} // namespace sim

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(Parameters...),
                               Arguments... arguments)
{
    return sim::launch(
        *config, std::make_unique<const sim::Call<Parameters...>>(kernel, static_cast<Parameters>(arguments)...));
}

template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value)
{
    return cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel), attribute, value);
}

template <typename T>
cudaError_t cudaMalloc(T **address, size_t bytes)
{
    return cudaMalloc(reinterpret_cast<void **>(address), bytes);
}
