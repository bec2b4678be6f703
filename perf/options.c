#include "options.h"
#include "command_line.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

static const char *const backend_words[] = {"auto", "cpu", "cuda", NULL};
static const char *const pass_words[] = {"both", "forward", "backward", NULL};
const char *const skew_words[] = {"uniform", "zipf", "one", NULL};
const char *const cache_words[] = {"warm", "cold", NULL};
const char *const launch_words[] = {"call", "graph", NULL};
const char *const type_words[] = {"bf16", "f16", "f32", "tf32", NULL};

enum { OF_LAYER = 1 << INFERENCE | 1 << FORWARD | 1 << BACKWARD | 1 << BOTH };

static const struct command {
    const char *name;
    unsigned parts;
    const char *about;
} commands[] = {
    {"layer", OF_LAYER, "the whole layer"},
    {"stages", (1 << NUM_PARTS) - 1, "every stage, the layer and the optimizer"},
    {"gate", 1 << CUMOE_STAGE_GATE | 1 << CUMOE_STAGE_GATE_BACKWARD, "this stage, forward and backward"},
    {"permute", 1 << CUMOE_STAGE_PERMUTE | 1 << CUMOE_STAGE_PERMUTE_BACKWARD, "likewise"},
    {"up", 1 << CUMOE_STAGE_UP | 1 << CUMOE_STAGE_UP_BACKWARD, "likewise"},
    {"down", 1 << CUMOE_STAGE_DOWN | 1 << CUMOE_STAGE_DOWN_BACKWARD, "likewise"},
    {"combine", 1 << CUMOE_STAGE_COMBINE, "this stage; its backward is in that of down"},
    {"optimizer", 1 << OPTIMIZER, "a step of Adam"},
    {"exchange", 1 << FORWARD | 1 << BACKWARD | 1 << BOTH,
     "the layer on ranks: the rows between them, the experts alone, and the rest"},
    {"capacity", 1 << FORWARD, "time per token against E, from 4 to 131,072 experts, at constant operations"},
};
enum { COMMANDS = sizeof commands / sizeof *commands };

static void list_names(void)
{
    models_list();
    puts("\nCommands, and the parts that they time:\n");
    for (int i = 0; i < COMMANDS; i++) {
        printf("- `%s`: %s:", commands[i].name, commands[i].about);
        const char *comma = "";
        for (int part = 0; part < NUM_PARTS; part++) {
            if (!(commands[i].parts >> part & 1)) continue;
            printf("%s %s", comma, part_names[part]);
            comma = ",";
        }
        puts("");
    }
}

/* The first word is the command. */
static int read_command(const program_t *program, int argc, char **argv)
{
    const char *names[COMMANDS + 1] = {NULL};
    for (int i = 0; i < COMMANDS; i++) names[i] = commands[i].name;
    if (argc < 2) command_line_fail(program, "COMMAND", NULL, "is missing");
    if (argv[1][0] == '-') return -1; /* --help, --list */
    return command_line_find(program, "COMMAND", argv[1], names);
}

static void choose_parts(options_t *o, const struct command *command)
{
    o->parts = command->parts;
    o->exchange = strcmp(command->name, "exchange") == 0;
    o->capacity = strcmp(command->name, "capacity") == 0;
    if (!o->capacity) return;
    o->axis[AXIS_EXPERTS].count = 0;
    for (int experts = 4; experts < CUMOE_MAX_EXPERTS; experts *= 4)
        o->axis[AXIS_EXPERTS].value[o->axis[AXIS_EXPERTS].count++] = experts;
    o->axis[AXIS_EXPERTS].value[o->axis[AXIS_EXPERTS].count++] = CUMOE_MAX_EXPERTS;
}

/* And what --pass and the activations leave of it. */
static void choose_pass(const program_t *program, options_t *o)
{
    if (o->pass == PASS_FORWARD) o->parts &= ~(unsigned)OF_BACKWARD;
    if (o->pass == PASS_BACKWARD) o->parts &= OF_BACKWARD & ~(1U << BOTH);
    for (int i = 0; i < o->axis[AXIS_ACTIVATION].count; i++) {
        if (o->axis[AXIS_ACTIVATION].value[i] == CUMOE_ACTIVATION_IDENTITY)
            command_line_fail(program, "--activation", "identity", "experts of one matrix are not timed here");
    }
    if (!o->parts) command_line_fail(program, "--pass", pass_words[o->pass], "leaves nothing of this command");
}

