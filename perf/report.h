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

/* A field of a row in the files. */
enum { MOST_FIELDS = 48 };
typedef struct field {
    const char *key, *text; /* text NULL: the number */
    double number;          /* NaN = not known */
} field_t;

/* In the table: the axes that vary, and a figure, or "-" where it is not known. */
void report_axes(const report_t *report, const subject_t *subject);
void report_cell(FILE *file, double value, const char *format);
void report_flush(const report_t *report);

/* What was measured; their number. */
int files_subject(const subject_t *subject, field_t fields[MOST_FIELDS]);
void files_fields(const report_t *report, const field_t *fields, int count);

/* To the files that there are. */
void files_begin(const report_t *report, int argc, char **argv);
void files_row(const report_t *report, const row_t *row);
void files_sentence(const report_t *report, int number);
/* False if one could not be written. */
bool files_end(const report_t *report);

#endif
