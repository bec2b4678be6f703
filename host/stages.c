/* The second rung: checks for single stages, then the backend. */
#include "host/kinds.h"
#include "host/objects.h"

#include <string.h>

/* A pointer of an argument struct and its rule. */
typedef struct {
    const char *name;
    const void *ptr;
    bool required;
} pointer_t;

/* What every stage checks first: the struct into ours (size bytes), the layer, T, the stream. */
static cumoe_status_t begin(const char *function, const cumoe_layer_t *layer, const void *args, void *ours,
                            size_t size, cumoe_stream_t stream)
{
    CUMOE_REQUIRE(layer, INVALID_ARGUMENT, "%s: layer = NULL, but must come from cumoe_layer_create()", function);
    CUMOE_REQUIRE(!layer->context.config.ep, UNSUPPORTED_CONFIG,
                  "%s: layer has config.ep, but single stages are for one device: call cumoe_layer_forward()",
                  function);
    memset(ours, 0, size);
    CUMOE_TRY(cumoe__struct_read(function, "args", args, size, ours, size));
    int64_t num_tokens; /* stands behind struct_size in every stage's arguments */
    memcpy(&num_tokens, (const char *)ours + sizeof(size_t), sizeof num_tokens);
    CUMOE_TRY(cumoe__check_tokens(function, layer, num_tokens));
    return cumoe__check_stream(function, layer->handle, stream);
}

static cumoe_status_t check_pointers(const char *function, const pointer_t *pointers, size_t count)
{
    for (size_t i = 0; i < count; i++)
        CUMOE_TRY(cumoe__check_array(function, pointers[i].name, pointers[i].ptr, 16, pointers[i].required));
    return CUMOE_SUCCESS;
}

#define CHECK_POINTERS(...)                                                                                        \
    do {                                                                                                           \
        const pointer_t pointers_[] = {__VA_ARGS__};                                                               \
        CUMOE_TRY(check_pointers(function, pointers_, sizeof pointers_ / sizeof pointers_[0]));                    \
    } while (0)

static cumoe_status_t check_scratch(const char *function, const cumoe_layer_t *layer, cumoe_stage_t stage,
                                    int64_t num_tokens, const void *workspace, size_t workspace_size)
{
    const size_t needed = layer->handle->ops->workspace_size(&layer->context, stage, num_tokens);
    CUMOE_TRY(cumoe__check_buffer(function, "workspace", workspace, workspace_size, needed, num_tokens));
    CUMOE_REQUIRE((uintptr_t)workspace % 64 == 0, INVALID_ARGUMENT,
                  "%s: workspace = %p, but must be 64-byte aligned", function, workspace);
    return CUMOE_SUCCESS;
}

static cumoe_status_t read_gradients(const char *function, const cumoe_layer_t *layer,
                                     const cumoe_weights_t **theirs, cumoe_weights_t *ours)
{
    CUMOE_TRY(cumoe__weights_read(function, "gradients", layer, *theirs, CUMOE_ROLE_GRADIENTS, ours));
    *theirs = ours;
    return CUMOE_SUCCESS;
}

static cumoe_status_t read_weights(const char *function, const cumoe_layer_t *layer, const cumoe_weights_t **theirs,
                                   cumoe_weights_t *ours)
{
    CUMOE_TRY(cumoe__weights_read(function, "weights", layer, *theirs, CUMOE_ROLE_WEIGHTS, ours));
    *theirs = ours;
    return CUMOE_SUCCESS;
}

