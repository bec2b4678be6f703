/* The caller's buffers: numbers of a call on the device, replays, saved elsewhere, offsets past 2^31. */
#include "tests/suite.h"

#include <string.h>
#include <sys/mman.h>

static void start(problem_t *p, const cumoe_handle_t *handle, const layer_case_t *layer_case, const char *test,
                  report_t *report)
{
    const problem_options_t options = {.dtype = CUMOE_F32,
                                       .activation = CUMOE_ACTIVATION_SWIGLU,
                                       .variant = GATE_VARIANTS[VARIANT_NOISY],
                                       .seed = random_seed(test, 41),
                                       .without_reference = true};
    cr_assert(problem_create(p, handle, layer_case, &options, report), "%s", report->text);
}

/* saved holds no pointers: a copy at another address serves as well, and the original is not looked at. */
Test(buffers, saved_can_be_copied)
{
    static const layer_case_t layer_case = {"saved", 45, 14, 18, 6, 2, .dead_tokens = 4};
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    problem_t p;
    start(&p, handle, &layer_case, "saved", &report);
    cr_assert(problem_run_forward(&p, &report) && problem_run_backward(&p, &report), "%s", report.text);
    problem_bits_t bits = problem_outputs(&p, true);
    char *copy = (char *)buffer_get(&p.buffers, p.saved_size + 32) + 32;
    memcpy(copy, p.forward.saved, p.saved_size);
    buffer_poison(p.forward.saved, p.saved_size);
    p.backward.saved = copy;
    cr_assert(problem_run_backward(&p, &report), "%s", report.text);
    problem_compare_outputs(&p, true, &bits, &report);
    report_check(&report, memcmp(copy, p.forward.saved, p.saved_size) != 0);
    EXPECT_EMPTY(report);
    problem_bits_free(&bits);
    problem_destroy(&p);
    cumoe_handle_destroy(handle);
}

/* Backward does not change saved. */
Test(buffers, saved_is_constant_in_backward)
{
    static const layer_case_t layer_case = {"constant saved", 45, 14, 18, 6, 2};
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    problem_t p;
    start(&p, handle, &layer_case, "constant saved", &report);
    cr_assert(problem_run_forward(&p, &report), "%s", report.text);
    void *copy = memcpy(buffer_get(&p.buffers, p.saved_size), p.forward.saved, p.saved_size);
    cr_assert(problem_run_backward(&p, &report), "%s", report.text);
    compare_bits(&report, "saved", p.forward.saved, copy, p.saved_size);
    EXPECT_EMPTY(report);
    problem_destroy(&p);
    cumoe_handle_destroy(handle);
}

/* The numbers of a call in device memory mean what they mean in the argument struct. */
Test(buffers, call_struct_equals_host_values)
{
    static const layer_case_t layer_case = {"call struct", 45, 14, 18, 6, 2, .first_token = 1000};
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    problem_t p;
    start(&p, handle, &layer_case, "call struct", &report);
    cr_assert(problem_run_forward(&p, &report) && problem_run_backward(&p, &report), "%s", report.text);
    problem_bits_t forward = problem_outputs(&p, false), backward = problem_outputs(&p, true);
    cumoe_call_t *call = buffer_get(&p.buffers, sizeof *call);
    *call = (cumoe_call_t){p.forward.seed, p.forward.offset, p.forward.first_token, p.tokens};
    p.forward.call = call;
    p.forward.seed = p.forward.offset = 77;
    p.forward.first_token = 77;
    cr_assert(problem_run_forward(&p, &report) && problem_run_backward(&p, &report), "%s", report.text);
    problem_compare_outputs(&p, false, &forward, &report);
    problem_compare_outputs(&p, true, &backward, &report);
    EXPECT_EMPTY(report);
    problem_bits_free(&forward);
    problem_bits_free(&backward);
    problem_destroy(&p);
    cumoe_handle_destroy(handle);
}

/* One set of arguments, replayed with other live_tokens and another seed in device memory: each replay is what a
 * call with so many tokens gives. Values outside 0..T are taken as the nearer of the two. */
