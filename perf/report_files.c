/* Every figure as CSV and JSON, with what a reader needs to judge it. */
#include "report.h"

#include <math.h>
#include <string.h>
#include <time.h>

/* ---- CSV and JSON: the same fields ---- */

static double known(double value)
{
    return value > 0 ? value : NAN;
}

int files_subject(const subject_t *s, field_t fields[MOST_FIELDS])
{
    const cumoe_config_t *c = &s->config;
    const field_t list[] = {
        {"shape", s->shape, 0},
        {"T", NULL, (double)s->num_tokens},
        {"H", NULL, c->hidden_size},
        {"I", NULL, c->intermediate_size},
        {"E", NULL, c->num_experts},
        {"K", NULL, c->top_k},
        {"G", NULL, c->num_groups},
        {"dtype", type_words[s->type], 0},
        {"activation", activation_words[c->activation], 0},
        {"bias", NULL, c->expert_bias},
        {"gate", gate_words[c->gate], 0},
        {"skew", skew_words[s->skew], 0},
        {"cache", cache_words[s->cache], 0},
        {"launch", launch_words[s->launch], 0},
    };
    memcpy(fields, list, sizeof list);
    return (int)(sizeof list / sizeof *list);
}

static int list_fields(const row_t *r, field_t fields[MOST_FIELDS])
{
    const times_t *t = r->times;
    const spread_t *dense = &t->ratio[DENSE], *loop = &t->ratio[LOOP];
    const int count = files_subject(r->subject, fields);
    const field_t list[] = {
        {"rows", NULL, (double)r->counts.rows},
        {"experts_with_rows", NULL, (double)r->counts.experts},
        {"most_rows", NULL, (double)r->counts.most},
        {"contestant", contestant_names[r->contestant], 0},
        {"part", part_names[r->part], 0},
        {"samples", NULL, t->samples},
        {"calls", NULL, t->calls},
        {"ms", NULL, 1e3 * t->seconds.median},
        {"ms_p95", NULL, 1e3 * t->seconds.p95},
        {"ms_min", NULL, 1e3 * t->seconds.min},
        {"ms_max", NULL, 1e3 * t->seconds.max},
        {"flop", NULL, r->work.flop},
        {"bytes", NULL, known(r->work.bytes)},
        {"tflops", NULL, 1e-12 * r->flops},
        {"gbps", NULL, known(1e-9 * r->bytes)},
        {"floor_ms", NULL, known(1e3 * r->floor)},
        {"of_floor", NULL, known(r->of_floor)},
        {"of_peak", NULL, known(r->of_peak)},
        {"of_dense", NULL, known(dense->median)},
        {"of_dense_min", NULL, known(dense->min)},
        {"of_dense_max", NULL, known(dense->max)},
        {"of_loop", NULL, known(loop->median)},
        {"of_loop_min", NULL, known(loop->min)},
        {"of_loop_max", NULL, known(loop->max)},
        {"error", NULL, r->error},
    };
    memcpy(fields + count, list, sizeof list);
    return count + (int)(sizeof list / sizeof *list);
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

/* Counts exactly, what is measured as far as it means something. */
static void print_number(FILE *file, double number)
{
    fprintf(file, number == floor(number) ? "%.15g" : "%.6g", number);
}

static void json_row(FILE *file, const field_t *fields, int count, bool first)
{
    fputs(first ? "\n  {" : ",\n  {", file);
    for (int i = 0; i < count; i++) {
        if (!fields[i].text && !isfinite(fields[i].number)) continue;
        fprintf(file, "%s\"%s\": ", i ? ", " : "", fields[i].key);
        if (fields[i].text) {
            json_string(file, fields[i].text);
        } else {
            print_number(file, fields[i].number);
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
        } else if (isfinite(fields[i].number)) {
            print_number(file, fields[i].number);
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

enum { MOST_FACTS = 12 };

/* What a reader needs to judge the figures, as key and value. */
static int list_facts(const report_t *report, int argc, char **argv, const char *facts[MOST_FACTS][2])
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

/* ---- all of it ---- */

static void begin_json(const report_t *report, const char *facts[MOST_FACTS][2], int count)
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

void files_begin(const report_t *report, int argc, char **argv)
{
    const char *facts[MOST_FACTS][2];
    const int count = list_facts(report, argc, argv, facts);
    if (report->json) begin_json(report, facts, count);
    for (int i = 0; report->csv && i < count; i++) fprintf(report->csv, "# %s: %s\n", facts[i][0], facts[i][1]);
}

void files_fields(const report_t *report, const field_t *fields, int count)
{
    if (report->json) json_row(report->json, fields, count, report->rows == 0);
    if (report->csv) csv_row(report->csv, fields, count, report->rows == 0);
}

void files_row(const report_t *report, const row_t *row)
{
    field_t fields[MOST_FIELDS];
    files_fields(report, fields, list_fields(row, fields));
}

void files_sentence(const report_t *report, int number)
{
    const char *about = report->sentence[number][0], *why = report->sentence[number][1];
    if (report->csv) fprintf(report->csv, "# not measured: %s: %s\n", about, why);
    if (!report->json) return;
    fputs(number ? ",\n  " : "],\n \"not_measured\": {\n  ", report->json);
    json_string(report->json, about);
    fputs(": ", report->json);
    json_string(report->json, why);
}

static bool close_file(FILE *file)
{
    if (!file) return true;
    const bool good = fflush(file) == 0 && !ferror(file);
    return (file == stdout || fclose(file) == 0) && good;
}

bool files_end(const report_t *report)
{
    char clocks[200];
    const device_t *device = report->device;
    if (report->json) {
        fputs(report->sentences ? "},\n \"clocks\": " : "],\n \"not_measured\": {},\n \"clocks\": ", report->json);
        json_string(
            report->json,
            device->cpu
                ? ask("sed -n 's/^cpu MHz.*: \\(.*\\)/\\1 MHz/p' /proc/cpuinfo 2>/dev/null", clocks, sizeof clocks)
                : ask_gpu(device, "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem", clocks, sizeof clocks));
        fputs("}\n", report->json);
    }
    return close_file(report->csv) & close_file(report->json);
}
