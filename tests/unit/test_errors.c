/* Wrong calls of the layer: each gets its status and a sentence, and changes nothing. */
#include "tests/suite.h"
#include "tests/unit/refusal.h"

#include <stdio.h>
#include <stdlib.h>

typedef struct fixture {
    cumoe_handle_t *handle;
    problem_t p;
    report_t report;
    problem_bits_t forward, backward; /* all outputs, poisoned */
} fixture_t;

/* Options but for the gate, which is NOISY_TOPK if they name no variant. */
static void set_up_options(fixture_t *x, const problem_options_t *wanted)
{
    static const layer_case_t layer_case = {"errors",        17, 12, 14, 6, 2, .pattern = PATTERN_RANDOM,
                                            .mask_period = 4};
    problem_options_t options = *wanted;
    if (!options.variant.name) options.variant = GATE_VARIANTS[VARIANT_NOISY];
    options.without_reference = true;
    *x = (fixture_t){.handle = suite_handle()};
    cr_assert(problem_create(&x->p, x->handle, &layer_case, &options, &x->report), "%s", x->report.text);
    cr_assert_eq(device_layer_forward(x->handle, x->p.layer, &x->p.forward), CUMOE_SUCCESS, "%s",
                 cumoe_last_error());
    x->forward = problem_outputs(&x->p, false);
    x->backward = problem_outputs(&x->p, true);
}

static void tear_down(fixture_t *x)
{
    problem_compare_outputs(&x->p, false, &x->forward, &x->report);
    problem_compare_outputs(&x->p, true, &x->backward, &x->report);
    report_check(&x->report, buffer_guards_intact(&x->p.buffers));
    EXPECT_EMPTY(x->report);
    problem_bits_free(&x->forward);
    problem_bits_free(&x->backward);
    problem_destroy(&x->p);
    cumoe_handle_destroy(x->handle);
}

static void set_up(fixture_t *x, int variant, cumoe_dtype_t dtype)
{
    set_up_options(x, &(problem_options_t){.dtype = dtype,
                                           .activation = CUMOE_ACTIVATION_SWIGLU,
                                           .variant = GATE_VARIANTS[variant]});
}

/* Shift a pointer by a byte: aligned for nothing. */
#define SHIFT(pointer) ((void *)((char *)(uintptr_t)(pointer) + 1))

/* A call with one thing wrong in a = its arguments, or in w = its weights. */
#define REFUSE_FORWARD(spoil, status, argument, value)                                                             \
    do {                                                                                                           \
        cumoe_forward_args_t a = x.p.forward;                                                                      \
        cumoe_weights_t w = x.p.weights;                                                                           \
        a.weights = &w;                                                                                            \
        spoil;                                                                                                     \
        expect_refusal(&x.report, cumoe_layer_forward(x.p.layer, &a, NULL), CUMOE_##status, "cumoe_layer_forward", \
                       argument, value);                                                                           \
    } while (0)

#define REFUSE_BACKWARD(spoil, status, argument, value)                                                            \
    do {                                                                                                           \
        cumoe_backward_args_t a = x.p.backward;                                                                    \
        cumoe_weights_t w = x.p.weights, g = x.p.gradients;                                                        \
        a.weights = &w;                                                                                            \
        a.gradients = &g;                                                                                          \
        spoil;                                                                                                     \
        expect_refusal(&x.report, cumoe_layer_backward(x.p.layer, &a, NULL), CUMOE_##status,                       \
                       "cumoe_layer_backward", argument, value);                                                   \
    } while (0)

