/* The layer on the CPU against OpenBLAS: every contestant in the same run, on the same numbers, in turns.
 *
 * First all three compute the same (every token to experts 0..K-1 with weight 1, which is a dense network) and
 * are compared; then the layer routes by its noisy gate, the loop follows that routing, and time is taken. */
#include "options.h"
#include "report.h"
#include "yardsticks.h"

#include <cblas.h>
#include <cumoe/cumoe.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#undef I /* of complex.h */

static void check(cumoe_status_t status)
{
    if (status == CUMOE_SUCCESS) return;
    fprintf(stderr, "cumoe-perf-cpu: %s: %s\n", cumoe_status_name(status), cumoe_last_error());
    exit(EXIT_FAILURE);
}

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* One activation: the layer, its yardsticks, and the numbers that they share. */
typedef struct bench {
    const options_t *options;
    shape_t shape;
    cumoe_handle_t *handle;
    cumoe_layer_t *layer;    /* with the noisy gate */
    cumoe_layer_t *external; /* routed by expert and weight below */
    cumoe_weights_t weights, gradients;
    void *workspace, *saved;
    size_t workspace_size, saved_size;
    matrices_t matrices, loop_gradients;
    dense_t *dense;
    loop_t *loop;
    float *x, *dy, *y[CONTESTANTS], *dx[CONTESTANTS]; /* [T, H] */
    int32_t *expert;                                  /* [T, K] */
    float *weight, *dweight;                          /* [T, K] */
} bench_t;

static void *device_array(const bench_t *b, int64_t count, int64_t size)
{
    void *array;
    check(cumoe_memory_alloc(b->handle, (size_t)(count * size), &array));
    check(cumoe_memory_set(b->handle, array, 0, (size_t)(count * size), NULL));
    return array;
}

/* A layer, and buffers large enough for it. */
static cumoe_layer_t *new_layer(bench_t *b, cumoe_gate_kind_t gate)
{
    const options_t *o = b->options;
    cumoe_config_t config;
    check(cumoe_config_init(&config));
    config.hidden_size = o->hidden;
    config.intermediate_size = o->intermediate;
    config.num_experts = o->experts;
    config.top_k = o->top_k;
    config.activation = b->shape.glu ? CUMOE_ACTIVATION_SWIGLU : CUMOE_ACTIVATION_RELU;
    config.gate = gate;
    config.max_threads = o->threads;
    cumoe_layer_t *layer;
    check(cumoe_layer_create(&layer, b->handle, &config));
    size_t workspace, saved;
    check(cumoe_layer_buffer_sizes(layer, o->tokens, &workspace, &saved));
    if (workspace > b->workspace_size) b->workspace_size = workspace;
    if (saved > b->saved_size) b->saved_size = saved;
    return layer;
}

/* Numbers in -1..1 without a library: xorshift. */
static void fill(float *array, int64_t count, uint32_t seed)
{
    for (int64_t i = 0; i < count; i++) {
        seed ^= seed << 13;
        seed ^= seed >> 17;
        seed ^= seed << 5;
        array[i] = (float)(int32_t)seed * 0x1p-31F;
    }
}

static void bench_create(bench_t *b, const options_t *o, bool glu)
{
    const int64_t T = o->tokens, H = o->hidden, rows = T * o->top_k;
    const int64_t matrix = (int64_t)o->experts * o->intermediate * H;
    *b = (bench_t){.options = o, .shape = {o->tokens, o->hidden, o->intermediate, o->experts, o->top_k, glu}};
    check(cumoe_handle_create(&b->handle, CUMOE_BACKEND_CPU, 0));
    b->layer = new_layer(b, CUMOE_GATE_NOISY_TOPK);
    b->external = new_layer(b, CUMOE_GATE_EXTERNAL);
    check(cumoe_weights_create(b->layer, CUMOE_DTYPE_DEFAULT, &b->weights));
    check(cumoe_weights_create(b->layer, CUMOE_DTYPE_DEFAULT, &b->gradients));
    check(cumoe_weights_init(b->layer, 1, &b->weights, NULL));
    b->workspace = device_array(b, (int64_t)b->workspace_size, 1);
    b->saved = device_array(b, (int64_t)b->saved_size, 1);
    b->matrices = (matrices_t){b->weights.w_up, b->weights.w_glu, b->weights.w_down};
    b->loop_gradients =
        (matrices_t){new_array(matrix, sizeof(float)), glu ? new_array(matrix, sizeof(float)) : NULL,
                     new_array(matrix, sizeof(float))};
    b->dense = dense_create(&b->shape, &b->matrices);
    b->loop = loop_create(&b->shape);
    b->x = device_array(b, T * H, sizeof(float));
    b->dy = device_array(b, T * H, sizeof(float));
    fill(b->x, T * H, 1);
    fill(b->dy, T * H, 2);
    for (int i = 0; i < CONTESTANTS; i++) {
        b->y[i] = device_array(b, T * H, sizeof(float));
        b->dx[i] = device_array(b, T * H, sizeof(float));
    }
    b->expert = device_array(b, rows, sizeof(int32_t));
    b->weight = device_array(b, rows, sizeof(float));
    b->dweight = device_array(b, rows, sizeof(float));
}

