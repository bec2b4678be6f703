/* cumoe-check --ranks: cases of the layer on several ranks. These are threads, or the processes of mpirun: those
 * run cumoe-check-mpi, which is the same program with MPI. */
#ifndef CUMOE_TESTS_CHECK_RANKS_H
#define CUMOE_TESTS_CHECK_RANKS_H

#include "tests/support/ranks.h"

typedef struct ranks_flags {
    int32_t numbers[RANKS_MAX]; /* of ranks, a run each; of processes, as many as there are */
    int count;                  /* 0 = no --ranks */
    bool processes;
    int32_t killed; /* the rank that leaves, -1 = none */
    double timeout; /* seconds; 0 = the default */
} ranks_flags_t;

/* Take an option of ranks; false = it is none, or its value cannot be read. */
bool ranks_read_option(ranks_flags_t *flags, const char *option, const char *value);

/* Do they fit each other? Else a sentence on stderr. */
bool ranks_check_flags(const ranks_flags_t *flags);

/* Does the layer run on so many ranks? */
bool ranks_apply(const problem_t *whole, int32_t num_ranks);

/* The problem, which has been run on one device, on so many ranks: what they give is compared with it, and hashed.
 * With a killed rank: the others print what they are told. */
uint64_t ranks_run_case(const ranks_flags_t *flags, const problem_t *whole, int32_t num_ranks, report_t *report);

#endif