Test(errors, forward_without_objects)
{
    fixture_t x;
    set_up(&x, 0, CUMOE_F32);
    const char *f = "cumoe_layer_forward";
    expect_refusal(&x.report, cumoe_layer_forward(NULL, &x.p.forward, NULL), CUMOE_INVALID_ARGUMENT, f, "layer",
                   "NULL");
    expect_refusal(&x.report, cumoe_layer_forward(x.p.layer, NULL, NULL), CUMOE_INVALID_ARGUMENT, f, "args",
                   "NULL");
    if (device_backend() == CUMOE_BACKEND_CPU)
        expect_refusal(&x.report, cumoe_layer_forward(x.p.layer, &x.p.forward, (cumoe_stream_t)(uintptr_t)64),
                       CUMOE_INVALID_ARGUMENT, f, "stream", NULL);
    REFUSE_FORWARD(a.struct_size = 0, INVALID_ARGUMENT, "struct_size", "0");
    REFUSE_FORWARD(a.struct_size = 24, INVALID_ARGUMENT, "struct_size", "24");
    tear_down(&x);
}

Test(errors, forward_pointers)
{
    fixture_t x;
    set_up(&x, 0, CUMOE_F32);
    REFUSE_FORWARD(a.weights = NULL, INVALID_ARGUMENT, "weights", "NULL");
    REFUSE_FORWARD(a.x = NULL, INVALID_ARGUMENT, "x", "NULL");
    REFUSE_FORWARD(a.y = NULL, INVALID_ARGUMENT, "y", "NULL");
    REFUSE_FORWARD(a.workspace = NULL, INVALID_ARGUMENT, "workspace", "NULL");
    REFUSE_FORWARD(a.x = SHIFT(a.x), INVALID_ARGUMENT, "x", "aligned");
    REFUSE_FORWARD(a.y = SHIFT(a.y), INVALID_ARGUMENT, "y", "aligned");
    REFUSE_FORWARD(a.workspace = SHIFT(a.workspace), INVALID_ARGUMENT, "workspace", "aligned");
    REFUSE_FORWARD(a.saved = SHIFT(a.saved), INVALID_ARGUMENT, "saved", "aligned");
    REFUSE_FORWARD(a.call = SHIFT(a.workspace), INVALID_ARGUMENT, "call", "aligned");
    REFUSE_FORWARD(a.chosen_expert = SHIFT(a.chosen_expert), INVALID_ARGUMENT, "chosen_expert", "aligned");
    REFUSE_FORWARD(a.chosen_weight = SHIFT(a.chosen_weight), INVALID_ARGUMENT, "chosen_weight", "aligned");
    REFUSE_FORWARD(a.expert_count = SHIFT(a.expert_count), INVALID_ARGUMENT, "expert_count", "aligned");
    REFUSE_FORWARD(a.importance = SHIFT(a.importance), INVALID_ARGUMENT, "importance", "aligned");
    REFUSE_FORWARD(a.load = SHIFT(a.load), INVALID_ARGUMENT, "load", "aligned");
    REFUSE_FORWARD(a.losses = SHIFT(a.losses), INVALID_ARGUMENT, "losses", "aligned");
    REFUSE_FORWARD(a.statistics = SHIFT(a.statistics), INVALID_ARGUMENT, "statistics", "aligned");
    tear_down(&x);
}

Test(errors, forward_numbers)
{
    fixture_t x;
    set_up(&x, 0, CUMOE_F32);
    REFUSE_FORWARD(a.num_tokens = -1, INVALID_ARGUMENT, "num_tokens", "-1");
    REFUSE_FORWARD(a.num_tokens = INT64_MIN, INVALID_ARGUMENT, "num_tokens", "-9223372036854775808");
    REFUSE_FORWARD(a.num_tokens = INT64_C(1) << 30, INVALID_ARGUMENT, "num_tokens",
                   "1073741824"); /* T * K = 2^31 */
    REFUSE_FORWARD(a.num_tokens = INT64_MAX, INVALID_ARGUMENT, "num_tokens", "9223372036854775807");
    REFUSE_FORWARD(a.x_stride = 11, INVALID_ARGUMENT, "x_stride", "11");
    REFUSE_FORWARD(a.y_stride = 11, INVALID_ARGUMENT, "y_stride", "11");
    REFUSE_FORWARD(a.x_stride = -12, INVALID_ARGUMENT, "x_stride", "-12");
    REFUSE_FORWARD(a.y_stride = INT64_MIN, INVALID_ARGUMENT, "y_stride", "-9223372036854775808");
    REFUSE_FORWARD(a.x_stride = INT64_MAX, INVALID_ARGUMENT, "x_stride", "9223372036854775807");
    REFUSE_FORWARD(a.training = 2, INVALID_ARGUMENT, "training", "2");
    REFUSE_FORWARD(a.training = -1, INVALID_ARGUMENT, "training", "-1");
    REFUSE_FORWARD(a.first_token = -1, INVALID_ARGUMENT, "first_token", "-1");
    /* The last token must have a name of its own: 2^42 - T is the largest first_token. */
    REFUSE_FORWARD(a.first_token = (INT64_C(1) << 42) - x.p.tokens + 1, INVALID_ARGUMENT, "first_token", NULL);
    REFUSE_FORWARD(a.first_token = INT64_MAX, INVALID_ARGUMENT, "first_token", "9223372036854775807");
    tear_down(&x);
}