static void bench_destroy(bench_t *b)
{
    cumoe_weights_destroy(b->layer, &b->weights);
    cumoe_weights_destroy(b->layer, &b->gradients);
    cumoe_layer_destroy(b->layer);
    cumoe_layer_destroy(b->external);
    dense_destroy(b->dense);
    loop_destroy(b->loop);
    free(b->loop_gradients.up);
    free(b->loop_gradients.glu);
    free(b->loop_gradients.down);
    void *arrays[] = {b->workspace, b->saved, b->x, b->dy, b->expert, b->weight, b->dweight};
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) cumoe_memory_free(b->handle, arrays[i]);
    for (int i = 0; i < CONTESTANTS; i++) {
        cumoe_memory_free(b->handle, b->y[i]);
        cumoe_memory_free(b->handle, b->dx[i]);
    }
    cumoe_handle_destroy(b->handle);
}

/* external: routed by expert and weight, else by the gate, which writes them. */
static void layer_forward(bench_t *b, bool external)
{
    const cumoe_forward_args_t args = {.struct_size = sizeof args,
                                       .num_tokens = b->shape.T,
                                       .weights = &b->weights,
                                       .x = b->x,
                                       .y = b->y[CUMOE],
                                       .training = !external,
                                       .seed = 1,
                                       .index = external ? b->expert : NULL,
                                       .index_weight = external ? b->weight : NULL,
                                       .chosen_expert = external ? NULL : b->expert,
                                       .chosen_weight = external ? NULL : b->weight,
                                       .workspace = b->workspace,
                                       .workspace_size = b->workspace_size,
                                       .saved = b->saved,
                                       .saved_size = b->saved_size};
    check(cumoe_layer_forward(external ? b->external : b->layer, &args, NULL));
}

static void layer_backward(bench_t *b, bool external)
{
    const cumoe_backward_args_t args = {.struct_size = sizeof args,
                                        .num_tokens = b->shape.T,
                                        .weights = &b->weights,
                                        .x = b->x,
                                        .dy = b->dy,
                                        .training = !external,
                                        .dx = b->dx[CUMOE],
                                        .gradients = &b->gradients,
                                        .workspace = b->workspace,
                                        .workspace_size = b->workspace_size,
                                        .saved = b->saved,
                                        .saved_size = b->saved_size};
    check(cumoe_layer_backward(external ? b->external : b->layer, &args, NULL));
}

/* Bounds of || a - b || / || b ||. A pre-activation that rounds to the other side of 0 changes the whole derivative
 * of ReLU there, which is rare but not small. */
static const double rounding = 1e-5, rounding_at_kinks = 2e-3;

/* False, reported on stderr, if a and b differ by more than the bound. */
static bool agree(const char *what, const float *a, const float *b, int64_t count, double bound)
{
    double difference = 0, size = 0;
    for (int64_t i = 0; i < count; i++) {
        difference += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        size += (double)b[i] * b[i];
    }
    const bool good = sqrt(difference) <= bound * sqrt(size); /* false for NaN */
    if (!good) fprintf(stderr, "cumoe-perf-cpu: %s: relative difference %.2g\n", what, sqrt(difference / size));
    return good;
}

static bool gradients_agree(const bench_t *b, const char *what, const matrices_t *other, int experts)
{
    const int64_t count = (int64_t)experts * b->shape.H * b->shape.I;
    const double bound = b->shape.glu ? rounding : rounding_at_kinks;
    char text[3][80];
    snprintf(text[0], sizeof text[0], "%s dw_up", what);
    snprintf(text[1], sizeof text[1], "%s dw_glu", what);
    snprintf(text[2], sizeof text[2], "%s dw_down", what);
    return agree(text[0], b->gradients.w_up, other->up, count, bound) &
           (!b->shape.glu || agree(text[1], b->gradients.w_glu, other->glu, count, bound)) &
           agree(text[2], b->gradients.w_down, other->down, count, rounding);
}

