/* Time by the host's clock, around many calls between two synchronisations. */
#include "stages.h"

#include <stdlib.h>
#include <time.h>

enum { MOST_SAMPLES = 15, MOST_CALLS = 1000 };
static const double sample_seconds = 0.02; /* at least, unless that takes too many calls */

double clock_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static double seconds_of(bench_t *bench, int part, int calls)
{
    bench_wait(bench);
    const double start = clock_now();
    for (int i = 0; i < calls; i++) bench_enqueue(bench, part);
    bench_wait(bench);
    return clock_now() - start;
}

/* As many calls as last long enough, found by doubling, which warms up as well. */
static int calls_of(bench_t *bench, int part)
{
    int calls = 1;
    double seconds = seconds_of(bench, part, calls);
    while (seconds < sample_seconds / 2 && calls < MOST_CALLS) {
        calls = calls < MOST_CALLS / 2 ? 2 * calls : MOST_CALLS;
        seconds = seconds_of(bench, part, calls);
    }
    const double enough = calls * (sample_seconds / seconds) + 1;
    return enough < calls ? calls : enough < MOST_CALLS ? (int)enough : MOST_CALLS;
}

static int compare(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

void clock_parts(bench_t *bench, double seconds, times_t times[NUM_PARTS])
{
    double sample[NUM_PARTS][MOST_SAMPLES];
    const double end = clock_now() + seconds;
    for (int part = 0; part < NUM_PARTS; part++) {
        const bool left_out = bench_left_out(bench, part) != NULL;
        times[part] = (times_t){.calls = left_out ? 0 : seconds > 0 ? calls_of(bench, part) : 1};
    }
    for (int round = 0; round < MOST_SAMPLES && (round == 0 || clock_now() < end); round++) {
        for (int part = 0; part < NUM_PARTS; part++) {
            times_t *t = &times[part];
            if (t->calls > 0) sample[part][t->samples++] = seconds_of(bench, part, t->calls) / t->calls;
        }
    }
    for (int part = 0; part < NUM_PARTS; part++) {
        times_t *t = &times[part];
        if (t->samples == 0) continue;
        double *s = sample[part];
        qsort(s, (size_t)t->samples, sizeof *s, compare);
        t->median = (s[(t->samples - 1) / 2] + s[t->samples / 2]) / 2;
        t->min = s[0];
        t->max = s[t->samples - 1];
    }
}

double clock_copy(const cumoe_handle_t *handle, cumoe_stream_t stream)
{
    const size_t size = cumoe_handle_backend(handle) == CUMOE_BACKEND_CPU ? (size_t)1 << 27 : (size_t)1 << 30;
    void *from = NULL, *to = NULL;
    double best = 0;
    cumoe_status_t status = cumoe_memory_alloc(handle, size, &from);
    if (!status) status = cumoe_memory_alloc(handle, size, &to);
    if (!status) {
        enum { COPIES = 10, ROUNDS = 6 };
        stages_check(cumoe_memory_set(handle, from, 1, size, stream));
        for (int round = 0; round < ROUNDS; round++) {
            stages_check(cumoe_stream_synchronize(handle, stream));
            const double start = clock_now();
            for (int i = 0; i < COPIES; i++)
                stages_check(cumoe_memory_copy(handle, to, from, size, CUMOE_COPY_ON_DEVICE, stream));
            stages_check(cumoe_stream_synchronize(handle, stream));
            const double rate = 2.0 * COPIES * (double)size / (clock_now() - start);
            if (rate > best) best = rate;
        }
    } else {
        fprintf(stderr, "cumoe-perf-stages: the rate of copies is not measured: %s\n", cumoe_last_error());
    }
    cumoe_memory_free(handle, from);
    cumoe_memory_free(handle, to);
    return best;
}
