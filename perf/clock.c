/* Time. A sample is as many calls as last long enough; everybody has one in turn, round after round. */
#include "perf.h"

#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static const double sample_seconds = 0.02; /* at least, unless that takes too many calls */
static const double settled = 0.02; /* of the median: the middle half of the samples, or one round to the next */

typedef struct timing {
    bench_t *bench;
    device_t *device;
    void *flushed; /* for cold caches, larger than any; NULL = warm */
    size_t flushed_size;
    int calls[CONTESTANTS][NUM_PARTS]; /* of a sample; 0 = takes no part */
    double sample[CONTESTANTS][NUM_PARTS][MOST_ROUNDS];
    int contestants; /* that must not disturb each other */
} timing_t;

double clock_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static double seconds_of(const timing_t *c, int contestant, int part, int calls)
{
    double sum = 0;
    if (!c->flushed) device_start_clock(c->device);
    for (int i = 0; i < calls; i++) {
        if (c->flushed) {
            perf_check(cumoe_memory_set(c->device->handle, c->flushed, i, c->flushed_size, c->device->stream));
            device_start_clock(c->device);
        }
        bench_enqueue(c->bench, contestant, part);
        if (c->flushed) sum += device_stop_clock(c->device);
    }
    return c->flushed ? sum : device_stop_clock(c->device);
}

int clock_calls(int calls, double seconds, int most)
{
    if (seconds < sample_seconds / 2 && calls < most) return -(calls < most / 2 ? 2 * calls : most);
    const double enough = calls * (sample_seconds / seconds) + 1;
    return enough < calls ? calls : enough < most ? (int)enough : most;
}

/* As many calls as last long enough, found by doubling, which warms up as well. */
static int calls_of(const timing_t *c, int contestant, int part)
{
    const int most = c->flushed ? 5 : MOST_CALLS; /* filling the caches takes its own time */
    int calls = -1;
    while (calls < 0) calls = clock_calls(-calls, seconds_of(c, contestant, part, -calls), most);
    return calls;
}

/* Idle threads of OpenBLAS spin for some 20 ms and would take the cores from the next contestant. */
static void let_threads_sleep(const timing_t *c)
{
    if (c->device->cpu && c->device->threads != 1 && c->contestants > 1)
        nanosleep(&(struct timespec){.tv_nsec = 60 * 1000 * 1000}, NULL);
}

/* Seconds of all calls of the round, those of a sample counted once. */
static double run_round(timing_t *c, int round)
{
    double sum = 0;
    for (int contestant = 0; contestant < CONTESTANTS; contestant++) {
        bool any = false;
        for (int part = 0; part < NUM_PARTS; part++) {
            const int calls = c->calls[contestant][part];
            if (calls == 0) continue;
            any = true;
            sum += c->sample[contestant][part][round] = seconds_of(c, contestant, part, calls) / calls;
        }
        if (any) let_threads_sleep(c);
    }
    return sum;
}

/* ---- spreads ---- */

