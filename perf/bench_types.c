/* Both layers have the same experts and tokens, in values that 16 bits hold exactly, and choose the same experts,
 * as their gates have no signal yet and draw the same noise. What differs is how results are rounded on the way. */
#include "bench.h"
#include "layer_run.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { HALF, WIDE, CONTESTANTS };
static const char *const names[][CONTESTANTS] = {[BF16] = {"bf16", "f32"}, [F16] = {"f16", "f32"}};

static void run(void *bench, int contestant, int pass)
{
    layer_run_t *layer = (layer_run_t *)bench + contestant;
    if (pass == FORWARD) {
        layer_run_forward(layer, false);
    } else {
        layer_run_backward(layer, false);
    }
}

/* The 16-bit layer's experts, as they are, for the other one. */
static void share_experts(layer_run_t layers[CONTESTANTS])
{
    const shape_t *s = &layers->shape;
    const int64_t matrix = (int64_t)s->E * s->I * s->H;
    const cumoe_weights_t *half = &layers[HALF].weights;
    cumoe_weights_t *wide = &layers[WIDE].weights;
    layer_run_widen(half->dtype, half->w_up, wide->w_up, matrix);
    if (s->glu) layer_run_widen(half->dtype, half->w_glu, wide->w_glu, matrix);
    layer_run_widen(half->dtype, half->w_down, wide->w_down, matrix);
}

/* Compares what the last round left, and notes how far it is apart. Every value is rounded four times on its way
 * through a pass, and a value's rounding is at most half a unit in the last place. */
static bool results_agree(const layer_run_t layers[CONTESTANTS], times_t *times)
{
    const shape_t *s = &layers->shape;
    const layer_run_t *half = &layers[HALF], *wide = &layers[WIDE];
    const int64_t elements = (int64_t)s->T * s->H, matrix = (int64_t)s->E * s->I * s->H;
    const double bound = 4 * (half->dtype == CUMOE_BF16 ? 0x1p-8 : 0x1p-11);
    float *y = new_array(elements, sizeof *y), *dx = new_array(elements, sizeof *dx);
    layer_run_widen(half->dtype, half->y, y, elements);
    layer_run_widen(half->dtype, half->dx, dx, elements);
    const struct {
        const char *what;
        const float *half, *wide;
        int64_t count;
    } results[] = {{"y", y, wide->y, elements},
                   {"dx", dx, wide->dx, elements},
                   {"dw_up", half->gradients.w_up, wide->gradients.w_up, matrix},
                   {"dw_glu", half->gradients.w_glu, wide->gradients.w_glu, s->glu ? matrix : 0},
                   {"dw_down", half->gradients.w_down, wide->gradients.w_down, matrix}};
    bool good = memcmp(half->expert, wide->expert, (size_t)s->T * (size_t)s->K * sizeof *half->expert) == 0;
    if (!good) fprintf(stderr, "cumoe-perf-cpu: the two types choose other experts\n");
    int length =
        snprintf(times->note, sizeof times->note, "%s, relative difference to f32:", s->glu ? "SwiGLU" : "ReLU");
    for (size_t i = 0; i < sizeof results / sizeof *results; i++) {
        if (results[i].count == 0) continue;
        const double difference = relative_difference(results[i].half, results[i].wide, results[i].count);
        length += snprintf(times->note + length, sizeof times->note - (size_t)length, " %s %.1e", results[i].what,
                           difference);
        good &= agree(results[i].what, results[i].half, results[i].wide, results[i].count, bound);
    }
    free(y);
    free(dx);
    return good;
}

bool bench_types(const options_t *options, const shape_t *shape, times_t *times)
{
    layer_run_t layers[CONTESTANTS];
    layer_run_create(&layers[HALF], shape, options->dtype == BF16 ? CUMOE_BF16 : CUMOE_F16, options->threads);
    layer_run_create(&layers[WIDE], shape, CUMOE_F32, options->threads);
    share_experts(layers);
    *times = times_create(shape, options->repeat, names[options->dtype], CONTESTANTS);
    times_measure(times, options->threads, run, layers);
    const bool good = results_agree(layers, times);
    for (int i = 0; i < CONTESTANTS; i++) layer_run_destroy(&layers[i]);
    return good;
}
