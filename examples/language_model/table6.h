/* Table 6 of the paper: what the two balancing losses do to a mixture. --table6 trains its six rows with MoE-64,
 * the demo two of them with MoE-256. */
#ifndef TABLE6_H
#define TABLE6_H

#include "report.h"

typedef enum figure { PERPLEXITY, CV_IMPORTANCE, CV_LOAD, MAX_OVER_MEAN_LOAD, NUM_FIGURES } figure_t;

/* Kinds of which nothing was added are no rows. */
typedef struct table6 {
    int64_t characters; /* in each batch over which the balance was measured */
    range_t figure[NUM_KINDS][NUM_FIGURES];
} table6_t;

/* What a training of a kind gave. */
void table6_add(table6_t *table, kind_index_t kind, double perplexity, const balance_t *balance);

/* The rows in the paper's order, with the paper's figures. */
void report_table6(report_t *report, const table6_t *table);

/* Whether the row without losses is worse in all measures of balance than any row with them, by BALANCE_FACTOR, and
 * every training with them ends below BALANCE_MOST; in words as well. Of a table with all rows. */
bool report_table6_verdict(report_t *report, const table6_t *table, bool quick);

#endif
