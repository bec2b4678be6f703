/* Wrong calls of the optimizer: each gets its status and a sentence, and changes nothing. */
#include "optimizer_problem.h"

#include "tests/unit/refusal.h"

#include <math.h>
#include <stdio.h>

#define SHIFT(pointer, bytes) ((void *)((char *)(uintptr_t)(pointer) + (bytes)))

/* A step with one thing wrong in a = its arguments, w = its weights or g = its gradients. */
#define REFUSE(spoil, status, argument, value)                                                                     \
    do {                                                                                                           \
        cumoe_optimizer_args_t a = p->args;                                                                        \
        cumoe_weights_t w = p->layer.weights, g = p->layer.gradients;                                              \
        a.weights = &w;                                                                                            \
        a.gradients = &g;                                                                                          \
        spoil;                                                                                                     \
        expect_refusal(report, cumoe_optimizer_step(p->layer.layer, &a, NULL), CUMOE_##status,                     \
                       "cumoe_optimizer_step", argument, value);                                                   \
    } while (0)

static void objects(optimizer_problem_t *p, report_t *report)
{
    const char *f = "cumoe_optimizer_step";
    expect_refusal(report, cumoe_optimizer_step(NULL, &p->args, NULL), CUMOE_INVALID_ARGUMENT, f, "layer", "NULL");
    expect_refusal(report, cumoe_optimizer_step(p->layer.layer, NULL, NULL), CUMOE_INVALID_ARGUMENT, f, "args",
                   "NULL");
    if (device_backend() == CUMOE_BACKEND_CPU)
        expect_refusal(report, cumoe_optimizer_step(p->layer.layer, &p->args, (cumoe_stream_t)(uintptr_t)64),
                       CUMOE_INVALID_ARGUMENT, f, "stream", NULL);
    REFUSE(a.struct_size = 0, INVALID_ARGUMENT, "struct_size", "0");
    REFUSE(a.struct_size = 24, INVALID_ARGUMENT, "struct_size", "24");
    REFUSE(a.weights = NULL, INVALID_ARGUMENT, "weights", "NULL");
    REFUSE(a.gradients = NULL, INVALID_ARGUMENT, "gradients", "NULL");
    REFUSE(a.optimizer = (cumoe_optimizer_t)2, INVALID_ARGUMENT, "optimizer = 2", NULL);
    REFUSE(a.optimizer = (cumoe_optimizer_t)-1, INVALID_ARGUMENT, "optimizer = -1", NULL);
    REFUSE(a.call = SHIFT(p->args.state, 4), INVALID_ARGUMENT, "call", "aligned");
}

static void numbers(optimizer_problem_t *p, report_t *report)
{
    REFUSE(a.beta1 = 1, INVALID_ARGUMENT, "beta1 = 1", NULL);
    REFUSE(a.beta1 = -0.5f, INVALID_ARGUMENT, "beta1 = -0.5", NULL);
    REFUSE(a.beta1 = NAN, INVALID_ARGUMENT, "beta1", "nan");
    REFUSE(a.beta2 = 1, INVALID_ARGUMENT, "beta2 = 1", NULL);
    REFUSE(a.beta2 = 2, INVALID_ARGUMENT, "beta2 = 2", NULL);
    REFUSE(a.beta2 = -1e-9f, INVALID_ARGUMENT, "beta2 = -", NULL);
    REFUSE(a.beta2 = NAN, INVALID_ARGUMENT, "beta2", "nan");
    REFUSE(a.epsilon = -1e-8f, INVALID_ARGUMENT, "epsilon = -1e-08", NULL);
    REFUSE(a.epsilon = NAN, INVALID_ARGUMENT, "epsilon", "nan");
    REFUSE(a.weight_decay = -1, INVALID_ARGUMENT, "weight_decay = -1", NULL);
    REFUSE(a.weight_decay = NAN, INVALID_ARGUMENT, "weight_decay", "nan");
    REFUSE(a.values.learning_rate = -0.25, INVALID_ARGUMENT, "learning_rate = -0.25", NULL);
    REFUSE(a.values.learning_rate = (double)NAN, INVALID_ARGUMENT, "learning_rate", "nan");
    REFUSE(a.values.learning_rate = (double)INFINITY, INVALID_ARGUMENT, "learning_rate", "inf");
    REFUSE(a.values.learning_rate = 1e39, INVALID_ARGUMENT, "learning_rate = 1e+39", "F32");
    REFUSE(a.values.gradient_scale = 1e-60, INVALID_ARGUMENT, "gradient_scale = 1e-60", "F32");
    REFUSE(a.values.gradient_scale = -2, INVALID_ARGUMENT, "gradient_scale = -2", NULL);
    REFUSE(a.values.gradient_scale = (double)NAN, INVALID_ARGUMENT, "gradient_scale", "nan");
    REFUSE(a.values.gradient_scale = (double)INFINITY, INVALID_ARGUMENT, "gradient_scale", "inf");
    REFUSE(a.values.step = 0, INVALID_ARGUMENT, "step = 0", NULL);
    REFUSE(a.values.step = INT64_MIN, INVALID_ARGUMENT, "step = -9223372036854775808", NULL);
}

