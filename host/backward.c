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

/* From dy to the gradients of rows, of the weights of the sum, and of the experts. */
static cumoe_status_t run_experts(const cumoe_layer_t *layer, const cumoe_backward_args_t *a,
                                  const cumoe_side_t *side, const cumoe_layout_t *l, const void *dy,
                                  int64_t dy_stride, void *dweight, void *drows, cumoe_stream_t stream)
{
    const cumoe_backend_ops_t *ops = layer->handle->ops;
    const int64_t z_width = cumoe__z_width(&layer->context.config);
    void *z = cumoe__side_rows(side, l->z, z_width), *dz = cumoe__side_rows(side, l->backward.dz, z_width);
    if (layer->context.config.recompute) {
        const cumoe_up_args_t up = {.struct_size = sizeof up,
                                    .num_tokens = side->num_tokens,
                                    .weights = &side->weights,
                                    .rows = side->rows,
                                    .x = side->x,
                                    .x_stride = side->x_stride,
                                    .z = z,
                                    .workspace = l->stage,
                                    .workspace_size = l->stage_size};
        CUMOE_TRY(ops->up(&side->context, &up, stream));
    }
    const cumoe_down_backward_args_t down = {.struct_size = sizeof down,
                                             .num_tokens = side->num_tokens,
                                             .weights = &side->weights,
                                             .routing = side->routing,
                                             .rows = side->rows,
                                             .z = z,
                                             .dy = dy,
                                             .dy_stride = dy_stride,
                                             .dz = dz,
                                             .dweight = dweight,
                                             .gradients = &side->gradients,
                                             .gradient_mode = a->gradient_mode,
                                             .workspace = l->stage,
                                             .workspace_size = l->stage_size};
    CUMOE_TRY(ops->down_backward(&side->context, &down, stream));
    const cumoe_up_backward_args_t up = {.struct_size = sizeof up,
                                         .num_tokens = side->num_tokens,
                                         .weights = &side->weights,
                                         .rows = side->rows,
                                         .x = side->x,
                                         .x_stride = side->x_stride,
                                         .dz = dz,
                                         .drows = drows,
                                         .gradients = &side->gradients,
                                         .gradient_mode = a->gradient_mode,
                                         .workspace = l->stage,
                                         .workspace_size = l->stage_size};
    return ops->up_backward(&side->context, &up, stream);
}

/* What a chunk of a call between ranks needs. */
typedef struct ranks_call {
    const cumoe_layer_t *layer;
    const cumoe_backward_args_t *args;
    const cumoe_layout_t *layout;
    const cumoe_traffic_t *traffic;
} ranks_call_t;

static cumoe_status_t dispatch(void *call, int32_t chunk, cumoe_stream_t stream)
{
    const ranks_call_t *c = call;
    return cumoe__exchange_dispatch_dy(c->layer, c->layout, &c->traffic->chunk[chunk], stream);
}

static cumoe_status_t compute(void *call, int32_t chunk, cumoe_stream_t stream)
{
    const ranks_call_t *c = call;
    const cumoe_layout_t *l = c->layout;
    const cumoe_config_t *config = &c->layer->context.config;
    const cumoe_side_t side =
        cumoe__exchange_side(c->layer, l, c->traffic, chunk, c->args->weights, c->args->gradients);
    void *drows = cumoe__side_rows(&side, l->backward.drows, config->hidden_size); /* others may want dx */
    void *dweight =
        (char *)l->exchange.dweight + (size_t)side.first_row * cumoe__dtype_size(cumoe__gate_dtype(config));
    CUMOE_TRY(
        run_experts(c->layer, c->args, &side, l, l->exchange.dy, config->hidden_size, dweight, drows, stream));
    return cumoe__exchange_unpermute(c->layer, &side, drows, l, stream);
}

static cumoe_status_t give_back(void *call, int32_t chunk, cumoe_stream_t stream)
{
    const ranks_call_t *c = call;
    return cumoe__exchange_return(c->layer, c->layout, &c->traffic->chunk[chunk], true, stream);
}

/* The same where experts are on several ranks. */
static cumoe_status_t run_ranks(const cumoe_layer_t *layer, const cumoe_backward_args_t *a, const cumoe_layout_t *l,
                                const cumoe_traffic_t *traffic, void *dweight, cumoe_stream_t stream)
{
    ranks_call_t call = {layer, a, l, traffic};
    const cumoe_chunk_ops_t chunks = {function, &call, dispatch, compute, give_back};
    CUMOE_TRY(cumoe__exchange_pack_dy(layer, a, l, traffic, stream));
    CUMOE_TRY(cumoe__exchange_chunks(layer, &chunks, stream));
    return cumoe__exchange_take_dweight(layer, dweight, a->num_tokens, l, stream);
}

static cumoe_status_t run(const cumoe_layer_t *layer, const cumoe_backward_args_t *a, const cumoe_layout_t *l,
                          const cumoe_traffic_t *traffic, cumoe_stream_t stream)
{
    const cumoe_backend_ops_t *ops = layer->handle->ops;
    const cumoe_context_t *context = &layer->context;
    const int64_t T = a->num_tokens;
    const bool learned = context->config.gate != CUMOE_GATE_EXTERNAL;
    void *dweight = a->dindex_weight ? a->dindex_weight : l->backward.dweight;
    if (traffic) {
        CUMOE_TRY(run_ranks(layer, a, l, traffic, dweight, stream));
    } else {
        const cumoe_side_t side = {.context = layer->experts,
                                   .weights = *a->weights,
                                   .gradients = *a->gradients,
                                   .num_tokens = T,
                                   .routing = l->routing,
                                   .rows = l->rows,
                                   .x = a->x,
                                   .x_stride = a->x_stride};
        CUMOE_TRY(run_experts(layer, a, &side, l, a->dy, a->dy_stride, dweight, a->dx ? l->backward.drows : NULL,
                              stream));
    }

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

    const cumoe_traffic_t *traffic;
    CUMOE_TRY(cumoe__exchange_traffic(function, layer, a.plan, a.routing, a.num_tokens, &traffic));
    CUMOE_TRY(check_buffers(layer, &a, traffic));
    const cumoe_memory_t memory = {a.workspace, a.saved, a.routing};
    const cumoe_layout_t layout = cumoe__layout(layer, CUMOE_PASS_BACKWARD, a.num_tokens, traffic, memory);
    a.weights = &weights;
    a.gradients = &gradients;
    return run(layer, &a, &layout, traffic, stream);
}
