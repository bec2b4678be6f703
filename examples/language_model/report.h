/* What the run says: the same Markdown on the terminal and in demo.md, and every figure in demo.tsv. */
#ifndef REPORT_H
#define REPORT_H

#include "inspect.h"
#include "options.h"

#include <stdio.h>

typedef struct report {
    FILE *markdown, *table;
    bool pictures; /* they could be drawn: demo.md shows them */
} report_t;

/* The figures of a kind over the seeds. */
typedef struct summary {
    int seeds;
    double mean, least, most; /* held-out perplexity */
    double rate;              /* mean of characters per second */
    size_t state_size;        /* bytes that the optimizer keeps for the layer */
} summary_t;

/* Opens demo.md and demo.tsv in the current folder and writes down what is about to be done. */
void report_open(report_t *report, const options_t *options, const text_t *text, const schedule_t *schedule,
                 const device_t *device);

/* One line of demo.tsv per training. */
void report_training(report_t *report, const kind_t *kind, uint64_t seed, const result_t *result);

/* The first table. summary  [NUM_KINDS] */
void report_models(report_t *report, const summary_t *summary, const text_t *text);

/* Whether MoE-32 is better than dense by more than the spread, in words as well. */
bool report_verdict(report_t *report, const summary_t *summary, bool quick);

/* What the optimizer keeps for the layers of MoE-256 and of the dense model. summary  [NUM_KINDS] */
void report_optimizer(report_t *report, cumoe_optimizer_t optimizer, const summary_t *summary);

/* Paper table 6: with and without the losses. perplexity  [2], balance  [2] */
void report_balance(report_t *report, const double *perplexity, const balance_t *balance);

/* Paper table 9. */
void report_experts(report_t *report, const usage_t *usage, const text_t *text);

/* Closes the files, and says what is where and how long it took. */
void report_close(report_t *report, const char *folder, double seconds);

#endif
