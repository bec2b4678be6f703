/* Elementary functions of the gate and of activations, one file for C and CUDA. F32: branch-free polynomials that a
 * compiler turns into vector code, relative error below 1e-6 (checked by a test), the same bits everywhere; F64,
 * for checks: the C library's. */
#ifndef CUMOE_ELEMENTARY_H
#define CUMOE_ELEMENTARY_H

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define CUMOE_ELEMENTARY_FN static __host__ __device__ __forceinline__
#else
#define CUMOE_ELEMENTARY_FN static inline __attribute__((always_inline, unused))
#endif

/* e^x = 2^n 2^t, n integer, |t| <= 1/2; 0 below -86.6 (no subnormals), +Inf from 88.72 on; NaN stays NaN. */
CUMOE_ELEMENTARY_FN float exp_f32(float x)
{
    const float low = -86.6f;
    const float clamped = x < low ? low : x;
    float y = clamped * 1.44269504f;
    y = y > 128.0f ? 128.0f : y;
    const float shifted = y + 12582912.0f; /* 1.5 * 2^23: the integer stands in the low bits */
    const float n = shifted - 12582912.0f;
    /* t = x log2(e) - n, with log2(e) in two pieces: exact to the last bits also for large |x| */
    const float t = fmaf(clamped, 1.92596303e-8f, fmaf(clamped, 1.44269502f, -n));
    float p = fmaf(t, 0.000153458081f, 0.00133999309f);
    p = fmaf(t, p, 0.00961848907f);
    p = fmaf(t, p, 0.0555032864f);
    p = fmaf(t, p, 0.240226462f);
    p = fmaf(t, p, 0.693147182f);
    p = fmaf(t, p, 1.0f);
    int32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (int32_t)((uint32_t)(bits - 0x4B400000 + 126) << 23);
    float half_scale; /* 2^(n - 1): 2^128 would be no number */
    memcpy(&half_scale, &bits, sizeof half_scale);
    const float result = (p + p) * half_scale;
    return x < low ? 0.0f : result;
}

/* e^(-z^2 / 2): the square rounded, and what the rounding lost. |z| is cut at 40, where the value is 0 long since.
 */
CUMOE_ELEMENTARY_FN float gauss_f32(float z)
{
    const float a = fabsf(z) > 40.0f ? 40.0f : z;
    const float square = a * a;
    return exp_f32(-0.5f * square) * fmaf(-0.5f, fmaf(a, a, -square), 1.0f);
}

/* ln(1 + x) for x in [0, 1]. */
CUMOE_ELEMENTARY_FN float log1p_f32(float x)
{
    /* 1 + x = m 2^e with m in [sqrt(1/2), sqrt(2)): e is 0 or 1; f = m - 1 without rounding 1 + x */
    const float e = x > 0.41421356f ? 1.0f : 0.0f;
    const float f = x > 0.41421356f ? fmaf(x, 0.5f, -0.5f) : x;
    float p = fmaf(f, -0.0786537752f, 0.128791735f);
    p = fmaf(f, p, -0.131253093f);
    p = fmaf(f, p, 0.141814247f);
    p = fmaf(f, p, -0.166249692f);
    p = fmaf(f, p, 0.200022817f);
    p = fmaf(f, p, -0.250007957f);
    p = fmaf(f, p, 0.333333164f);
    p = fmaf(f, p, -0.5f);
    return fmaf(e, 0.693147182f, fmaf(f * f, p, f));
}

/* Phi, the distribution function of the standard normal: erfc(x) = t exp(-x^2 + P(t)), t = 1 / (1 + x/2), for the
 * tail x = |z| / sqrt(2), so that small probabilities keep their relative accuracy. */
CUMOE_ELEMENTARY_FN float normal_cdf_f32(float z)
{
    const float x = (fabsf(z) > 40.0f ? 40.0f : fabsf(z)) * 0.707106781f;
    const float t = 1.0f / fmaf(x, 0.5f, 1.0f);
    float p = fmaf(t, 0.157901451f, -0.751439214f);
    p = fmaf(t, p, 1.32275927f);
    p = fmaf(t, p, -0.9168908f);
    p = fmaf(t, p, 0.101755388f);
    p = fmaf(t, p, -0.0950703546f);
    p = fmaf(t, p, 0.06717664f);
    p = fmaf(t, p, 0.379883438f);
    p = fmaf(t, p, 0.999409795f);
    p = fmaf(t, p, -1.26548564f);
    const float tail = 0.5f * t * gauss_f32(z) * exp_f32(p);
    return z > 0 ? 1.0f - tail : tail;
}

