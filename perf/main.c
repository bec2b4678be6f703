/* cumoe-perf: the time of the layer and of its stages, beside what the device could do at best and what a library
 * for dense products makes of the same operations. */
#include "exchange.h"
#include "options.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

void perf_check(cumoe_status_t status)
{
    if (status == CUMOE_SUCCESS) return;
    fprintf(stderr, "cumoe-perf: %s: %s\n", cumoe_status_name(status), cumoe_last_error());
    exit(EXIT_FAILURE);
}

/* Where the program is, for people: a line on a terminal. */
typedef struct progress {
    const subject_t *subject;
    int number, count;
} progress_t;

static void show_progress(void *context, const char *text)
{
    const progress_t *p = context;
    if (!isatty(STDERR_FILENO)) return;
    fprintf(stderr, "\r\033[K");
    if (text) {
        fprintf(stderr, "%d of %d: %s, %s, T = %lld, E = %d: %s", p->number + 1, p->count, p->subject->shape,
                type_words[p->subject->type], (long long)p->subject->num_tokens, p->subject->config.num_experts,
                text);
    }
    fflush(stderr);
}

enum { MEASURED, NOT_MEASURED, FOUND_WRONG };

/* Nothing is timed before it was right. */
static int measure(report_t *report, blas_t *blas, progress_t *progress, double seconds)
{
    const subject_t *s = progress->subject;
    char why[600] = "";
    double error = 0;
    show_progress(progress, "start");
    bench_t *bench = bench_create(report->device, blas, s, why, sizeof why);
    if (!bench) {
        report_sentence(report, s, -1, why);
        return NOT_MEASURED;
    }
    show_progress(progress, "check");
    const bool right = work_agrees(s, why, sizeof why) && bench_check(bench, &error, why, sizeof why);
    if (right) {
        times_t times[CONTESTANTS][NUM_PARTS];
        clock_parts(bench, seconds, times, show_progress, progress);
        show_progress(progress, NULL);
        report_rows(report, bench, error, times);
        for (int part = -1; part < NUM_PARTS; part++) {
            const char *left_out = part < 0 || has_part(s, part) ? bench_left_out(bench, part) : NULL;
            if (left_out) report_sentence(report, s, part, left_out);
        }
    } else {
        report_sentence(report, s, -1, why);
    }
    bench_destroy(bench);
    show_progress(progress, NULL);
    return right ? MEASURED : FOUND_WRONG;
}

/* A subject on ranks: what all share, which rank 0 writes. */
typedef struct shared {
    progress_t *progress;
    double seconds, link; /* link: given; 0 = to be measured */
    int outcome;
    exchange_t exchange;
    char why[600], unchecked[200];
} shared_t;

static void measure_rank(rank_t *rank, void *context)
{
    shared_t *shared = context;
    const subject_t *s = shared->progress->subject;
    shared_t mine = {.exchange.link = shared->link, .outcome = MEASURED};
    share_t share;
    bool wrong;
    const bool first = rank->number == 0, quick = shared->seconds == 0;
    if (first) show_progress(shared->progress, "check");
    if (!share_create(&share, rank, s, &wrong, mine.why, sizeof mine.why)) {
        mine.outcome = wrong ? FOUND_WRONG : NOT_MEASURED;
    } else if (!share_check(&share, mine.unchecked, mine.why, sizeof mine.why)) {
        mine.outcome = FOUND_WRONG;
    } else {
        if (mine.exchange.link == 0 && !quick) mine.exchange.link = exchange_link(rank);
        exchange_traffic(&share, &mine.exchange);
        exchange_clock(&share, shared->seconds, &mine.exchange, show_progress, shared->progress);
        mine.exchange.checked = mine.unchecked[0] == '\0';
    }
    share_destroy(&share);
    if (!first) return;
    mine.progress = shared->progress;
    *shared = mine;
}

static int measure_exchange(report_t *report, const ranks_t *ranks, progress_t *progress, double seconds,
                            double link)
{
    const subject_t *s = progress->subject;
    shared_t shared = {.progress = progress, .seconds = seconds, .link = link};
    ranks_run(ranks, s->num_ranks, measure_rank, &shared);
    if (ranks->number > 0) return shared.outcome;
    show_progress(progress, NULL);
    if (shared.outcome == MEASURED)
        report_exchange(report, s, transport_names[ranks->transport], &shared.exchange);
    else
        report_sentence(report, s, -1, shared.why);
    if (shared.unchecked[0]) report_sentence(report, s, -1, shared.unchecked);
    return shared.outcome;
}

