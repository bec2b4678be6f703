/* Times as a Markdown table, and every figure as CSV and JSON. */
#include "perf.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* ---- from times to figures ---- */

/* A row: one contestant, one part. 0 = not known. */
typedef struct row {
    const subject_t *subject;
    counts_t counts;
    int contestant, part;
    const times_t *times;
    work_t work;
    double error;
    double flops, bytes; /* a second */
    double floor;        /* seconds */
    double of_floor, of_peak;
} row_t;

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

/* ---- CSV and JSON: the same fields ---- */

enum { MOST_FIELDS = 48 };
typedef struct field {
    const char *key, *text; /* text NULL: the number */
    double number;          /* NaN = not known */
} field_t;

static double known(double value)
{
    return value > 0 ? value : NAN;
}

static field_t *add_number(field_t *field, const char *key, double number)
{
    *field = (field_t){key, NULL, number};
    return field + 1;
}

static field_t *add_text(field_t *field, const char *key, const char *text)
{
    *field = (field_t){key, text, 0};
    return field + 1;
}

static field_t *add_subject(field_t *f, const subject_t *s, const counts_t *counts)
{
    const cumoe_config_t *c = &s->config;
    f = add_text(f, "shape", s->shape);
    f = add_number(f, "T", (double)s->num_tokens);
    f = add_number(f, "H", c->hidden_size);
    f = add_number(f, "I", c->intermediate_size);
    f = add_number(f, "E", c->num_experts);
    f = add_number(f, "K", c->top_k);
    f = add_number(f, "G", c->num_groups);
    f = add_text(f, "dtype", type_words[s->type]);
    f = add_text(f, "activation", activation_words[c->activation]);
    f = add_number(f, "bias", c->expert_bias);
    f = add_text(f, "gate", gate_words[c->gate]);
    f = add_text(f, "skew", skew_words[s->skew]);
    f = add_text(f, "cache", cache_words[s->cache]);
    f = add_text(f, "launch", launch_words[s->launch]);
    f = add_number(f, "rows", (double)counts->rows);
    f = add_number(f, "experts_with_rows", (double)counts->experts);
    return add_number(f, "most_rows", (double)counts->most);
}

static int list_fields(const row_t *r, field_t fields[MOST_FIELDS])
{
    const spread_t *t = &r->times->seconds, *dense = &r->times->ratio[DENSE], *loop = &r->times->ratio[LOOP];
    field_t *f = add_subject(fields, r->subject, &r->counts);
    f = add_text(f, "contestant", contestant_names[r->contestant]);
    f = add_text(f, "part", part_names[r->part]);
    f = add_number(f, "samples", r->times->samples);
    f = add_number(f, "calls", r->times->calls);
    f = add_number(f, "ms", 1e3 * t->median);
    f = add_number(f, "ms_p95", 1e3 * t->p95);
    f = add_number(f, "ms_min", 1e3 * t->min);
    f = add_number(f, "ms_max", 1e3 * t->max);
    f = add_number(f, "flop", r->work.flop);
    f = add_number(f, "bytes", known(r->work.bytes));
    f = add_number(f, "tflops", 1e-12 * r->flops);
    f = add_number(f, "gbps", known(1e-9 * r->bytes));
    f = add_number(f, "floor_ms", known(1e3 * r->floor));
    f = add_number(f, "of_floor", known(r->of_floor));
    f = add_number(f, "of_peak", known(r->of_peak));
    f = add_number(f, "of_dense", known(dense->median));
    f = add_number(f, "of_dense_min", known(dense->min));
    f = add_number(f, "of_dense_max", known(dense->max));
    f = add_number(f, "of_loop", known(loop->median));
    f = add_number(f, "of_loop_min", known(loop->min));
    f = add_number(f, "of_loop_max", known(loop->max));
    f = add_number(f, "error", r->error);
    return (int)(f - fields);
}

static void json_string(FILE *file, const char *text)
{
    fputc('"', file);
    for (; *text; text++) {
        if (*text == '"' || *text == '\\') fputc('\\', file);
        fputc((unsigned char)*text < ' ' ? ' ' : *text, file);
    }
    fputc('"', file);
}

