/* cumoe-check: does the library compute on this machine what it should? Every stage and the whole layer against a
 * reference in double precision, over the tables of cases that the tests use. */
#include "mpi/processes.h"
#include "tests/check/checks.h"
#include "tests/check/ranks.h"
#include "tests/sim/print_instructions.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char USAGE[] =
    "usage: cumoe-check [OPTION...]\n"
    "\n"
    "Runs every stage and the whole layer on small inputs and compares with double precision. A line per case: ok "
    "or\n"
    "FAILED, the worst error in units of what rounding explains, the case.\n"
    "\n"
    "  --backend cpu|cuda|auto  which device (default: auto, CUDA if there is one)\n"
    "  --ordinal N              which of them (default: 0)\n"
    "  --filter TEXT            only cases whose line contains TEXT; may be given several times, all must be "
    "there\n"
    "  --seed N                 other numbers (default: 1)\n"
    "  --hash                   with the outputs' hash, of forward and backward passes: the same device gives the "
    "same\n"
    "  --json                   a JSON object per line\n"
    "  --ranks N[,N...]         the layer alone, on so many ranks: each number must give the bits of one device\n"
    "                           and the same hash of what all ranks give\n"
    "  --ranks mpi              the same on the processes of mpirun -n N cumoe-check --ranks mpi\n"
    "  --transport local        how the ranks of --ranks N are connected (the default: threads)\n"
    "  --kill R                 one case, in which rank R dies between forward and backward: the others must be\n"
    "                           told in time\n"
    "  --timeout S              seconds that a rank may be late (default: 600; with --kill 5)\n"
    "  --list                   print the cases and run nothing\n"
    "  --instructions [FILE...] the last option: print what each instruction of the GPU gives; 1 if it is not "
    "what\n"
    "                           the FILEs say\n"
    "  --help                   this text\n"
    "\n"
    "exit status: 0 all is well, 1 a case failed, 2 wrong usage or no such device\n";

enum { MAX_FILTERS = 8, MAX_LINE = 256 };

typedef struct options {
    cumoe_backend_t backend;
    int32_t ordinal;
    uint64_t seed;
    const char *filters[MAX_FILTERS];
    int num_filters;
    bool hash, json, list;
    ranks_flags_t ranks;
    char **golden; /* the files behind --instructions, NULL at their end; NULL without it */
} options_t;

typedef struct session {
    const options_t *options;
    const cumoe_handle_t *handle;
    int64_t cases, failures;
    double worst;
} session_t;

/* ---- a case ---- */

static void print_json_string(const char *text)
{
    putchar('"');
    for (; *text; text++) {
        const unsigned char c = (unsigned char)*text;
        if (c == '"' || c == '\\')
            printf("\\%c", c);
        else if (c < 0x20)
            printf("\\u%04x", c);
        else
            putchar(c);
    }
    putchar('"');
}

static uint64_t hash_outputs(const problem_t *p, bool backward)
{
    uint64_t hash = 0xcbf29ce484222325u;
    problem_bits_t bits = problem_outputs(p, backward);
    for (size_t i = 0; bits.data && i < bits.size; i++) hash = (hash ^ bits.data[i]) * 0x100000001b3u;
    problem_bits_free(&bits);
    return hash;
}

static void print_result(const options_t *o, const char *line, const report_t *report, const char *hash)
{
    const bool ok = report->failures == 0;
    if (o->json) {
        printf("{\"case\": ");
        print_json_string(line);
        printf(", \"ok\": %s, \"error\": %.4g", ok ? "true" : "false", report->worst);
        if (*hash) printf(", \"hash\": \"%s\"", hash);
        if (!ok) {
            printf(", \"text\": ");
            print_json_string(report->text);
        }
        printf("}\n");
        return;
    }
    printf("%-6s %6.3f  %s%s%s\n", ok ? "ok" : "FAILED", report->worst, hash, *hash ? "  " : "", line);
    if (!ok) printf("%s", report->text);
}

static void run_case(session_t *s, const check_t *check, const char *line)
{
    char hash[20] = "";
    problem_t problem;
    report_t report = {0};
    if (problem_create(&problem, s->handle, &check->layer_case, &check->options, &report)) {
        /* before the check, which poisons what it has looked at */
        if (s->options->hash && check->layer_pass && problem_run_forward(&problem, &report) &&
            (check->layer_pass == 1 || problem_run_backward(&problem, &report)))
            snprintf(hash, sizeof hash, "%016" PRIx64, hash_outputs(&problem, check->layer_pass == 2));
        check->body(&problem, &report);
    }
    print_result(s->options, line, &report, hash);
    problem_destroy(&problem);
    s->cases++;
    s->failures += report.failures > 0;
    if (report.worst > s->worst) s->worst = report.worst;
}

/* The layer on several ranks, if it runs on so many; the first number is what others are compared with. */
static void run_ranks(session_t *s, const check_t *check, const char *line)
{
    const ranks_flags_t *ranks = &s->options->ranks;
    uint64_t first = 0;
    problem_t problem;
    report_t whole = {0};
    problem_options_t options = check->options;
    options.without_reference = true; /* one device is what is compared with */
    const bool made = problem_create(&problem, s->handle, &check->layer_case, &options, &whole) &&
                      problem_run_forward(&problem, &whole) && problem_run_backward(&problem, &whole);
    for (int i = 0, runs = 0; i < ranks->count; i++) {
        report_t report = whole;
        char hash[20], title[MAX_LINE + 20];
        if (made && !ranks_apply(&problem, ranks->numbers[i])) continue;
        const uint64_t number = made ? ranks_run_case(ranks, &problem, ranks->numbers[i], &report) : 0;
        if (runs++ == 0) first = number;
        if (number != first) report_fail(&report, "the hash is not that of the first number of ranks");
        snprintf(hash, sizeof hash, "%016" PRIx64, number);
        snprintf(title, sizeof title, "ranks %d: %s", ranks->numbers[i], line);
        print_result(s->options, title, &report, ranks->killed < 0 ? hash : "");
        s->cases++;
        s->failures += report.failures > 0;
    }
    problem_destroy(&problem);
}