Test(errors, first_token_of_the_last_tokens_is_accepted)
{
    fixture_t x;
    set_up(&x, 0, CUMOE_F32);
    cumoe_forward_args_t a = x.p.forward;
    a.first_token = (INT64_C(1) << 42) - x.p.tokens;
    cr_expect_eq(device_layer_forward(x.handle, x.p.layer, &a), CUMOE_SUCCESS, "%s", cumoe_last_error());
    cr_assert_eq(device_layer_forward(x.handle, x.p.layer, &x.p.forward), CUMOE_SUCCESS); /* for tear_down */
    tear_down(&x);
}

Test(errors, sizes_of_f64)
{
    fixture_t x;
    set_up(&x, 0, CUMOE_F64);
    const int64_t most = (INT64_C(1) << 22) / 2; /* K = 2: sums in fixed point */
    size_t workspace = 77, saved = 77;
    cr_expect_eq(cumoe_layer_buffer_sizes(x.p.layer, most, &workspace, &saved), CUMOE_SUCCESS);
    expect_refusal(&x.report, cumoe_layer_buffer_sizes(x.p.layer, most + 1, &workspace, &saved),
                   CUMOE_INVALID_ARGUMENT, "cumoe_layer_buffer_sizes", "num_tokens", "2097153");
    tear_down(&x);
}

Test(errors, choices_for_a_gate_that_chooses)
{
    fixture_t x;
    set_up(&x, 0, CUMOE_F32);
    REFUSE_FORWARD(a.index = a.x, INVALID_ARGUMENT, "index", "EXTERNAL");
    REFUSE_FORWARD(a.index_weight = a.x, INVALID_ARGUMENT, "index_weight", "EXTERNAL");
    tear_down(&x);
}

Test(errors, buffers_that_overlap)
{
    fixture_t x;
    set_up(&x, 0, CUMOE_F32);
    REFUSE_FORWARD(a.saved = a.workspace, INVALID_ARGUMENT, "workspace", "saved");
    REFUSE_FORWARD(a.y = a.workspace, INVALID_ARGUMENT, "workspace", "y");
    REFUSE_FORWARD(a.x = a.saved, INVALID_ARGUMENT, "saved", "x");
    REFUSE_BACKWARD(a.saved = a.workspace, INVALID_ARGUMENT, "workspace", "saved");
    REFUSE_BACKWARD(a.dx = a.workspace, INVALID_ARGUMENT, "workspace", "dx");
    REFUSE_BACKWARD(a.dx = (void *)a.saved, INVALID_ARGUMENT, "saved", "dx");
    REFUSE_BACKWARD(a.dy = a.workspace, INVALID_ARGUMENT, "workspace", "dy");
    REFUSE_BACKWARD(a.dx = (void *)a.x, INVALID_ARGUMENT, "dx", "overlaps");
    REFUSE_BACKWARD(a.dx = (void *)a.dy, INVALID_ARGUMENT, "dx", "overlaps");
    tear_down(&x);
}

