/* The command line of cumoe-perf: a command, and axes that it is run over. */
#ifndef CUMOE_PERF_OPTIONS_H
#define CUMOE_PERF_OPTIONS_H

#include "perf.h"

enum { MOST_VALUES = 40 };

/* The values of an axis; none: those of the shape. */
typedef struct axis {
    int value[MOST_VALUES], count;
} axis_t;

enum { PASS_BOTH, PASS_FORWARD, PASS_BACKWARD };

typedef struct options {
    unsigned parts;
    bool exchange; /* the command: ranks */
    bool capacity; /* what does not fit is no failure, and many experts get a gate of two levels */
    int backend, ordinal, threads, pass, seconds, list;
    int hidden, intermediate, top_k, bias; /* 0 = those of the shape */
    axis_t axis[AXES];
    const char *blas, *json, *csv, *commit;
    const char *ranks; /* --ranks: "mpi", "nccl", else a list, which is in its axis */
    double link;       /* bytes a second; 0 = to be measured */
} options_t;

/* Ends the program after --help or --list, or with a sentence on stderr and status 2 where something is wrong. */
options_t options_read(int argc, char **argv);
/* So many ranks have come together. */
void options_set_ranks(options_t *options, int32_t count);

int options_num_subjects(const options_t *options);
/* The number-th of them; ends the program where the sizes do not fit together. */
subject_t options_subject(const options_t *options, int number);

#endif
