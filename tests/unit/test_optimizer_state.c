/* What the optimizer keeps: master copies, a state that may be moved, its size; and the same bits whatever brings
 * the numbers and however many threads work. */
#include "optimizer_problem.h"

/* The master copies move by less than a 16-bit parameter can, and give back what is lost in it. */
static void small_steps(optimizer_problem_t *p, report_t *report)
{
    p->args.values.learning_rate = 1e-4;
    for (int64_t t = 1; t <= 40; t++) {
        optimizer_step(p, t, report);
        memset(p->layer.weights.w_up, 0, p->layer.weight_bytes[MATRIX_UP]);
        buffer_poison(p->layer.weights.w_down, p->layer.weight_bytes[MATRIX_DOWN]);
    }
}

Test(optimizer_state, parameters_of_16_bits_are_rounded_master_copies)
{
    for (int optimizer = 0; optimizer < COUNT(OPTIMIZERS); optimizer++)
        for (int type = CUMOE_BF16; type <= CUMOE_F16; type++) {
            const optimizer_case_t c = {.optimizer = OPTIMIZERS[optimizer], .options.dtype = (cumoe_dtype_t)type};
            with_optimizer(&c, small_steps);
        }
}

/* The state may be moved, and may stand in a larger buffer. */
static void moved_state(optimizer_problem_t *p, report_t *report)
{
    optimizer_step(p, 1, report);
    for (int64_t t = 2; t <= 4; t++) {
        char *buffer = buffer_get_aligned(&p->layer.buffers, p->args.state_size + 200, 16 << t);
        memcpy(buffer, p->args.state, p->args.state_size);
        buffer_poison(p->args.state, p->args.state_size);
        const size_t size = p->args.state_size;
        p->args.state = buffer;
        p->args.state_size += 200;
        optimizer_step(p, t, report);
        report_check(report, buffer_is_poison(buffer + size, 200));
        p->args.state_size = size;
    }
}

Test(optimizer_state, the_state_holds_no_pointers)
{
    for (int optimizer = 0; optimizer < COUNT(OPTIMIZERS); optimizer++) {
        const optimizer_case_t c = {.optimizer = OPTIMIZERS[optimizer],
                                    .options = {.dtype = CUMOE_F16, .bias = true}};
        with_optimizer(&c, moved_state);
    }
}

/* ---- two ways, the same bits ---- */

/* Three steps of both, the second with other arguments. */
static void expect_same_bits(const optimizer_case_t *a, const optimizer_case_t *b,
                             void (*change)(optimizer_problem_t *p))
{
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    optimizer_problem_t p, q;
    if (optimizer_create(&p, handle, a, &report) & optimizer_create(&q, handle, b, &report)) {
        for (int64_t t = 1; t <= 3; t++) {
            p.args.values.step = q.args.values.step = t;
            if (change) change(&q);
            optimizer_draw_gradients(&p);
            optimizer_draw_gradients(&q);
            optimizer_run_step(&p, &report);
            optimizer_run_step(&q, &report);
            if (a->layout == b->layout && a->glu == b->glu) optimizer_compare(&q, &p, &report);
            report_check(&report, p.args.state_size == q.args.state_size);
            compare_bits(&report, "state", q.args.state, p.args.state, p.args.state_size);
        }
    }
    optimizer_destroy(&p);
    optimizer_destroy(&q);
    cumoe_handle_destroy(handle);
    EXPECT_EMPTY(report);
}

Test(optimizer_state, threads_do_not_change_bits)
{
    static const int32_t threads[] = {2, 3, 7};
    static const int32_t sizes[][3] = {{13, 17, 9}, {4200, 5, 9}, {70, 1270, 2}};
    if (device_backend() != CUMOE_BACKEND_CPU) return; /* which alone has them */
    for (int optimizer = 0; optimizer < COUNT(OPTIMIZERS); optimizer++)
        for (int i = 0; i < COUNT(threads) * COUNT(sizes); i++) {
            const int32_t *size = sizes[i % COUNT(sizes)];
            optimizer_case_t c = {
                .H = size[0],
                .I = size[1],
                .E = size[2],
                .optimizer = OPTIMIZERS[optimizer],
                .layout = (case_layout_t)(i % 3),
                .options = {.dtype = i % 2 ? CUMOE_BF16 : CUMOE_F32, .bias = true, .max_threads = 1}};
            const optimizer_case_t one = c;
            c.options.max_threads = threads[i / COUNT(sizes)];
            expect_same_bits(&one, &c, NULL);
        }
}

/* The state is contiguous: it shows the moments and master copies of any layout. */
Test(optimizer_state, layouts_do_not_change_bits)
{
    for (int optimizer = 0; optimizer < COUNT(OPTIMIZERS); optimizer++)
        for (int i = 0; i < 36; i++) {
            if (device_is_slow() && (i / 3 + i) % 3 != optimizer % 3) continue;
            optimizer_case_t c = {.H = 45,
                                  .I = 70,
                                  .optimizer = OPTIMIZERS[optimizer],
                                  .options = {.dtype = CUMOE_BF16,
                                              .activation = CUMOE_ACTIVATION_SWIGLU,
                                              .bias = true,
                                              .gradient_dtype = i % 2 ? CUMOE_F32 : CUMOE_BF16}};
            const optimizer_case_t plain = c;
            c.layout = (case_layout_t)(i % 3);
            c.gradient_layout = (case_layout_t)(i / 3 % 3);
            c.glu = (cumoe_glu_placement_t)(i / 9);
            c.gradient_glu = (cumoe_glu_placement_t)((i / 9 + i) % 4);
            expect_same_bits(&plain, &c, NULL);
        }
}