Test(errors, forward_buffers)
{
    fixture_t x;
    set_up(&x, 0, CUMOE_F32);
    char size[32];
    size_t bare = 0;
    cr_assert_eq(cumoe_layer_buffer_sizes(x.p.layer, x.p.tokens, &bare, NULL), CUMOE_SUCCESS);
    snprintf(size, sizeof size, "%zu", bare - 1);
    REFUSE_FORWARD((a.saved = NULL, a.workspace_size = bare - 1), BUFFER_TOO_SMALL, "workspace_size", size);
    REFUSE_FORWARD(a.workspace_size = 0, BUFFER_TOO_SMALL, "workspace_size", "0");
    snprintf(size, sizeof size, "%zu", x.p.saved_size - 1);
    REFUSE_FORWARD(a.saved_size -= 1, BUFFER_TOO_SMALL, "saved_size", size);
    REFUSE_FORWARD(a.saved_size = 0, BUFFER_TOO_SMALL, "saved_size", "0");
    tear_down(&x);
}

Test(errors, forward_x_and_y_overlap)
{
    fixture_t x;
    set_up(&x, 0, CUMOE_F32);
    REFUSE_FORWARD(a.y = (void *)a.x, INVALID_ARGUMENT, "y", NULL);
    REFUSE_FORWARD(a.y = (char *)a.x + 16, INVALID_ARGUMENT, "y", NULL);
    REFUSE_FORWARD(a.x = (char *)a.y + 16, INVALID_ARGUMENT, "x", NULL);
    tear_down(&x);
}

/* x in the left half and y in the right half of one buffer share no element. */
Test(errors, x_and_y_side_by_side)
{
    fixture_t x;
    set_up(&x, 0, CUMOE_F32);
    const int64_t T = x.p.tokens, H = 12;
    float *both = buffer_get(&x.p.buffers, (size_t)(T * 2 * H) * sizeof *both);
    cumoe_forward_args_t a = x.p.forward;
    for (int64_t i = 0; i < T * H; i++)
        both[i / H * 2 * H + i % H] = ((const float *)a.x)[i / H * (a.x_stride ? a.x_stride : H) + i % H];
    a.x = both, a.y = both + H, a.x_stride = a.y_stride = 2 * H;
    cr_assert_eq(device_layer_forward(x.handle, x.p.layer, &a), CUMOE_SUCCESS, "%s", cumoe_last_error());
    for (int64_t t = 0; t < T; t++)
        cr_expect(memcmp(both + t * 2 * H + H,
                         (const float *)x.p.forward.y + t * (x.p.forward.y_stride ? x.p.forward.y_stride : H),
                         (size_t)H * sizeof *both) == 0,
                  "row %d", (int)t);
    a.y = both + H - 4; /* one vector too far to the left */
    cr_expect_eq(cumoe_layer_forward(x.p.layer, &a, NULL), CUMOE_INVALID_ARGUMENT);
    tear_down(&x);
}

