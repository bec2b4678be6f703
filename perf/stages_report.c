/* Times as Markdown on stdout and as JSON in a file. */
#include "stages.h"

#include <math.h>
#include <string.h>

/* What a part could take at best, and what it reached. 0 = not known. */
typedef struct figures {
    work_t work;
    double dense; /* FLOP a second of a dense product of the same type */
    double floor; /* seconds */
    double flops, bytes;
    double share, of_dense;
} figures_t;

static double dense_rate(const rates_t *r, const subject_t *s, bool gate)
{
    if (gate && r->f32 > 0) return r->f32; /* the gate's arithmetic is F32 whatever the tokens are */
    if (s->config.compute == CUMOE_COMPUTE_TF32) return r->tf32;
    return s->config.dtype == CUMOE_F32 ? r->f32 : s->config.dtype == CUMOE_BF16 ? r->bf16 : r->f16;
}

static figures_t figures_of(const report_t *report, const subject_t *s, const counts_t *counts, int part,
                            double time)
{
    const rates_t *r = &report->rates;
    figures_t f = {.work = work_of(s, counts, part)};
    const double gate = f.work.gate_flop, experts = f.work.flop - gate;
    const double gate_rate = dense_rate(r, s, true), rate = dense_rate(r, s, false);
    const double products = (gate > 0 ? gate / gate_rate : 0) + (experts > 0 ? experts / rate : 0);
    const double memory = r->bytes > 0 ? f.work.bytes / r->bytes : 0;
    f.dense = experts > 0 ? rate : gate_rate;
    f.floor = r->bytes > 0 && isfinite(products) ? fmax(products, memory) : 0;
    f.flops = f.work.flop / time;
    f.bytes = f.work.bytes / time;
    f.share = f.floor / time;
    f.of_dense = f.dense > 0 ? f.flops / f.dense : 0;
    return f;
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

void report_begin(report_t *report, int argc, char **argv)
{
    const rates_t *r = &report->rates;
    const char *description = cumoe_handle_description(report->handle);
    printf("%s; cumoe %d.%d.%d\n\n", description, CUMOE_VERSION_MAJOR, CUMOE_VERSION_MINOR, CUMOE_VERSION_PATCH);
    printf("Bytes: %.4g GB/s, %s.", 1e-9 * r->bytes,
           r->bytes_measured ? "the best of six rounds of copies on the device, read + written" : "as given");
    const struct {
        const char *name;
        double rate;
    } dense[] = {{"bf16", r->bf16}, {"f16", r->f16}, {"f32", r->f32}, {"tf32", r->tf32}};
    printf(" Dense products:");
    for (int i = 0; i < 4; i++) {
        if (dense[i].rate > 0) printf(" %s %.4g TFLOP/s", dense[i].name, 1e-12 * dense[i].rate);
    }
    puts(r->bf16 + r->f16 + r->f32 + r->tf32 > 0 ? ", as given." : " not known (--tflops).");
    if (!report->json) return;
    fprintf(report->json, "{\"format\": 1, \"program\": \"cumoe-perf-stages\", \"version\": \"%d.%d.%d\",\n",
            CUMOE_VERSION_MAJOR, CUMOE_VERSION_MINOR, CUMOE_VERSION_PATCH);
    fprintf(report->json, " \"backend\": \"%s\", \"device\": ",
            cumoe_handle_backend(report->handle) == CUMOE_BACKEND_CPU ? "cpu" : "cuda");
    json_string(report->json, description);
    fprintf(report->json, ",\n \"command\": [");
    for (int i = 0; i < argc; i++) {
        if (i) fputs(", ", report->json);
        json_string(report->json, argv[i]);
    }
    fprintf(report->json, "],\n \"seconds\": %g, \"gbs\": %.6g, \"gbs_measured\": %s, \"dense_tflops\": {",
            report->seconds, 1e-9 * r->bytes, r->bytes_measured ? "true" : "false");
    for (int i = 0; i < 4; i++)
        fprintf(report->json, "%s\"%s\": %.6g", i ? ", " : "", dense[i].name, 1e-12 * dense[i].rate);
    fprintf(report->json, "},\n \"subjects\": [");
}

/* A figure, or "-" where it is not known. */
static void cell(double value, const char *format)
{
    fputs(" ", stdout);
    if (value > 0) {
        printf(format, value);
    } else {
        fputs("-", stdout);
    }
    fputs(" |", stdout);
}

static void table_row(const times_t *t, const figures_t *f, int part)
{
    printf("| %s | %.4g | %.4g..%.4g |", part_names[part], 1e6 * t->median, 1e6 * t->min, 1e6 * t->max);
    cell(1e-9 * f->work.flop, "%.4g");
    cell(1e-6 * f->work.bytes, "%.4g");
    cell(1e-12 * f->flops, "%.3g");
    cell(1e-9 * f->bytes, "%.3g");
    cell(1e6 * f->floor, "%.4g");
    cell(f->share, "%.2f");
    cell(f->of_dense, "%.2f");
    puts("");
}

static void json_subject(const report_t *report, const subject_t *s, const counts_t *counts)
{
    const cumoe_config_t *c = &s->config;
    FILE *file = report->json;
    fprintf(
        file, "%s\n  {\"shape\": \"%s\", \"hidden\": %d, \"intermediate\": %d, \"experts\": %d, \"top_k\": %d,\n",
        report->any_row ? "," : "", s->model->name, c->hidden_size, c->intermediate_size, c->num_experts, c->top_k);
    fprintf(file,
            "   \"activation\": \"%s\", \"bias\": %d, \"gate\": \"%s\", \"skew\": \"%s\", \"dtype\": \"%s\",\n",
            activation_words[c->activation], c->expert_bias, gate_words[c->gate], skew_words[s->skew], s->dtype);
    fprintf(file, "   \"tokens\": %lld, \"rows\": %lld, \"experts_with_rows\": %lld, \"most_rows\": %lld,\n",
            (long long)s->num_tokens, (long long)counts->rows, (long long)counts->experts, (long long)counts->most);
    fprintf(file, "   \"parts\": [");
}

/* us: median, smallest, largest. */
static void json_part(FILE *file, const times_t *t, const figures_t *f, int part, bool first)
{
    fprintf(file, "%s\n    {\"part\": \"%s\", \"us\": [%.5g, %.5g, %.5g], \"samples\": %d, \"calls\": %d,",
            first ? "" : ",", part_names[part], 1e6 * t->median, 1e6 * t->min, 1e6 * t->max, t->samples, t->calls);
    fprintf(file, " \"flop\": %.15g, \"bytes\": %.15g, \"tflops\": %.4g, \"gbs\": %.4g,", f->work.flop,
            f->work.bytes, 1e-12 * f->flops, 1e-9 * f->bytes);
    fprintf(file, " \"floor_us\": %.5g, \"share\": %.4g, \"of_dense\": %.4g}", 1e6 * f->floor, f->share,
            f->of_dense);
}

void report_rows(report_t *report, const subject_t *s, const bench_t *bench, const times_t times[NUM_PARTS])
{
    const cumoe_config_t *c = &s->config;
    const counts_t counts = bench_counts(bench);
    printf("\n%s, %s, T = %lld: H = %d, I = %d, E = %d, K = %d, %s%s, %s gate, %s; %lld experts have rows, the "
           "busiest "
           "%lld of %lld\n\n",
           s->model->name, s->dtype, (long long)s->num_tokens, c->hidden_size, c->intermediate_size, c->num_experts,
           c->top_k, activation_words[c->activation], c->expert_bias ? ", biases" : "", gate_words[c->gate],
           skew_words[s->skew], (long long)counts.experts, (long long)counts.most, (long long)counts.rows);
    puts("| part | us | smallest..largest | GFLOP | MB | TFLOP/s | GB/s | floor us | floor / time | of dense |\n"
         "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|");
    if (report->json) json_subject(report, s, &counts);
    bool first = true;
    for (int part = 0; part < NUM_PARTS; part++) {
        const times_t *t = &times[part];
        if (t->samples == 0) continue;
        const figures_t f = figures_of(report, s, &counts, part, t->median);
        table_row(t, &f, part);
        if (report->json) json_part(report->json, t, &f, part, first);
        first = false;
    }
    if (report->json) fputs("]}", report->json);
    report->any_row = true;
    fflush(stdout);
    if (report->json) fflush(report->json);
}

void report_sentence(report_t *report, const subject_t *s, const char *sentence)
{
    char text[700];
    snprintf(text, sizeof text, "%s, %s, T = %lld: %s", s->model->name, s->dtype, (long long)s->num_tokens,
             sentence);
    printf("\n%s\n", text);
    fflush(stdout);
    const size_t used = strlen(report->sentences);
    if (used + 2 * strlen(text) + 8 > sizeof report->sentences) return;
    char *end = report->sentences + used;
    end += sprintf(end, "%s\n  \"", report->any_sentence ? "," : "");
    for (const char *c = text; *c; c++) {
        if (*c == '"' || *c == '\\') *end++ = '\\';
        *end++ = (unsigned char)*c < ' ' ? ' ' : *c;
    }
    strcpy(end, "\"");
    report->any_sentence = true;
}

bool report_end(report_t *report)
{
    if (!report->json) return true;
    fprintf(report->json, "],\n \"sentences\": [%s]}\n", report->sentences);
    const bool failed = ferror(report->json);
    return fclose(report->json) == 0 && !failed;
}