/* What is for exchange alone, and what it has not. */
static void choose_ranks(const program_t *program, options_t *o, const char *link)
{
    axis_t *ranks = &o->axis[AXIS_RANKS];
    if (!o->exchange) {
        const char *needless = o->ranks                           ? "--ranks"
                               : link                             ? "--link"
                               : o->axis[AXIS_CAPACITY].count > 0 ? "--exchange-capacity"
                               : o->axis[AXIS_CHUNKS].count > 0   ? "--exchange-chunks"
                                                                  : NULL;
        if (needless) command_line_fail(program, needless, NULL, "is for the command exchange alone");
        return;
    }
    if (o->axis[AXIS_CAPACITY].count == 0) o->axis[AXIS_CAPACITY].count = 1; /* 0: exact */
    if (o->axis[AXIS_CHUNKS].count == 0) o->axis[AXIS_CHUNKS].count = 1;     /* 0: chosen */
    if (o->axis[AXIS_CACHE].value[0] != WARM || o->axis[AXIS_CACHE].count > 1)
        command_line_fail(program, "--cache", "cold", "caches are as the last call left them in exchange");
    if (o->axis[AXIS_LAUNCH].value[0] != CALL || o->axis[AXIS_LAUNCH].count > 1)
        command_line_fail(program, "--launch", "graph", "exchange is timed by calls");
    if (link) {
        char *end;
        o->link = 1e9 * strtod(link, &end);
        if (*end != '\0' || !(o->link > 0 && o->link < 1e15))
            command_line_fail(program, "--link", link, "must be GB/s, above 0");
    }
    if (o->ranks && (strcmp(o->ranks, "mpi") == 0 || strcmp(o->ranks, "nccl") == 0)) return;
    const char *text = o->ranks ? o->ranks : "1";
    for (char *end; ranks->count < MOST_VALUES; text = end + 1) {
        const long number = strtol(text, &end, 10);
        if (end == text || number < 1 || number > 1024 || (*end != '\0' && *end != ',')) break;
        ranks->value[ranks->count++] = (int)number;
        if (*end == '\0') return;
    }
    command_line_fail(program, "--ranks", o->ranks, "must be mpi, nccl, or numbers of threads, 1..1024");
}

void options_set_ranks(options_t *o, int32_t count)
{
    o->axis[AXIS_RANKS] = (axis_t){{count}, 1};
}

#define AXIS(name) .count = &o.axis[AXIS_##name].count, .most = MOST_VALUES

