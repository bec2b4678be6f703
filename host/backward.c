/* The backward pass: the stages of the forward pass the other way round. */
#include "host/exchange.h"
#include "host/kinds.h"

static const char function[] = "cumoe_layer_backward";

static cumoe_status_t check_arrays(const cumoe_layer_t *layer, cumoe_backward_args_t *a)
{
    const cumoe_config_t *config = &layer->context.config;
    const int64_t H = config->hidden_size, T = a->num_tokens;
    const size_t element = cumoe__dtype_size(config->dtype);
    const bool any = T > 0;
    CUMOE_TRY(cumoe__check_stride(function, "x_stride", &a->x_stride, H, T));
    CUMOE_TRY(cumoe__check_stride(function, "dy_stride", &a->dy_stride, H, T));
    CUMOE_TRY(cumoe__check_stride(function, "dx_stride", &a->dx_stride, H, T));
    CUMOE_TRY(cumoe__check_array(function, "x", a->x, 16, any));
    CUMOE_TRY(cumoe__check_array(function, "dy", a->dy, 16, any));
    CUMOE_TRY(cumoe__check_array(function, "dx", a->dx, 16, false));
    CUMOE_TRY(cumoe__check_array(function, "loss_gradient", a->loss_gradient, 16, false));
    CUMOE_TRY(cumoe__check_array(function, "dindex_weight", a->dindex_weight, 16, false));
    CUMOE_REQUIRE(!a->dindex_weight || config->gate == CUMOE_GATE_EXTERNAL, INVALID_ARGUMENT,
                  "%s: dindex_weight = %p, but only CUMOE_GATE_EXTERNAL has index weights: must be NULL", function,
                  a->dindex_weight);
    CUMOE_REQUIRE(!cumoe__overlap(a->x, a->x_stride, a->dx, a->dx_stride, T, H, element), INVALID_ARGUMENT,
                  "%s: dx = %p overlaps x = %p, but x stays unchanged", function, a->dx, a->x);
    CUMOE_REQUIRE(!cumoe__overlap(a->dy, a->dy_stride, a->dx, a->dx_stride, T, H, element), INVALID_ARGUMENT,
                  "%s: dx = %p overlaps dy = %p, but dy stays unchanged", function, a->dx, a->dy);
    return CUMOE_SUCCESS;
}

static cumoe_status_t check_buffers(const cumoe_layer_t *layer, const cumoe_backward_args_t *a,
                                    const cumoe_traffic_t *traffic)
{
    const cumoe_config_t *config = &layer->context.config;
    const int64_t T = a->num_tokens, H = config->hidden_size;
    const cumoe_layout_t need = cumoe__layout(layer, CUMOE_PASS_BACKWARD, T, traffic, (cumoe_memory_t){0});
    CUMOE_TRY(cumoe__check_buffer(function, "workspace", a->workspace, a->workspace_size, need.workspace_size, T));
    CUMOE_TRY(cumoe__check_buffer(function, "saved", a->saved, a->saved_size, need.saved_size, T));
    if (need.routing_size)
        CUMOE_TRY(cumoe__check_buffer(function, "routing", a->routing, a->routing_size, need.routing_size, T));
    const cumoe_range_t ranges[] = {{"workspace", a->workspace, need.workspace_size},
                                    {"saved", a->saved, need.saved_size},
                                    {"routing", a->routing, need.routing_size},
                                    {"x", a->x, cumoe__rows_size(config, T, a->x_stride, H)},
                                    {"dy", a->dy, cumoe__rows_size(config, T, a->dy_stride, H)},
                                    {"dx", a->dx, cumoe__rows_size(config, T, a->dx_stride, H)}};
    return cumoe__check_buffers_apart(function, ranges, sizeof ranges / sizeof ranges[0]);
}

/* From dy, or what of it came from other ranks, to the gradients of hidden and of the weights of the sum. */
static cumoe_status_t run_down(const cumoe_layer_t *layer, const cumoe_backward_args_t *a, const cumoe_layout_t *l,
                               const cumoe_side_t *side, const cumoe_traffic_t *traffic, cumoe_stream_t stream)
{
    void *dweight = a->dindex_weight ? a->dindex_weight : l->backward.dweight;
    if (traffic) CUMOE_TRY(cumoe__exchange_dispatch_dy(layer, a, l, traffic, stream));
    if (layer->context.config.recompute) {
        const cumoe_up_args_t up = {.struct_size = sizeof up,
                                    .num_tokens = side->num_tokens,
                                    .weights = a->weights,
                                    .rows = side->rows,
                                    .x = side->x,
                                    .x_stride = side->x_stride,
                                    .z = l->z,
                                    .workspace = l->stage,
                                    .workspace_size = l->stage_size};
        CUMOE_TRY(layer->handle->ops->up(&layer->experts, &up, stream));
    }
    const cumoe_down_backward_args_t down = {.struct_size = sizeof down,
                                             .num_tokens = side->num_tokens,
                                             .weights = a->weights,
                                             .routing = side->routing,
                                             .rows = side->rows,
                                             .z = l->z,
                                             .dy = traffic ? l->exchange.dy : a->dy,
                                             .dy_stride =
                                                 traffic ? layer->context.config.hidden_size : a->dy_stride,
                                             .dz = l->backward.dz,
                                             .dweight = traffic ? l->exchange.dweight : dweight,
                                             .gradients = a->gradients,
                                             .gradient_mode = a->gradient_mode,
                                             .workspace = l->stage,
                                             .workspace_size = l->stage_size};
    CUMOE_TRY(layer->handle->ops->down_backward(&layer->experts, &down, stream));
    if (!traffic) return CUMOE_SUCCESS;
    return cumoe__exchange_return_dweight(layer, dweight, a->num_tokens, l, traffic, stream);
}

