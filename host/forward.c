/* The forward pass: check the call, place the buffers, run the stages. */
#include "host/exchange.h"
#include "host/kinds.h"

static cumoe_status_t check_arrays(const char *function, const cumoe_layer_t *layer, cumoe_forward_args_t *a)
{
    const cumoe_config_t *config = &layer->context.config;
    const int64_t H = config->hidden_size;
    const bool any = a->num_tokens > 0;
    CUMOE_TRY(cumoe__check_stride(function, "x_stride", &a->x_stride, H, a->num_tokens));
    CUMOE_TRY(cumoe__check_stride(function, "y_stride", &a->y_stride, H, a->num_tokens));
    const struct {
        const char *name;
        const void *ptr;
        size_t alignment;
        bool required;
    } arrays[] = {
        {"x", a->x, 16, any},
        {"y", a->y, 16, any},
        {"call", a->call, 8, false},
        {"chosen_expert", a->chosen_expert, 16, false},
        {"chosen_weight", a->chosen_weight, 16, false},
        {"chosen_offset", a->chosen_offset, 16, false},
        {"expert_count", a->expert_count, 16, false},
        {"importance", a->importance, 16, false},
        {"load", a->load, 16, false},
        {"batch_threshold", a->batch_threshold, 16, false},
        {"losses", a->losses, 16, false},
        {"statistics", a->statistics, 8, false},
    };
    for (size_t i = 0; i < sizeof arrays / sizeof arrays[0]; i++)
        CUMOE_TRY(
            cumoe__check_array(function, arrays[i].name, arrays[i].ptr, arrays[i].alignment, arrays[i].required));
    CUMOE_REQUIRE(
        !a->chosen_offset || cumoe__has_token_slots(config), INVALID_ARGUMENT,
        "%s: chosen_offset = %p, but only with CUMOE_GATE_BALANCED the choices of tokens vary in number: must "
        "be NULL",
        function, (void *)a->chosen_offset);
    CUMOE_TRY(cumoe__check_batch_threshold(function, layer, a->batch_threshold, a->training));
    CUMOE_REQUIRE(
        !cumoe__overlap(a->x, a->x_stride, a->y, a->y_stride, a->num_tokens, H, cumoe__dtype_size(config->dtype)),
        INVALID_ARGUMENT, "%s: y = %p overlaps x = %p, but x stays unchanged", function, a->y, a->x);
    return CUMOE_SUCCESS;
}

static cumoe_status_t check_numbers(const char *function, const cumoe_layer_t *layer, cumoe_forward_args_t *a)
{
    CUMOE_TRY(cumoe__check_tokens(function, layer, a->num_tokens));
    CUMOE_TRY(cumoe__check_flag(function, "training", a->training));
    CUMOE_TRY(cumoe__check_first_token(function, a->first_token, a->num_tokens));
    return cumoe__check_index(function, layer, a->num_tokens, a->index, a->index_weight, &a->index_dtype,
                              &a->index_weight_dtype);
}

/* The caller's buffers are large enough and apart from each other, x and y. */
static cumoe_status_t check_buffers(const char *function, const cumoe_layer_t *layer, cumoe_pass_t pass,
                                    const cumoe_forward_args_t *a, const cumoe_traffic_t *traffic)
{
    const cumoe_config_t *config = &layer->context.config;
    const int64_t T = a->num_tokens, H = config->hidden_size;
    const cumoe_layout_t need = cumoe__layout(layer, pass, T, traffic, (cumoe_memory_t){0});
    const void *saved = pass == CUMOE_PASS_FORWARD ? a->saved : NULL;
    CUMOE_TRY(cumoe__check_buffer(function, "workspace", a->workspace, a->workspace_size, need.workspace_size, T));
    if (saved) CUMOE_TRY(cumoe__check_buffer(function, "saved", saved, a->saved_size, need.saved_size, T));
    if (need.routing_size)
        CUMOE_TRY(cumoe__check_buffer(function, "routing", a->routing, a->routing_size, need.routing_size, T));
    const cumoe_range_t ranges[] = {{"workspace", a->workspace, need.workspace_size},
                                    {"saved", saved, need.saved_size},
                                    {"routing", a->routing, need.routing_size},
                                    {"x", a->x, cumoe__rows_size(config, T, a->x_stride, H)},
                                    {"y", a->y, cumoe__rows_size(config, T, a->y_stride, H)}};
    return cumoe__check_buffers_apart(function, ranges, sizeof ranges / sizeof ranges[0]);
}