Test(errors, forward_weights)
{
    fixture_t x;
    set_up(&x, 0, CUMOE_F32);
    REFUSE_FORWARD(w.struct_size = 0, INVALID_ARGUMENT, "weights.struct_size", "0");
    REFUSE_FORWARD(w.w_gate = NULL, INVALID_ARGUMENT, "weights.w_gate", "NULL");
    REFUSE_FORWARD(w.w_noise = NULL, INVALID_ARGUMENT, "weights.w_noise", "NULL");
    REFUSE_FORWARD(w.w_up = NULL, INVALID_ARGUMENT, "weights.w_up", "NULL");
    REFUSE_FORWARD(w.w_glu = NULL, INVALID_ARGUMENT, "weights.w_glu", "NULL");
    REFUSE_FORWARD(w.w_down = NULL, INVALID_ARGUMENT, "weights.w_down", "NULL");
    REFUSE_FORWARD(w.w_up = SHIFT(w.w_up), INVALID_ARGUMENT, "weights.w_up", "aligned");
    REFUSE_FORWARD(w.w_gate = SHIFT(w.w_gate), INVALID_ARGUMENT, "weights.w_gate", "aligned");
    REFUSE_FORWARD(w.up_row_stride = -12, INVALID_ARGUMENT, "up_row_stride", "-12");
    REFUSE_FORWARD(w.up_expert_stride = -1, INVALID_ARGUMENT, "up_expert_stride", "-1");
    REFUSE_FORWARD(w.up_col_stride = INT64_MIN, INVALID_ARGUMENT, "up_col_stride", NULL);
    REFUSE_FORWARD(w.down_row_stride = -1, INVALID_ARGUMENT, "down_row_stride", "-1");
    REFUSE_FORWARD(w.down_expert_stride = INT64_MAX, INVALID_ARGUMENT, "down_expert_stride", "9223372036854775807");
    REFUSE_FORWARD(w.glu = (cumoe_glu_placement_t)9, INVALID_ARGUMENT, "weights.glu", "9");
    REFUSE_FORWARD(w.dtype = (cumoe_dtype_t)99, INVALID_ARGUMENT, "weights.dtype", "99");
    REFUSE_FORWARD(w.dtype = CUMOE_F64, INVALID_ARGUMENT, "weights.dtype", NULL);
    REFUSE_FORWARD(w.gate_dtype = CUMOE_F64, INVALID_ARGUMENT, "weights.gate_dtype", NULL);
    REFUSE_FORWARD(w.gate_dtype = CUMOE_BF16, INVALID_ARGUMENT, "weights.gate_dtype", NULL);
    REFUSE_FORWARD(w.b_up = w.w_up, INVALID_ARGUMENT, "weights.b_up", "expert_bias");
    REFUSE_FORWARD(w.b_down = w.w_down, INVALID_ARGUMENT, "weights.b_down", "expert_bias");
    REFUSE_FORWARD(w.gate_bias = w.w_gate, INVALID_ARGUMENT, "weights.gate_bias", "must be NULL");
    REFUSE_FORWARD(w.glu = CUMOE_GLU_FIRST, INVALID_ARGUMENT, "weights.w_glu", "must be NULL");
    tear_down(&x);
}

/* Biases are required where the layer has them, and glu stands somewhere only where there is one. */
Test(errors, forward_weights_of_other_layers)
{
    fixture_t x;
    set_up_options(&x, &(problem_options_t){.dtype = CUMOE_F16, .activation = CUMOE_ACTIVATION_GELU, .bias = true});
    REFUSE_FORWARD(w.b_up = NULL, INVALID_ARGUMENT, "weights.b_up", "NULL");
    REFUSE_FORWARD(w.b_down = NULL, INVALID_ARGUMENT, "weights.b_down", "NULL");
    REFUSE_FORWARD(w.b_down = SHIFT(w.b_down), INVALID_ARGUMENT, "weights.b_down", "aligned");
    REFUSE_FORWARD(w.glu = CUMOE_GLU_FIRST, INVALID_ARGUMENT, "weights.glu = 1", "SEPARATE");
    REFUSE_FORWARD(w.glu = CUMOE_GLU_INTERLEAVED, INVALID_ARGUMENT, "weights.glu = 3", "SEPARATE");
    REFUSE_FORWARD(w.w_glu = w.w_up, INVALID_ARGUMENT, "weights.w_glu", "must be NULL");
    REFUSE_FORWARD(w.b_glu = w.b_up, INVALID_ARGUMENT, "weights.b_glu", "must be NULL");
    REFUSE_FORWARD(w.dtype = CUMOE_F32, INVALID_ARGUMENT, "weights.dtype = 2", "config.dtype");
    REFUSE_FORWARD(w.dtype = CUMOE_BF16, INVALID_ARGUMENT, "weights.dtype = 3", "config.dtype");
    REFUSE_FORWARD(w.gate_dtype = CUMOE_BF16, INVALID_ARGUMENT, "weights.gate_dtype = 3", NULL);
    tear_down(&x);
}

