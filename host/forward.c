/* The forward pass: check the call, place the buffers, run the stages. */
#include "host/kinds.h"
#include "host/layout.h"

static const char function[] = "cumoe_layer_forward";

static cumoe_status_t check_arrays(const cumoe_layer_t *layer, cumoe_forward_args_t *a)
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

static cumoe_status_t check_numbers(const cumoe_layer_t *layer, cumoe_forward_args_t *a)
{
    CUMOE_TRY(cumoe__check_tokens(function, layer, a->num_tokens));
    CUMOE_TRY(cumoe__check_flag(function, "training", a->training));
    CUMOE_TRY(cumoe__check_first_token(function, a->first_token, a->num_tokens));
    return cumoe__check_index(function, layer, a->num_tokens, a->index, a->index_weight, &a->index_dtype,
                              &a->index_weight_dtype);
}

/* The caller's two buffers are large enough and apart from each other, x and y. */
static cumoe_status_t check_buffers(const cumoe_layer_t *layer, cumoe_pass_t pass, const cumoe_forward_args_t *a)
{
    const cumoe_config_t *config = &layer->context.config;
    const int64_t T = a->num_tokens, H = config->hidden_size;
    const cumoe_layout_t need = cumoe__layout(layer, pass, T, NULL, NULL);
    CUMOE_TRY(cumoe__check_buffer(function, "workspace", a->workspace, a->workspace_size, need.workspace_size, T));
    if (a->saved) CUMOE_TRY(cumoe__check_buffer(function, "saved", a->saved, a->saved_size, need.saved_size, T));
    const cumoe_range_t ranges[] = {{"workspace", a->workspace, need.workspace_size},
                                    {"saved", a->saved, need.saved_size},
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
        .losses = a->losses,
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

static cumoe_status_t run(const cumoe_layer_t *layer, const cumoe_forward_args_t *a, const cumoe_weights_t *weights,
                          const cumoe_layout_t *l, cumoe_stream_t stream)
{
    const cumoe_backend_ops_t *ops = layer->handle->ops;
    const cumoe_context_t *context = &layer->context;
    const int64_t T = a->num_tokens;

    const cumoe_gate_args_t gate = gate_args(a, weights, l);
    CUMOE_TRY(ops->gate(context, &gate, stream));
    CUMOE_TRY(copy_choices(layer, a, l, stream));

    const cumoe_permute_args_t permute = {.struct_size = sizeof permute,
                                          .num_tokens = T,
                                          .routing = l->routing,
                                          .rows = l->rows,
                                          .workspace = l->stage,
                                          .workspace_size = l->stage_size};
    CUMOE_TRY(ops->permute(context, &permute, stream));

    const cumoe_up_args_t up = {.struct_size = sizeof up,
                                .num_tokens = T,
                                .weights = weights,
                                .rows = l->rows,
                                .x = a->x,
                                .x_stride = a->x_stride,
                                .z = l->z,
                                .hidden = l->forward.hidden,
                                .workspace = l->stage,
                                .workspace_size = l->stage_size};
    CUMOE_TRY(ops->up(context, &up, stream));

    const cumoe_down_args_t down = {.struct_size = sizeof down,
                                    .num_tokens = T,
                                    .weights = weights,
                                    .rows = l->rows,
                                    .hidden = l->forward.hidden,
                                    .output = l->forward.output,
                                    .workspace = l->stage,
                                    .workspace_size = l->stage_size};
    CUMOE_TRY(ops->down(context, &down, stream));

    const cumoe_combine_args_t combine = {.struct_size = sizeof combine,
                                          .num_tokens = T,
                                          .routing = l->routing,
                                          .rows = l->rows,
                                          .output = l->forward.output,
                                          .y = a->y,
                                          .y_stride = a->y_stride};
    return ops->combine(context, &combine, stream);
}

cumoe_status_t cumoe_layer_forward(const cumoe_layer_t *layer, const cumoe_forward_args_t *args,
                                   cumoe_stream_t stream)
{
    CUMOE_REQUIRE(layer, INVALID_ARGUMENT, "%s: layer = NULL, but must come from cumoe_layer_create()", function);
    cumoe_forward_args_t a = {0};
    cumoe_weights_t weights;
    CUMOE_TRY(cumoe__struct_read(function, "args", args, sizeof a, &a, sizeof a));
    CUMOE_TRY(check_numbers(layer, &a));
    CUMOE_TRY(cumoe__weights_read(function, "weights", layer, a.weights, CUMOE_ROLE_WEIGHTS, &weights));
    CUMOE_TRY(check_arrays(layer, &a));
    CUMOE_TRY(cumoe__check_stream(function, layer->handle, stream));

    const cumoe_pass_t pass = a.saved ? CUMOE_PASS_FORWARD : CUMOE_PASS_INFERENCE;
    CUMOE_TRY(check_buffers(layer, pass, &a));
    const cumoe_layout_t layout = cumoe__layout(layer, pass, a.num_tokens, a.workspace, a.saved);
    return run(layer, &a, &weights, &layout, stream);
}