static void json_row(FILE *file, const field_t *fields, int count, bool first)
{
    fputs(first ? "\n  {" : ",\n  {", file);
    for (int i = 0; i < count; i++) {
        fprintf(file, "%s\"%s\": ", i ? ", " : "", fields[i].key);
        if (fields[i].text) {
            json_string(file, fields[i].text);
        } else if (isnan(fields[i].number)) {
            fputs("null", file);
        } else {
            fprintf(file, "%.10g", fields[i].number);
        }
    }
    fputc('}', file);
}

static void csv_row(FILE *file, const field_t *fields, int count, bool first)
{
    for (int i = 0; first && i < count; i++) fprintf(file, "%s%s", i ? "," : "", fields[i].key);
    if (first) fputc('\n', file);
    for (int i = 0; i < count; i++) {
        if (i) fputc(',', file);
        if (fields[i].text) {
            fputs(fields[i].text, file);
        } else if (!isnan(fields[i].number)) {
            fprintf(file, "%.10g", fields[i].number);
        }
    }
    fputc('\n', file);
}

/* ---- the run ---- */

/* The first line that a command prints; "" where there is no such command. */
static const char *ask(const char *command, char *answer, int size)
{
    answer[0] = '\0';
    FILE *pipe = popen(command, "r");
    if (pipe && !fgets(answer, size, pipe)) answer[0] = '\0';
    if (pipe) (void)pclose(pipe);
    answer[strcspn(answer, "\n")] = '\0';
    return answer;
}

static const char *ask_gpu(const device_t *device, const char *what, char *answer, int size)
{
    char command[200];
    snprintf(command, sizeof command, "nvidia-smi --query-gpu=%s --format=csv,noheader -i %d 2>/dev/null", what,
             device->ordinal);
    return ask(command, answer, size);
}

/* What a reader needs to judge the figures, as key and value. */
static int list_facts(const report_t *report, int argc, char **argv, const char *facts[12][2])
{
    static char command[2000], date[40], version[40], driver[100], device[200], cpu[200];
    const time_t now = time(NULL);
    size_t length = 0;
    for (int i = 0; i < argc && length < sizeof command; i++)
        length += (size_t)snprintf(command + length, sizeof command - length, "%s%s", i ? " " : "", argv[i]);
    strftime(date, sizeof date, "%Y-%m-%d %H:%M:%S UTC", gmtime(&now));
    snprintf(version, sizeof version, "%d.%d.%d", CUMOE_VERSION_MAJOR, CUMOE_VERSION_MINOR, CUMOE_VERSION_PATCH);
    snprintf(device, sizeof device, "%s", cumoe_handle_description(report->device->handle));
    int count = 0;
    const char *const list[][2] = {
        {"command", command},
        {"commit", report->commit},
        {"date", date},
        {"cumoe", version},
        {"backend", report->device->cpu ? "cpu" : "cuda"},
        {"device", device},
        {"processor", ask("sed -n 's/^model name.*: //p' /proc/cpuinfo 2>/dev/null", cpu, sizeof cpu)},
        {"driver", report->device->cpu ? "" : ask_gpu(report->device, "driver_version", driver, sizeof driver)},
        {"blas", report->blas},
    };
    for (size_t i = 0; i < sizeof list / sizeof *list; i++) {
        if (list[i][1][0] == '\0') continue;
        facts[count][0] = list[i][0];
        facts[count++][1] = list[i][1];
    }
    return count;
}

/* ---- the table ---- */

static const struct axis_name {
    const char *title, *align;
} axis_names[AXES] = {{"shape", "---"}, {"T", "---:"},   {"E", "---:"},    {"type", "---"},  {"activation", "---"},
                      {"gate", "---"},  {"skew", "---"}, {"cache", "---"}, {"launch", "---"}};