cumoe_status_t cumoe_stage_workspace_size(const cumoe_layer_t *layer, cumoe_stage_t stage, int64_t num_tokens,
                                          size_t *workspace_size)
{
    const char *function = "cumoe_stage_workspace_size";
    CUMOE_REQUIRE(layer, INVALID_ARGUMENT, "%s: layer = NULL, but must come from cumoe_layer_create()", function);
    CUMOE_REQUIRE(workspace_size, INVALID_ARGUMENT, "%s: workspace_size = NULL, but the result needs a place",
                  function);
    CUMOE_REQUIRE((unsigned)stage < CUMOE_NUM_STAGES, INVALID_ARGUMENT,
                  "%s: stage = %d, but must be a cumoe_stage_t, 0..%d", function, (int)stage, CUMOE_NUM_STAGES - 1);
    CUMOE_TRY(cumoe__check_tokens(function, layer, num_tokens));
    *workspace_size = layer->handle->ops->workspace_size(&layer->context, stage, num_tokens);
    return CUMOE_SUCCESS;
}

/* What forms of routing have beside the arrays of all. */
static cumoe_status_t check_levels(const char *function, const cumoe_config_t *config, const cumoe_routing_t *r,
                                   bool any)
{
    if (cumoe__has_token_slots(config))
        CHECK_POINTERS({"routing.token_slot", r->token_slot, true}, {"routing.slot_token", r->slot_token, any},
                       {"routing.excess", r->excess, true});
    if (config->gate == CUMOE_GATE_HIERARCHICAL)
        CHECK_POINTERS(
            {"routing.primary_group", r->primary_group, any}, {"routing.primary_weight", r->primary_weight, any},
            {"routing.primary_load", r->primary_load, true}, {"routing.primary_count", r->primary_count, true});
    return CUMOE_SUCCESS;
}

/* The numbers of a call, and, for the gate, of its tokens. */
static cumoe_status_t check_call(const char *function, const cumoe_routing_t *r, bool tokens)
{
    CUMOE_TRY(cumoe__check_array(function, "routing.call", r->call, 8, true));
    return cumoe__check_array(function, "routing.tokens", r->tokens, 8, tokens);
}

/* Where a token's slots are, for stages that go through its choices. */
static cumoe_status_t check_token_slot(const char *function, const cumoe_config_t *config, const cumoe_routing_t *r)
{
    CUMOE_REQUIRE(
        !r->token_slot || cumoe__has_token_slots(config), INVALID_ARGUMENT,
        "%s: routing.token_slot = %p, but only with CUMOE_GATE_BALANCED choices vary in number: must be NULL",
        function, (void *)r->token_slot);
    return cumoe__check_array(function, "routing.token_slot", r->token_slot, 16, cumoe__has_token_slots(config));
}

cumoe_status_t cumoe_gate(const cumoe_layer_t *layer, const cumoe_gate_args_t *args, cumoe_stream_t stream)
{
    const char *function = "cumoe_gate";
    cumoe_gate_args_t a;
    cumoe_weights_t weights;
    CUMOE_TRY(begin(function, layer, args, &a, sizeof a, stream));
    const cumoe_config_t *config = &layer->context.config;
    const bool any = a.num_tokens > 0, external = config->gate == CUMOE_GATE_EXTERNAL;
    CUMOE_TRY(cumoe__check_flag(function, "training", a.training));
    CUMOE_TRY(cumoe__check_first_token(function, a.first_token, a.num_tokens));
    CUMOE_TRY(cumoe__check_index(function, layer, a.num_tokens, a.index, a.index_weight, &a.index_dtype,
                                 &a.index_weight_dtype));
    CUMOE_TRY(cumoe__check_stride(function, "x_stride", &a.x_stride, config->hidden_size, a.num_tokens));
    CHECK_POINTERS({"x", a.x, any && !external}, {"routing.expert", a.routing.expert, any},
                   {"routing.weight", a.routing.weight, any}, {"routing.importance", a.routing.importance, true},
                   {"routing.load", a.routing.load, true}, {"expert_count", a.expert_count, false},
                   {"importance", a.importance, false}, {"load", a.load, false}, {"losses", a.losses, false},
                   {"batch_threshold", a.batch_threshold, false});
    CUMOE_TRY(check_levels(function, config, &a.routing, any));
    CUMOE_TRY(cumoe__check_batch_threshold(function, layer, a.batch_threshold, a.training));
    CUMOE_TRY(cumoe__check_array(function, "call", a.call, 8, false));
    CUMOE_TRY(check_call(function, &a.routing, true));
    CUMOE_TRY(cumoe__check_array(function, "statistics", a.statistics, 8, false));
    if (!external) CUMOE_TRY(read_weights(function, layer, &a.weights, &weights));
    CUMOE_TRY(check_scratch(function, layer, CUMOE_STAGE_GATE, a.num_tokens, a.workspace, a.workspace_size));
    return layer->handle->ops->gate(&layer->context, &a, stream);
}

