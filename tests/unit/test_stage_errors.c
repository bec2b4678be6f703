/* Wrong calls of single stages: a status, a sentence, and nothing else. */
#include "tests/suite.h"
#include "tests/unit/refusal.h"

typedef struct fixture {
    cumoe_handle_t *handle;
    problem_t p;
    report_t report;
    void *scratch; /* stands for every buffer between stages: 64-byte aligned, poisoned, never to be written */
    size_t scratch_size;
} fixture_t;

static void set_up_variant(fixture_t *x, int variant)
{
    static const layer_case_t layer_case = {"stage errors", 17, 12, 14, 6, 2, .pattern = PATTERN_RANDOM};
    const problem_options_t options = {
        .dtype = CUMOE_F32, .variant = GATE_VARIANTS[variant], .without_reference = true};
    *x = (fixture_t){.handle = suite_handle(), .scratch_size = 1 << 23};
    cr_assert(problem_create(&x->p, x->handle, &layer_case, &options, &x->report), "%s", x->report.text);
    x->scratch = buffer_get_aligned(&x->p.buffers, x->scratch_size, 64);
}

static void set_up(fixture_t *x)
{
    set_up_variant(x, VARIANT_NOISY);
}

static void tear_down(fixture_t *x)
{
    report_check(&x->report, buffer_is_poison(x->scratch, x->scratch_size));
    report_check(&x->report, buffer_guards_intact(&x->p.buffers));
    EXPECT_EMPTY(x->report);
    problem_destroy(&x->p);
    cumoe_handle_destroy(x->handle);
}

static cumoe_routing_t routing(const fixture_t *x)
{
    return (cumoe_routing_t){.call = x->scratch,
                             .tokens = x->scratch,
                             .expert = x->scratch,
                             .weight = x->scratch,
                             .importance = x->scratch,
                             .load = x->scratch};
}

static cumoe_rows_t rows(const fixture_t *x)
{
    return (cumoe_rows_t){.offset = x->scratch,
                          .row_token = x->scratch,
                          .row_slot = x->scratch,
                          .slot_row = x->scratch,
                          .tile = x->scratch};
}

#define SHIFT(pointer) ((void *)((char *)(uintptr_t)(pointer) + 1))