static void defaults_spelled_out(optimizer_problem_t *p)
{
    p->args.beta1 = 0.9f;
    p->args.beta2 = 0.999f;
    p->args.epsilon = 1e-8f;
    p->args.values.gradient_scale = 1;
}

/* The values beside the pointer are not looked at. */
static void numbers_in_device_memory(optimizer_problem_t *p)
{
    cumoe_optimizer_call_t *call = buffer_get_aligned(&p->layer.buffers, sizeof *call, 8);
    *call = (cumoe_optimizer_call_t){.learning_rate = 0.01, .step = p->args.values.step};
    if (call->step == 1) call->step = -7; /* counts as 1 */
    p->args.call = call;
    p->args.values = (cumoe_optimizer_call_t){.learning_rate = -1, .step = p->args.values.step, .skip = 1};
}

Test(optimizer_state, numbers_from_elsewhere)
{
    for (int optimizer = 0; optimizer < COUNT(OPTIMIZERS); optimizer++)
        for (int f64 = 0; f64 < 2; f64++) {
            const optimizer_case_t c = {.optimizer = OPTIMIZERS[optimizer],
                                        .options = {.dtype = f64 ? CUMOE_F64 : CUMOE_F32, .bias = true}};
            expect_same_bits(&c, &c, defaults_spelled_out);
            expect_same_bits(&c, &c, numbers_in_device_memory);
        }
}

/* ---- sizes ---- */

/* Bytes of state per value of the expert matrices, which are nearly all of a large layer. */
static double bytes_per_value(const cumoe_handle_t *handle, cumoe_optimizer_t optimizer, cumoe_dtype_t dtype,
                              cumoe_dtype_t gate_dtype, cumoe_activation_t activation)
{
    cumoe_config_t config;
    cr_assert_eq(cumoe_config_init(&config), CUMOE_SUCCESS);
    config.hidden_size = 512;
    config.intermediate_size = 2048;
    config.num_experts = 64;
    config.top_k = 2;
    config.dtype = dtype;
    config.activation = activation;
    cumoe_layer_t *layer = NULL;
    cr_assert_eq(cumoe_layer_create(&layer, handle, &config), CUMOE_SUCCESS, "%s", cumoe_last_error());
    /* Types are all that counts: no arrays, and strides that nobody would accept. */
    const cumoe_weights_t weights = {
        .struct_size = sizeof weights, .dtype = dtype, .gate_dtype = gate_dtype, .up_row_stride = -1};
    size_t size = 0;
    cr_assert_eq(cumoe_optimizer_state_size(layer, optimizer, &weights, &size), CUMOE_SUCCESS, "%s",
                 cumoe_last_error());
    cumoe_layer_destroy(layer);
    const int matrices = activation == CUMOE_ACTIVATION_SWIGLU ? 3 : 2;
    return (double)size / ((double)matrices * 64 * 512 * 2048);
}

Test(optimizer_state, sizes)
{
    static const struct {
        cumoe_dtype_t dtype, gate_dtype;
        double adam, factored;
    } sizes[] = {{CUMOE_F64, CUMOE_F64, 16, 0},
                 {CUMOE_F32, CUMOE_F32, 8, 0},
                 {CUMOE_BF16, CUMOE_F32, 12, 4},
                 {CUMOE_F16, CUMOE_F16, 12, 4}};
    cumoe_handle_t *handle = suite_handle();
    for (int i = 0; i < COUNT(sizes); i++)
        for (int glu = 0; glu < 2; glu++) {
            const cumoe_activation_t activation = glu ? CUMOE_ACTIVATION_SWIGLU : CUMOE_ACTIVATION_RELU;
            const double adam =
                bytes_per_value(handle, CUMOE_OPTIMIZER_ADAM, sizes[i].dtype, sizes[i].gate_dtype, activation);
            const double factored = bytes_per_value(handle, CUMOE_OPTIMIZER_FACTORED_ADAM, sizes[i].dtype,
                                                    sizes[i].gate_dtype, activation);
            cr_expect(adam >= sizes[i].adam && adam < sizes[i].adam + 0.02, "dtype %d: %g", sizes[i].dtype, adam);
            cr_expect(factored >= sizes[i].factored && factored < sizes[i].factored + 0.04, "dtype %d: %g",
                      sizes[i].dtype, factored);
        }
    /* App. D: values per weight, the weight among them, go from 3 to 1. */
    const double adam = bytes_per_value(handle, CUMOE_OPTIMIZER_ADAM, CUMOE_F32, CUMOE_F32, CUMOE_ACTIVATION_RELU);
    const double factored =
        bytes_per_value(handle, CUMOE_OPTIMIZER_FACTORED_ADAM, CUMOE_F32, CUMOE_F32, CUMOE_ACTIVATION_RELU);
    cr_expect_float_eq(1 + adam / 4, 3, 0.01);
    cr_expect_float_eq(1 + factored / 4, 1, 0.01);
    cumoe_handle_destroy(handle);
}

/* Gates of 16 bits have master copies as well. */
Test(optimizer_state, types_of_gates)
{
    cumoe_handle_t *handle = suite_handle();
    const double wide = bytes_per_value(handle, CUMOE_OPTIMIZER_ADAM, CUMOE_BF16, CUMOE_F32, CUMOE_ACTIVATION_RELU);
    const double narrow =
        bytes_per_value(handle, CUMOE_OPTIMIZER_ADAM, CUMOE_BF16, CUMOE_BF16, CUMOE_ACTIVATION_RELU);
    const double gates = 2.0 * 64 * 512, experts = 2.0 * 64 * 512 * 2048;
    cr_expect_float_eq((narrow - wide) * experts / gates, 4, 0.1);
    cumoe_handle_destroy(handle);
}
