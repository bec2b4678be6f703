#include "options.h"

#include <omp.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct number {
    const char *name, *text;
    int *value, min, max;
} number_t;

static _Noreturn void help(const number_t *numbers, int count)
{
    puts("cumoe-perf-cpu: the layer on the CPU against OpenBLAS, forward and backward, ReLU and SwiGLU, fp32\n"
         "\n"
         "Prints a Markdown table; perf/README.md says what its columns mean. Exits with 1 if results disagree.\n");
    for (int i = 0; i < count; i++) {
        printf("  --%-14s %s (default %d)\n", numbers[i].name, numbers[i].text, *numbers[i].value);
    }
    puts("  --json FILE      write all figures to FILE as well\n"
         "  --help           this text");
    exit(EXIT_SUCCESS);
}

static _Noreturn void fail(const char *option, const char *value, const char *rule)
{
    fprintf(stderr, "cumoe-perf-cpu: %s%s%s: %s; see --help\n", option, value ? " " : "", value ? value : "", rule);
    exit(2);
}

static void parse_number(const number_t *n, const char *option, const char *text)
{
    char *end, rule[100];
    const long value = strtol(text, &end, 10);
    if (*text == '\0' || *end != '\0' || value < n->min || value > n->max) {
        snprintf(rule, sizeof rule, "must be a whole number, %d..%d", n->min, n->max);
        fail(option, text, rule);
    }
    *n->value = (int)value;
}

options_t options_parse(int argc, char **argv)
{
    options_t o = {4096, 512, 1024, 32, 4, omp_get_max_threads(), 9, NULL};
    const number_t numbers[] = {
        {"tokens", "T, tokens in a call", &o.tokens, 1, 1 << 20},
        {"hidden", "H, width of the model", &o.hidden, 1, 1 << 16},
        {"intermediate", "I, width inside an expert", &o.intermediate, 1, 1 << 16},
        {"experts", "E, number of experts", &o.experts, 1, 1 << 12},
        {"top-k", "K, experts per token", &o.top_k, 1, 64},
        {"threads", "threads of every contestant", &o.threads, 1, 1024},
        {"repeat", "timed rounds", &o.repeat, 1, 1000},
    };
    const int count = (int)(sizeof numbers / sizeof *numbers);
    for (int i = 1; i < argc; i++) {
        const number_t *found = NULL;
        for (int n = 0; n < count && strncmp(argv[i], "--", 2) == 0; n++) {
            if (strcmp(argv[i] + 2, numbers[n].name) == 0) found = &numbers[n];
        }
        const bool json = strcmp(argv[i], "--json") == 0;
        if (strcmp(argv[i], "--help") == 0) help(numbers, count);
        if (!found && !json) fail(argv[i], NULL, "no such option");
        if (i + 1 == argc) fail(argv[i], NULL, "needs a value");
        if (json) {
            o.json = argv[i + 1];
        } else {
            parse_number(found, argv[i], argv[i + 1]);
        }
        i++;
    }
    if (o.top_k > o.experts) fail("--top-k", NULL, "must not be larger than --experts");
    return o;
}