Test(buffers, live_tokens_replays)
{
    enum { T = 53 };
    static const layer_case_t layer_case = {"replays", T, 14, 18, 6, 2, .dead_tokens = 1};
    static const int64_t replays[][2] = {{T, T},  {7, 7},    {0, 0}, {30, 30},
                                         {-5, 0}, {1000, T}, {1, 1}, {T - 1, T - 1}};
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    problem_t p;
    start(&p, handle, &layer_case, "replays", &report);
    float *x = (float *)p.forward.x, *dy = (float *)p.backward.dy; /* the last row was left NaN */
    memcpy(x + (T - 1) * 14, x, 14 * sizeof *x);
    memcpy(dy + (T - 1) * 14, dy, 14 * sizeof *dy);
    p.input_hash = problem_input_hash(&p);
    for (size_t i = 0; i < sizeof replays / sizeof *replays; i++) {
        problem_t q = p; /* the same buffers and weights, exactly live tokens */
        const int64_t live = replays[i][1];
        p.call->seed = 90 + i;
        p.call->live_tokens = replays[i][0];
        cr_assert(problem_run_forward(&p, &report) && problem_run_backward(&p, &report), "%s", report.text);
        report_check(&report, p.call->live_tokens == replays[i][0]); /* an input */
        report_check(&report,
                     buffer_is_poison((float *)p.forward.y + live * 14, (size_t)(T - live) * 14 * sizeof(float)));
        report_check(&report,
                     buffer_is_poison((float *)p.backward.dx + live * 14, (size_t)(T - live) * 14 * sizeof(float)));
        problem_bits_t forward = problem_outputs(&p, false), backward = problem_outputs(&p, true);
        q.forward.call = NULL;
        q.forward.seed = p.call->seed;
        q.forward.offset = p.call->offset;
        q.forward.first_token = p.call->first_token;
        q.forward.num_tokens = q.backward.num_tokens = live;
        cr_assert(problem_run_forward(&q, &report) && problem_run_backward(&q, &report), "%s", report.text);
        /* p has said "no expert" there (-1 is poison, too), q was not asked */
        memset((float *)q.forward.chosen_weight + live * 2, 0, (size_t)(T - live) * 2 * sizeof(float));
        problem_compare_outputs(&q, false, &forward, &report);
        problem_compare_outputs(&q, true, &backward, &report);
        problem_bits_free(&forward);
        problem_bits_free(&backward);
    }
    EXPECT_EMPTY(report);
    problem_destroy(&p);
    cumoe_handle_destroy(handle);
}

/* Buffer sizes grow with T; those of the largest T serve the smaller ones. */
Test(buffers, sizes_grow_with_tokens)
{
    static const layer_case_t layer_case = {"sizes", 8, 14, 18, 6, 2};
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    problem_t p;
    start(&p, handle, &layer_case, "sizes", &report);
    size_t workspace = 0, saved = 0;
    for (int64_t t = 0; t < 5000; t = t * 9 / 8 + 1) {
        size_t w = 0, s = 0, alone = 0;
        cr_assert(cumoe_layer_buffer_sizes(p.layer, t, &w, &s) == CUMOE_SUCCESS, "%s", cumoe_last_error());
        cr_assert(cumoe_layer_buffer_sizes(p.layer, t, &alone, NULL) == CUMOE_SUCCESS);
        report_check(&report, w >= workspace && s >= saved);
        workspace = w, saved = s;
    }
    EXPECT_EMPTY(report);
    problem_destroy(&p);
    cumoe_handle_destroy(handle);
}

/* ---- offsets past 2^31 elements: on the host sparse mappings, of which only a few pages exist ---- */

static float *sparse(const cumoe_handle_t *handle, size_t elements)
{
    void *data = NULL;
    const size_t size = elements * sizeof(float);
    if (cumoe_handle_backend(handle) == CUMOE_BACKEND_CPU) {
        data = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        cr_assert(data != MAP_FAILED);
    } else if (cumoe_memory_alloc(handle, size, &data) != CUMOE_SUCCESS) {
        cr_skip_test("%s", cumoe_last_error());
    }
    return data;
}

static void free_sparse(const cumoe_handle_t *handle, float *data, size_t elements)
{
    if (cumoe_handle_backend(handle) == CUMOE_BACKEND_CPU)
        munmap(data, elements * sizeof *data);
    else
        cumoe_memory_free(handle, data);
}

/* Between rows side by side in host memory and rows in device memory. */
static void write_rows(const cumoe_handle_t *handle, float *dst, int64_t stride, const float *src, int64_t rows,
                       int64_t cols)
{
    for (int64_t r = 0; r < rows; r++)
        device_write(handle, dst + r * stride, src + r * cols, (size_t)cols * sizeof *dst);
}

