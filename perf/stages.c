/* cumoe-perf-stages: the time of every stage and of the whole layer, beside what a device could do at best. */
#include "stages.h"
#include "command_line.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static const char *const backend_words[] = {"auto", "cpu", "cuda", NULL};
static const char *const gates[] = {"noisy-topk", "softmax",      "external",     "hierarchical",
                                    "balanced",   "softmax-topk", "sigmoid-topk", NULL};
enum { MOST_NAMES = 20, MOST_TOKENS = 20 };
enum { NO_DEVICE = 77 };

/* How products are computed: a type, for f32 in one of two ways. */
static const struct dtype {
    const char *name;
    cumoe_dtype_t dtype;
    cumoe_compute_t compute;
} dtypes[] = {{"bf16", CUMOE_BF16, CUMOE_COMPUTE_EXACT},
              {"f16", CUMOE_F16, CUMOE_COMPUTE_EXACT},
              {"f32", CUMOE_F32, CUMOE_COMPUTE_EXACT},
              {"tf32", CUMOE_F32, CUMOE_COMPUTE_TF32}};
enum { DTYPES = sizeof dtypes / sizeof *dtypes };

typedef struct options {
    int backend, device, gate, skew, seconds, list;
    const char *shapes, *sizes, *tokens, *dtypes, *tflops, *gbs, *json;
    model_t own; /* of --sizes */
    int shape[MOST_NAMES], num_shapes;
    int token[MOST_TOKENS], num_tokens;
    int dtype[DTYPES], num_dtypes;
    rates_t rates;
} options_t;

void stages_check(cumoe_status_t status)
{
    if (status == CUMOE_SUCCESS) return;
    fprintf(stderr, "cumoe-perf-stages: %s: %s\n", cumoe_status_name(status), cumoe_last_error());
    exit(EXIT_FAILURE);
}

/* ---- options ---- */

/* The next word of a list; NULL at its end. */
static const char *next_word(const char **list, char word[64])
{
    if (!**list) return NULL;
    size_t length = strcspn(*list, ",");
    const char *rest = *list + length;
    if (length > 63) length = 63;
    memcpy(word, *list, length);
    word[length] = '\0';
    *list = *rest ? rest + 1 : rest;
    return word;
}

static void read_shapes(const program_t *program, options_t *o)
{
    char word[64];
    for (const char *list = o->shapes; o->num_shapes < MOST_NAMES && next_word(&list, word);) {
        int shape = 0;
        while (shape < MODELS && strcmp(word, models[shape].name) != 0) shape++;
        if (shape == MODELS) command_line_fail(program, "--shape", word, "no such shape; --list has their names");
        o->shape[o->num_shapes++] = shape;
    }
}

static void read_sizes(const program_t *program, options_t *o)
{
    model_t *m = &o->own;
    char rest;
    if (sscanf(o->sizes, "%d,%d,%d,%d%c", &m->hidden, &m->intermediate, &m->experts, &m->top_k, &rest) != 4)
        command_line_fail(program, "--sizes", o->sizes, "must be four whole numbers: H,I,E,K");
    m->name = o->sizes;
    o->num_shapes = 1;
}

static void read_tokens(const program_t *program, options_t *o)
{
    char word[64], *end;
    for (const char *list = o->tokens; o->num_tokens < MOST_TOKENS && next_word(&list, word);) {
        const long value = strtol(word, &end, 10);
        if (*word == '\0' || *end || value < 1 || value > 1 << 24)
            command_line_fail(program, "--tokens", word, "must be whole numbers, 1..16777216, and commas");
        o->token[o->num_tokens++] = (int)value;
    }
}

static int find_dtype(const char *word)
{
    int dtype = 0;
    while (dtype < DTYPES && strcmp(word, dtypes[dtype].name) != 0) dtype++;
    return dtype;
}

static void read_dtypes(const program_t *program, options_t *o)
{
    char word[64];
    for (const char *list = o->dtypes; o->num_dtypes < DTYPES && next_word(&list, word);) {
        const int dtype = find_dtype(word);
        if (dtype == DTYPES)
            command_line_fail(program, "--dtype", word, "must be bf16, f16, f32, tf32, and commas");
        o->dtype[o->num_dtypes++] = dtype;
    }
}

static double read_rate(const program_t *program, const char *option, const char *text)
{
    char *end;
    const double rate = strtod(text, &end);
    if (!*text || *end || !(rate > 0 && rate < 1e9)) command_line_fail(program, option, text, "must be above 0");
    return rate;
}

