/* The polynomials of host/elementary.h against the C library in double. */
#include "host/elementary.h"

#include <criterion/criterion.h>

enum { POINTS = 400000 };

/* Largest relative error over [low, high]; values that F32 can only hold as subnormals are left out. */
static double worst(float (*function)(float), double (*exact)(double), double low, double high)
{
    double most = 0;
    for (int i = 0; i <= POINTS; i++) {
        const float x = (float)(low + (high - low) * i / POINTS);
        const double expected = exact(x);
        if (fabs(expected) < 0x1p-124) continue;
        const double error = fabs(function(x) - expected) / fabs(expected);
        if (!(error <= most)) most = error; /* NaN counts */
    }
    return most;
}

/* Copies that have addresses. */
#define ADDRESSABLE(name)                                                                                          \
    static float name(float x)                                                                                     \
    {                                                                                                              \
        return name##_f32(x);                                                                                      \
    }
static float float_exp(float x)
{
    return exp_f32(x);
}
static float float_log1p(float x)
{
    return log1p_f32(x);
}
ADDRESSABLE(normal_cdf)
ADDRESSABLE(normal_density)
ADDRESSABLE(sigmoid)
ADDRESSABLE(softplus)
ADDRESSABLE(gelu_tanh_share)

static double exact_cdf(double z)
{
    return 0.5 * erfc(-z / sqrt(2));
}
static double exact_density(double z)
{
    return exp(-z * z / 2) / sqrt(2 * acos(-1));
}
static double exact_sigmoid(double x)
{
    return x < 0 ? exp(x) / (1 + exp(x)) : 1 / (1 + exp(-x));
}
/* 0.5 (1 + tanh(y)), without the cancellation where y is far below 0. */
static double exact_gelu_tanh_share(double z)
{
    return 1 / (1 + exp(-2 * sqrt(2 / acos(-1)) * (z + 0.044715 * z * z * z)));
}
static double exact_softplus(double x)
{
    return (x > 0 ? x : 0) + log1p(exp(-fabs(x)));
}

Test(elementary, relative_errors)
{
    const double exponential = worst(float_exp, exp, -86, 88.7), logarithm = worst(float_log1p, log1p, 1e-6, 1);
    const double cdf = worst(normal_cdf, exact_cdf, -12.8, 12.8);
    const double density = worst(normal_density, exact_density, -12.8, 12.8);
    const double logistic = worst(sigmoid, exact_sigmoid, -86, 86), plus = worst(softplus, exact_softplus, -86, 86);
    cr_expect(exponential < 2e-7, "exp %g", exponential);
    cr_expect(logarithm < 2e-7, "log1p %g", logarithm);
    cr_expect(cdf < 1e-6, "normal_cdf %g", cdf);
    cr_expect(density < 5e-7, "normal_density %g", density);
    cr_expect(logistic < 3e-7, "sigmoid %g", logistic);
    cr_expect(plus < 3e-7, "softplus %g", plus);
}

/* The argument of an exponential is as exact as F32 allows: its rounding counts as often as it is large. */
Test(elementary, gelu_tanh)
{
    const double middle = worst(gelu_tanh_share, exact_gelu_tanh_share, -3, 12);
    const double tail = worst(gelu_tanh_share, exact_gelu_tanh_share, -10, -3);
    cr_expect(middle < 1e-6, "gelu_tanh_share %g", middle);
    cr_expect(tail < 85 * 4 * 0x1p-24, "gelu_tanh_share, tail %g", tail);
    cr_expect(gelu_tanh_share_f32(0) == 0.5f && gelu_tanh_share_f32(-INFINITY) == 0);
    cr_expect(gelu_tanh_share_f32(INFINITY) == 1 && gelu_tanh_share_f32(1e30f) == 1 &&
              isnan(gelu_tanh_share_f32(NAN)));
    for (double z = -12; z < 12; z += 0.01) {
        const double exact = 0.5 * (1 + tanh(sqrt(2 / acos(-1)) * (z + 0.044715 * z * z * z)));
        cr_expect(fabs(gelu_tanh_share_f64(z) - exact) < 1e-15, "%g", z);
    }
}

/* NaN comes through, and the ends belong to the middle. */
Test(elementary, clamp_and_relu)
{
    cr_expect(clamp_f32(-2, -1, 3) == -1 && clamp_f32(4, -1, 3) == 3 && clamp_f32(-1, -1, 3) == -1);
    cr_expect(clamp_f32(INFINITY, -1, 3) == 3 && clamp_f32(-INFINITY, -1, 3) == -1 && clamp_f64(0.5, -1, 3) == 0.5);
    cr_expect(isnan(clamp_f32(NAN, -1, 3)) && isnan(clamp_f64((double)NAN, -1, 3)));
    cr_expect(relu_f32(-1) == 0 && relu_f32(2) == 2 && relu_f32(INFINITY) == INFINITY && relu_f32(-INFINITY) == 0);
    cr_expect(isnan(relu_f32(NAN)) && isnan(relu_f64((double)NAN)) && relu_f64(-0.5) == 0);
}

Test(elementary, edges)
{
    cr_expect(exp_f32(0) == 1 && exp_f32(-INFINITY) == 0 && exp_f32(-1000) == 0);
    cr_expect(exp_f32(INFINITY) == INFINITY && exp_f32(1000) == INFINITY && isnan(exp_f32(NAN)));
    cr_expect(isfinite(exp_f32(88.7f)));
    cr_expect(normal_cdf_f32(0) == 0.5f && normal_cdf_f32(-INFINITY) == 0 && normal_cdf_f32(INFINITY) == 1);
    cr_expect(isnan(normal_cdf_f32(NAN)) && normal_density_f32(INFINITY) == 0);
    cr_expect(sigmoid_f32(-INFINITY) == 0 && sigmoid_f32(INFINITY) == 1 && sigmoid_f32(0) == 0.5f);
    cr_expect(softplus_f32(-INFINITY) == 0 && softplus_f32(INFINITY) == INFINITY && softplus_f32(100) == 100);
}