cumoe_status_t cumoe_permute(const cumoe_layer_t *layer, const cumoe_permute_args_t *args, cumoe_stream_t stream)
{
    const char *function = "cumoe_permute";
    cumoe_permute_args_t a;
    CUMOE_TRY(begin(function, layer, args, &a, sizeof a, stream));
    const bool any = a.num_tokens > 0;
    CHECK_POINTERS({"routing.expert", a.routing.expert, any}, {"rows.offset", a.rows.offset, true},
                   {"rows.tile", a.rows.tile, layer->handle->ops->row_tiles},
                   {"rows.row_token", a.rows.row_token, any}, {"rows.row_slot", a.rows.row_slot, any},
                   {"rows.slot_row", a.rows.slot_row, any});
    CUMOE_TRY(check_call(function, &a.routing, false));
    CUMOE_TRY(check_token_slot(function, &layer->context.config, &a.routing));
    if (cumoe__has_token_slots(&layer->context.config))
        CHECK_POINTERS({"routing.slot_token", a.routing.slot_token, any});
    CUMOE_TRY(check_scratch(function, layer, CUMOE_STAGE_PERMUTE, a.num_tokens, a.workspace, a.workspace_size));
    return layer->handle->ops->permute(&layer->context, &a, stream);
}

cumoe_status_t cumoe_experts_up(const cumoe_layer_t *layer, const cumoe_up_args_t *args, cumoe_stream_t stream)
{
    const char *function = "cumoe_experts_up";
    cumoe_up_args_t a;
    cumoe_weights_t weights;
    CUMOE_TRY(begin(function, layer, args, &a, sizeof a, stream));
    const bool any = a.num_tokens > 0;
    CUMOE_TRY(
        cumoe__check_stride(function, "x_stride", &a.x_stride, layer->context.config.hidden_size, a.num_tokens));
    CHECK_POINTERS({"rows.offset", a.rows.offset, true}, {"rows.tile", a.rows.tile, layer->handle->ops->row_tiles},
                   {"rows.row_token", a.rows.row_token, any}, {"x", a.x, any}, {"z", a.z, any},
                   {"hidden", a.hidden, false});
    CUMOE_REQUIRE(!a.hidden || a.hidden != a.z || !cumoe__is_glu(layer->context.config.activation),
                  INVALID_ARGUMENT, "%s: hidden = z = %p, but with a gated linear unit z has two halves", function,
                  a.z);
    CUMOE_TRY(read_weights(function, layer, &a.weights, &weights));
    CUMOE_TRY(check_scratch(function, layer, CUMOE_STAGE_UP, a.num_tokens, a.workspace, a.workspace_size));
    return layer->handle->ops->up(&layer->context, &a, stream);
}

cumoe_status_t cumoe_experts_down(const cumoe_layer_t *layer, const cumoe_down_args_t *args, cumoe_stream_t stream)
{
    const char *function = "cumoe_experts_down";
    cumoe_down_args_t a;
    cumoe_weights_t weights;
    CUMOE_TRY(begin(function, layer, args, &a, sizeof a, stream));
    const bool any = a.num_tokens > 0;
    CHECK_POINTERS({"rows.offset", a.rows.offset, true}, {"rows.tile", a.rows.tile, layer->handle->ops->row_tiles},
                   {"hidden", a.hidden, any}, {"output", a.output, any});
    CUMOE_TRY(read_weights(function, layer, &a.weights, &weights));
    CUMOE_TRY(check_scratch(function, layer, CUMOE_STAGE_DOWN, a.num_tokens, a.workspace, a.workspace_size));
    return layer->handle->ops->down(&layer->context, &a, stream);
}