static peaks_t measure_peaks(device_t *device, blas_t *blas, const options_t *o)
{
    peaks_t peaks = {0};
    if (o->seconds == 0) return peaks;
    peaks.bytes = clock_memory(device);
    if (!blas) return peaks;
    peaks.flops[TYPE_F32] = dense_peak(device, blas, TYPE_F32);
    for (int i = 0; i < o->axis[AXIS_TYPE].count; i++) {
        const int type = o->axis[AXIS_TYPE].value[i], same = blas_type(blas, type);
        if (peaks.flops[same] == 0) peaks.flops[same] = dense_peak(device, blas, same);
        peaks.flops[type] = peaks.flops[same];
    }
    return peaks;
}

/* "-" is stdout, where the table then is not. */
static FILE *open_file(const char *option, const char *name, bool *table)
{
    if (!name) return NULL;
    if (strcmp(name, "-") == 0) {
        if (!*table) {
            fprintf(stderr, "cumoe-perf: %s -: only one can go to stdout\n", option);
            exit(2);
        }
        *table = false;
        return stdout;
    }
    FILE *file = fopen(name, "w");
    if (!file) {
        fprintf(stderr, "cumoe-perf: %s %s: %s\n", option, name, strerror(errno));
        exit(2);
    }
    return file;
}

/* The table and the files; of ranks the first one writes. */
static void open_report(report_t *report, const options_t *o, bool writes)
{
    bool table = writes;
    report->json = writes ? open_file("--json", o->json, &table) : NULL;
    report->csv = writes ? open_file("--csv", o->csv, &table) : NULL;
    report->table = table ? stdout : NULL;
    for (int axis = 0; axis < AXES; axis++) report->varies[axis] = o->axis[axis].count > 1;
    report->varies[AXIS_GATE] |= o->capacity;
}

int main(int argc, char **argv)
{
    options_t o = options_read(argc, argv);
    ranks_t ranks;
    ranks_begin(&ranks, o.ranks, argc, argv);
    if (ranks.count > 0) options_set_ranks(&o, ranks.count);
    const int count = options_num_subjects(&o);
    for (int i = 0; i < count; i++) (void)options_subject(&o, i); /* what is wrong is said before it takes time */
    report_t report = {.commit = o.commit, .per_token = o.capacity, .exchange = o.exchange};
    open_report(&report, &o, ranks.number == 0);

    device_t device = {.threads = o.threads};
    char why[600] = "";
    device_open(&device, o.backend, device_of_rank(o.ordinal, ranks.local));
    ranks_join(&ranks, &device);
    blas_t *blas = o.exchange ? NULL : blas_open(&device, o.blas, why, sizeof why);
    if (o.exchange) snprintf(why, sizeof why, "ranks: %s", transport_names[ranks.transport]);
    report.device = &device;
    report.blas = blas ? blas_name(blas) : why;
    if (!o.exchange) report.peaks = measure_peaks(&device, blas, &o);
    const subject_t first = options_subject(&o, 0);
    if (ranks.number == 0) report_begin(&report, &first, argc, argv);

    int outcomes[3] = {0};
    for (int i = 0; i < count; i++) {
        const subject_t subject = options_subject(&o, i);
        const double seconds = (double)o.seconds / count;
        progress_t progress = {&subject, i, count};
        outcomes[o.exchange ? measure_exchange(&report, &ranks, &progress, seconds, o.link)
                            : measure(&report, blas, &progress, seconds)]++;
    }
    const bool written = report_end(&report);
    if (!written) fputs("cumoe-perf: a file or the table could not be written\n", stderr);
    blas_close(blas);
    const bool missed = o.capacity ? outcomes[MEASURED] == 0 : outcomes[NOT_MEASURED] > 0;
    ranks_end(&ranks, written && !missed && outcomes[FOUND_WRONG] == 0 ? EXIT_SUCCESS : EXIT_FAILURE);
}
