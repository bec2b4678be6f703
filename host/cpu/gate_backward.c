/* The gate stage backward: what the losses over the batch ask of every token, and then the gate's own gradients. */
#include "host/cpu/gate.h"

#define REAL  float
#define FN(x) x##_f32
#include "host/cpu/gate_loss_real.h"

#include "host/cpu/gate_backward_real.h"
#undef REAL
#undef FN
#define REAL  double
#define FN(x) x##_f64
#include "host/cpu/gate_loss_real.h"

#include "host/cpu/gate_backward_real.h"
#undef REAL
#undef FN

cumoe_status_t cumoe__cpu_gate_backward(const cumoe_context_t *context, const cumoe_gate_backward_args_t *args,
                                        cumoe_stream_t stream)
{
    (void)stream;
    const cumoe_config_t *c = &context->config;
    if (c->gate == CUMOE_GATE_EXTERNAL) return CUMOE_SUCCESS;
    const cumoe_cpu_gate_scratch_t scratch =
        cumoe__cpu_gate_scratch(context, args->num_tokens, true, args->workspace);
    const cumoe_cpu_level_t level = cumoe__cpu_flat_level(c, args->training);
    if (c->gate == CUMOE_GATE_HIERARCHICAL) {
        cumoe__cpu_groups_backward(c, args, &scratch);
    } else {
        const cumoe_cpu_batch_t batch =
            (c->dtype == CUMOE_F64 ? sum_gradients_f64 : sum_gradients_f32)(c, args, &level, &scratch);
        cumoe__cpu_flat_backward(c, args, &level, &batch, &scratch);
        if (c->gate == CUMOE_GATE_BALANCED)
            (c->dtype == CUMOE_F64 ? threshold_gradient_f64 : threshold_gradient_f32)(c, args);
    }
    return CUMOE_SUCCESS;
}