cumoe_status_t cumoe_combine(const cumoe_layer_t *layer, const cumoe_combine_args_t *args, cumoe_stream_t stream)
{
    const char *function = "cumoe_combine";
    cumoe_combine_args_t a;
    CUMOE_TRY(begin(function, layer, args, &a, sizeof a, stream));
    const bool any = a.num_tokens > 0;
    CUMOE_TRY(
        cumoe__check_stride(function, "y_stride", &a.y_stride, layer->context.config.hidden_size, a.num_tokens));
    CHECK_POINTERS({"routing.weight", a.routing.weight, any}, {"rows.slot_row", a.rows.slot_row, any},
                   {"output", a.output, any}, {"y", a.y, any});
    CUMOE_TRY(check_call(function, &a.routing, false));
    CUMOE_TRY(check_token_slot(function, &layer->context.config, &a.routing));
    return layer->handle->ops->combine(&layer->context, &a, stream);
}

cumoe_status_t cumoe_experts_down_backward(const cumoe_layer_t *layer, const cumoe_down_backward_args_t *args,
                                           cumoe_stream_t stream)
{
    const char *function = "cumoe_experts_down_backward";
    cumoe_down_backward_args_t a;
    cumoe_weights_t weights, gradients;
    CUMOE_TRY(begin(function, layer, args, &a, sizeof a, stream));
    const bool any = a.num_tokens > 0;
    CUMOE_TRY(
        cumoe__check_stride(function, "dy_stride", &a.dy_stride, layer->context.config.hidden_size, a.num_tokens));
    CUMOE_TRY(cumoe__check_mode(function, a.gradient_mode));
    CHECK_POINTERS({"routing.weight", a.routing.weight, any}, {"rows.offset", a.rows.offset, true},
                   {"rows.tile", a.rows.tile, layer->handle->ops->row_tiles},
                   {"rows.row_token", a.rows.row_token, any}, {"rows.row_slot", a.rows.row_slot, any},
                   {"rows.slot_row", a.rows.slot_row, any}, {"z", a.z, any}, {"dy", a.dy, any}, {"dz", a.dz, any},
                   {"dweight", a.dweight, any});
    CUMOE_REQUIRE(!any || a.dz != a.z, INVALID_ARGUMENT, "%s: dz = z = %p, but z is read when dz is written",
                  function, a.z);
    CUMOE_TRY(read_weights(function, layer, &a.weights, &weights));
    CUMOE_TRY(read_gradients(function, layer, &a.gradients, &gradients));
    CUMOE_TRY(
        check_scratch(function, layer, CUMOE_STAGE_DOWN_BACKWARD, a.num_tokens, a.workspace, a.workspace_size));
    return layer->handle->ops->down_backward(&layer->context, &a, stream);
}