static void state(optimizer_problem_t *p, report_t *report)
{
    char size[32];
    snprintf(size, sizeof size, "state_size = %zu", p->args.state_size - 1);
    REFUSE(a.state_size -= 1, BUFFER_TOO_SMALL, "state_size", size);
    REFUSE(a.state_size = 0, BUFFER_TOO_SMALL, "state_size", "0");
    REFUSE((a.state = NULL, a.state_size = 0), BUFFER_TOO_SMALL, "state_size", "0");
    REFUSE(a.state = NULL, INVALID_ARGUMENT, "state", "NULL");
    REFUSE(a.state = SHIFT(a.state, 1), INVALID_ARGUMENT, "state", "aligned");
    REFUSE(a.state = SHIFT(a.state, 8), INVALID_ARGUMENT, "state", "16-byte aligned");
}

static void weights_and_gradients(optimizer_problem_t *p, report_t *report)
{
    REFUSE(w.struct_size = 0, INVALID_ARGUMENT, "weights.struct_size", "0");
    REFUSE(w.w_up = NULL, INVALID_ARGUMENT, "weights.w_up", "NULL");
    REFUSE(w.w_noise = NULL, INVALID_ARGUMENT, "weights.w_noise", "NULL");
    REFUSE(w.w_down = SHIFT(w.w_down, 2), INVALID_ARGUMENT, "weights.w_down", "aligned");
    REFUSE(w.down_col_stride = -1, INVALID_ARGUMENT, "weights.down_col_stride", "-1");
    REFUSE(w.dtype = CUMOE_F32, INVALID_ARGUMENT, "weights.dtype = 2", "config.dtype");
    REFUSE(w.gate_dtype = CUMOE_F16, INVALID_ARGUMENT, "weights.gate_dtype = 4", NULL);
    REFUSE(w.b_up = w.w_up, INVALID_ARGUMENT, "weights.b_up = 0x", "must be NULL: config.expert_bias = 0");
    REFUSE(w.glu = CUMOE_GLU_LAST, INVALID_ARGUMENT, "weights.glu = 2", "SEPARATE");
    REFUSE(g.struct_size = 0, INVALID_ARGUMENT, "gradients.struct_size", "0");
    REFUSE(g.w_up = SHIFT(g.w_up, 2), INVALID_ARGUMENT, "gradients.w_up", "aligned");
    REFUSE(g.up_row_stride = -3, INVALID_ARGUMENT, "gradients.up_row_stride", "-3");
    REFUSE(g.dtype = CUMOE_F16, INVALID_ARGUMENT, "gradients.dtype = 4", "F32");
    REFUSE(g.dtype = CUMOE_F64, INVALID_ARGUMENT, "gradients.dtype = 1", "F32");
    REFUSE(g.gate_dtype = CUMOE_BF16, INVALID_ARGUMENT, "gradients.gate_dtype = 3", "gate type");
    REFUSE(g.b_down = g.w_up, INVALID_ARGUMENT, "gradients.b_down = 0x", "must be NULL: config.expert_bias = 0");
    REFUSE(g.w_up = w.w_up, INVALID_ARGUMENT, "share the array at 0x", NULL);
    REFUSE(g.up_row_stride = 1, INVALID_ARGUMENT, "gradients.up_row_stride = 1", "may not overlap");
    REFUSE(w.down_expert_stride = 3, INVALID_ARGUMENT, "weights.down_expert_stride = 3", "may not overlap");
    REFUSE(g.gate_bias = g.w_gate, INVALID_ARGUMENT, "gradients.gate_bias = 0x", "must be NULL");
}

