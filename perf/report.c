#include "report.h"

#include <cblas.h>
#include <cumoe/cumoe.h>
#include <stdio.h>
#include <stdlib.h>
#undef I /* of complex.h */

static const char *const contestant_name[] = {"cumoe", "dense", "loop"};
static const char *const pass_name[] = {"forward", "backward", "forward + backward"};

times_t times_create(const shape_t *shape, int repeat)
{
    times_t times = {.shape = *shape, .repeat = repeat};
    for (int c = 0; c < CONTESTANTS; c++) {
        for (int p = FORWARD; p <= BACKWARD; p++) times.seconds[c][p] = new_array(repeat, sizeof(double));
    }
    return times;
}

void times_destroy(times_t *times)
{
    for (int c = 0; c < CONTESTANTS; c++) {
        for (int p = FORWARD; p <= BACKWARD; p++) free(times->seconds[c][p]);
    }
}

/* Useful FLOPs of a pass: a product of [T K, H] and [H, I] for every matrix, twice that backward. */
static double pass_flops(const shape_t *s, int pass)
{
    static const int products[] = {1, 2, 3};
    return 2.0 * products[pass] * (s->glu ? 3 : 2) * s->T * s->K * s->H * s->I;
}

static double pass_seconds(const times_t *t, int contestant, int pass, int round)
{
    if (pass != BOTH) return t->seconds[contestant][pass][round];
    return t->seconds[contestant][FORWARD][round] + t->seconds[contestant][BACKWARD][round];
}

typedef struct spread {
    double median, min, max;
} spread_t;

static int compare(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static spread_t spread_of(double *values, int count)
{
    qsort(values, (size_t)count, sizeof *values, compare);
    return (spread_t){(values[(count - 1) / 2] + values[count / 2]) / 2, values[0], values[count - 1]};
}

/* GFLOP/s of a contestant. */
static spread_t rate(const times_t *t, int contestant, int pass)
{
    double *values = new_array(t->repeat, sizeof *values);
    for (int i = 0; i < t->repeat; i++) {
        values[i] = 1e-9 * pass_flops(&t->shape, pass) / pass_seconds(t, contestant, pass, i);
    }
    const spread_t spread = spread_of(values, t->repeat);
    free(values);
    return spread;
}

/* Speed of the layer over that of a yardstick, round by round. */
static spread_t ratio(const times_t *t, int yardstick, int pass)
{
    double *values = new_array(t->repeat, sizeof *values);
    for (int i = 0; i < t->repeat; i++) {
        values[i] = pass_seconds(t, yardstick, pass, i) / pass_seconds(t, CUMOE, pass, i);
    }
    const spread_t spread = spread_of(values, t->repeat);
    free(values);
    return spread;
}

void report_machine(const options_t *o)
{
    cumoe_handle_t *handle = NULL;
    if (cumoe_handle_create(&handle, CUMOE_BACKEND_CPU, 0) != CUMOE_SUCCESS) handle = NULL;
    printf("T = %d, H = %d, I = %d, E = %d, K = %d, fp32, %d thread%s, median of %d rounds (smallest..largest)\n\n",
           o->tokens, o->hidden, o->intermediate, o->experts, o->top_k, o->threads, o->threads == 1 ? "" : "s",
           o->repeat);
    printf("cumoe %d.%d.%d: %s; %s\n\n", CUMOE_VERSION_MAJOR, CUMOE_VERSION_MINOR, CUMOE_VERSION_PATCH,
           cumoe_handle_description(handle), openblas_get_config());
    cumoe_handle_destroy(handle);
}

void report_table(const times_t *t, bool first)
{
    if (first) {
        puts("| | pass | cumoe GFLOP/s | dense GFLOP/s | loop GFLOP/s | cumoe / dense | cumoe / loop |\n"
             "|---|---|---:|---:|---:|---:|---:|");
    }
    for (int p = 0; p < PASSES; p++) {
        const spread_t dense = ratio(t, DENSE, p), loop = ratio(t, LOOP, p);
        printf("| %s | %s | %.1f | %.1f | %.1f | %.2f (%.2f..%.2f) | %.2f (%.2f..%.2f) |\n",
               t->shape.glu ? "SwiGLU" : "ReLU", pass_name[p], rate(t, CUMOE, p).median, rate(t, DENSE, p).median,
               rate(t, LOOP, p).median, dense.median, dense.min, dense.max, loop.median, loop.min, loop.max);
    }
    fflush(stdout);
}

static void json_spread(FILE *f, const char *name, spread_t s, const char *end)
{
    fprintf(f, "\"%s\": {\"median\": %.6g, \"min\": %.6g, \"max\": %.6g}%s", name, s.median, s.min, s.max, end);
}

bool report_json(FILE *f, const options_t *o, const times_t *times, int count)
{
    fprintf(f, "{\"tokens\": %d, \"hidden\": %d, \"intermediate\": %d, \"experts\": %d, \"top_k\": %d,\n",
            o->tokens, o->hidden, o->intermediate, o->experts, o->top_k);
    fprintf(f, " \"threads\": %d, \"repeat\": %d, \"openblas\": \"%s\",\n \"results\": [", o->threads, o->repeat,
            openblas_get_config());
    for (int i = 0; i < count * PASSES; i++) {
        const times_t *t = &times[i / PASSES];
        const int pass = i % PASSES;
        fprintf(f, "%s\n  {\"activation\": \"%s\", \"pass\": \"%s\",\n   \"gflops\": {", i ? "," : "",
                t->shape.glu ? "swiglu" : "relu", pass_name[pass]);
        for (int c = 0; c < CONTESTANTS; c++) {
            json_spread(f, contestant_name[c], rate(t, c, pass), c < LOOP ? ", " : "},\n");
        }
        fprintf(f, "   \"ratio\": {");
        json_spread(f, "cumoe/dense", ratio(t, DENSE, pass), ", ");
        json_spread(f, "cumoe/loop", ratio(t, LOOP, pass), "}}");
    }
    fprintf(f, "]}\n");
    const bool failed = ferror(f);
    if (fclose(f) != 0 || failed) {
        fprintf(stderr, "cumoe-perf-cpu: --json %s: could not be written\n", o->json);
        return false;
    }
    return true;
}
