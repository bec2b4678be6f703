/* First all three compute the same (every token to experts 0..K-1 with weight 1, which is a dense network) and are
 * compared; then the layer routes by its noisy gate, the loop follows that routing, and time is taken. */
#include "bench.h"
#include "layer_run.h"

#include <stdio.h>
#include <stdlib.h>

enum { CUMOE, DENSE, LOOP, CONTESTANTS };
static const char *const names[CONTESTANTS] = {"cumoe", "dense", "loop"};

/* The layer, its yardsticks, and the numbers that they share. */
typedef struct bench {
    layer_run_t layer;
    matrices_t matrices; /* of the layer */
    matrices_t gradients, loop_gradients;
    dense_t *dense;
    loop_t *loop;
    float *x, *dy;                           /* [T, H] of the layer */
    float *y[CONTESTANTS], *dx[CONTESTANTS]; /* [T, H] */
    float *dweight;                          /* [T, K] */
} bench_t;

static matrices_t matrices_of(const cumoe_weights_t *weights)
{
    return (matrices_t){weights->w_up, weights->w_glu, weights->w_down};
}

static void bench_create(bench_t *b, const shape_t *s, int threads)
{
    const int64_t elements = (int64_t)s->T * s->H, matrix = (int64_t)s->E * s->I * s->H;
    layer_run_create(&b->layer, s, CUMOE_F32, threads);
    b->matrices = matrices_of(&b->layer.weights);
    b->gradients = matrices_of(&b->layer.gradients);
    b->loop_gradients =
        (matrices_t){new_array(matrix, sizeof(float)), s->glu ? new_array(matrix, sizeof(float)) : NULL,
                     new_array(matrix, sizeof(float))};
    b->dense = dense_create(s, &b->matrices);
    b->loop = loop_create(s);
    b->x = b->layer.x;
    b->dy = b->layer.dy;
    b->y[CUMOE] = b->layer.y;
    b->dx[CUMOE] = b->layer.dx;
    for (int i = DENSE; i < CONTESTANTS; i++) {
        b->y[i] = new_array(elements, sizeof(float));
        b->dx[i] = new_array(elements, sizeof(float));
    }
    b->dweight = new_array((int64_t)s->T * s->K, sizeof(float));
}

static void bench_destroy(bench_t *b)
{
    layer_run_destroy(&b->layer);
    dense_destroy(b->dense);
    loop_destroy(b->loop);
    free(b->loop_gradients.up);
    free(b->loop_gradients.glu);
    free(b->loop_gradients.down);
    for (int i = DENSE; i < CONTESTANTS; i++) {
        free(b->y[i]);
        free(b->dx[i]);
    }
    free(b->dweight);
}

/* Bounds of relative differences. A pre-activation that rounds to the other side of 0 changes the whole derivative
 * of ReLU there, which is rare but not small. */
static const double rounding = 1e-5, rounding_at_kinks = 2e-3;

static bool gradients_agree(const bench_t *b, const char *what, int experts)
{
    const shape_t *s = &b->layer.shape;
    const int64_t count = (int64_t)experts * s->H * s->I;
    const double bound = s->glu ? rounding : rounding_at_kinks;
    const matrices_t *ours = &b->gradients, *theirs = &b->loop_gradients;
    char text[3][80];
    snprintf(text[0], sizeof text[0], "%s dw_up", what);
    snprintf(text[1], sizeof text[1], "%s dw_glu", what);
    snprintf(text[2], sizeof text[2], "%s dw_down", what);
    return agree(text[0], ours->up, theirs->up, count, bound) &
           (!s->glu || agree(text[1], ours->glu, theirs->glu, count, bound)) &
           agree(text[2], ours->down, theirs->down, count, rounding);
}

/* All three on what a dense network can compute. */
static bool check_results(bench_t *b)
{
    const shape_t *s = &b->layer.shape;
    const int64_t rows = (int64_t)s->T * s->K, elements = (int64_t)s->T * s->H;
    const double bound = s->glu ? rounding : rounding_at_kinks;
    int32_t *expert = b->layer.expert;
    float *weight = b->layer.weight;
    for (int64_t i = 0; i < rows; i++) {
        expert[i] = (int32_t)(i % s->K);
        weight[i] = 1;
    }
    layer_run_forward(&b->layer, true);
    layer_run_backward(&b->layer, true);
    loop_forward(b->loop, &b->matrices, b->x, expert, weight, b->y[LOOP]);
    loop_backward(b->loop, &b->matrices, b->dy, weight, b->dx[LOOP], b->dweight, &b->loop_gradients);
    bool good = agree("cumoe and loop: y", b->y[CUMOE], b->y[LOOP], elements, rounding) &
                agree("cumoe and loop: dx", b->dx[CUMOE], b->dx[LOOP], elements, bound) &
                gradients_agree(b, "cumoe and loop:", s->E);

    dense_forward(b->dense, b->x, b->y[DENSE], true);
    dense_backward(b->dense, b->x, b->dy, b->dx[DENSE], true);
    dense_gradients(b->dense, &b->loop_gradients);
    good &= agree("cumoe and dense: y", b->y[CUMOE], b->y[DENSE], elements, rounding) &
            agree("cumoe and dense: dx", b->dx[CUMOE], b->dx[DENSE], elements, bound) &
            gradients_agree(b, "cumoe and dense:", s->K);
    return good;
}

static void run(void *bench, int contestant, int pass)
{
    bench_t *b = bench;
    const layer_run_t *l = &b->layer;
    switch (contestant * 2 + pass) {
    case CUMOE * 2 + FORWARD:
        layer_run_forward(&b->layer, false);
        break;
    case CUMOE * 2 + BACKWARD:
        layer_run_backward(&b->layer, false);
        break;
    case DENSE * 2 + FORWARD:
        dense_forward(b->dense, b->x, b->y[DENSE], false);
        break;
    case DENSE * 2 + BACKWARD:
        dense_backward(b->dense, b->x, b->dy, b->dx[DENSE], false);
        break;
    case LOOP * 2 + FORWARD:
        loop_forward(b->loop, &b->matrices, b->x, l->expert, l->weight, b->y[LOOP]);
        break;
    case LOOP * 2 + BACKWARD:
        loop_backward(b->loop, &b->matrices, b->dy, l->weight, b->dx[LOOP], b->dweight, &b->loop_gradients);
        break;
    }
}

bool bench_openblas(const options_t *options, const shape_t *shape, times_t *times)
{
    bench_t b;
    bench_create(&b, shape, options->threads);
    *times = times_create(shape, options->repeat, names, CONTESTANTS);
    bool good = check_results(&b);
    times_measure(times, options->threads, run, &b);
    good &=
        agree("cumoe and loop behind the gate: y", b.y[CUMOE], b.y[LOOP], (int64_t)shape->T * shape->H, rounding) &
        gradients_agree(&b, "cumoe and loop behind the gate:", shape->E);
    bench_destroy(&b);
    return good;
}