CUMOE_ELEMENTARY_FN double exp_f64(double x)
{
    return exp(x);
}

CUMOE_ELEMENTARY_FN double gauss_f64(double z)
{
    return exp(-0.5 * z * z);
}

CUMOE_ELEMENTARY_FN double log1p_f64(double x)
{
    return log1p(x);
}

CUMOE_ELEMENTARY_FN double normal_cdf_f64(double z)
{
    return 0.5 * erfc(-z * 0.70710678118654752440);
}

/* The tanh form of gelu is z sigmoid(SCALE (z + CUBE z^3)). */
#define GELU_TANH_SCALE 1.59576912160573071176 /* 2 sqrt(2 / pi) */
#define GELU_TANH_CUBE  0.044715

/* Made of the above, for both types. */
#define CUMOE_ELEMENTARY_DEFINE(REAL, SUFFIX)                                                                      \
    CUMOE_ELEMENTARY_FN REAL sigmoid_##SUFFIX(REAL x)                                                              \
    {                                                                                                              \
        const REAL e = exp_##SUFFIX(x < 0 ? x : -x); /* of the negative side: no overflow */                       \
        return (x < 0 ? e : 1) / (1 + e);                                                                          \
    }                                                                                                              \
    CUMOE_ELEMENTARY_FN REAL softplus_##SUFFIX(REAL x)                                                             \
    {                                                                                                              \
        return (x > 0 ? x : 0) + log1p_##SUFFIX(exp_##SUFFIX(x < 0 ? x : -x));                                     \
    }                                                                                                              \
    CUMOE_ELEMENTARY_FN REAL normal_density_##SUFFIX(REAL z)                                                       \
    {                                                                                                              \
        return (REAL)0.39894228040143267794 * gauss_##SUFFIX(z);                                                   \
    }                                                                                                              \
    CUMOE_ELEMENTARY_FN REAL clamp_##SUFFIX(REAL x, REAL low, REAL high)                                           \
    {                                                                                                              \
        return x < low ? low : x > high ? high : x; /* NaN stays */                                                \
    }                                                                                                              \
    CUMOE_ELEMENTARY_FN REAL above_infinity_##SUFFIX(REAL x) /* -Inf made a number: times 0 it is 0 */             \
    {                                                                                                              \
        return x < -FLT_MAX ? -FLT_MAX : x;                                                                        \
    }                                                                                                              \
    CUMOE_ELEMENTARY_FN REAL finite_##SUFFIX(REAL x)                                                               \
    {                                                                                                              \
        return clamp_##SUFFIX(x, -FLT_MAX, FLT_MAX);                                                               \
    }                                                                                                              \
    CUMOE_ELEMENTARY_FN REAL relu_##SUFFIX(REAL x)                                                                 \
    {                                                                                                              \
        return x < 0 ? 0 : x;                                                                                      \
    }                                                                                                              \
    CUMOE_ELEMENTARY_FN REAL gelu_tanh_share_##SUFFIX(REAL x)                                                      \
    {                                                                                                              \
        const REAL z = clamp_##SUFFIX(x, -40, 40); /* 0 and 1 long since; z^3 stays finite */                      \
        return sigmoid_##SUFFIX((REAL)GELU_TANH_SCALE * (z + (REAL)GELU_TANH_CUBE * z * z * z));                   \
    }                                                                                                              \
    CUMOE_ELEMENTARY_FN REAL gelu_tanh_slope_##SUFFIX(REAL x, REAL share)                                          \
    {                                                                                                              \
        const REAL z = clamp_##SUFFIX(x, -40, 40);                                                                 \
        return share + z * share * (1 - share) * (REAL)GELU_TANH_SCALE * (1 + 3 * (REAL)GELU_TANH_CUBE * z * z);   \
    }

CUMOE_ELEMENTARY_DEFINE(float, f32)
CUMOE_ELEMENTARY_DEFINE(double, f64)

#endif