/* Call function with good arguments but for one thing. */
#define REFUSE(function, good, spoil, status, argument, value)                                                     \
    do {                                                                                                           \
        __typeof__(good) a = good;                                                                                 \
        a.struct_size = sizeof a;                                                                                  \
        a.num_tokens = x.p.tokens;                                                                                 \
        spoil;                                                                                                     \
        expect_refusal(&x.report, function(x.p.layer, &a, NULL), CUMOE_##status, #function, argument, value);      \
    } while (0)

/* What every stage refuses in the same way. */
#define REFUSE_COMMON(function, good)                                                                              \
    do {                                                                                                           \
        expect_refusal(&x.report, function(NULL, &(good), NULL), CUMOE_INVALID_ARGUMENT, #function, "layer",       \
                       "NULL");                                                                                    \
        expect_refusal(&x.report, function(x.p.layer, NULL, NULL), CUMOE_INVALID_ARGUMENT, #function, "args",      \
                       "NULL");                                                                                    \
        REFUSE(function, good, a.struct_size = 0, INVALID_ARGUMENT, "struct_size", "0");                           \
        REFUSE(function, good, a.num_tokens = -1, INVALID_ARGUMENT, "num_tokens", "-1");                           \
        REFUSE(function, good, a.num_tokens = INT64_C(1) << 30, INVALID_ARGUMENT, "num_tokens", "1073741824");     \
    } while (0)

/* Not every backend needs scratch for every stage. */
static bool needs_scratch(const fixture_t *x, cumoe_stage_t stage)
{
    size_t size = 0;
    cr_assert_eq(cumoe_stage_workspace_size(x->p.layer, stage, x->p.tokens, &size), CUMOE_SUCCESS);
    return size > 0;
}

#define REFUSE_SMALL(function, good, stage)                                                                        \
    do {                                                                                                           \
        if (needs_scratch(&x, CUMOE_STAGE_##stage))                                                                \
            REFUSE(function, good, a.workspace_size = 0, BUFFER_TOO_SMALL, "workspace_size", "0");                 \
    } while (0)

Test(stage_errors, gate)
{
    fixture_t x;
    set_up(&x);
    cumoe_gate_args_t good = {.weights = &x.p.weights,
                              .x = x.p.forward.x,
                              .routing = routing(&x),
                              .workspace = x.scratch,
                              .workspace_size = x.scratch_size};
    REFUSE_COMMON(cumoe_gate, good);
    REFUSE(cumoe_gate, good, a.weights = NULL, INVALID_ARGUMENT, "weights", "NULL");
    REFUSE(cumoe_gate, good, a.x = NULL, INVALID_ARGUMENT, "x", "NULL");
    REFUSE(cumoe_gate, good, a.x_stride = 11, INVALID_ARGUMENT, "x_stride", "11");
    REFUSE(cumoe_gate, good, a.training = 3, INVALID_ARGUMENT, "training", "3");
    REFUSE(cumoe_gate, good, a.first_token = -1, INVALID_ARGUMENT, "first_token", "-1");
    REFUSE(cumoe_gate, good, a.routing.call = NULL, INVALID_ARGUMENT, "routing.call", "NULL");
    REFUSE(cumoe_gate, good, a.routing.expert = NULL, INVALID_ARGUMENT, "routing.expert", "NULL");
    REFUSE(cumoe_gate, good, a.routing.weight = SHIFT(x.scratch), INVALID_ARGUMENT, "routing.weight", "aligned");
    REFUSE(cumoe_gate, good, a.routing.importance = NULL, INVALID_ARGUMENT, "routing.importance", "NULL");
    REFUSE(cumoe_gate, good, a.routing.load = NULL, INVALID_ARGUMENT, "routing.load", "NULL");
    REFUSE(cumoe_gate, good, a.routing.tokens = NULL, INVALID_ARGUMENT, "routing.tokens", "NULL");
    REFUSE(cumoe_gate, good, a.batch_threshold = x.scratch, INVALID_ARGUMENT, "batch_threshold", "BALANCED");
    REFUSE(cumoe_gate, good, a.losses = SHIFT(x.scratch), INVALID_ARGUMENT, "losses", "aligned");
    REFUSE(cumoe_gate, good, a.workspace = SHIFT(x.scratch), INVALID_ARGUMENT, "workspace", "aligned");
    REFUSE_SMALL(cumoe_gate, good, GATE);
    tear_down(&x);
}

Test(stage_errors, permute)
{
    fixture_t x;
    set_up(&x);
    cumoe_permute_args_t good = {
        .routing = routing(&x), .rows = rows(&x), .workspace = x.scratch, .workspace_size = x.scratch_size};
    REFUSE_COMMON(cumoe_permute, good);
    REFUSE(cumoe_permute, good, a.routing.expert = NULL, INVALID_ARGUMENT, "routing.expert", "NULL");
    REFUSE(cumoe_permute, good, a.routing.token_slot = x.scratch, INVALID_ARGUMENT, "routing.token_slot",
           "BALANCED");
    REFUSE(cumoe_permute, good, a.rows.offset = NULL, INVALID_ARGUMENT, "rows.offset", "NULL");
    if (device_backend() == CUMOE_BACKEND_CUDA)
        REFUSE(cumoe_permute, good, a.rows.tile = NULL, INVALID_ARGUMENT, "rows.tile", "NULL");
    REFUSE(cumoe_permute, good, a.rows.row_token = NULL, INVALID_ARGUMENT, "rows.row_token", "NULL");
    REFUSE(cumoe_permute, good, a.rows.row_slot = NULL, INVALID_ARGUMENT, "rows.row_slot", "NULL");
    REFUSE(cumoe_permute, good, a.rows.slot_row = SHIFT(x.scratch), INVALID_ARGUMENT, "rows.slot_row", "aligned");
    REFUSE_SMALL(cumoe_permute, good, PERMUTE);
    tear_down(&x);
}

/* Arrays of the routing that only some gates have. */
Test(stage_errors, routing_of_hierarchical)
{
    fixture_t x;
    set_up_variant(&x, VARIANT_HIERARCHICAL);
    cumoe_gate_args_t good = {.weights = &x.p.weights,
                              .x = x.p.forward.x,
                              .routing = routing(&x),
                              .workspace = x.scratch,
                              .workspace_size = x.scratch_size};
    good.routing.primary_group = good.routing.primary_count = x.scratch;
    good.routing.primary_weight = good.routing.primary_load = x.scratch;
    REFUSE(cumoe_gate, good, a.routing.primary_group = NULL, INVALID_ARGUMENT, "routing.primary_group", "NULL");
    REFUSE(cumoe_gate, good, a.routing.primary_weight = NULL, INVALID_ARGUMENT, "routing.primary_weight", "NULL");
    REFUSE(cumoe_gate, good, a.routing.primary_load = NULL, INVALID_ARGUMENT, "routing.primary_load", "NULL");
    REFUSE(cumoe_gate, good, a.routing.primary_count = SHIFT(x.scratch), INVALID_ARGUMENT, "routing.primary_count",
           "aligned");
    REFUSE_SMALL(cumoe_gate, good, GATE);
    cumoe_gate_backward_args_t backward = {.weights = &x.p.weights,
                                           .x = x.p.forward.x,
                                           .training = 1,
                                           .routing = good.routing,
                                           .dweight = x.scratch,
                                           .dx_gate = x.scratch,
                                           .workspace = x.scratch,
                                           .workspace_size = x.scratch_size};
    REFUSE(cumoe_gate_backward, backward, a.routing.primary_group = NULL, INVALID_ARGUMENT, "routing.primary_group",
           "NULL");
    REFUSE_SMALL(cumoe_gate_backward, backward, GATE_BACKWARD);
    tear_down(&x);
}

Test(stage_errors, routing_of_balanced)
{
    fixture_t x;
    set_up_variant(&x, VARIANT_BALANCED);
    cumoe_gate_args_t good = {.weights = &x.p.weights,
                              .x = x.p.forward.x,
                              .routing = routing(&x),
                              .workspace = x.scratch,
                              .workspace_size = x.scratch_size};
    good.routing.token_slot = good.routing.slot_token = good.routing.excess = x.scratch;
    REFUSE(cumoe_gate, good, a.routing.token_slot = NULL, INVALID_ARGUMENT, "routing.token_slot", "NULL");
    REFUSE(cumoe_gate, good, a.routing.slot_token = NULL, INVALID_ARGUMENT, "routing.slot_token", "NULL");
    REFUSE(cumoe_gate, good, a.routing.excess = SHIFT(x.scratch), INVALID_ARGUMENT, "routing.excess", "aligned");
    REFUSE(cumoe_gate, good, a.batch_threshold = x.scratch, INVALID_ARGUMENT, "batch_threshold", "training");
    REFUSE_SMALL(cumoe_gate, good, GATE);
    cumoe_permute_args_t permute = {
        .routing = good.routing, .rows = rows(&x), .workspace = x.scratch, .workspace_size = x.scratch_size};
    REFUSE(cumoe_permute, permute, a.routing.token_slot = NULL, INVALID_ARGUMENT, "routing.token_slot", "NULL");
    cumoe_combine_args_t combine = {.routing = good.routing, .rows = rows(&x), .output = x.scratch, .y = x.scratch};
    REFUSE(cumoe_combine, combine, a.routing.token_slot = NULL, INVALID_ARGUMENT, "routing.token_slot", "NULL");
    tear_down(&x);
}

Test(stage_errors, up)
{
    fixture_t x;
    set_up(&x);
    cumoe_up_args_t good = {.weights = &x.p.weights,
                            .rows = rows(&x),
                            .x = x.p.forward.x,
                            .z = x.scratch,
                            .hidden = x.scratch,
                            .workspace = x.scratch,
                            .workspace_size = x.scratch_size};
    REFUSE_COMMON(cumoe_experts_up, good);
    REFUSE(cumoe_experts_up, good, a.weights = NULL, INVALID_ARGUMENT, "weights", "NULL");
    REFUSE(cumoe_experts_up, good, a.x = NULL, INVALID_ARGUMENT, "x", "NULL");
    REFUSE(cumoe_experts_up, good, a.z = NULL, INVALID_ARGUMENT, "z", "NULL");
    REFUSE(cumoe_experts_up, good, a.hidden = SHIFT(x.scratch), INVALID_ARGUMENT, "hidden", "aligned");
    REFUSE(cumoe_experts_up, good, a.x_stride = -1, INVALID_ARGUMENT, "x_stride", "-1");
    REFUSE(cumoe_experts_up, good, a.rows.offset = NULL, INVALID_ARGUMENT, "rows.offset", "NULL");
    if (device_backend() == CUMOE_BACKEND_CUDA)
        REFUSE(cumoe_experts_up, good, a.rows.tile = NULL, INVALID_ARGUMENT, "rows.tile", "NULL");
    REFUSE_SMALL(cumoe_experts_up, good, UP);
    tear_down(&x);
}

Test(stage_errors, down_and_combine)
{
    fixture_t x;
    set_up(&x);
    cumoe_down_args_t down = {.weights = &x.p.weights,
                              .rows = rows(&x),
                              .hidden = x.scratch,
                              .output = x.scratch,
                              .workspace = x.scratch,
                              .workspace_size = x.scratch_size};
    REFUSE_COMMON(cumoe_experts_down, down);
    REFUSE(cumoe_experts_down, down, a.weights = NULL, INVALID_ARGUMENT, "weights", "NULL");
    REFUSE(cumoe_experts_down, down, a.hidden = NULL, INVALID_ARGUMENT, "hidden", "NULL");
    REFUSE(cumoe_experts_down, down, a.output = NULL, INVALID_ARGUMENT, "output", "NULL");
    REFUSE_SMALL(cumoe_experts_down, down, DOWN);

    cumoe_combine_args_t combine = {.routing = routing(&x), .rows = rows(&x), .output = x.scratch, .y = x.scratch};
    REFUSE_COMMON(cumoe_combine, combine);
    REFUSE(cumoe_combine, combine, a.output = NULL, INVALID_ARGUMENT, "output", "NULL");
    REFUSE(cumoe_combine, combine, a.y = NULL, INVALID_ARGUMENT, "y", "NULL");
    REFUSE(cumoe_combine, combine, a.y_stride = 11, INVALID_ARGUMENT, "y_stride", "11");
    REFUSE(cumoe_combine, combine, a.routing.weight = NULL, INVALID_ARGUMENT, "routing.weight", "NULL");
    REFUSE(cumoe_combine, combine, a.rows.slot_row = NULL, INVALID_ARGUMENT, "rows.slot_row", "NULL");
    tear_down(&x);
}

Test(stage_errors, backward_of_experts)
{
    fixture_t x;
    set_up(&x);
    cumoe_down_backward_args_t down = {.weights = &x.p.weights,
                                       .routing = routing(&x),
                                       .rows = rows(&x),
                                       .z = x.scratch,
                                       .dy = x.scratch,
                                       .dz = (char *)x.scratch + 64,
                                       .dweight = x.scratch,
                                       .workspace = x.scratch,
                                       .workspace_size = x.scratch_size};
    REFUSE_COMMON(cumoe_experts_down_backward, down);
    REFUSE(cumoe_experts_down_backward, down, a.z = NULL, INVALID_ARGUMENT, "z", "NULL");
    REFUSE(cumoe_experts_down_backward, down, a.dy = NULL, INVALID_ARGUMENT, "dy", "NULL");
    REFUSE(cumoe_experts_down_backward, down, a.dz = NULL, INVALID_ARGUMENT, "dz", "NULL");
    REFUSE(cumoe_experts_down_backward, down, a.dweight = NULL, INVALID_ARGUMENT, "dweight", "NULL");
    REFUSE(cumoe_experts_down_backward, down, a.dy_stride = 1, INVALID_ARGUMENT, "dy_stride", "1");
    REFUSE(cumoe_experts_down_backward, down, a.gradient_mode = (cumoe_gradient_mode_t)7, INVALID_ARGUMENT,
           "gradient_mode", "7");
    REFUSE_SMALL(cumoe_experts_down_backward, down, DOWN_BACKWARD);

    cumoe_up_backward_args_t up = {.weights = &x.p.weights,
                                   .rows = rows(&x),
                                   .x = x.p.forward.x,
                                   .dz = x.scratch,
                                   .drows = (char *)x.scratch + 64,
                                   .workspace = x.scratch,
                                   .workspace_size = x.scratch_size};
    REFUSE_COMMON(cumoe_experts_up_backward, up);
    REFUSE(cumoe_experts_up_backward, up, a.x = NULL, INVALID_ARGUMENT, "x", "NULL");
    REFUSE(cumoe_experts_up_backward, up, a.dz = NULL, INVALID_ARGUMENT, "dz", "NULL");
    REFUSE(cumoe_experts_up_backward, up, a.drows = SHIFT(x.scratch), INVALID_ARGUMENT, "drows", "aligned");
    REFUSE_SMALL(cumoe_experts_up_backward, up, UP_BACKWARD);
    tear_down(&x);
}

Test(stage_errors, backward_of_gate_and_permute)
{
    fixture_t x;
    set_up(&x);
    cumoe_gate_backward_args_t gate = {.weights = &x.p.weights,
                                       .x = x.p.forward.x,
                                       .training = 1,
                                       .routing = routing(&x),
                                       .dweight = x.scratch,
                                       .dx_gate = x.scratch,
                                       .workspace = x.scratch,
                                       .workspace_size = x.scratch_size};
    REFUSE_COMMON(cumoe_gate_backward, gate);
    REFUSE(cumoe_gate_backward, gate, a.x = NULL, INVALID_ARGUMENT, "x", "NULL");
    REFUSE(cumoe_gate_backward, gate, a.dweight = NULL, INVALID_ARGUMENT, "dweight", "NULL");
    REFUSE(cumoe_gate_backward, gate, a.dx_gate = SHIFT(x.scratch), INVALID_ARGUMENT, "dx_gate", "aligned");
    REFUSE(cumoe_gate_backward, gate, a.loss_gradient = SHIFT(x.scratch), INVALID_ARGUMENT, "loss_gradient",
           "aligned");
    REFUSE_SMALL(cumoe_gate_backward, gate, GATE_BACKWARD);

    cumoe_permute_backward_args_t permute = {
        .routing = routing(&x), .rows = rows(&x), .drows = x.scratch, .dx = x.scratch};
    REFUSE_COMMON(cumoe_permute_backward, permute);
    REFUSE(cumoe_permute_backward, permute, a.drows = NULL, INVALID_ARGUMENT, "drows", "NULL");
    REFUSE(cumoe_permute_backward, permute, a.dx = NULL, INVALID_ARGUMENT, "dx", "NULL");
    REFUSE(cumoe_permute_backward, permute, a.dx_stride = 11, INVALID_ARGUMENT, "dx_stride", "11");
    tear_down(&x);
}

Test(stage_errors, workspace_size)
{
    fixture_t x;
    set_up(&x);
    const char *f = "cumoe_stage_workspace_size";
    size_t size = 77;
    expect_refusal(&x.report, cumoe_stage_workspace_size(NULL, CUMOE_STAGE_UP, 4, &size), CUMOE_INVALID_ARGUMENT, f,
                   "layer", "NULL");
    expect_refusal(&x.report, cumoe_stage_workspace_size(x.p.layer, CUMOE_NUM_STAGES, 4, &size),
                   CUMOE_INVALID_ARGUMENT, f, "stage", "9");
    expect_refusal(&x.report, cumoe_stage_workspace_size(x.p.layer, CUMOE_STAGE_UP, -4, &size),
                   CUMOE_INVALID_ARGUMENT, f, "num_tokens", "-4");
    expect_refusal(&x.report, cumoe_stage_workspace_size(x.p.layer, CUMOE_STAGE_UP, 4, NULL),
                   CUMOE_INVALID_ARGUMENT, f, "workspace_size", "NULL");
    cr_expect_eq(size, 77);
    tear_down(&x);
}
