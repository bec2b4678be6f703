/* Several ranks train one model, data and expert parallel (paper, section 3.1): each has its part of every batch
 * and its share of the experts; everything else is the same on all of them. Here the ranks are threads of one
 * process. */
#ifndef RANKS_H
#define RANKS_H

#include "report.h"

enum { MAX_RANKS = 16 };

/* As train_model(), by num_ranks ranks; the model names device, kind, symbols, batch, seed and optimizer. */
result_t train_on_ranks(const model_t *model, int num_ranks, const text_t *text, const schedule_t *schedule,
                        progress_t *progress);

/* What one rank reached, and several. */
void report_ranks(report_t *report, int num_ranks, const summary_t *summary);

/* The perplexities are the same but for rounding. */
bool report_ranks_verdict(report_t *report, int num_ranks, const summary_t *summary, bool quick);

#endif
