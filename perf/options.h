/* The command line of the benchmark. */
#ifndef CUMOE_PERF_OPTIONS_H
#define CUMOE_PERF_OPTIONS_H

typedef struct options {
    int tokens, hidden, intermediate, experts, top_k;
    int dtype;   /* index into dtype_names */
    int threads; /* of every contestant */
    int repeat;
    const char *json; /* file name or NULL */
} options_t;

enum { F32, BF16, F16 };
extern const char *const dtype_names[]; /* NULL ends them */

/* Ends the program after --help, or with a sentence on stderr and status 2 where something is wrong. */
options_t options_parse(int argc, char **argv);

#endif
