/* Of activation.h, in REAL. */

/* The activation of one pre-activation, and its derivatives by up and by glu; by_glu = 0 without glu. */
typedef struct FN(cumoe_activated) {
    REAL hidden, by_up, by_glu;
} FN(cumoe_activated_t);

CUMOE_ELEMENTARY_FN FN(cumoe_activated_t)
    FN(cumoe__activate)(cumoe_activation_t activation, REAL up, REAL glu, cumoe_swiglu_t swiglu)
{
    FN(cumoe_activated_t) a = {up, 1, 0};
    switch (activation) {
    case CUMOE_ACTIVATION_RELU: {
        a.hidden = FN(relu)(up);
        a.by_up = up > 0 ? 1 : a.hidden; /* 0, or NaN */
        break;
    }
    case CUMOE_ACTIVATION_RELU2: {
        const REAL relu = FN(relu)(up);
        a.hidden = relu * relu;
        a.by_up = 2 * relu;
        break;
    }
    case CUMOE_ACTIVATION_GELU: {
        const REAL share = FN(normal_cdf)(up);
        a.hidden = FN(above_infinity)(up) * share;
        a.by_up = share + FN(finite)(up) * FN(normal_density)(up);
        break;
    }
    case CUMOE_ACTIVATION_GELU_TANH: {
        const REAL share = FN(gelu_tanh_share)(up);
        a.hidden = FN(above_infinity)(up) * share;
        a.by_up = FN(gelu_tanh_slope)(up, share);
        break;
    }
    case CUMOE_ACTIVATION_SILU: {
        const REAL s = FN(sigmoid)(up);
        a.hidden = FN(above_infinity)(up) * s;
        a.by_up = s + FN(finite)(up) * s * (1 - s);
        break;
    }
    case CUMOE_ACTIVATION_SWIGLU: {
        const REAL s = FN(sigmoid)(glu), silu = FN(above_infinity)(glu) * s;
        a.hidden = silu * up;
        a.by_up = silu;
        a.by_glu = up * (s + FN(finite)(silu) * (1 - s));
        break;
    }
    case CUMOE_ACTIVATION_GEGLU: {
        const REAL share = FN(normal_cdf)(glu), gelu = FN(above_infinity)(glu) * share;
        a.hidden = gelu * up;
        a.by_up = gelu;
        a.by_glu = up * (share + FN(finite)(glu) * FN(normal_density)(glu));
        break;
    }
    case CUMOE_ACTIVATION_GEGLU_TANH: {
        const REAL share = FN(gelu_tanh_share)(glu), gelu = FN(above_infinity)(glu) * share;
        a.hidden = gelu * up;
        a.by_up = gelu;
        a.by_glu = up * FN(gelu_tanh_slope)(glu, share);
        break;
    }
    case CUMOE_ACTIVATION_SWIGLU_CLAMPED: {
        const REAL limit = swiglu.limit, alpha = swiglu.alpha;
        const REAL g = FN(clamp)(glu, -FLT_MAX, limit), u = FN(clamp)(up, -limit, limit) + swiglu.offset;
        const REAL s = FN(sigmoid)(alpha * g), swish = g * s;
        a.hidden = swish * u;
        a.by_up = up > limit || up < -limit ? 0 : swish;
        a.by_glu = glu > limit ? 0 : u * (s + alpha * swish * (1 - s));
        break;
    }
    case CUMOE_ACTIVATION_IDENTITY:
        break;
    }
    return a;
}
