/* The activations of cumoe/types.h with their derivatives; tests/unit/test_reference.c holds them to central
 * differences. NaN comes through: comparisons are written so that it does. */
#include "tests/support/reference_formulas.h"

static reference_activation_t relu(double z)
{
    return (reference_activation_t){z <= 0 ? 0 : z, z > 0, 0};
}

static reference_activation_t relu2(double z)
{
    const double positive = z <= 0 ? 0 : z;
    return (reference_activation_t){positive * positive, 2 * positive, 0};
}

static reference_activation_t gelu(double z)
{
    return (reference_activation_t){z * normal_cdf(z), normal_cdf(z) + z * normal_density(z), 0};
}

static reference_activation_t gelu_tanh(double z)
{
    const double scale = sqrt(2 / acos(-1)), cubic = 0.044715;
    const double t = tanh(scale * (z + cubic * z * z * z));
    const double dt = (1 - t * t) * scale * (1 + 3 * cubic * z * z);
    return (reference_activation_t){0.5 * z * (1 + t), 0.5 * (1 + t) + 0.5 * z * dt, 0};
}

/* z sigmoid(alpha z) */
static reference_activation_t silu(double z, double alpha)
{
    const double s = sigmoid(alpha * z);
    return (reference_activation_t){z * s, s + alpha * z * s * (1 - s), 0};
}

static reference_activation_t gated(reference_activation_t glu, double up)
{
    return (reference_activation_t){glu.value * up, glu.value, glu.dup * up};
}

/* A clamp passes the gradient where its limit is met exactly. */
static reference_activation_t swiglu_clamped(const reference_input_t *in, double up, double glu)
{
    const double limit = in->swiglu_limit;
    const double u = up > limit ? limit : up < -limit ? -limit : up;
    reference_activation_t a = gated(silu(glu > limit ? limit : glu, in->swiglu_alpha), u + in->swiglu_offset);
    if (fabs(up) > limit) a.dup = 0;
    if (glu > limit) a.dglu = 0;
    return a;
}

reference_activation_t reference_activation(const reference_input_t *in, double up, double glu)
{
    switch (in->activation) {
    case CUMOE_ACTIVATION_RELU:
        return relu(up);
    case CUMOE_ACTIVATION_RELU2:
        return relu2(up);
    case CUMOE_ACTIVATION_GELU:
        return gelu(up);
    case CUMOE_ACTIVATION_GELU_TANH:
        return gelu_tanh(up);
    case CUMOE_ACTIVATION_SILU:
        return silu(up, 1);
    case CUMOE_ACTIVATION_SWIGLU:
        return gated(silu(glu, 1), up);
    case CUMOE_ACTIVATION_GEGLU:
        return gated(gelu(glu), up);
    case CUMOE_ACTIVATION_GEGLU_TANH:
        return gated(gelu_tanh(glu), up);
    case CUMOE_ACTIVATION_SWIGLU_CLAMPED:
        return swiglu_clamped(in, up, glu);
    case CUMOE_ACTIVATION_IDENTITY:
        return (reference_activation_t){up, 1, 0};
    }
    return (reference_activation_t){NAN, NAN, NAN};
}
