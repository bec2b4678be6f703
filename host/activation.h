/* The activations of experts, one file for C and CUDA. The formulas are those of cumoe_activation_t; a NaN comes
 * through, and the infinities, which a z beyond F16 becomes, give the limits: z times a share of 0 is 0. */
#ifndef CUMOE_ACTIVATION_H
#define CUMOE_ACTIVATION_H

#include "host/elementary.h"

#include <cumoe/types.h>

/* The numbers of SWIGLU_CLAMPED. */
typedef struct cumoe_swiglu {
    float limit, alpha, offset;
} cumoe_swiglu_t;

#define REAL  float
#define FN(x) x##_f32
#include "host/activation_real.h"
#undef REAL
#undef FN
#define REAL  double
#define FN(x) x##_f64
#include "host/activation_real.h"
#undef REAL
#undef FN

#endif
