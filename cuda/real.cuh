/* Numbers: the type of arithmetic (float, or double for F64), and values in memory, which are widened as they are
 * read and rounded as they are written. */
#pragma once

#include "cuda/ptx.cuh"
#include "host/activation.h"

namespace cumoe
{

/* host/elementary.h by the type of arithmetic. */
#define CUMOE_REAL_FUNCTION(name)                                                                                  \
    __device__ __forceinline__ float name(float x)                                                                 \
    {                                                                                                              \
        return name##_f32(x);                                                                                      \
    }                                                                                                              \
    __device__ __forceinline__ double name(double x)                                                               \
    {                                                                                                              \
        return name##_f64(x);                                                                                      \
    }
namespace real
{
CUMOE_REAL_FUNCTION(exp)
CUMOE_REAL_FUNCTION(sigmoid)
CUMOE_REAL_FUNCTION(softplus)
CUMOE_REAL_FUNCTION(normal_cdf)
CUMOE_REAL_FUNCTION(normal_density)
} // namespace real
#undef CUMOE_REAL_FUNCTION

/* Element AT of an array whose type is known at run time: BF16, F16, or Real itself (F32, F64). */
template <typename Real>
__device__ __forceinline__ Real load(const void *data, cumoe_dtype_t dtype, int64_t at)
{
    if (dtype == CUMOE_BF16)
        return static_cast<Real>(__bfloat162float(static_cast<const __nv_bfloat16 *>(data)[at]));
    if (dtype == CUMOE_F16) return static_cast<Real>(__half2float(static_cast<const __half *>(data)[at]));
    return static_cast<const Real *>(data)[at];
}

template <typename Real>
__device__ __forceinline__ void store(void *data, cumoe_dtype_t dtype, int64_t at, Real value)
{
    if (dtype == CUMOE_BF16)
        static_cast<__nv_bfloat16 *>(data)[at] = __float2bfloat16_rn(static_cast<float>(value));
    else if (dtype == CUMOE_F16)
        static_cast<__half *>(data)[at] = __float2half_rn(static_cast<float>(value));
    else
        static_cast<Real *>(data)[at] = value;
}

/* What storing leaves of a value. */
template <typename Real>
__device__ __forceinline__ Real rounded(Real value, cumoe_dtype_t dtype)
{
    if (dtype == CUMOE_BF16)
        return static_cast<Real>(__bfloat162float(__float2bfloat16_rn(static_cast<float>(value))));
    if (dtype == CUMOE_F16) return static_cast<Real>(__half2float(__float2half_rn(static_cast<float>(value))));
    return value;
}

} // namespace cumoe
