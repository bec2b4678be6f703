/* From times to figures, and the Markdown table of them. */
#include "report.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- from times to figures ---- */

/* The gate's arithmetic is F32 whatever the tokens are. */
static double peak_of(const report_t *report, const subject_t *s, bool gate)
{
    return report->peaks.flops[gate ? TYPE_F32 : s->type];
}

static row_t row_of(const report_t *report, const bench_t *bench, int contestant, int part, const times_t *times)
{
    const subject_t *s = bench_subject(bench);
    row_t r = {.subject = s, .counts = bench_counts(bench), .contestant = contestant, .part = part, .times = times};
    const double seconds = times->seconds.median;
    r.work = work_of(s, &r.counts, part);
    const double gate = r.work.gate_flop, experts = r.work.flop - gate;
    if (contestant != CUMOE) { /* of the products alone */
        const bool of_gate = part == CUMOE_STAGE_GATE || part == CUMOE_STAGE_GATE_BACKWARD;
        r.work = (work_t){.flop = of_gate ? gate : experts};
    }
    r.flops = r.work.flop / seconds;
    r.bytes = r.work.bytes / seconds;
    const double peak = peak_of(report, s, experts <= 0);
    if (peak > 0) r.of_peak = r.flops / peak;
    const double products = (gate > 0 ? gate / peak_of(report, s, true) : 0) + (experts > 0 ? experts / peak : 0);
    if (contestant == CUMOE && report->peaks.bytes > 0 && isfinite(products))
        r.floor = fmax(products, r.work.bytes / report->peaks.bytes);
    r.of_floor = r.floor / seconds;
    return r;
}

/* ---- the table ---- */

static const struct axis_name {
    const char *title, *align;
} axis_names[AXES] = {{"shape", "---"},      {"T", "---:"},     {"E", "---:"},        {"type", "---"},
                      {"activation", "---"}, {"gate", "---"},   {"skew", "---"},      {"cache", "---"},
                      {"launch", "---"},     {"ranks", "---:"}, {"capacity", "---:"}, {"chunks", "---:"}};

static const char *axis_value(const subject_t *s, int axis, char text[48])
{
    const cumoe_config_t *c = &s->config;
    const long long numbers[AXES] = {[AXIS_TOKENS] = s->num_tokens,
                                     [AXIS_EXPERTS] = c->num_experts,
                                     [AXIS_RANKS] = s->num_ranks,
                                     [AXIS_CAPACITY] = c->exchange_capacity,
                                     [AXIS_CHUNKS] = c->exchange_chunks};
    const char *const words[AXES] = {[AXIS_SHAPE] = s->shape,
                                     [AXIS_TYPE] = type_words[s->type],
                                     [AXIS_ACTIVATION] = activation_words[c->activation],
                                     [AXIS_GATE] = gate_words[c->gate],
                                     [AXIS_SKEW] = skew_words[s->skew],
                                     [AXIS_CACHE] = cache_words[s->cache],
                                     [AXIS_LAUNCH] = launch_words[s->launch]};
    if (words[axis]) return words[axis];
    if (axis == AXIS_CAPACITY && numbers[axis] == 0) return "exact";
    if (axis == AXIS_CHUNKS && numbers[axis] == 0) return "chosen";
    snprintf(text, 48, "%lld", numbers[axis]);
    return text;
}

/* What all rows have in common. */
static void print_constants(const report_t *report, const subject_t *s)
{
    const cumoe_config_t *c = &s->config;
    FILE *f = report->table;
    char text[48];
    if (!report->varies[AXIS_SHAPE])
        fprintf(f, "%s: H = %d, I = %d, K = %d%s, ", s->shape, c->hidden_size, c->intermediate_size, c->top_k,
                c->expert_bias ? ", biases" : "");
    static const char *const before[AXES] = {
        [AXIS_TOKENS] = "T = ", [AXIS_EXPERTS] = "E = ", [AXIS_CAPACITY] = "capacity "};
    static const char *const behind[AXES] = {
        [AXIS_GATE] = " gate", [AXIS_SKEW] = " routing", [AXIS_CACHE] = " caches",
        [AXIS_LAUNCH] = "s",   [AXIS_RANKS] = " ranks",  [AXIS_CHUNKS] = " chunks"};
    const char *comma = "";
    for (int axis = AXIS_TOKENS; axis < AXES; axis++) {
        const bool of_shape = axis == AXIS_EXPERTS || axis == AXIS_ACTIVATION || axis == AXIS_GATE;
        if (report->varies[axis] || (of_shape && report->varies[AXIS_SHAPE])) continue;
        if (axis >= AXIS_RANKS && !report->exchange) continue;
        fprintf(f, "%s%s%s%s", comma, before[axis] ? before[axis] : "", axis_value(s, axis, text),
                behind[axis] ? behind[axis] : "");
        comma = ", ";
    }
    fputs("\n\n", f);
}

static void print_heading(const report_t *report)
{
    FILE *f = report->table;
    static const char *const titles[] = {
        "| part | us | p95 | min..max | TFLOP/s | GB/s | of peak | of floor | of dense | of loop | error |\n",
        "| part | ns / token | floor | TFLOP/s | GB/s | of peak | of floor | of dense | of loop | error |\n",
        "| part | us | exchange | experts | rest | MB out | MB back | algbw | busbw | of link | dropped | check "
        "|\n"};
    static const char *const aligns[] = {"|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n",
                                         "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n",
                                         "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|\n"};
    const int kind = report->exchange ? 2 : report->per_token ? 1 : 0;
    for (int axis = 0; axis < AXES; axis++) {
        if (report->varies[axis]) fprintf(f, "| %s ", axis_names[axis].title);
    }
    fputs(titles[kind], f);
    for (int axis = 0; axis < AXES; axis++) {
        if (report->varies[axis]) fprintf(f, "|%s", axis_names[axis].align);
    }
    fputs(aligns[kind], f);
}

