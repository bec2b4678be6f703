/* A pre-activation beyond the numbers of F16 becomes infinite; what the activation makes of it is its limit, and
 * not NaN, which would spread. One token, one expert, all sizes 1. */
#include "tests/suite.h"

#include <math.h>

typedef struct limits {
    cumoe_activation_t activation;
    bool glu;
    double above, below;             /* y where the driving half is +Inf, -Inf */
    double slope_above, slope_below; /* of y by the driving half */
} limits_t;

static const limits_t LIMITS[] = {
    {CUMOE_ACTIVATION_RELU, false, INFINITY, 0, 1, 0},
    {CUMOE_ACTIVATION_RELU2, false, INFINITY, 0, INFINITY, 0}, /* of a square */
    {CUMOE_ACTIVATION_GELU, false, INFINITY, 0, 1, 0},
    {CUMOE_ACTIVATION_GELU_TANH, false, INFINITY, 0, 1, 0},
    {CUMOE_ACTIVATION_SILU, false, INFINITY, 0, 1, 0},
    {CUMOE_ACTIVATION_SWIGLU, true, INFINITY, 0, 1, 0},
    {CUMOE_ACTIVATION_GEGLU, true, INFINITY, 0, 1, 0},
    {CUMOE_ACTIVATION_GEGLU_TANH, true, INFINITY, 0, 1, 0},
    {CUMOE_ACTIVATION_SWIGLU_CLAMPED, true, 14, 0, 0, 0}, /* 7 sigmoid(1.702 * 7) (1 + 1) */
};

typedef struct run {
    double y, slope;
} run_t;

/* An array of one number. */
static void *number(buffer_list_t *buffers, cumoe_dtype_t dtype, double value)
{
    void *data = buffer_get(buffers, real_size(dtype));
    real_set(data, dtype, 0, value);
    return data;
}

/* z of the driving half is x weight = 2 weight, that of the other half 1. */
static run_t run(const limits_t *limits, double weight)
{
    const cumoe_dtype_t dtype = CUMOE_F16;
    cumoe_handle_t *handle = suite_handle();
    cumoe_config_t config;
    cumoe_config_init(&config);
    config.hidden_size = config.intermediate_size = config.num_experts = config.top_k = 1;
    config.dtype = dtype;
    config.activation = limits->activation;
    config.gate = CUMOE_GATE_EXTERNAL;
    cumoe_layer_t *layer;
    buffer_list_t buffers = {0};
    const bool glu = limits->glu;
    size_t workspace_size, saved_size;
    cr_assert_eq(cumoe_layer_create(&layer, handle, &config), CUMOE_SUCCESS, "%s", cumoe_last_error());
    cr_assert_eq(cumoe_layer_buffer_sizes(layer, 1, &workspace_size, &saved_size), CUMOE_SUCCESS);
    void *workspace = buffer_get(&buffers, workspace_size), *saved = buffer_get(&buffers, saved_size);
    const cumoe_weights_t weights = {.struct_size = sizeof weights,
                                     .w_up = number(&buffers, dtype, glu ? 0.5 : weight),
                                     .w_glu = glu ? number(&buffers, dtype, weight) : NULL,
                                     .w_down = number(&buffers, dtype, 1)};
    const cumoe_weights_t gradients = {.struct_size = sizeof gradients,
                                       .dtype = CUMOE_F32,
                                       .w_up = number(&buffers, CUMOE_F32, NAN),
                                       .w_glu = glu ? number(&buffers, CUMOE_F32, NAN) : NULL,
                                       .w_down = number(&buffers, CUMOE_F32, NAN)};
    const cumoe_forward_args_t forward = {.struct_size = sizeof forward,
                                          .num_tokens = 1,
                                          .weights = &weights,
                                          .x = number(&buffers, dtype, 2),
                                          .y = number(&buffers, dtype, NAN),
                                          .index = buffer_get_zero(&buffers, sizeof(int32_t)),
                                          .index_weight = number(&buffers, CUMOE_F32, 1),
                                          .workspace = workspace,
                                          .workspace_size = workspace_size,
                                          .saved = saved,
                                          .saved_size = saved_size};
    const cumoe_backward_args_t backward = {.struct_size = sizeof backward,
                                            .num_tokens = 1,
                                            .weights = &weights,
                                            .x = forward.x,
                                            .dy = number(&buffers, dtype, 1),
                                            .gradients = &gradients,
                                            .workspace = workspace,
                                            .workspace_size = workspace_size,
                                            .saved = saved,
                                            .saved_size = saved_size};
    cr_assert_eq(device_layer_forward(handle, layer, &forward), CUMOE_SUCCESS, "%s", cumoe_last_error());
    cr_assert_eq(device_layer_backward(handle, layer, &backward), CUMOE_SUCCESS, "%s", cumoe_last_error());
    const run_t result = {real_get(forward.y, dtype, 0),
                          real_get(glu ? gradients.w_glu : gradients.w_up, CUMOE_F32, 0) / 2};
    cr_assert(buffer_guards_intact(&buffers));
    buffer_free_all(&buffers);
    cumoe_layer_destroy(layer);
    cumoe_handle_destroy(handle);
    return result;
}

Test(infinities, limits_of_activations)
{
    report_t report = {0};
    for (size_t i = 0; i < sizeof LIMITS / sizeof *LIMITS; i++) {
        const limits_t *l = &LIMITS[i];
        const run_t above = run(l, 60000), below = run(l, -60000);
        if (!(above.y == l->above) || !(above.slope == l->slope_above))
            report_fail(&report, "activation %d at +Inf: %g, slope %g, expected %g, %g", (int)l->activation,
                        above.y, above.slope, l->above, l->slope_above);
        if (!(below.y == l->below) || !(below.slope == l->slope_below))
            report_fail(&report, "activation %d at -Inf: %g, slope %g, expected %g, %g", (int)l->activation,
                        below.y, below.slope, l->below, l->slope_below);
    }
    EXPECT_EMPTY(report);
}