static void state_size(optimizer_problem_t *p, report_t *report)
{
    const char *f = "cumoe_optimizer_state_size";
    const cumoe_optimizer_t adam = CUMOE_OPTIMIZER_ADAM;
    size_t size = 77;
    cumoe_weights_t w = p->layer.weights;
    expect_refusal(report, cumoe_optimizer_state_size(NULL, adam, &w, &size), CUMOE_INVALID_ARGUMENT, f, "layer",
                   "NULL");
    expect_refusal(report, cumoe_optimizer_state_size(p->layer.layer, (cumoe_optimizer_t)5, &w, &size),
                   CUMOE_INVALID_ARGUMENT, f, "optimizer = 5", NULL);
    expect_refusal(report, cumoe_optimizer_state_size(p->layer.layer, adam, NULL, &size), CUMOE_INVALID_ARGUMENT, f,
                   "weights", "NULL");
    expect_refusal(report, cumoe_optimizer_state_size(p->layer.layer, adam, &w, NULL), CUMOE_INVALID_ARGUMENT, f,
                   "state_size", "NULL");
    w.struct_size = 8;
    expect_refusal(report, cumoe_optimizer_state_size(p->layer.layer, adam, &w, &size), CUMOE_INVALID_ARGUMENT, f,
                   "weights.struct_size", "8");
    w = p->layer.weights;
    w.dtype = CUMOE_F32;
    expect_refusal(report, cumoe_optimizer_state_size(p->layer.layer, adam, &w, &size), CUMOE_INVALID_ARGUMENT, f,
                   "weights.dtype = 2", "config.dtype");
    w = p->layer.weights;
    w.gate_dtype = (cumoe_dtype_t)9;
    expect_refusal(report, cumoe_optimizer_state_size(p->layer.layer, adam, &w, &size), CUMOE_INVALID_ARGUMENT, f,
                   "weights.gate_dtype = 9", NULL);
    report_check(report, size == 77);
}

/* Runs the body; parameters, gradients and state stay as they were, and the good call still works. */
static void nothing_happens(optimizer_body_t *body)
{
    cumoe_handle_t *handle = suite_handle();
    const optimizer_case_t wanted = {.options.dtype = CUMOE_BF16};
    report_t report = {0};
    optimizer_problem_t p, untouched;
    if (optimizer_create(&p, handle, &wanted, &report) & optimizer_create(&untouched, handle, &wanted, &report)) {
        body(&p, &report);
        optimizer_compare(&p, &untouched, &report);
        report_check(&report, buffer_is_poison(p.args.state, p.args.state_size));
        optimizer_step(&p, 1, &report);
    }
    optimizer_destroy(&p);
    optimizer_destroy(&untouched);
    cumoe_handle_destroy(handle);
    EXPECT_EMPTY(report);
}

Test(optimizer_errors, objects)
{
    nothing_happens(objects);
}

Test(optimizer_errors, numbers)
{
    nothing_happens(numbers);
}

Test(optimizer_errors, state)
{
    nothing_happens(state);
}

Test(optimizer_errors, weights_and_gradients)
{
    nothing_happens(weights_and_gradients);
}

Test(optimizer_errors, state_size)
{
    nothing_happens(state_size);
}
