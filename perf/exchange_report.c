/* From times of ranks to figures, in the conventions of nccl-tests. */
#include "exchange.h"
#include "report.h"

#include <math.h>

/* The layer in one part: what of its time is what. */
typedef struct split {
    const char *part;
    const times_t *layer;
    double exchange, experts, rest; /* seconds */
    double passes;                  /* exchanges of dispatch and return */
    double algbw, busbw, of_link;   /* bytes a second; 0 = not known */
} split_t;

static split_t split_of(const exchange_t *e, int32_t num_ranks, int layer, const char *part)
{
    const int experts = layer == RANKS_FORWARD    ? EXPERTS_FORWARD
                        : layer == RANKS_BACKWARD ? EXPERTS_BACKWARD
                                                  : EXPERTS_BOTH;
    split_t s = {.part = part, .layer = &e->times[layer], .passes = layer == RANKS_BOTH ? 2 : 1};
    s.exchange = s.passes * e->times[ROWS].seconds.median;
    s.experts = e->times[experts].seconds.median;
    s.rest = s.layer->seconds.median - s.exchange - s.experts;
    s.algbw = s.passes * e->largest / s.exchange;
    s.busbw = s.algbw * (num_ranks - 1) / num_ranks;
    if (e->link > 0) s.of_link = (num_ranks > 1 ? s.busbw : s.algbw) / e->link;
    return s;
}

static void table_row(const report_t *report, const subject_t *subject, const exchange_t *e, const split_t *s)
{
    FILE *f = report->table;
    const double all = s->layer->seconds.median, parts[] = {s->exchange, s->experts, s->rest};
    report_axes(report, subject);
    fprintf(f, "| %s | %.4g |", s->part, 1e6 * all);
    for (int i = 0; i < 3; i++) fprintf(f, " %.4g (%.1f %%) |", 1e6 * parts[i], 100 * parts[i] / all);
    const double *const bytes[] = {e->dispatched, e->returned};
    for (int i = 0; i < 2; i++)
        fprintf(f, " %.4g + %.4g |", 1e-6 * s->passes * bytes[i][0], 1e-6 * s->passes * bytes[i][1]);
    fprintf(f, " %.3g |", 1e-9 * s->algbw);
    report_cell(f, 1e-9 * s->busbw, "%.3g");
    report_cell(f, s->of_link, "%.2f");
    fprintf(f, " %lld | %s |\n", (long long)e->dropped, e->checked ? "same bits" : "-");
}

static void write_fields(report_t *report, const subject_t *subject, const char *transport, const exchange_t *e,
                         const split_t *s)
{
    field_t fields[MOST_FIELDS];
    const spread_t *t = &s->layer->seconds;
    int count = files_subject(subject, fields);
    const field_t list[] = {
        {"transport", transport, 0},
        {"ranks", NULL, subject->num_ranks},
        {"exchange_capacity", NULL, (double)subject->config.exchange_capacity},
        {"exchange_chunks", NULL, subject->config.exchange_chunks},
        {"rows", NULL, (double)e->rows},
        {"most_rows", NULL, (double)e->most_rows},
        {"dropped", NULL, (double)e->dropped},
        {"contestant", "cumoe", 0},
        {"part", s->part, 0},
        {"samples", NULL, s->layer->samples},
        {"calls", NULL, s->layer->calls},
        {"ms", NULL, 1e3 * t->median},
        {"ms_p95", NULL, 1e3 * t->p95},
        {"ms_min", NULL, 1e3 * t->min},
        {"ms_max", NULL, 1e3 * t->max},
        {"exchange_ms", NULL, 1e3 * s->exchange},
        {"experts_ms", NULL, 1e3 * s->experts},
        {"rest_ms", NULL, 1e3 * s->rest},
        {"dispatch_to_others", NULL, s->passes * e->dispatched[0]},
        {"dispatch_to_itself", NULL, s->passes * e->dispatched[1]},
        {"return_to_others", NULL, s->passes * e->returned[0]},
        {"return_to_itself", NULL, s->passes * e->returned[1]},
        {"exchange_bytes", NULL, s->passes * e->largest},
        {"algbw", NULL, 1e-9 * s->algbw},
        {"busbw", NULL, 1e-9 * s->busbw},
        {"link", NULL, e->link > 0 ? 1e-9 * e->link : NAN},
        {"of_link", NULL, s->of_link > 0 ? s->of_link : NAN},
        {"same_bits", NULL, e->checked},
    };
    for (size_t i = 0; i < sizeof list / sizeof *list; i++) fields[count++] = list[i];
    files_fields(report, fields, count);
}

void report_exchange(report_t *report, const subject_t *subject, const char *transport, const exchange_t *e)
{
    static const struct {
        int layer;
        const char *part;
    } parts[] = {{RANKS_FORWARD, "forward"}, {RANKS_BACKWARD, "backward"}, {RANKS_BOTH, "forward + backward"}};
    for (int i = 0; i < 3; i++) {
        if (e->times[parts[i].layer].samples == 0) continue;
        const split_t split = split_of(e, subject->num_ranks, parts[i].layer, parts[i].part);
        write_fields(report, subject, transport, e, &split);
        if (report->table) table_row(report, subject, e, &split);
        report->rows++;
    }
    report_flush(report);
}