/* "790", or "bf16=790,f32=50". */
static void read_tflops(const program_t *program, options_t *o)
{
    double *rates[DTYPES] = {&o->rates.bf16, &o->rates.f16, &o->rates.f32, &o->rates.tf32};
    char word[64];
    for (const char *list = o->tflops; list && next_word(&list, word);) {
        char *rate = strchr(word, '=');
        if (rate) {
            *rate++ = '\0';
            const int dtype = find_dtype(word);
            if (dtype == DTYPES) command_line_fail(program, "--tflops", word, "must be bf16, f16, f32 or tf32");
            *rates[dtype] = 1e12 * read_rate(program, "--tflops", rate);
        } else {
            const double all = 1e12 * read_rate(program, "--tflops", word);
            for (int i = 0; i < DTYPES; i++) *rates[i] = all;
        }
    }
}

static options_t read_options(int argc, char **argv)
{
    options_t o = {.seconds = 60,
                   .shapes = "paper-32",
                   .tokens = "4096",
                   .dtypes = "f32",
                   .own = {.activation = CUMOE_ACTIVATION_SWIGLU}};
    const option_t table[] = {
        {"backend", "where it runs; auto: a GPU if there is one", .choice = &o.backend, .words = backend_words},
        {"device", "which of the GPUs", .number = &o.device, .min = 0, .max = 1023},
        {"shape", "NAME[,NAME...]: layers by name (default paper-32)", .string = &o.shapes},
        {"sizes", "H,I,E,K: a layer of other sizes, with SwiGLU", .string = &o.sizes},
        {"bias", "with --sizes: experts have biases", .flag = &o.own.bias},
        {"tokens", "T[,T...]: tokens in a call (default 4096)", .string = &o.tokens},
        {"dtype", "bf16, f16, f32, tf32, and commas (default f32)", .string = &o.dtypes},
        {"gate", "the gate", .choice = &o.gate, .words = gates},
        {"skew", "which experts are chosen: all alike, the e-th e times less often, or the same K",
         .choice = &o.skew, .words = skew_words},
        {"seconds",
         "time for all rounds together, warming up comes on top; 0: one call of each part, to check results",
         .number = &o.seconds, .min = 0, .max = 86400},
        {"tflops", "X, or bf16=X,f32=X: rate of dense products on this device, measured in the same run",
         .string = &o.tflops},
        {"gbs", "Y: GB/s of copies, read + written; otherwise measured here", .string = &o.gbs},
        {"json", "FILE: write all figures to it as well", .string = &o.json},
        {"list", "the shapes, and the parts that are timed", .flag = &o.list},
    };
    const program_t program = {
        "cumoe-perf-stages",
        "the time of every stage and of the whole layer, beside what the device could do at best\n\n"
        "Prints a Markdown table for each shape, type and T; perf/README.md says what its columns mean. Exits with "
        "1\n"
        "if a result is not finite or the stages have not the bits of the layer, with 77 if there is no such "
        "device.",
        table, sizeof table / sizeof *table};
    command_line_read(&program, argc, argv);
    if (o.sizes) {
        read_sizes(&program, &o);
    } else {
        read_shapes(&program, &o);
    }
    read_tokens(&program, &o);
    read_dtypes(&program, &o);
    read_tflops(&program, &o);
    if (o.gbs) o.rates.bytes = 1e9 * read_rate(&program, "--gbs", o.gbs);
    return o;
}

static void list_names(void)
{
    puts("| shape | H | I | E | K | activation | biases |\n|---|---:|---:|---:|---:|---|---|");
    for (int i = 0; i < MODELS; i++) {
        const model_t *m = &models[i];
        printf("| %s | %d | %d | %d | %d | %s | %s |\n", m->name, m->hidden, m->intermediate, m->experts, m->top_k,
               activation_words[m->activation], m->bias ? "yes" : "no");
    }
    puts("\nParts, with the gate of --gate:");
    for (int part = 0; part < NUM_PARTS; part++) printf("  %s\n", part_names[part]);
}

/* ---- measuring ---- */

/* Two levels: the divisor of E nearest to its root from below as G, and two groups if K allows. */
static void choose_groups(cumoe_config_t *c)
{
    for (int32_t groups = 1; groups * groups <= c->num_experts; groups++)
        if (c->num_experts % groups == 0) c->num_groups = groups;
    const int32_t experts = c->num_experts / c->num_groups;
    for (int32_t chosen = 1; chosen <= c->num_groups && chosen <= 2; chosen++)
        if (c->top_k % chosen == 0 && c->top_k / chosen <= experts) c->top_k_groups = chosen;
}

