/* From seconds to a table. */
#ifndef CUMOE_PERF_REPORT_H
#define CUMOE_PERF_REPORT_H

#include "options.h"
#include "yardsticks.h"

#include <stdio.h>

enum { FORWARD, BACKWARD, BOTH, PASSES };
enum { MOST_CONTESTANTS = 3 };

/* All rounds of one activation. BOTH is the sum of a round's two passes. */
typedef struct times {
    shape_t shape;
    int repeat, contestants;
    const char *const *names;                        /* [contestants]; the others are yardsticks of the first */
    double *seconds[MOST_CONTESTANTS][BACKWARD + 1]; /* [repeat] */
    char note[200];                                  /* a line below the table, or empty */
} times_t;

times_t times_create(const shape_t *shape, int repeat, const char *const *names, int contestants);
void times_destroy(times_t *times);

/* Fill times: rounds in turns, after one that is not counted. run() does a pass of a contestant. */
void times_measure(times_t *times, int threads, void (*run)(void *bench, int contestant, int pass), void *bench);

/* The lines above the table. */
void report_machine(const options_t *options);

/* Rows of the Markdown table on stdout; the heading as well if first. */
void report_table(const times_t *times, bool first);

/* All figures of count activations; closes the file. False, with a sentence on stderr, if it cannot be written. */
bool report_json(FILE *file, const options_t *options, const times_t *times, int count);

#endif