static const char *axis_value(const subject_t *s, int axis, char text[48])
{
    const cumoe_config_t *c = &s->config;
    const long long numbers[AXES] = {[AXIS_TOKENS] = s->num_tokens, [AXIS_EXPERTS] = c->num_experts};
    const char *const words[AXES] = {[AXIS_SHAPE] = s->shape,
                                     [AXIS_TYPE] = type_words[s->type],
                                     [AXIS_ACTIVATION] = activation_words[c->activation],
                                     [AXIS_GATE] = gate_words[c->gate],
                                     [AXIS_SKEW] = skew_words[s->skew],
                                     [AXIS_CACHE] = cache_words[s->cache],
                                     [AXIS_LAUNCH] = launch_words[s->launch]};
    if (words[axis]) return words[axis];
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
    static const char *const before[AXES] = {"", "T = ", "E = ", "", "", "", "", "", ""};
    static const char *const behind[AXES] = {"", "", "", "", "", " gate", " routing", " caches", "s"};
    const char *comma = "";
    for (int axis = AXIS_TOKENS; axis < AXES; axis++) {
        const bool of_shape = axis == AXIS_EXPERTS || axis == AXIS_ACTIVATION || axis == AXIS_GATE;
        if (report->varies[axis] || (of_shape && report->varies[AXIS_SHAPE])) continue;
        fprintf(f, "%s%s%s%s", comma, before[axis], axis_value(s, axis, text), behind[axis]);
        comma = ", ";
    }
    fputs("\n\n", f);
}

static void print_heading(const report_t *report)
{
    FILE *f = report->table;
    for (int axis = 0; axis < AXES; axis++) {
        if (report->varies[axis]) fprintf(f, "| %s ", axis_names[axis].title);
    }
    fputs(report->per_token ? "| part | ns / token | floor |" : "| part | us | p95 | min..max |", f);
    fputs(" TFLOP/s | GB/s | of peak | of floor | of dense | of loop | error |\n", f);
    for (int axis = 0; axis < AXES; axis++) {
        if (report->varies[axis]) fprintf(f, "|%s", axis_names[axis].align);
    }
    fputs(report->per_token ? "|---|---:|---:" : "|---|---:|---:|---:", f);
    fputs("|---:|---:|---:|---:|---:|---:|---:|\n", f);
}

/* A figure, or "-" where it is not known. */
static void cell(FILE *file, double value, const char *format)
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
    char text[48];
    for (int axis = 0; axis < AXES; axis++) {
        if (report->varies[axis]) fprintf(f, "| %s ", axis_value(r->subject, axis, text));
    }
    fprintf(f, "| %s |", part_names[r->part]);
    if (report->per_token) {
        cell(f, 1e9 * t->median / tokens, "%.4g");
        cell(f, 1e9 * r->floor / tokens, "%.4g");
    } else {
        fprintf(f, " %.4g | %.4g | %.4g..%.4g |", 1e6 * t->median, 1e6 * t->p95, 1e6 * t->min, 1e6 * t->max);
    }
    cell(f, 1e-12 * r->flops, "%.3g");
    cell(f, 1e-9 * r->bytes, "%.3g");
    cell(f, r->of_peak, "%.2f");
    cell(f, r->of_floor, "%.2f");
    ratio_cell(f, &r->times->ratio[DENSE]);
    ratio_cell(f, &r->times->ratio[LOOP]);
    fprintf(f, " %.0e |\n", r->error);
}

/* ---- all of it ---- */

static void begin_json(const report_t *report, const char *facts[12][2], int count)
{
    FILE *f = report->json;
    fputs("{\"format\": 2, \"program\": \"cumoe-perf\"", f);
    for (int i = 0; i < count; i++) {
        fprintf(f, ",\n \"%s\": ", facts[i][0]);
        json_string(f, facts[i][1]);
    }
    fprintf(f, ",\n \"threads\": %d,\n \"peaks\": {", report->device->threads);
    for (int type = 0; type < TYPES; type++) {
        if (report->peaks.flops[type] > 0)
            fprintf(f, "\"%s\": %.6g, ", type_words[type], 1e-12 * report->peaks.flops[type]);
    }
    fprintf(f, "\"gbps\": %.6g},\n \"rows\": [", 1e-9 * report->peaks.bytes);
}

