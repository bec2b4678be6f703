#include "tests/check/ranks.h"

#include "mpi/processes.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* What all ranks of a case share. */
typedef struct work {
    const ranks_flags_t *flags;
    uint64_t hash[RANKS_MAX]; /* of each rank; with processes [0] */
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

bool ranks_check_flags(const ranks_flags_t *flags)
{
    const bool needless = flags->count == 0 && (flags->killed >= 0 || flags->timeout > 0);
    if (needless) fprintf(stderr, "cumoe-check: --kill and --timeout are for --ranks, which is not there\n");
    for (int i = 0; i < flags->count; i++) {
        if (flags->killed < flags->numbers[i]) continue;
        fprintf(stderr, "cumoe-check: --kill %d, but of %d ranks it must be 0..%d\n", flags->killed,
                flags->numbers[i], flags->numbers[i] - 1);
        return false;
    }
    return !needless;
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
static void lose_one(rank_t *r, const ranks_flags_t *flags)
{
    const int32_t rank = cumoe_ep_rank(r->ep);
    if (!rank_forward(r)) return;
    if (rank == flags->killed) {
        if (flags->processes) raise(SIGKILL);
        return;
    }
    const double begin = seconds_now();
    const bool done = rank_backward(r);
    const double seconds = seconds_now() - begin;
    const bool told = !done && cumoe_ep_wait(r->ep, NULL, 0) == CUMOE_COMM_ERROR;
    r->report = (report_t){0};
    if (told) fprintf(stderr, "rank %d is told after %.1f s: %s\n", rank, seconds, cumoe_last_error());
    if (!told) report_fail(&r->report, "rank %d is not told", rank);
    if (seconds > r->options->timeout + 1) /* a second to be given a processor */
        report_fail(&r->report, "rank %d comes back after %.1f s, but the timeout is %.1f s", rank, seconds,
                    r->options->timeout);
}

static void run_rank(rank_t *r)
{
    work_t *w = r->context;
    if (!rank_create(r, r->whole, r->options, r->ep)) return;
    if (w->flags->killed >= 0) {
        lose_one(r, w->flags);
    } else if (rank_run(r)) {
        rank_check(r);
        w->hash[w->flags->processes ? 0 : cumoe_ep_rank(r->ep)] = rank_hash(r);
    }
}

/* The rank that this process is. */
static void run_process(const problem_t *whole, const ranks_options_t *options, work_t *w, report_t *report)
{
    cumoe_ep_t *ep = NULL;
    if (processes_group(&ep, whole->handle, options->timeout) != CUMOE_SUCCESS)
        report_fail(report, "%s", cumoe_last_error());
    rank_t rank = {.whole = whole, .options = options, .ep = ep, .context = w};
    if (ep) run_rank(&rank);
    if (rank.report.failures) report_fail(report, "rank %d: %s", cumoe_ep_rank(ep), rank.report.text);
    rank_destroy(&rank);
    cumoe_ep_destroy(ep);
    if (w->flags->killed >= 0) return;
    const uint64_t failures = processes_sum((uint64_t)report->failures);
    if (failures && !report->failures) report_fail(report, "another rank failed");
    w->hash[0] = processes_sum(w->hash[0]);
}

uint64_t ranks_run_case(const ranks_flags_t *flags, const problem_t *whole, int32_t num_ranks, report_t *report)
{
    const uint64_t seed = whole->options.seed; /* exchanges and splits in turn, all of which give all outputs */
    const int32_t chunks = (int32_t)(seed / 4 % 4);
    const ranks_options_t options = {.num_ranks = num_ranks,
                                     .split = seed / 2 % 2 ? SPLIT_EVEN : SPLIT_LAST,
                                     .capacity = seed % 2 ? (whole->tokens * whole->top_k + 3) * (chunks + 1) : 0,
                                     .chunks = chunks,
                                     .timeout = flags->timeout > 0   ? flags->timeout
                                                : flags->killed >= 0 ? 5
                                                                     : 0};
    work_t w = {.flags = flags};
    if (flags->processes)
        run_process(whole, &options, &w, report);
    else
        ranks_run(whole, &options, run_rank, &w, report);
    uint64_t hash = 0;
    for (int r = 0; r < RANKS_MAX; r++) hash += w.hash[r];
    return hash;
}