void report_axes(const report_t *report, const subject_t *subject)
{
    char text[48];
    for (int axis = 0; axis < AXES; axis++) {
        if (report->varies[axis]) fprintf(report->table, "| %s ", axis_value(subject, axis, text));
    }
}

void report_cell(FILE *file, double value, const char *format)
{
    fputs(" ", file);
    if (value > 0) {
        fprintf(file, format, value);
    } else {
        fputs("-", file);
    }
    fputs(" |", file);
}

static void ratio_cell(FILE *file, const spread_t *ratio)
{
    if (ratio->median > 0) {
        fprintf(file, " %.2f (%.2f..%.2f) |", ratio->median, ratio->min, ratio->max);
    } else {
        fputs(" - |", file);
    }
}

static void table_row(const report_t *report, const row_t *r)
{
    FILE *f = report->table;
    const spread_t *t = &r->times->seconds;
    const double tokens = (double)r->subject->num_tokens;
    report_axes(report, r->subject);
    fprintf(f, "| %s |", part_names[r->part]);
    if (report->per_token) {
        report_cell(f, 1e9 * t->median / tokens, "%.4g");
        report_cell(f, 1e9 * r->floor / tokens, "%.4g");
    } else {
        fprintf(f, " %.4g | %.4g | %.4g..%.4g |", 1e6 * t->median, 1e6 * t->p95, 1e6 * t->min, 1e6 * t->max);
    }
    report_cell(f, 1e-12 * r->flops, "%.3g");
    report_cell(f, 1e-9 * r->bytes, "%.3g");
    report_cell(f, r->of_peak, "%.2f");
    report_cell(f, r->of_floor, "%.2f");
    ratio_cell(f, &r->times->ratio[DENSE]);
    ratio_cell(f, &r->times->ratio[LOOP]);
    fprintf(f, " %.0e |\n", r->error);
}

/* ---- all of it ---- */

void report_begin(report_t *report, const subject_t *first, int argc, char **argv)
{
    files_begin(report, argc, argv);
    if (!report->table) return;
    fprintf(report->table, "cumoe %d.%d.%d: %s; %s\n\n", CUMOE_VERSION_MAJOR, CUMOE_VERSION_MINOR,
            CUMOE_VERSION_PATCH, cumoe_handle_description(report->device->handle), report->blas);
    const char *comma = "Peaks measured: ";
    for (int type = 0; type < TYPES; type++) {
        if (report->peaks.flops[type] <= 0) continue;
        fprintf(report->table, "%s%s %.3g TFLOP/s", comma, type_words[type], 1e-12 * report->peaks.flops[type]);
        comma = ", ";
    }
    if (report->peaks.bytes > 0)
        fprintf(report->table, "%smemory %.3g GB/s, read + written\n\n", comma, 1e-9 * report->peaks.bytes);
    print_constants(report, first);
    print_heading(report);
    fflush(report->table);
}

void report_flush(const report_t *report)
{
    FILE *const files[] = {report->table, report->csv, report->json};
    for (int i = 0; i < 3; i++) {
        if (files[i]) fflush(files[i]);
    }
}

void report_rows(report_t *report, const bench_t *bench, double error, times_t times[CONTESTANTS][NUM_PARTS])
{
    for (int part = 0; part < NUM_PARTS; part++) {
        for (int contestant = 0; contestant < CONTESTANTS; contestant++) {
            if (times[contestant][part].samples == 0) continue;
            row_t row = row_of(report, bench, contestant, part, &times[contestant][part]);
            row.error = error;
            files_row(report, &row);
            if (report->table && contestant == CUMOE) table_row(report, &row);
            report->rows++;
        }
    }
    report_flush(report);
}

void report_sentence(report_t *report, const subject_t *s, int part, const char *sentence)
{
    char about[300], ranks[80] = "";
    const cumoe_config_t *c = &s->config;
    if (report->sentences == MOST_SENTENCES) return;
    if (s->num_ranks)
        snprintf(ranks, sizeof ranks, ", ranks %d, capacity %lld, chunks %d", s->num_ranks,
                 (long long)c->exchange_capacity, c->exchange_chunks);
    snprintf(about, sizeof about, "%s, %s, T = %lld, E = %d, %s, %s gate, %s%s%s%s%s%s", s->shape,
             type_words[s->type], (long long)s->num_tokens, c->num_experts, activation_words[c->activation],
             gate_words[c->gate], skew_words[s->skew], s->cache == COLD ? ", cold" : "",
             s->launch == GRAPH ? ", graph" : "", ranks, part >= 0 ? ", " : "", part >= 0 ? part_names[part] : "");
    report->sentence[report->sentences][0] = strdup(about);
    report->sentence[report->sentences++][1] = strdup(sentence);
}

bool report_end(report_t *report)
{
    if (report->table && report->sentences > 0) fputs("\nNot measured:\n\n", report->table);
    for (int i = 0; i < report->sentences; i++) {
        if (report->table) fprintf(report->table, "- %s: %s\n", report->sentence[i][0], report->sentence[i][1]);
        files_sentence(report, i);
        free(report->sentence[i][0]);
        free(report->sentence[i][1]);
    }
    const bool written = files_end(report);
    return (!report->table || (fflush(report->table) == 0 && !ferror(report->table))) && written;
}