void report_begin(report_t *report, const subject_t *first, int argc, char **argv)
{
    const char *facts[12][2];
    const int count = list_facts(report, argc, argv, facts);
    if (report->json) begin_json(report, facts, count);
    for (int i = 0; report->csv && i < count; i++) fprintf(report->csv, "# %s: %s\n", facts[i][0], facts[i][1]);
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
        fprintf(report->table, "%scopies %.3g GB/s, read + written\n\n", comma, 1e-9 * report->peaks.bytes);
    print_constants(report, first);
    print_heading(report);
    fflush(report->table);
}

void report_rows(report_t *report, const bench_t *bench, double error, times_t times[CONTESTANTS][NUM_PARTS])
{
    for (int part = 0; part < NUM_PARTS; part++) {
        for (int contestant = 0; contestant < CONTESTANTS; contestant++) {
            field_t fields[MOST_FIELDS];
            if (times[contestant][part].samples == 0) continue;
            row_t row = row_of(report, bench, contestant, part, &times[contestant][part]);
            row.error = error;
            const int count = list_fields(&row, fields);
            if (report->json) json_row(report->json, fields, count, report->rows == 0);
            if (report->csv) csv_row(report->csv, fields, count, report->rows == 0);
            if (report->table && contestant == CUMOE) table_row(report, &row);
            report->rows++;
        }
    }
    FILE *const files[] = {report->table, report->csv, report->json};
    for (int i = 0; i < 3; i++) {
        if (files[i]) fflush(files[i]);
    }
}

void report_sentence(report_t *report, const subject_t *s, int part, const char *sentence)
{
    char about[300];
    const cumoe_config_t *c = &s->config;
    if (report->sentences == MOST_SENTENCES) return;
    snprintf(about, sizeof about, "%s, %s, T = %lld, E = %d, %s, %s gate, %s%s%s%s%s", s->shape,
             type_words[s->type], (long long)s->num_tokens, c->num_experts, activation_words[c->activation],
             gate_words[c->gate], skew_words[s->skew], s->cache == COLD ? ", cold" : "",
             s->launch == GRAPH ? ", graph" : "", part >= 0 ? ", " : "", part >= 0 ? part_names[part] : "");
    report->sentence[report->sentences][0] = strdup(about);
    report->sentence[report->sentences++][1] = strdup(sentence);
}

static bool close_file(FILE *file)
{
    if (!file) return true;
    const bool good = fflush(file) == 0 && !ferror(file);
    return (file == stdout || fclose(file) == 0) && good;
}

bool report_end(report_t *report)
{
    char clocks[200] = "";
    if (report->table && report->sentences > 0) fputs("\nNot measured:\n\n", report->table);
    if (report->json) fputs("],\n \"not_measured\": {", report->json);
    for (int i = 0; i < report->sentences; i++) {
        const char *about = report->sentence[i][0], *why = report->sentence[i][1];
        if (report->table) fprintf(report->table, "- %s: %s\n", about, why);
        if (report->csv) fprintf(report->csv, "# not measured: %s: %s\n", about, why);
        if (report->json) {
            fputs(i ? ",\n  " : "\n  ", report->json);
            json_string(report->json, about);
            fputs(": ", report->json);
            json_string(report->json, why);
        }
        free(report->sentence[i][0]);
        free(report->sentence[i][1]);
    }
    if (report->json) {
        fputs("},\n \"clocks\": ", report->json);
        json_string(report->json, report->device->cpu
                                      ? ask("sed -n 's/^cpu MHz.*: \\(.*\\)/\\1 MHz/p' /proc/cpuinfo 2>/dev/null",
                                            clocks, sizeof clocks)
                                      : ask_gpu(report->device, "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem",
                                                clocks, sizeof clocks));
        fputs("}\n", report->json);
    }
    return close_file(report->table) & close_file(report->csv) & close_file(report->json);
}