static subject_t subject_of(const options_t *o, int shape, int dtype, int tokens)
{
    subject_t s = {.model = o->sizes ? &o->own : &models[shape],
                   .dtype = dtypes[dtype].name,
                   .num_tokens = tokens,
                   .skew = o->skew};
    stages_check(cumoe_config_init(&s.config));
    s.config.hidden_size = s.model->hidden;
    s.config.intermediate_size = s.model->intermediate;
    s.config.num_experts = s.model->experts;
    s.config.gate = (cumoe_gate_kind_t)o->gate;
    s.config.top_k = s.config.gate == CUMOE_GATE_SOFTMAX ? s.model->experts : s.model->top_k;
    if (s.config.gate == CUMOE_GATE_HIERARCHICAL) choose_groups(&s.config);
    s.config.dtype = dtypes[dtype].dtype;
    s.config.compute = dtypes[dtype].compute;
    s.config.activation = (cumoe_activation_t)s.model->activation;
    s.config.expert_bias = s.model->bias;
    return s;
}

/* False if a result is wrong. */
static bool measure(report_t *report, cumoe_handle_t *handle, cumoe_stream_t stream, const subject_t *s,
                    double seconds)
{
    char why[600] = "";
    bench_t *bench = bench_create(handle, stream, s, why, sizeof why);
    if (!bench) {
        report_sentence(report, s, why);
        return true;
    }
    bool good = bench_check(bench, why, sizeof why) && work_agrees(s);
    if (!good) report_sentence(report, s, *why ? why : "WRONG: FLOP or bytes of the stages do not add up");
    times_t times[NUM_PARTS];
    clock_parts(bench, seconds, times);
    report_rows(report, s, bench, times);
    for (int part = 0; part < NUM_PARTS; part++) {
        if (!bench_left_out(bench, part)) continue;
        snprintf(why, sizeof why, "%s: %s", part_names[part], bench_left_out(bench, part));
        report_sentence(report, s, why);
    }
    bench_destroy(bench);
    return good;
}

static bool measure_all(const options_t *o, report_t *report, cumoe_handle_t *handle, cumoe_stream_t stream)
{
    const int count = o->num_shapes * o->num_dtypes * o->num_tokens;
    bool good = true;
    for (int i = 0; i < count; i++) {
        const int shape = o->shape[i / (o->num_tokens * o->num_dtypes)];
        const int dtype = o->dtype[i / o->num_tokens % o->num_dtypes], tokens = o->token[i % o->num_tokens];
        const subject_t subject = subject_of(o, shape, dtype, tokens);
        good &= measure(report, handle, stream, &subject, (double)o->seconds / count);
    }
    return good;
}

int main(int argc, char **argv)
{
    const options_t o = read_options(argc, argv);
    if (o.list) {
        list_names();
        return fflush(stdout) == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
    }
    report_t report = {.rates = o.rates, .seconds = o.seconds};
    if (o.json && !(report.json = fopen(o.json, "w"))) {
        fprintf(stderr, "cumoe-perf-stages: --json %s: %s\n", o.json, strerror(errno));
        return 2;
    }
    cumoe_handle_t *handle;
    cumoe_stream_t stream;
    const cumoe_status_t status = cumoe_handle_create(&handle, (cumoe_backend_t)o.backend, o.device);
    if (status == CUMOE_UNSUPPORTED_DEVICE) {
        fprintf(stderr, "cumoe-perf-stages: %s\n", cumoe_last_error());
        return NO_DEVICE;
    }
    stages_check(status);
    stages_check(cumoe_stream_create(handle, &stream));
    report.handle = handle;
    if (!o.gbs) {
        report.rates.bytes = clock_copy(handle, stream);
        report.rates.bytes_measured = true;
    }
    report_begin(&report, argc, argv);
    const bool good = measure_all(&o, &report, handle, stream);
    if (!report_end(&report)) {
        fprintf(stderr, "cumoe-perf-stages: --json %s: could not be written\n", o.json);
        return EXIT_FAILURE;
    }
    cumoe_stream_destroy(handle, stream);
    cumoe_handle_destroy(handle);
    return good && fflush(stdout) == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