static cumoe_gate_args_t gate_args(const cumoe_forward_args_t *a, const cumoe_weights_t *weights,
                                   const cumoe_layout_t *layout)
{
    return (cumoe_gate_args_t){
        .struct_size = sizeof(cumoe_gate_args_t),
        .num_tokens = a->num_tokens,
        .weights = weights,
        .x = a->x,
        .x_stride = a->x_stride,
        .token_mask = a->token_mask,
        .training = a->training,
        .seed = a->seed,
        .offset = a->offset,
        .first_token = a->first_token,
        .call = a->call,
        .index = a->index,
        .index_dtype = a->index_dtype,
        .index_weight = a->index_weight,
        .index_weight_dtype = a->index_weight_dtype,
        .routing = layout->routing,
        .expert_count = a->expert_count,
        .importance = a->importance,
        .load = a->load,
        .batch_threshold = a->batch_threshold,
        .losses = a->losses ? a->losses : layout->exchange.losses,
        .statistics = a->statistics,
        .workspace = layout->stage,
        .workspace_size = layout->stage_size,
    };
}

static cumoe_status_t copy_choices(const cumoe_layer_t *layer, const cumoe_forward_args_t *a,
                                   const cumoe_layout_t *l, cumoe_stream_t stream)
{
    const cumoe_config_t *config = &layer->context.config;
    const size_t slots = (size_t)cumoe__max_slots(config, a->num_tokens);
    if (a->chosen_expert)
        CUMOE_TRY(layer->handle->ops->memory_copy(layer->handle->device, a->chosen_expert, l->routing.expert,
                                                  slots * sizeof(int32_t), CUMOE_COPY_ON_DEVICE, stream));
    if (a->chosen_weight)
        CUMOE_TRY(layer->handle->ops->memory_copy(layer->handle->device, a->chosen_weight, l->routing.weight,
                                                  slots * cumoe__dtype_size(cumoe__gate_dtype(config)),
                                                  CUMOE_COPY_ON_DEVICE, stream));
    if (a->chosen_offset)
        CUMOE_TRY(layer->handle->ops->memory_copy(layer->handle->device, a->chosen_offset, l->routing.token_slot,
                                                  (size_t)(a->num_tokens + 1) * sizeof(int32_t),
                                                  CUMOE_COPY_ON_DEVICE, stream));
    return CUMOE_SUCCESS;
}

/* Gate and sorting. */
static cumoe_status_t route(const cumoe_layer_t *layer, const cumoe_forward_args_t *a,
                            const cumoe_weights_t *weights, const cumoe_layout_t *l, cumoe_stream_t stream)
{
    const cumoe_gate_args_t gate = gate_args(a, weights, l);
    CUMOE_TRY(cumoe__exchange_gate(layer, &gate, l, stream));
    return copy_choices(layer, a, l, stream);
}

static cumoe_status_t run_experts(const cumoe_layer_t *layer, const cumoe_side_t *side, const cumoe_layout_t *l,
                                  cumoe_stream_t stream)
{
    const cumoe_backend_ops_t *ops = layer->handle->ops;
    const cumoe_config_t *config = &layer->context.config;
    void *hidden = cumoe__side_rows(side, l->forward.hidden, config->intermediate_size);
    const cumoe_up_args_t up = {.struct_size = sizeof up,
                                .num_tokens = side->num_tokens,
                                .weights = &side->weights,
                                .rows = side->rows,
                                .x = side->x,
                                .x_stride = side->x_stride,
                                .z = cumoe__side_rows(side, l->z, cumoe__z_width(config)),
                                .hidden = hidden,
                                .workspace = l->stage,
                                .workspace_size = l->stage_size};
    CUMOE_TRY(ops->up(&side->context, &up, stream));
    const cumoe_down_args_t down = {.struct_size = sizeof down,
                                    .num_tokens = side->num_tokens,
                                    .weights = &side->weights,
                                    .rows = side->rows,
                                    .hidden = hidden,
                                    .output = cumoe__side_rows(side, l->forward.output, config->hidden_size),
                                    .workspace = l->stage,
                                    .workspace_size = l->stage_size};
    return ops->down(&side->context, &down, stream);
}

/* What a chunk of a call between ranks needs. */
typedef struct ranks_call {
    const cumoe_layer_t *layer;
    const cumoe_weights_t *weights;
    const cumoe_layout_t *layout;
    const cumoe_traffic_t *traffic;
} ranks_call_t;

static cumoe_status_t dispatch(void *call, int32_t chunk, cumoe_stream_t stream)
{
    const ranks_call_t *c = call;
    return cumoe__exchange_dispatch(c->layer, c->layout, &c->traffic->chunk[chunk], stream);
}

static cumoe_status_t compute(void *call, int32_t chunk, cumoe_stream_t stream)
{
    const ranks_call_t *c = call;
    const cumoe_side_t side = cumoe__exchange_side(c->layer, c->layout, c->traffic, chunk, c->weights, NULL);
    CUMOE_TRY(cumoe__exchange_arrive(c->layer, c->layout, chunk, &side, stream));
    CUMOE_TRY(run_experts(c->layer, &side, c->layout, stream));
    const void *output = cumoe__side_rows(&side, c->layout->forward.output, side.context.config.hidden_size);
    return cumoe__exchange_unpermute(c->layer, &side, output, c->layout, stream);
}

static cumoe_status_t give_back(void *call, int32_t chunk, cumoe_stream_t stream)
{
    const ranks_call_t *c = call;
    return cumoe__exchange_return(c->layer, c->layout, &c->traffic->chunk[chunk], false, stream);
}

