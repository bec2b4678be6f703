/* The inside of a report: rows and facts, as report.c makes them and report_files.c writes them. */
#ifndef CUMOE_PERF_REPORT_H
#define CUMOE_PERF_REPORT_H

#include "perf.h"

/* A row: one contestant, one part. 0 = not known. */
typedef struct row {
    const subject_t *subject;
    counts_t counts;
    int contestant, part;
    const times_t *times;
    work_t work;
    double error;
    double flops, bytes; /* a second */
    double floor;        /* seconds */
    double of_floor, of_peak;
} row_t;

/* To the files that there are. */
void files_begin(const report_t *report, int argc, char **argv);
void files_row(const report_t *report, const row_t *row);
void files_sentence(const report_t *report, int number);
/* False if one could not be written. */
bool files_end(const report_t *report);

#endif