cumoe_status_t cumoe_experts_up_backward(const cumoe_layer_t *layer, const cumoe_up_backward_args_t *args,
                                         cumoe_stream_t stream)
{
    const char *function = "cumoe_experts_up_backward";
    cumoe_up_backward_args_t a;
    cumoe_weights_t weights, gradients;
    CUMOE_TRY(begin(function, layer, args, &a, sizeof a, stream));
    const bool any = a.num_tokens > 0;
    CUMOE_TRY(
        cumoe__check_stride(function, "x_stride", &a.x_stride, layer->context.config.hidden_size, a.num_tokens));
    CUMOE_TRY(cumoe__check_mode(function, a.gradient_mode));
    CHECK_POINTERS({"rows.offset", a.rows.offset, true}, {"rows.tile", a.rows.tile, layer->handle->ops->row_tiles},
                   {"rows.row_token", a.rows.row_token, any}, {"x", a.x, any}, {"dz", a.dz, any},
                   {"drows", a.drows, false});
    CUMOE_REQUIRE(!a.drows || a.drows != a.dz || cumoe__is_linear(layer->context.config.activation),
                  INVALID_ARGUMENT, "%s: drows = dz = %p, but only with IDENTITY they may be one", function, a.dz);
    CUMOE_TRY(read_weights(function, layer, &a.weights, &weights));
    CUMOE_TRY(read_gradients(function, layer, &a.gradients, &gradients));
    CUMOE_TRY(check_scratch(function, layer, CUMOE_STAGE_UP_BACKWARD, a.num_tokens, a.workspace, a.workspace_size));
    return layer->handle->ops->up_backward(&layer->context, &a, stream);
}

cumoe_status_t cumoe_gate_backward(const cumoe_layer_t *layer, const cumoe_gate_backward_args_t *args,
                                   cumoe_stream_t stream)
{
    const char *function = "cumoe_gate_backward";
    cumoe_gate_backward_args_t a;
    cumoe_weights_t weights, gradients;
    CUMOE_TRY(begin(function, layer, args, &a, sizeof a, stream));
    const bool any = a.num_tokens > 0;
    CUMOE_REQUIRE(
        layer->context.config.gate != CUMOE_GATE_EXTERNAL, INVALID_ARGUMENT,
        "%s: the layer's gate is CUMOE_GATE_EXTERNAL, which has no parameters: dweight is the caller's gradient",
        function);
    CUMOE_TRY(cumoe__check_flag(function, "training", a.training));
    CUMOE_TRY(
        cumoe__check_stride(function, "x_stride", &a.x_stride, layer->context.config.hidden_size, a.num_tokens));
    CUMOE_TRY(cumoe__check_mode(function, a.gradient_mode));
    CHECK_POINTERS({"x", a.x, any}, {"routing.expert", a.routing.expert, any},
                   {"routing.weight", a.routing.weight, any}, {"routing.importance", a.routing.importance, true},
                   {"routing.load", a.routing.load, true}, {"dweight", a.dweight, any},
                   {"loss_gradient", a.loss_gradient, false}, {"dx_gate", a.dx_gate, false});
    CUMOE_TRY(check_levels(function, &layer->context.config, &a.routing, any));
    CUMOE_TRY(check_call(function, &a.routing, true));
    CUMOE_TRY(read_weights(function, layer, &a.weights, &weights));
    CUMOE_TRY(read_gradients(function, layer, &a.gradients, &gradients));
    CUMOE_TRY(
        check_scratch(function, layer, CUMOE_STAGE_GATE_BACKWARD, a.num_tokens, a.workspace, a.workspace_size));
    return layer->handle->ops->gate_backward(&layer->context, &a, stream);
}

cumoe_status_t cumoe_permute_backward(const cumoe_layer_t *layer, const cumoe_permute_backward_args_t *args,
                                      cumoe_stream_t stream)
{
    const char *function = "cumoe_permute_backward";
    cumoe_permute_backward_args_t a;
    CUMOE_TRY(begin(function, layer, args, &a, sizeof a, stream));
    const bool any = a.num_tokens > 0;
    CUMOE_TRY(
        cumoe__check_stride(function, "dx_stride", &a.dx_stride, layer->context.config.hidden_size, a.num_tokens));
    CHECK_POINTERS({"rows.slot_row", a.rows.slot_row, any}, {"drows", a.drows, any}, {"dx_gate", a.dx_gate, false},
                   {"dx", a.dx, any});
    CUMOE_TRY(check_call(function, &a.routing, false));
    CUMOE_TRY(check_token_slot(function, &layer->context.config, &a.routing));
    return layer->handle->ops->permute_backward(&layer->context, &a, stream);
}