Test(errors, gradients)
{
    fixture_t x;
    set_up_options(&x, &(problem_options_t){.dtype = CUMOE_F16, .activation = CUMOE_ACTIVATION_GELU});
    REFUSE_BACKWARD(g.dtype = CUMOE_BF16, INVALID_ARGUMENT, "gradients.dtype = 3", "F32");
    REFUSE_BACKWARD(g.dtype = CUMOE_F64, INVALID_ARGUMENT, "gradients.dtype = 1", "F32");
    REFUSE_BACKWARD(g.gate_dtype = CUMOE_F16, INVALID_ARGUMENT, "gradients.gate_dtype = 4", "gate type");
    REFUSE_BACKWARD(g.b_up = g.w_up, INVALID_ARGUMENT, "gradients.b_up", "expert_bias");
    REFUSE_BACKWARD(g.w_glu = g.w_up, INVALID_ARGUMENT, "gradients.w_glu", "must be NULL");
    REFUSE_BACKWARD(g.glu = CUMOE_GLU_LAST, INVALID_ARGUMENT, "gradients.glu = 2", "SEPARATE");
    tear_down(&x);
    set_up(&x, 0, CUMOE_F32);
    REFUSE_BACKWARD(g.dtype = CUMOE_BF16, INVALID_ARGUMENT, "gradients.dtype = 3", NULL); /* too narrow */
    REFUSE_BACKWARD(g.gate_dtype = CUMOE_F16, INVALID_ARGUMENT, "gradients.gate_dtype = 4", NULL);
    tear_down(&x);
}

Test(errors, forward_external)
{
    fixture_t x;
    set_up(&x, 3, CUMOE_F64);
    REFUSE_FORWARD(a.index = NULL, INVALID_ARGUMENT, "index", "NULL");
    REFUSE_FORWARD(a.index_weight = NULL, INVALID_ARGUMENT, "index_weight", "NULL");
    REFUSE_FORWARD(a.index = SHIFT(a.index), INVALID_ARGUMENT, "index", "aligned");
    REFUSE_FORWARD(a.index_weight = SHIFT(a.index_weight), INVALID_ARGUMENT, "index_weight", "aligned");
    REFUSE_FORWARD(a.index_dtype = CUMOE_F32, INVALID_ARGUMENT, "index_dtype", NULL);
    REFUSE_FORWARD(a.index_weight_dtype = CUMOE_I32, INVALID_ARGUMENT, "index_weight_dtype", NULL);
    tear_down(&x);
}

/* What another gate has. */
Test(errors, arrays_of_other_gates)
{
    fixture_t x;
    set_up(&x, VARIANT_NOISY, CUMOE_F32);
    REFUSE_FORWARD(w.thresholds = w.w_gate, INVALID_ARGUMENT, "weights.thresholds", "must be NULL");
    REFUSE_FORWARD(w.w_gate_primary = w.w_gate, INVALID_ARGUMENT, "weights.w_gate_primary", "must be NULL");
    REFUSE_FORWARD(w.w_noise_primary = w.w_gate, INVALID_ARGUMENT, "weights.w_noise_primary", "must be NULL");
    REFUSE_FORWARD(a.chosen_offset = a.chosen_expert, INVALID_ARGUMENT, "chosen_offset", "BALANCED");
    REFUSE_FORWARD(a.batch_threshold = a.load, INVALID_ARGUMENT, "batch_threshold", "BALANCED");
    REFUSE_BACKWARD(g.thresholds = g.w_gate, INVALID_ARGUMENT, "gradients.thresholds", "must be NULL");
    REFUSE_BACKWARD(g.gate_bias = g.w_gate, INVALID_ARGUMENT, "gradients.gate_bias", "must be NULL");
    tear_down(&x);
    set_up(&x, VARIANT_SIGMOID, CUMOE_F32);
    REFUSE_FORWARD(w.gate_bias = SHIFT(w.gate_bias), INVALID_ARGUMENT, "weights.gate_bias", "aligned");
    REFUSE_FORWARD(w.w_noise = w.w_gate, INVALID_ARGUMENT, "weights.w_noise", "must be NULL");
    tear_down(&x);
    set_up(&x, VARIANT_SOFTMAX_TOPK, CUMOE_F32);
    REFUSE_FORWARD(w.gate_bias = w.w_gate, INVALID_ARGUMENT, "weights.gate_bias", "must be NULL");
    tear_down(&x);
}

