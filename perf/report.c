#include "report.h"

#include <cblas.h>
#include <cumoe/cumoe.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#undef I /* of complex.h */

static const char *const pass_name[] = {"forward", "backward", "forward + backward"};

times_t times_create(const shape_t *shape, int repeat, const char *const *names, int contestants)
{
    times_t times = {.shape = *shape, .repeat = repeat, .contestants = contestants, .names = names};
    for (int c = 0; c < contestants; c++) {
        for (int p = FORWARD; p <= BACKWARD; p++) times.seconds[c][p] = new_array(repeat, sizeof(double));
    }
    return times;
}

void times_destroy(times_t *times)
{
    for (int c = 0; c < times->contestants; c++) {
        for (int p = FORWARD; p <= BACKWARD; p++) free(times->seconds[c][p]);
    }
}

static void progress(const times_t *t, int round)
{
    if (!isatty(STDERR_FILENO)) return;
    fprintf(stderr, "\r\033[K");
    if (round <= t->repeat) {
        fprintf(stderr, "%s: %s %d of %d", t->shape.glu ? "SwiGLU" : "ReLU", round ? "round" : "warm-up", round,
                t->repeat);
    }
    fflush(stderr);
}

void times_measure(times_t *times, int threads, void (*run)(void *bench, int contestant, int pass), void *bench)
{
    for (int round = 0; round <= times->repeat; round++) {
        progress(times, round);
        for (int contestant = 0; contestant < times->contestants; contestant++) {
            for (int pass = FORWARD; pass <= BACKWARD; pass++) {
                const double start = seconds();
                run(bench, contestant, pass);
                if (round > 0) times->seconds[contestant][pass][round - 1] = seconds() - start;
            }
            let_threads_sleep(threads);
        }
    }
    progress(times, times->repeat + 1);
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

/* Speed of the first over that of a yardstick, round by round. */
static spread_t ratio(const times_t *t, int yardstick, int pass)
{
    double *values = new_array(t->repeat, sizeof *values);
    for (int i = 0; i < t->repeat; i++) {
        values[i] = pass_seconds(t, yardstick, pass, i) / pass_seconds(t, 0, pass, i);
    }
    const spread_t spread = spread_of(values, t->repeat);
    free(values);
    return spread;
}

void report_machine(const options_t *o)
{
    cumoe_handle_t *handle = NULL;
    if (cumoe_handle_create(&handle, CUMOE_BACKEND_CPU, 0) != CUMOE_SUCCESS) handle = NULL;
    printf("T = %d, H = %d, I = %d, E = %d, K = %d, %s, %d thread%s, median of %d rounds (smallest..largest)\n\n",
           o->tokens, o->hidden, o->intermediate, o->experts, o->top_k, dtype_names[o->dtype], o->threads,
           o->threads == 1 ? "" : "s", o->repeat);
    printf("cumoe %d.%d.%d: %s; %s\n\n", CUMOE_VERSION_MAJOR, CUMOE_VERSION_MINOR, CUMOE_VERSION_PATCH,
           cumoe_handle_description(handle), openblas_get_config());
    cumoe_handle_destroy(handle);
}

void report_table(const times_t *t, bool first)
{
    if (first) {
        printf("| | pass |");
        for (int c = 0; c < t->contestants; c++) printf(" %s GFLOP/s |", t->names[c]);
        for (int c = 1; c < t->contestants; c++) printf(" %s / %s |", t->names[0], t->names[c]);
        printf("\n|---|---|");
        for (int c = 1; c < 2 * t->contestants; c++) printf("---:|");
        puts("");
    }
    for (int p = 0; p < PASSES; p++) {
        printf("| %s | %s |", t->shape.glu ? "SwiGLU" : "ReLU", pass_name[p]);
        for (int c = 0; c < t->contestants; c++) printf(" %.1f |", rate(t, c, p).median);
        for (int c = 1; c < t->contestants; c++) {
            const spread_t r = ratio(t, c, p);
            printf(" %.2f (%.2f..%.2f) |", r.median, r.min, r.max);
        }
        puts("");
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
    fprintf(f, " \"dtype\": \"%s\", \"threads\": %d, \"repeat\": %d, \"openblas\": \"%s\",\n \"results\": [",
            dtype_names[o->dtype], o->threads, o->repeat, openblas_get_config());
    for (int i = 0; i < count * PASSES; i++) {
        const times_t *t = &times[i / PASSES];
        const int pass = i % PASSES;
        fprintf(f, "%s\n  {\"activation\": \"%s\", \"pass\": \"%s\",\n   \"gflops\": {", i ? "," : "",
                t->shape.glu ? "swiglu" : "relu", pass_name[pass]);
        const int last = t->contestants - 1;
        for (int c = 0; c <= last; c++) json_spread(f, t->names[c], rate(t, c, pass), c < last ? ", " : "},\n");
        fprintf(f, "   \"ratio\": {");
        for (int c = 1; c <= last; c++) {
            char name[40];
            snprintf(name, sizeof name, "%s/%s", t->names[0], t->names[c]);
            json_spread(f, name, ratio(t, c, pass), c < last ? ", " : "}}");
        }
    }
    fprintf(f, "]}\n");
    const bool failed = ferror(f);
    if (fclose(f) != 0 || failed) {
        fprintf(stderr, "cumoe-perf-cpu: --json %s: could not be written\n", o->json);
        return false;
    }
    return true;
}
