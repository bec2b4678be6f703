#include "tests/check/ranks.h"

#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* What a rank does. */
typedef struct work {
    const ranks_flags_t *flags;
    const problem_t *whole;
    ranks_options_t options;
    cumoe_ep_t *ep;
    rank_t part;
    uint64_t hash;
} work_t;

/* ---- options ---- */

static bool read_numbers(ranks_flags_t *flags, const char *text)
{
    flags->count = 0;
    for (char *end; flags->count < RANKS_MAX; text = end + 1) {
        const long number = strtol(text, &end, 10);
        if (end == text || number < 1 || number > RANKS_MAX || (*end && *end != ',')) return false;
        flags->numbers[flags->count++] = (int32_t)number;
        if (!*end) return true;
    }
    return false;
}

bool ranks_read_option(ranks_flags_t *flags, const char *option, const char *value)
{
    char *end = NULL;
    if (strcmp(option, "--ranks") == 0) {
        flags->processes = strcmp(value, "mpi") == 0;
        return flags->processes || read_numbers(flags, value);
    }
    if (strcmp(option, "--transport") == 0) return strcmp(value, "local") == 0;
    if (strcmp(option, "--kill") == 0) {
        flags->killed = (int32_t)strtol(value, &end, 10);
        return *value && !*end && flags->killed >= 0;
    }
    if (strcmp(option, "--timeout") != 0) return false;
    flags->timeout = strtod(value, &end);
    return *value && !*end && flags->timeout > 0;
}

bool ranks_apply(const problem_t *whole, int32_t num_ranks)
{
    return num_ranks <= (whole->groups ? whole->groups : whole->experts);
}

/* ---- a rank ---- */

static double seconds_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* One leaves, and the others go on without it. */
static void lose_one(work_t *w)
{
    rank_t *r = &w->part;
    const int32_t rank = cumoe_ep_rank(w->ep);
    if (!rank_forward(r)) return;
    if (rank == w->flags->killed) {
        if (w->flags->processes) raise(SIGKILL);
        return;
    }
    const double begin = seconds_now();
    const bool done = rank_backward(r);
    const double seconds = seconds_now() - begin;
    const bool told = !done && cumoe_ep_wait(w->ep, NULL, 0) == CUMOE_COMM_ERROR;
    r->report = (report_t){0};
    if (told) fprintf(stderr, "rank %d is told after %.1f s: %s\n", rank, seconds, cumoe_last_error());
    if (!told) report_fail(&r->report, "rank %d is not told", rank);
    if (seconds > w->options.timeout + 1) /* a second to be given a processor */
        report_fail(&r->report, "rank %d comes back after %.1f s, but the timeout is %.1f s", rank, seconds,
                    w->options.timeout);
}

static void *work(void *argument)
{
    work_t *w = argument;
    if (!rank_create(&w->part, w->whole, &w->options, w->ep)) return NULL;
    if (w->flags->killed >= 0) {
        lose_one(w);
    } else if (rank_run(&w->part)) {
        rank_check(&w->part);
        w->hash = rank_hash(&w->part);
    }
    return NULL;
}

/* ---- all ranks ---- */

static void end_work(work_t *w, report_t *report)
{
    if (w->part.report.failures) report_fail(report, "rank %d: %s", cumoe_ep_rank(w->ep), w->part.report.text);
    rank_destroy(&w->part);
}

static uint64_t run_process(work_t *w, report_t *report)
{
    w->ep = processes_group(w->whole->handle, w->options.timeout, report);
    if (w->ep) work(w);
    end_work(w, report);
    cumoe_ep_destroy(w->ep);
    if (w->flags->killed >= 0) return 0;
    const uint64_t failures = processes_sum((uint64_t)report->failures);
    if (failures && !report->failures) report_fail(report, "another rank failed");
    return processes_sum(w->hash);
}

static uint64_t run_threads(work_t *w, int32_t num_ranks, report_t *report)
{
    cumoe_ep_t *ep[RANKS_MAX];
    pthread_t threads[RANKS_MAX];
    uint64_t hash = 0;
    if (cumoe_ep_create_local(ep, w->whole->handle, num_ranks, w->options.timeout) != CUMOE_SUCCESS) {
        report_fail(report, "%s", cumoe_last_error());
        return 0;
    }
    for (int32_t r = 0; r < num_ranks; r++) {
        w[r] = w[0];
        w[r].ep = ep[r];
    }
    for (int32_t r = 0; r < num_ranks; r++)
        if (pthread_create(&threads[r], NULL, work, &w[r]) != 0) abort();
    for (int32_t r = 0; r < num_ranks; r++) pthread_join(threads[r], NULL);
    for (int32_t r = 0; r < num_ranks; r++) {
        end_work(&w[r], report);
        hash += w[r].hash;
    }
    for (int32_t r = 0; r < num_ranks; r++) cumoe_ep_destroy(ep[r]);
    return hash;
}

uint64_t ranks_run_case(const ranks_flags_t *flags, const problem_t *whole, int32_t num_ranks, report_t *report)
{
    const uint64_t seed = whole->options.seed; /* the kinds of splits and of exchanges in turn */
    work_t *all = calloc(RANKS_MAX, sizeof *all);
    if (!all) abort();
    all[0] = (work_t){.flags = flags,
                      .whole = whole,
                      .options = {.num_ranks = num_ranks,
                                  .split = (ranks_split_t)(seed % NUM_SPLITS),
                                  .capacity = seed % 2 ? whole->tokens * whole->top_k + 3 : 0,
                                  .timeout = flags->timeout > 0   ? flags->timeout
                                             : flags->killed >= 0 ? 5
                                                                  : 0}};
    const uint64_t hash = flags->processes ? run_process(all, report) : run_threads(all, num_ranks, report);
    free(all);
    return hash;
}