Test(errors, hierarchical)
{
    fixture_t x;
    set_up(&x, VARIANT_HIERARCHICAL, CUMOE_F32);
    REFUSE_FORWARD(w.w_gate = NULL, INVALID_ARGUMENT, "weights.w_gate", "NULL");
    REFUSE_FORWARD(w.w_gate_primary = NULL, INVALID_ARGUMENT, "weights.w_gate_primary", "NULL");
    REFUSE_FORWARD(w.w_noise_primary = NULL, INVALID_ARGUMENT, "weights.w_noise_primary", "NULL");
    REFUSE_FORWARD(w.w_gate_primary = SHIFT(w.w_gate_primary), INVALID_ARGUMENT, "weights.w_gate_primary",
                   "aligned");
    REFUSE_BACKWARD(g.w_noise_primary = SHIFT(g.w_noise_primary), INVALID_ARGUMENT, "gradients.w_noise_primary",
                    "aligned");
    REFUSE_FORWARD(a.chosen_offset = a.chosen_expert, INVALID_ARGUMENT, "chosen_offset", "BALANCED");
    tear_down(&x);
}

Test(errors, balanced)
{
    fixture_t x;
    set_up(&x, VARIANT_BALANCED, CUMOE_F32);
    REFUSE_FORWARD(w.thresholds = NULL, INVALID_ARGUMENT, "weights.thresholds", "NULL");
    REFUSE_FORWARD(w.thresholds = SHIFT(w.thresholds), INVALID_ARGUMENT, "weights.thresholds", "aligned");
    REFUSE_FORWARD(w.w_noise = w.w_gate, INVALID_ARGUMENT, "weights.w_noise", "must be NULL");
    REFUSE_FORWARD(a.chosen_offset = SHIFT(a.chosen_offset), INVALID_ARGUMENT, "chosen_offset", "aligned");
    REFUSE_FORWARD(a.batch_threshold = SHIFT(a.batch_threshold), INVALID_ARGUMENT, "batch_threshold", "aligned");
    /* K = 2: twice as many rows would do, but not a slot more for each token */
    REFUSE_FORWARD(a.num_tokens = (INT64_C(1) << 30) - 1, INVALID_ARGUMENT, "num_tokens", "1073741823");
    REFUSE_BACKWARD(w.thresholds = NULL, INVALID_ARGUMENT, "weights.thresholds", "NULL");
    REFUSE_BACKWARD(g.thresholds = SHIFT(g.thresholds), INVALID_ARGUMENT, "gradients.thresholds", "aligned");
    tear_down(&x);
    set_up(&x, VARIANT_BALANCED_INFERENCE, CUMOE_F32);
    REFUSE_FORWARD(a.batch_threshold = a.load, INVALID_ARGUMENT, "batch_threshold", "training");
    tear_down(&x);
}