options_t options_read(int argc, char **argv)
{
    const char *shapes[MODELS + 1];
    models_names(shapes);
    const char *link = NULL;
    options_t o = {.seconds = 60,
                   .axis[AXIS_SHAPE] = {{1}, 1},
                   .axis[AXIS_TOKENS] = {{4096}, 1},
                   .axis[AXIS_TYPE] = {{TYPE_F32}, 1},
                   .axis[AXIS_SKEW] = {{UNIFORM}, 1},
                   .axis[AXIS_CACHE] = {{WARM}, 1},
                   .axis[AXIS_LAUNCH] = {{CALL}, 1},
                   .commit = "unknown"};
    const option_t table[] = {
        {"shape", "layers by name", .choice = o.axis[AXIS_SHAPE].value, .words = shapes, AXIS(SHAPE)},
        {"tokens", "T, tokens in a call", .number = o.axis[AXIS_TOKENS].value, .min = 1, .max = 1 << 24,
         AXIS(TOKENS)},
        {"experts", "E, in place of the shape's", .number = o.axis[AXIS_EXPERTS].value, .min = 1,
         .max = CUMOE_MAX_EXPERTS, AXIS(EXPERTS)},
        {"dtype", "of tokens and experts; tf32: f32 with products in tf32", .choice = o.axis[AXIS_TYPE].value,
         .words = type_words, AXIS(TYPE)},
        {"activation", "in place of the shape's", .choice = o.axis[AXIS_ACTIVATION].value,
         .words = activation_words, AXIS(ACTIVATION)},
        {"gate", "in place of the shape's", .choice = o.axis[AXIS_GATE].value, .words = gate_words, AXIS(GATE)},
        {"skew", "which experts are chosen: all alike, the e-th e times less often, the same K",
         .choice = o.axis[AXIS_SKEW].value, .words = skew_words, AXIS(SKEW)},
        {"cache", "as the last call left it, or filled with other things before every call",
         .choice = o.axis[AXIS_CACHE].value, .words = cache_words, AXIS(CACHE)},
        {"launch", "calls, or a CUDA graph of each", .choice = o.axis[AXIS_LAUNCH].value, .words = launch_words,
         AXIS(LAUNCH)},
        {"ranks",
         "exchange: numbers of ranks, which are threads; mpi: the processes of mpirun; nccl: GPUs, as the"
         " environment says",
         .string = &o.ranks},
        {"exchange-capacity", "exchange: rows from each rank to each, 0: as many as there are",
         .number = o.axis[AXIS_CAPACITY].value, .min = 0, .max = INT_MAX, AXIS(CAPACITY)},
        {"exchange-chunks", "exchange: parts of it that overlap with the products, 0: chosen",
         .number = o.axis[AXIS_CHUNKS].value, .min = 0, .max = CUMOE_MAX_CHUNKS, AXIS(CHUNKS)},
        {"link", "exchange: GB/s to compare with, in place of those of a large exchange", .string = &link},
        {"hidden", "H, in place of the shape's", .number = &o.hidden, .min = 1, .max = CUMOE_MAX_WIDTH},
        {"intermediate", "I, in place of the shape's", .number = &o.intermediate, .min = 1, .max = CUMOE_MAX_WIDTH},
        {"top-k", "K, in place of the shape's", .number = &o.top_k, .min = 1, .max = CUMOE_MAX_TOP_K},
        {"bias", "experts have biases", .flag = &o.bias},
        {"pass", "these parts alone; forward: no memory for gradients", .choice = &o.pass, .words = pass_words},
        {"backend", "where it runs; auto: a GPU if there is one", .choice = &o.backend, .words = backend_words},
        {"device", "which of the GPUs", .number = &o.ordinal, .min = 0, .max = 1023},
        {"threads", "of the CPU, for all contestants; 0: all there are", .number = &o.threads, .min = 0,
         .max = 1024},
        {"blas", "FILE: the library with dense products, in place of the system's", .string = &o.blas},
        {"seconds", "for all samples together; 0: one call of each, to check results", .number = &o.seconds,
         .min = 0, .max = 86400},
        {"json", "FILE: write all figures to it as well; - = to stdout, instead of the table", .string = &o.json},
        {"csv", "FILE: likewise", .string = &o.csv},
        {"commit", "TEXT: of the sources, to be written beside the figures", .string = &o.commit},
        {"list", "the shapes, the commands and what they time", .flag = &o.list},
    };
    const program_t program = {
        "cumoe-perf",
        "the time of the layer and of its stages, beside what the device could do at best\n\n"
        "cumoe-perf COMMAND [OPTION...]\n\n"
        "COMMAND is layer, stages, gate, permute, up, down, combine, optimizer, exchange or capacity; --list says\n"
        "what each times. Options with a list of values, a,b,c, are axes: everything is measured for each "
        "combination.\n"
        "Prints a Markdown table; perf/README.md says what its columns mean. Exits with 1 if a result is wrong or\n"
        "something could not be measured, with 77 if there is no such device.",
        table, sizeof table / sizeof *table};
    const int command = read_command(&program, argc, argv);
    choose_parts(&o, &commands[command < 0 ? 0 : command]);
    command_line_read(&program, command < 0 ? argc : argc - 1, command < 0 ? argv : argv + 1);
    if (o.list) {
        list_names();
        exit(fflush(stdout) == 0 ? EXIT_SUCCESS : EXIT_FAILURE);
    }
    if (command < 0) command_line_fail(&program, "COMMAND", NULL, "is missing");
    choose_pass(&program, &o);
    choose_ranks(&program, &o, link);
    return o;
}

/* ---- subjects ---- */

int options_num_subjects(const options_t *o)
{
    int count = 1;
    for (int i = 0; i < AXES; i++) count *= o->axis[i].count ? o->axis[i].count : 1;
    return count;
}

/* The value of the axis that changes fastest; number goes on to the next axis. */
static int take(const axis_t *axis, int *number, int otherwise)
{
    if (axis->count == 0) return otherwise;
    const int value = axis->value[*number % axis->count];
    *number /= axis->count;
    return value;
}