static void read_rows(const cumoe_handle_t *handle, float *dst, const float *src, int64_t stride, int64_t rows,
                      int64_t cols)
{
    for (int64_t r = 0; r < rows; r++)
        device_read(handle, dst + r * cols, src + r * stride, (size_t)cols * sizeof *dst);
}

Test(buffers, rows_past_2_to_the_31)
{
    enum { T = 7, H = 14 };
    static const layer_case_t layer_case = {"far rows", T, H, 18, 6, 2};
    const int64_t stride = (INT64_C(1) << 29) + 4; /* the last rows start past 2^31 */
    const size_t elements = (size_t)(T * stride);
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    problem_t p;
    start(&p, handle, &layer_case, "far rows", &report);
    cr_assert(problem_run_forward(&p, &report) && problem_run_backward(&p, &report), "%s", report.text);

    float *x = sparse(handle, elements), *y = sparse(handle, elements), *dy = sparse(handle, elements),
          *dx = sparse(handle, elements);
    write_rows(handle, x, stride, p.forward.x, T, H);
    write_rows(handle, dy, stride, p.backward.dy, T, H);
    cumoe_forward_args_t f = p.forward;
    f.x = x, f.y = y, f.x_stride = f.y_stride = stride;
    cr_assert(device_layer_forward(p.handle, p.layer, &f) == CUMOE_SUCCESS, "%s", cumoe_last_error());
    cumoe_backward_args_t b = p.backward;
    b.x = x, b.dy = dy, b.dx = dx, b.x_stride = b.dy_stride = b.dx_stride = stride;
    b.gradients = NULL;
    cr_assert(device_layer_backward(p.handle, p.layer, &b) == CUMOE_SUCCESS, "%s", cumoe_last_error());
    float near_y[T * H], near_dx[T * H];
    read_rows(handle, near_y, y, stride, T, H);
    read_rows(handle, near_dx, dx, stride, T, H);
    cr_assert(problem_run_forward(&p, &report), "%s", report.text);
    compare_bits(&report, "y", near_y, p.forward.y, sizeof near_y);
    cr_assert(problem_run_backward(&p, &report), "%s", report.text);
    compare_bits(&report, "dx", near_dx, p.backward.dx, sizeof near_dx);
    EXPECT_EMPTY(report);
    for (int i = 0; i < 4; i++) free_sparse(handle, (float *[]){x, y, dx, dy}[i], elements);
    problem_destroy(&p);
    cumoe_handle_destroy(handle);
}

Test(buffers, experts_past_2_to_the_31)
{
    enum { T = 40, H = 14, I = 18, E = 5 };
    static const layer_case_t layer_case = {"far experts", T, H, I, E, 2};
    const int64_t stride = (INT64_C(1) << 29) + 4; /* the last expert starts past 2^31 */
    const size_t elements = (size_t)(E * stride);
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    problem_t p;
    start(&p, handle, &layer_case, "far experts", &report);
    cr_assert(problem_run_forward(&p, &report) && problem_run_backward(&p, &report), "%s", report.text);
    problem_bits_t forward = problem_outputs(&p, false);
    float *near[3] = {p.gradients.w_up, p.gradients.w_glu, p.gradients.w_down}, *w[3], *g[3];
    const float *const old[3] = {p.weights.w_up, p.weights.w_glu, p.weights.w_down};
    for (int m = 0; m < 3; m++) {
        w[m] = sparse(handle, elements), g[m] = sparse(handle, elements);
        write_rows(handle, w[m], stride, old[m], E, I * H);
    }
    cumoe_weights_t far_weights = p.weights, far_gradients = p.gradients;
    far_weights.up_expert_stride = far_weights.down_expert_stride = stride;
    far_gradients.up_expert_stride = far_gradients.down_expert_stride = stride;
    far_weights.w_up = w[0], far_weights.w_glu = w[1], far_weights.w_down = w[2];
    far_gradients.w_up = g[0], far_gradients.w_glu = g[1], far_gradients.w_down = g[2];
    p.forward.weights = p.backward.weights = &far_weights;
    p.backward.gradients = &far_gradients;
    cr_assert(device_layer_forward(p.handle, p.layer, &p.forward) == CUMOE_SUCCESS, "%s", cumoe_last_error());
    problem_compare_outputs(&p, false, &forward, &report);
    cr_assert(device_layer_backward(p.handle, p.layer, &p.backward) == CUMOE_SUCCESS, "%s", cumoe_last_error());
    for (int m = 0; m < 3; m++) {
        float gradient[E * I * H];
        read_rows(handle, gradient, g[m], stride, E, I * H);
        compare_bits(&report, "gradient", gradient, near[m], sizeof gradient);
        free_sparse(handle, w[m], elements);
        free_sparse(handle, g[m], elements);
    }
    EXPECT_EMPTY(report);
    problem_bits_free(&forward);
    problem_destroy(&p);
    cumoe_handle_destroy(handle);
}

