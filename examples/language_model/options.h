/* The command line. */
#ifndef OPTIONS_H
#define OPTIONS_H

#include "schedule.h"
#include "text.h"

#include <cumoe/cumoe.h>

#include <stdbool.h>

/* What is trained and reported. */
typedef enum experiment { EXPERIMENT_DEMO, EXPERIMENT_TABLE6, EXPERIMENT_BALANCED, EXPERIMENT_RANKS } experiment_t;

typedef struct options {
    int num_texts;
    const char *text[MAX_TEXTS];
    experiment_t experiment;
    int seeds;
    int batch;
    double rate, epochs;
    int64_t steps; /* 0 = as epochs says */
    schedule_kind_t schedule;
    cumoe_optimizer_t optimizer;
    int ranks;      /* of EXPERIMENT_RANKS */
    bool processes; /* they are those of mpirun, which knows their number */
    bool quick, resume;
    int threads; /* 0 = OpenMP's number */
    const char *out;
    cumoe_backend_t backend;
    bool copy;
} options_t;

/* Ends the program on --help, and with a sentence on anything wrong. */
void options_read(options_t *options, int argc, char **argv);

#endif