static cumoe_status_t run(const cumoe_layer_t *layer, const cumoe_backward_args_t *a, const cumoe_layout_t *l,
                          const cumoe_traffic_t *traffic, cumoe_stream_t stream)
{
    const cumoe_backend_ops_t *ops = layer->handle->ops;
    const cumoe_context_t *context = &layer->context;
    const int64_t T = a->num_tokens;
    const bool learned = context->config.gate != CUMOE_GATE_EXTERNAL;
    const cumoe_side_t side = traffic ? cumoe__exchange_side(layer, l, traffic)
                                      : (cumoe_side_t){T, l->routing, l->rows, a->x, a->x_stride};
    CUMOE_TRY(run_down(layer, a, l, &side, traffic, stream));

    void *dx_gate = a->dx && learned ? l->backward.dx_gate : NULL;
    if (learned) {
        const cumoe_gate_backward_args_t gate = {.struct_size = sizeof gate,
                                                 .num_tokens = T,
                                                 .weights = a->weights,
                                                 .x = a->x,
                                                 .x_stride = a->x_stride,
                                                 .token_mask = a->token_mask,
                                                 .training = a->training,
                                                 .routing = l->routing,
                                                 .dweight = l->backward.dweight,
                                                 .loss_gradient = a->loss_gradient,
                                                 .dx_gate = dx_gate,
                                                 .gradients = a->gradients,
                                                 .gradient_mode = a->gradient_mode,
                                                 .workspace = l->stage,
                                                 .workspace_size = l->stage_size};
        CUMOE_TRY(ops->gate_backward(context, &gate, stream));
    }

    const cumoe_up_backward_args_t up = {.struct_size = sizeof up,
                                         .num_tokens = side.num_tokens,
                                         .weights = a->weights,
                                         .rows = side.rows,
                                         .x = side.x,
                                         .x_stride = side.x_stride,
                                         .dz = l->backward.dz,
                                         .drows = a->dx || traffic ? l->backward.drows : NULL,
                                         .gradients = a->gradients,
                                         .gradient_mode = a->gradient_mode,
                                         .workspace = l->stage,
                                         .workspace_size = l->stage_size};
    CUMOE_TRY(ops->up_backward(&layer->experts, &up, stream));

    if (traffic)
        CUMOE_TRY(cumoe__exchange_return(layer, l->backward.drows, l, traffic, stream)); /* others want dx */
    if (!a->dx) return CUMOE_SUCCESS;
    const cumoe_permute_backward_args_t permute = {.struct_size = sizeof permute,
                                                   .num_tokens = T,
                                                   .routing = l->routing,
                                                   .rows = l->rows,
                                                   .drows = traffic ? l->exchange.results : l->backward.drows,
                                                   .dx_gate = dx_gate,
                                                   .dx = a->dx,
                                                   .dx_stride = a->dx_stride};
    return ops->permute_backward(context, &permute, stream);
}

cumoe_status_t cumoe_layer_backward(const cumoe_layer_t *layer, const cumoe_backward_args_t *args,
                                    cumoe_stream_t stream)
{
    CUMOE_REQUIRE(layer, INVALID_ARGUMENT, "%s: layer = NULL, but must come from cumoe_layer_create()", function);
    cumoe_backward_args_t a = {0};
    cumoe_weights_t weights, gradients;
    CUMOE_TRY(cumoe__struct_read(function, "args", args, sizeof a, &a, sizeof a));
    CUMOE_TRY(cumoe__check_tokens(function, layer, a.num_tokens));
    CUMOE_TRY(cumoe__check_flag(function, "training", a.training));
    CUMOE_TRY(cumoe__check_mode(function, a.gradient_mode));
    CUMOE_TRY(cumoe__weights_read(function, "weights", layer, a.weights, CUMOE_ROLE_WEIGHTS, &weights));
    CUMOE_TRY(cumoe__weights_read(function, "gradients", layer, a.gradients, CUMOE_ROLE_GRADIENTS, &gradients));
    CUMOE_TRY(check_arrays(layer, &a));
    CUMOE_TRY(cumoe__check_stream(function, layer->handle, stream));

    cumoe_traffic_t bounded;
    const cumoe_traffic_t *traffic;
    CUMOE_TRY(cumoe__exchange_traffic(function, layer, a.plan, a.routing, a.num_tokens, &bounded, &traffic));
    CUMOE_TRY(check_buffers(layer, &a, traffic));
    const cumoe_memory_t memory = {a.workspace, a.saved, a.routing};
    const cumoe_layout_t layout = cumoe__layout(layer, CUMOE_PASS_BACKWARD, a.num_tokens, traffic, memory);
    a.weights = &weights;
    a.gradients = &gradients;
    return run(layer, &a, &layout, traffic, stream);
}