Test(errors, backward_calls)
{
    fixture_t x;
    set_up(&x, 0, CUMOE_F32);
    const char *f = "cumoe_layer_backward";
    expect_refusal(&x.report, cumoe_layer_backward(NULL, &x.p.backward, NULL), CUMOE_INVALID_ARGUMENT, f, "layer",
                   "NULL");
    expect_refusal(&x.report, cumoe_layer_backward(x.p.layer, NULL, NULL), CUMOE_INVALID_ARGUMENT, f, "args",
                   "NULL");
    REFUSE_BACKWARD(a.struct_size = 0, INVALID_ARGUMENT, "struct_size", "0");
    REFUSE_BACKWARD(a.num_tokens = -1, INVALID_ARGUMENT, "num_tokens", "-1");
    REFUSE_BACKWARD(a.num_tokens = INT64_C(1) << 30, INVALID_ARGUMENT, "num_tokens", "1073741824");
    REFUSE_BACKWARD(a.weights = NULL, INVALID_ARGUMENT, "weights", "NULL");
    REFUSE_BACKWARD(a.x = NULL, INVALID_ARGUMENT, "x", "NULL");
    REFUSE_BACKWARD(a.dy = NULL, INVALID_ARGUMENT, "dy", "NULL");
    REFUSE_BACKWARD(a.saved = NULL, INVALID_ARGUMENT, "saved", "NULL");
    REFUSE_BACKWARD(a.workspace = NULL, INVALID_ARGUMENT, "workspace", "NULL");
    REFUSE_BACKWARD(a.x = SHIFT(a.x), INVALID_ARGUMENT, "x", "aligned");
    REFUSE_BACKWARD(a.dy = SHIFT(a.dy), INVALID_ARGUMENT, "dy", "aligned");
    REFUSE_BACKWARD(a.dx = SHIFT(a.dx), INVALID_ARGUMENT, "dx", "aligned");
    REFUSE_BACKWARD(a.saved = SHIFT(a.saved), INVALID_ARGUMENT, "saved", "aligned");
    REFUSE_BACKWARD(a.loss_gradient = SHIFT(a.loss_gradient), INVALID_ARGUMENT, "loss_gradient", "aligned");
    REFUSE_BACKWARD(a.x_stride = 11, INVALID_ARGUMENT, "x_stride", "11");
    REFUSE_BACKWARD(a.dy_stride = 11, INVALID_ARGUMENT, "dy_stride", "11");
    REFUSE_BACKWARD(a.dx_stride = 11, INVALID_ARGUMENT, "dx_stride", "11");
    REFUSE_BACKWARD(a.training = 2, INVALID_ARGUMENT, "training", "2");
    REFUSE_BACKWARD(a.gradient_mode = (cumoe_gradient_mode_t)2, INVALID_ARGUMENT, "gradient_mode", "2");
    REFUSE_BACKWARD(a.workspace_size = 0, BUFFER_TOO_SMALL, "workspace_size", "0");
    REFUSE_BACKWARD(a.saved_size -= 1, BUFFER_TOO_SMALL, "saved_size", NULL);
    REFUSE_BACKWARD(w.w_down = NULL, INVALID_ARGUMENT, "weights.w_down", "NULL");
    REFUSE_BACKWARD(g.struct_size = 0, INVALID_ARGUMENT, "gradients.struct_size", "0");
    REFUSE_BACKWARD(g.w_up = SHIFT(g.w_up), INVALID_ARGUMENT, "gradients.w_up", "aligned");
    REFUSE_BACKWARD(g.dtype = CUMOE_F64, INVALID_ARGUMENT, "gradients.dtype", NULL);
    REFUSE_BACKWARD(g.up_row_stride = -1, INVALID_ARGUMENT, "up_row_stride", "-1");
    tear_down(&x);
}

Test(errors, buffer_sizes)
{
    fixture_t x;
    set_up(&x, 0, CUMOE_F32);
    const char *f = "cumoe_layer_buffer_sizes";
    size_t workspace = 77, saved = 77;
    expect_refusal(&x.report, cumoe_layer_buffer_sizes(NULL, 4, &workspace, &saved), CUMOE_INVALID_ARGUMENT, f,
                   "layer", "NULL");
    expect_refusal(&x.report, cumoe_layer_buffer_sizes(x.p.layer, 4, NULL, &saved), CUMOE_INVALID_ARGUMENT, f,
                   "workspace_size", "NULL");
    expect_refusal(&x.report, cumoe_layer_buffer_sizes(x.p.layer, -1, &workspace, &saved), CUMOE_INVALID_ARGUMENT,
                   f, "num_tokens", "-1");
    expect_refusal(&x.report, cumoe_layer_buffer_sizes(x.p.layer, INT64_C(1) << 30, &workspace, &saved),
                   CUMOE_INVALID_ARGUMENT, f, "num_tokens", "1073741824");
    cr_expect(workspace == 77 && saved == 77);
    cr_expect_eq(cumoe_layer_buffer_sizes(x.p.layer, (INT64_C(1) << 30) - 1, &workspace, &saved), CUMOE_SUCCESS);
    cr_expect(workspace != 77 && saved > (size_t)1 << 33); /* T * K * I values of z: no 32-bit product */
    tear_down(&x);
}
