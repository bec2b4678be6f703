/* From seconds to a table. */
#ifndef CUMOE_PERF_REPORT_H
#define CUMOE_PERF_REPORT_H

#include "options.h"
#include "yardsticks.h"

#include <stdio.h>

enum { CUMOE, DENSE, LOOP, CONTESTANTS };
enum { FORWARD, BACKWARD, BOTH, PASSES };

/* All rounds of one activation. BOTH is the sum of a round's two passes. */
typedef struct times {
    shape_t shape;
    int repeat;
    double *seconds[CONTESTANTS][BACKWARD + 1]; /* [repeat] */
} times_t;

times_t times_create(const shape_t *shape, int repeat);
void times_destroy(times_t *times);

/* The lines above the table. */
void report_machine(const options_t *options);

/* Rows of the Markdown table on stdout; the heading as well if first. */
void report_table(const times_t *times, bool first);

/* All figures of count activations; closes the file. False, with a sentence on stderr, if it cannot be written. */
bool report_json(FILE *file, const options_t *options, const times_t *times, int count);

#endif
