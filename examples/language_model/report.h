/* What the run says: the same Markdown on the terminal and in demo.md, and every figure in demo.tsv. */
#ifndef REPORT_H
#define REPORT_H

#include "inspect.h"
#include "options.h"

#include <stdio.h>

typedef struct report {
    const char *name; /* of the files: demo, table6, balanced or ranks */
    FILE *markdown, *table;
    bool pictures; /* they could be drawn: demo.md shows them */
} report_t;

/* A figure over the seeds. */
typedef struct range {
    int seeds;
    double mean, least, most;
} range_t;

void range_add(range_t *range, double value);

/* The figures of a kind. */
typedef struct summary {
    range_t perplexity; /* held-out */
    range_t rate;       /* characters per second */
    size_t state_size;  /* bytes that the optimizer keeps for the layer */
} summary_t;

/* Opens demo.md and demo.tsv (or those of another experiment) in the current folder and writes down what is about
 * to be done. */
/* The word in the names of an experiment's files. */
const char *experiment_name(experiment_t experiment);

/* The numbers that two runs must have in common for their trainings to be the same; in the table as well. */
enum { NUM_PROTOCOL = 9 };
typedef struct protocol {
    const char *name[NUM_PROTOCOL];
    double value[NUM_PROTOCOL];
} protocol_t;
protocol_t protocol_of(const options_t *options, const text_t *text, const schedule_t *schedule);

/* The row of a training in the table. */
void training_name(char *row, size_t size, const kind_t *kind, uint64_t seed);

void report_open(report_t *report, const options_t *options, const text_t *text, const schedule_t *schedule,
                 const device_t *device);

/* To the terminal and to the Markdown file. */
void say(report_t *report, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* To the Markdown file alone. */
void show_picture(report_t *report, const char *title, const char *file);

/* One figure to the TSV file. */
void note(report_t *report, const char *table, const char *row, const char *column, double value);

/* What one training gave, to the TSV file. */
void report_training(report_t *report, const kind_t *kind, uint64_t seed, const result_t *result);
void report_balance(report_t *report, const kind_t *kind, uint64_t seed, const balance_t *balance);

/* The first table. summary  [NUM_KINDS] */
void report_models(report_t *report, const summary_t *summary, const text_t *text);

/* Whether MoE-32 is better than dense by more than the spread, in words as well. */
bool report_verdict(report_t *report, const summary_t *summary, bool quick);

/* What the optimizer keeps for the layers of MoE-256 and of the dense model. summary  [NUM_KINDS] */
void report_optimizer(report_t *report, cumoe_optimizer_t optimizer, const summary_t *summary);

/* Paper table 9. */
void report_experts(report_t *report, const usage_t *usage, const text_t *text);

/* Closes the files, and says what is where and how long it took. */
void report_close(report_t *report, const char *folder, double seconds);

#endif
