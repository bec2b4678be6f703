/* The strictly balanced gate (paper, appendix F) on the demo's text: do the learned thresholds, one character at a
 * time, decide as the whole batch does? */
#ifndef BALANCED_H
#define BALANCED_H

#include "report.h"

/* Means over batches of training characters. */
typedef struct agreement {
    double both; /* of the (character, expert) pairs that the batch or the thresholds take, those that both do */
    double rows; /* that the thresholds take, for each that the batch takes */
    double least_rows, most_rows; /* of an expert by its threshold, for each by the batch */
    int fewest, most;             /* rows of an expert by the batch: all alike */
    int alone;                    /* characters that no expert took, by the thresholds */
} agreement_t;

/* Thresholds that decide as the first batch does. */
void start_thresholds(model_t *model, const text_t *text);

agreement_t measure_agreement(model_t *model, const text_t *text);

void report_agreement(report_t *report, const agreement_t *before, const agreement_t *after);

/* Every expert took the same number of characters, and the thresholds agree with the batch by MASKS_AGREE. */
bool report_balanced_verdict(report_t *report, const summary_t *summary, const agreement_t *before,
                             const agreement_t *after, bool quick);

#endif