static bool visit(const check_t *check, void *context)
{
    session_t *s = context;
    const ranks_flags_t *ranks = &s->options->ranks;
    if (ranks->count && (check->layer_pass != 2 || check->options.variant.gate == CUMOE_GATE_BALANCED)) return true;
    if (ranks->killed >= 0 && s->cases > 0) return false;
    char name[MAX_LINE - 40], line[MAX_LINE];
    problem_name(name, sizeof name, &check->layer_case, &check->options);
    snprintf(line, sizeof line, "%s: %s", check->part, name);
    for (int i = 0; i < s->options->num_filters; i++)
        if (!strstr(line, s->options->filters[i])) return true;
    if (s->options->list) {
        puts(line);
        s->cases++;
    } else if (ranks->count) {
        run_ranks(s, check, line);
    } else {
        run_case(s, check, line);
    }
    return true;
}

/* ---- the program ---- */

static bool read_backend(const char *text, cumoe_backend_t *backend)
{
    static const char *const names[] = {"auto", "cpu", "cuda"};
    for (int i = 0; i < 3; i++)
        if (strcmp(text, names[i]) == 0) {
            *backend = (cumoe_backend_t)i;
            return true;
        }
    return false;
}

static bool read_number(const char *text, uint64_t most, uint64_t *number)
{
    char *end;
    *number = strtoull(text, &end, 10);
    return *text >= '0' && *text <= '9' && *end == 0 && *number <= most;
}

/* 0 = go on, else exit status + 1 */
static int read_options(int argc, char **argv, options_t *o)
{
    for (int i = 1; i < argc; i++) {
        const char *option = argv[i], *value = i + 1 < argc ? argv[i + 1] : "";
        uint64_t number;
        bool taken = true;
        if (strcmp(option, "--instructions") == 0) {
            o->golden = argv + i + 1;
            return 0;
        }
        if (strcmp(option, "--help") == 0) return fputs(USAGE, stdout), 1;
        if (strcmp(option, "--hash") == 0)
            o->hash = true;
        else if (strcmp(option, "--json") == 0)
            o->json = true;
        else if (strcmp(option, "--list") == 0)
            o->list = true;
        else
            taken = false;
        if (taken) continue;
        i++;
        if (strcmp(option, "--backend") == 0 && read_backend(value, &o->backend)) continue;
        if (strcmp(option, "--ordinal") == 0 && read_number(value, INT32_MAX, &number)) {
            o->ordinal = (int32_t)number;
            continue;
        }
        if (strcmp(option, "--seed") == 0 && read_number(value, UINT64_MAX, &o->seed)) continue;
        if (strcmp(option, "--filter") == 0 && i < argc && o->num_filters < MAX_FILTERS) {
            o->filters[o->num_filters++] = value;
            continue;
        }
        if (i < argc && ranks_read_option(&o->ranks, option, value)) continue;
        fprintf(stderr, "cumoe-check: cannot read %s %s\n\n%s", option, value, USAGE);
        return 3;
    }
    return 0;
}

static int instructions(const options_t *o)
{
#ifdef CUMOE_CHECK_INSTRUCTIONS
    return print_instructions(o->ordinal, o->golden);
#else
    (void)o;
    fprintf(stderr, "cumoe-check: --instructions is for a GPU, but this program was built without CUDA\n");
    return 2;
#endif
}

static int finish(const session_t *s)
{
    if (s->cases == 0) fprintf(stderr, "cumoe-check: no case contains that\n");
    if (!s->options->list && s->options->json)
        printf("{\"cases\": %" PRId64 ", \"failures\": %" PRId64 ", \"error\": %.4g}\n", s->cases, s->failures,
               s->worst);
    else if (!s->options->list)
        printf("%" PRId64 " cases, %" PRId64 " failed, the worst error is %.3f of what is allowed\n", s->cases,
               s->failures, s->worst);
    return s->cases == 0 ? 2 : s->failures ? 1 : 0;
}

int main(int argc, char **argv)
{
    options_t options = {.seed = 1, .ranks = {.killed = -1}};
    session_t session = {.options = &options};
    const int answer = read_options(argc, argv, &options);
    if (answer) return answer - 1;
    if (options.golden) return instructions(&options);
    if (options.ranks.processes) {
        processes_t processes;
        if (!processes_begin(argc, argv, &processes)) return 2;
        options.ranks.numbers[0] = processes.count;
        options.ranks.count = 1;
    }
    if (!ranks_check_flags(&options.ranks)) return 2;
    cumoe_handle_t *handle = NULL;
    if (cumoe_handle_create(&handle, options.backend, options.ordinal) != CUMOE_SUCCESS)
        return fprintf(stderr, "cumoe-check: %s\n", cumoe_last_error()), 2;
    session.handle = handle;
    if (options.json) {
        printf("{\"device\": ");
        print_json_string(cumoe_handle_description(handle));
        printf("}\n");
    } else if (!options.list) {
        printf("%s\n", cumoe_handle_description(handle));
    }
    checks_visit(cumoe_handle_backend(handle), options.seed, visit, &session);
    if (options.ranks.processes) processes_end(finish(&session), options.ranks.killed < 0);
    cumoe_handle_destroy(handle);
    return finish(&session);
}