static cumoe_status_t run(const cumoe_layer_t *layer, const cumoe_forward_args_t *a, const cumoe_weights_t *weights,
                          const cumoe_layout_t *l, const cumoe_traffic_t *traffic, cumoe_stream_t stream)
{
    if (!a->plan) CUMOE_TRY(route(layer, a, weights, l, stream));
    if (traffic) {
        ranks_call_t call = {layer, weights, l, traffic};
        const cumoe_chunk_ops_t chunks = {"cumoe_layer_forward", &call, dispatch, compute, give_back};
        CUMOE_TRY(cumoe__exchange_pack(layer, a, l, traffic, stream));
        CUMOE_TRY(cumoe__exchange_chunks(layer, &chunks, stream));
    } else {
        const cumoe_side_t side = {.context = layer->experts,
                                   .weights = *weights,
                                   .num_tokens = a->num_tokens,
                                   .routing = l->routing,
                                   .rows = l->rows,
                                   .x = a->x,
                                   .x_stride = a->x_stride};
        CUMOE_TRY(run_experts(layer, &side, l, stream));
    }
    const cumoe_combine_args_t combine = {.struct_size = sizeof combine,
                                          .num_tokens = a->num_tokens,
                                          .routing = l->routing,
                                          .rows = l->rows,
                                          .output = traffic ? l->exchange.results : l->forward.output,
                                          .y = a->y,
                                          .y_stride = a->y_stride};
    return layer->handle->ops->combine(&layer->context, &combine, stream);
}

/* The arguments, but for the buffers. */
static cumoe_status_t read_args(const char *function, const cumoe_layer_t *layer, const cumoe_forward_args_t *args,
                                cumoe_stream_t stream, cumoe_forward_args_t *a, cumoe_weights_t *weights)
{
    CUMOE_REQUIRE(layer, INVALID_ARGUMENT, "%s: layer = NULL, but must come from cumoe_layer_create()", function);
    *a = (cumoe_forward_args_t){0};
    CUMOE_TRY(cumoe__struct_read(function, "args", args, sizeof *a, a, sizeof *a));
    CUMOE_TRY(check_numbers(function, layer, a));
    CUMOE_TRY(cumoe__weights_read(function, "weights", layer, a->weights, CUMOE_ROLE_WEIGHTS, weights));
    CUMOE_TRY(check_arrays(function, layer, a));
    return cumoe__check_stream(function, layer->handle, stream);
}

cumoe_status_t cumoe_layer_forward(const cumoe_layer_t *layer, const cumoe_forward_args_t *args,
                                   cumoe_stream_t stream)
{
    const char *function = "cumoe_layer_forward";
    cumoe_forward_args_t a;
    cumoe_weights_t weights;
    const cumoe_traffic_t *traffic;
    CUMOE_TRY(read_args(function, layer, args, stream, &a, &weights));
    CUMOE_TRY(cumoe__exchange_traffic(function, layer, a.plan, a.routing, a.num_tokens, &traffic));
    const cumoe_pass_t pass = a.saved ? CUMOE_PASS_FORWARD : CUMOE_PASS_INFERENCE;
    CUMOE_TRY(check_buffers(function, layer, pass, &a, traffic));
    const cumoe_memory_t memory = {a.workspace, a.saved, a.routing};
    const cumoe_layout_t layout = cumoe__layout(layer, pass, a.num_tokens, traffic, memory);
    return run(layer, &a, &weights, &layout, traffic, stream);
}

cumoe_status_t cumoe_ep_plan(const cumoe_layer_t *layer, const cumoe_forward_args_t *args, cumoe_ep_plan_t *plan,
                             cumoe_ep_sizes_t *sizes, cumoe_stream_t stream)
{
    const char *function = "cumoe_ep_plan";
    cumoe_forward_args_t a;
    cumoe_weights_t weights;
    CUMOE_TRY(read_args(function, layer, args, stream, &a, &weights));
    CUMOE_REQUIRE(plan && plan->layer == layer, INVALID_ARGUMENT,
                  "%s: plan = %p, but must come from cumoe_ep_plan_create() of this layer", function, (void *)plan);
    CUMOE_REQUIRE(sizes, INVALID_ARGUMENT, "%s: sizes = NULL, but the result needs a place", function);
    CUMOE_TRY(check_buffers(function, layer, CUMOE_PASS_PLAN, &a, NULL));
    const cumoe_memory_t memory = {a.workspace, NULL, a.routing};
    const cumoe_layout_t layout = cumoe__layout(layer, CUMOE_PASS_PLAN, a.num_tokens, NULL, memory);
    plan->num_tokens = -1;
    CUMOE_TRY(route(layer, &a, &weights, &layout, stream));
    CUMOE_TRY(cumoe__exchange_counts(layer, a.num_tokens, &layout, plan, stream));
    plan->routing = a.routing;
    *sizes = cumoe__exchange_sizes(plan);
    return CUMOE_SUCCESS;
}