/* The bound of saved for an unknown T: never below the size, and hardly above it where rows grow with tokens. */
static void check_bound(const cumoe_handle_t *handle, const cumoe_config_t *config, report_t *report)
{
    enum { MOST_WASTED = 4096 };
    static const int64_t tokens[] = {0, 1, 2, 3, 7, 30, 64, 127, 1000, 4096, 4097, 30011};
    cumoe_layer_t *layer;
    size_t base, per_token, workspace, saved;
    cr_assert_eq(cumoe_layer_create(&layer, handle, config), CUMOE_SUCCESS, "%s", cumoe_last_error());
    report_check(report, cumoe_layer_saved_bound(layer, &base, &per_token) == CUMOE_SUCCESS);
    const int64_t rows = config->max_rows > config->num_experts ? config->max_rows : config->num_experts;
    const int64_t flat = config->gate == CUMOE_GATE_BALANCED ? (rows + config->top_k - 1) / config->top_k : 0;
    for (size_t i = 0; i < sizeof tokens / sizeof *tokens; i++) {
        const size_t bound = base + per_token * (size_t)(tokens[i] > flat ? tokens[i] - flat : 0);
        report_check(report, cumoe_layer_buffer_sizes(layer, tokens[i], &workspace, &saved) == CUMOE_SUCCESS);
        const bool tight = tokens[i] >= flat && tokens[i] * config->top_k >= config->num_experts;
        if (bound < saved || (tight && bound > saved + MOST_WASTED + (size_t)tokens[i]))
            report_fail(report, "gate %d, max_rows %lld, %lld tokens: saved has %zu bytes, the bound %zu",
                        config->gate, (long long)config->max_rows, (long long)tokens[i], saved, bound);
    }
    cumoe_layer_destroy(layer);
}

Test(buffers, bound_for_an_unknown_number_of_tokens)
{
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    cumoe_config_t config;
    cr_assert_eq(cumoe_config_init(&config), CUMOE_SUCCESS);
    config.hidden_size = 5;
    config.intermediate_size = 13;
    config.num_experts = 12;
    config.activation = CUMOE_ACTIVATION_SWIGLU;
    for (config.gate = CUMOE_GATE_NOISY_TOPK; config.gate <= CUMOE_GATE_SIGMOID_TOPK; config.gate++)
        for (config.recompute = 0; config.recompute <= 1; config.recompute++) {
            config.top_k = config.gate == CUMOE_GATE_SOFTMAX ? 0 : 3;
            config.num_groups = config.gate == CUMOE_GATE_HIERARCHICAL ? 4 : 0;
            config.top_k_groups = config.gate == CUMOE_GATE_HIERARCHICAL ? 1 : 0;
            check_bound(handle, &config, &report);
        }
    config.recompute = 0;
    config.top_k = 3;
    config.gate = CUMOE_GATE_BALANCED;
    static const int64_t max_rows[] = {1, 13, 100, 40000, 100000};
    for (size_t i = 0; i < sizeof max_rows / sizeof *max_rows; i++) {
        config.max_rows = max_rows[i];
        check_bound(handle, &config, &report);
    }

    cumoe_layer_t *layer;
    size_t base = 7, per_token = 7;
    config.max_rows = 0;
    cr_assert_eq(cumoe_layer_create(&layer, handle, &config), CUMOE_SUCCESS);
    report_check(&report, cumoe_layer_saved_bound(NULL, &base, &per_token) == CUMOE_INVALID_ARGUMENT);
    report_check(&report, cumoe_layer_saved_bound(layer, NULL, &per_token) == CUMOE_INVALID_ARGUMENT);
    report_check(&report, cumoe_layer_saved_bound(layer, &base, NULL) == CUMOE_INVALID_ARGUMENT);
    report_check(&report, strcmp(cumoe_last_error(), "cumoe_layer_saved_bound: per_token = NULL, but the result "
                                                     "needs a place") == 0);
    report_check(&report, base == 7 && per_token == 7);
    cumoe_layer_destroy(layer);
    EXPECT_EMPTY(report);
    cumoe_handle_destroy(handle);
}