/* All three on what a dense network can compute. */
static bool check_results(bench_t *b)
{
    const shape_t *s = &b->shape;
    const int64_t rows = (int64_t)s->T * s->K, elements = (int64_t)s->T * s->H;
    const double bound = s->glu ? rounding : rounding_at_kinks;
    for (int64_t i = 0; i < rows; i++) {
        b->expert[i] = (int32_t)(i % s->K);
        b->weight[i] = 1;
    }
    layer_forward(b, true);
    layer_backward(b, true);
    loop_forward(b->loop, &b->matrices, b->x, b->expert, b->weight, b->y[LOOP]);
    loop_backward(b->loop, &b->matrices, b->dy, b->weight, b->dx[LOOP], b->dweight, &b->loop_gradients);
    bool good = agree("cumoe and loop: y", b->y[CUMOE], b->y[LOOP], elements, rounding) &
                agree("cumoe and loop: dx", b->dx[CUMOE], b->dx[LOOP], elements, bound) &
                gradients_agree(b, "cumoe and loop:", &b->loop_gradients, s->E);

    dense_forward(b->dense, b->x, b->y[DENSE], true);
    dense_backward(b->dense, b->x, b->dy, b->dx[DENSE], true);
    dense_gradients(b->dense, &b->loop_gradients);
    good &= agree("cumoe and dense: y", b->y[CUMOE], b->y[DENSE], elements, rounding) &
            agree("cumoe and dense: dx", b->dx[CUMOE], b->dx[DENSE], elements, bound) &
            gradients_agree(b, "cumoe and dense:", &b->loop_gradients, s->K);
    return good;
}

static void run(bench_t *b, int contestant, int pass)
{
    switch (contestant * 2 + pass) {
    case CUMOE * 2 + FORWARD:
        layer_forward(b, false);
        break;
    case CUMOE * 2 + BACKWARD:
        layer_backward(b, false);
        break;
    case DENSE * 2 + FORWARD:
        dense_forward(b->dense, b->x, b->y[DENSE], false);
        break;
    case DENSE * 2 + BACKWARD:
        dense_backward(b->dense, b->x, b->dy, b->dx[DENSE], false);
        break;
    case LOOP * 2 + FORWARD:
        loop_forward(b->loop, &b->matrices, b->x, b->expert, b->weight, b->y[LOOP]);
        break;
    case LOOP * 2 + BACKWARD:
        loop_backward(b->loop, &b->matrices, b->dy, b->weight, b->dx[LOOP], b->dweight, &b->loop_gradients);
        break;
    }
}

/* Idle threads of OpenBLAS spin for some 20 ms and would take the cores from the next contestant. */
static void let_threads_sleep(int threads)
{
    if (threads > 1) nanosleep(&(struct timespec){.tv_nsec = 60 * 1000 * 1000}, NULL);
}

static void progress(const bench_t *b, int round)
{
    if (!isatty(STDERR_FILENO)) return;
    fprintf(stderr, "\r\033[K");
    if (round <= b->options->repeat) {
        fprintf(stderr, "%s: %s %d of %d", b->shape.glu ? "SwiGLU" : "ReLU", round ? "round" : "warm-up", round,
                b->options->repeat);
    }
    fflush(stderr);
}

/* Rounds in turns; the one before the first is not counted. */
static void measure(bench_t *b, times_t *times)
{
    const int threads = b->options->threads;
    for (int round = 0; round <= b->options->repeat; round++) {
        progress(b, round);
        for (int contestant = 0; contestant < CONTESTANTS; contestant++) {
            for (int pass = FORWARD; pass <= BACKWARD; pass++) {
                const double start = seconds();
                run(b, contestant, pass);
                if (round > 0) times->seconds[contestant][pass][round - 1] = seconds() - start;
            }
            let_threads_sleep(threads);
        }
    }
    progress(b, b->options->repeat + 1);
}

int main(int argc, char **argv)
{
    const options_t options = options_parse(argc, argv);
    FILE *json = options.json ? fopen(options.json, "w") : NULL;
    if (options.json && !json) {
        fprintf(stderr, "cumoe-perf-cpu: --json %s: %s\n", options.json, strerror(errno));
        return 2;
    }
    openblas_set_num_threads(options.threads);
    times_t times[2];
    bool good = true;
    report_machine(&options);
    for (int glu = 0; glu < 2; glu++) {
        bench_t b;
        bench_create(&b, &options, glu);
        times[glu] = times_create(&b.shape, options.repeat);
        good &= check_results(&b);
        measure(&b, &times[glu]);
        good &= agree("cumoe and loop behind the gate: y", b.y[CUMOE], b.y[LOOP], (int64_t)b.shape.T * b.shape.H,
                      rounding) &
                gradients_agree(&b, "cumoe and loop behind the gate:", &b.loop_gradients, b.shape.E);
        report_table(&times[glu], glu == 0);
        bench_destroy(&b);
    }
    if (json) good &= report_json(json, &options, times, 2);
    for (int glu = 0; glu < 2; glu++) times_destroy(&times[glu]);
    return good ? EXIT_SUCCESS : EXIT_FAILURE;
}