/* Two levels: the divisor of E nearest to its root from below as G, and two groups if K allows. */
static void choose_groups(cumoe_config_t *c)
{
    for (int32_t groups = 1; groups * groups <= c->num_experts; groups++)
        if (c->num_experts % groups == 0) c->num_groups = groups;
    const int32_t experts = c->num_experts / c->num_groups;
    for (int32_t chosen = 1; chosen <= c->num_groups && chosen <= 2; chosen++)
        if (c->top_k % chosen == 0 && c->top_k / chosen <= experts) c->top_k_groups = chosen;
}

static void demand(cumoe_status_t status)
{
    if (status == CUMOE_SUCCESS) return;
    fprintf(stderr, "cumoe-perf: %s\n", cumoe_last_error());
    exit(2);
}

/* Each has an expert, or a group of them, and numbers of rows are below 2^31. */
static void demand_ranks(const subject_t *s)
{
    const cumoe_config_t *c = &s->config;
    const int32_t most = c->num_groups > 0 ? c->num_groups : c->num_experts;
    const bool many = s->num_ranks > most;
    if (many)
        fprintf(stderr, "cumoe-perf: --ranks %d: there are no more than %d %s to share\n", s->num_ranks, most,
                c->num_groups > 0 ? "groups of experts" : "experts");
    const bool wide = s->num_ranks > 0 && c->exchange_capacity > INT32_MAX / s->num_ranks;
    if (wide)
        fprintf(stderr, "cumoe-perf: --exchange-capacity %lld: times %d ranks it must be below 2^31\n",
                (long long)c->exchange_capacity, s->num_ranks);
    const int32_t least = s->num_ranks > 0 && !many ? most / s->num_ranks * (c->num_experts / most) : INT32_MAX;
    if (c->exchange_chunks > least)
        fprintf(stderr, "cumoe-perf: --exchange-chunks %d: one of %d ranks has %d experts\n", c->exchange_chunks,
                s->num_ranks, least);
    if (many || wide || c->exchange_chunks > least) exit(2);
}

subject_t options_subject(const options_t *o, int number)
{
    subject_t s = {.parts = o->parts};
    cumoe_config_t *c = &s.config;
    const int chunks = take(&o->axis[AXIS_CHUNKS], &number, 0);
    const int64_t capacity = take(&o->axis[AXIS_CAPACITY], &number, 0);
    s.num_ranks = take(&o->axis[AXIS_RANKS], &number, 0);
    s.launch = take(&o->axis[AXIS_LAUNCH], &number, CALL);
    s.cache = take(&o->axis[AXIS_CACHE], &number, WARM);
    s.skew = take(&o->axis[AXIS_SKEW], &number, UNIFORM);
    const int gate = take(&o->axis[AXIS_GATE], &number, -1),
              activation = take(&o->axis[AXIS_ACTIVATION], &number, -1);
    const int experts = take(&o->axis[AXIS_EXPERTS], &number, 0);
    s.num_tokens = take(&o->axis[AXIS_TOKENS], &number, 1);
    s.type = take(&o->axis[AXIS_TYPE], &number, TYPE_F32);
    const model_t *m = &models[take(&o->axis[AXIS_SHAPE], &number, 0)];
    s.shape = o->hidden || o->intermediate || experts || o->top_k || o->bias ? "own" : m->name;
    demand(cumoe_config_init(c));
    c->hidden_size = o->hidden ? o->hidden : m->hidden;
    c->intermediate_size = o->intermediate ? o->intermediate : m->intermediate;
    c->num_experts = experts ? experts : m->experts;
    c->activation = (cumoe_activation_t)(activation >= 0 ? activation : m->activation);
    const int two_levels = o->capacity && c->num_experts > 256 ? CUMOE_GATE_HIERARCHICAL : m->gate;
    c->gate = (cumoe_gate_kind_t)(gate >= 0 ? gate : two_levels);
    c->top_k = c->gate == CUMOE_GATE_SOFTMAX ? c->num_experts : o->top_k ? o->top_k : m->top_k;
    if (c->gate == CUMOE_GATE_HIERARCHICAL) choose_groups(c);
    c->dtype = dtype_of(s.type);
    c->compute = s.type == TYPE_TF32 ? CUMOE_COMPUTE_TF32 : CUMOE_COMPUTE_EXACT;
    c->expert_bias = o->bias || m->bias;
    c->max_threads = o->threads;
    c->exchange_capacity = capacity;
    c->exchange_chunks = chunks;
    demand_ranks(&s);
    cumoe_cost_t cost = {.struct_size = sizeof cost};
    demand(cumoe_config_cost(c, s.num_tokens, 1, 1, &cost));
    return s;
}