static int compare(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

spread_t clock_spread(double *values, int count)
{
    qsort(values, (size_t)count, sizeof *values, compare);
    return (spread_t){(values[(count - 1) / 2] + values[count / 2]) / 2, values[(int)ceil(0.95 * count) - 1],
                      values[0], values[count - 1]};
}

bool clock_settled(const double *values, int count)
{
    double sorted[MOST_ROUNDS];
    memcpy(sorted, values, (size_t)count * sizeof *values);
    const spread_t spread = clock_spread(sorted, count);
    return sorted[count - 1 - count / 4] - sorted[count / 4] <= settled * spread.median;
}

static bool is_settled(const timing_t *c, int rounds)
{
    for (int part = 0; part < NUM_PARTS; part++)
        if (c->calls[CUMOE][part] > 0 && !clock_settled(c->sample[CUMOE][part], rounds)) return false;
    return true;
}

/* From samples, which are then sorted, to times. */
static void summarize(timing_t *c, int rounds, times_t times[CONTESTANTS][NUM_PARTS])
{
    for (int part = 0; part < NUM_PARTS; part++) {
        for (int contestant = CONTESTANTS - 1; contestant >= 0; contestant--) {
            times_t *t = &times[contestant][part];
            const double *both = c->sample[contestant][FORWARD], *back = c->sample[contestant][BACKWARD];
            const bool sums = part == BOTH && has_part(bench_subject(c->bench), BOTH) &&
                              c->calls[contestant][FORWARD] && c->calls[contestant][BACKWARD];
            if (!c->calls[contestant][part] && !sums) continue;
            t->samples = rounds;
            t->calls = sums ? 1 : c->calls[contestant][part];
            for (int i = 0; sums && i < rounds; i++) c->sample[contestant][part][i] = both[i] + back[i];
        }
        for (int other = DENSE; other < CONTESTANTS; other++) {
            double ratio[MOST_ROUNDS];
            if (times[CUMOE][part].samples == 0 || times[other][part].samples == 0) continue;
            for (int i = 0; i < rounds; i++) ratio[i] = c->sample[other][part][i] / c->sample[CUMOE][part][i];
            times[CUMOE][part].ratio[other] = clock_spread(ratio, rounds);
        }
    }
    for (int contestant = 0; contestant < CONTESTANTS; contestant++) {
        for (int part = 0; part < NUM_PARTS; part++) {
            times_t *t = &times[contestant][part];
            if (t->samples > 0) t->seconds = clock_spread(c->sample[contestant][part], rounds);
        }
    }
}

/* ---- all ---- */

static void start(timing_t *c, bench_t *bench, bool once)
{
    *c = (timing_t){.bench = bench, .device = bench_device(bench)};
    if (bench_subject(bench)->cache == COLD) {
        c->flushed_size = (size_t)1 << 28;
        perf_check(cumoe_memory_alloc(c->device->handle, c->flushed_size, &c->flushed));
    }
    for (int contestant = 0; contestant < CONTESTANTS; contestant++) {
        int parts = 0;
        for (int part = 0; part < NUM_PARTS; part++) {
            if (!bench_takes_part(bench, contestant, part)) continue;
            c->calls[contestant][part] = once ? 1 : calls_of(c, contestant, part);
            parts++;
        }
        c->contestants += parts > 0 && !once;
    }
}

void clock_parts(bench_t *bench, double seconds, times_t times[CONTESTANTS][NUM_PARTS],
                 void (*progress)(void *, const char *), void *context)
{
    const double begin = clock_now();
    const bool once = seconds == 0;
    timing_t *c = malloc(sizeof *c);
    if (!c) abort();
    progress(context, "warm-up");
    start(c, bench, once);
    double before = 0;
    for (int round = 0; !once && round < WARM_UP_ROUNDS && clock_now() < begin + seconds / 3; round++) {
        const double sum = run_round(c, 0);
        if (fabs(sum - before) < settled * sum) break;
        before = sum;
    }
    int rounds = 0;
    while (rounds < (once ? 1 : MOST_ROUNDS)) {
        char text[40];
        snprintf(text, sizeof text, "round %d", rounds + 1);
        progress(context, text);
        run_round(c, rounds++);
        if (rounds >= FEWEST_ROUNDS && clock_now() > begin + seconds) break;
        if (rounds >= SETTLED_ROUNDS && is_settled(c, rounds)) break;
    }
    memset(times, 0, sizeof(times_t) * CONTESTANTS * NUM_PARTS);
    summarize(c, rounds, times);
    cumoe_memory_free(c->device->handle, c->flushed);
    free(c);
}

enum { MEMORY_ROUNDS = 6 };

/* Copies are the fastest that a GPU does with its memory. */
static double copy_rate(device_t *device)
{
    enum { COPIES = 10 };
    const size_t size = (size_t)1 << 30;
    void *from = NULL, *to = NULL;
    double best = 0;
    cumoe_status_t status = cumoe_memory_alloc(device->handle, size, &from);
    if (!status) status = cumoe_memory_alloc(device->handle, size, &to);
    if (!status) perf_check(cumoe_memory_set(device->handle, from, 1, size, device->stream));
    for (int round = 0; !status && round < MEMORY_ROUNDS; round++) {
        device_start_clock(device);
        for (int i = 0; i < COPIES; i++)
            perf_check(cumoe_memory_copy(device->handle, to, from, size, CUMOE_COPY_ON_DEVICE, device->stream));
        best = fmax(best, 2.0 * COPIES * (double)size / device_stop_clock(device));
    }
    cumoe_memory_free(device->handle, from);
    cumoe_memory_free(device->handle, to);
    return best;
}

/* A CPU needs all its threads for it, and a copy by one is less than one can do: a = b + 3 c. */
static double triad_rate(const device_t *device)
{
    const int64_t count = 1 << 25;
    const int threads = device->threads > 0 ? device->threads : omp_get_max_threads();
    float *a = malloc(3 * (size_t)count * sizeof *a);
    double best = 0;
    if (!a) return 0;
    float *b = a + count, *c = b + count;
    for (int round = 0; round <= MEMORY_ROUNDS; round++) {
        const double start = clock_now();
#pragma omp parallel for simd num_threads(threads) schedule(static)
        for (int64_t i = 0; i < count; i++) {
            if (round == 0) b[i] = c[i] = 1; /* where the thread is that reads it */
            a[i] = b[i] + 3 * c[i];
        }
        if (round > 0) best = fmax(best, 3.0 * (double)count * sizeof *a / (clock_now() - start));
    }
    free(a);
    return best;
}

double clock_memory(device_t *device)
{
    return device->cpu ? triad_rate(device) : copy_rate(device);
}
