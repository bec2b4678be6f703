/* Several ranks train one model, data and expert parallel (paper, section 3.1): each has its part of every batch
 * and its share of the experts; everything else is the same on all of them. The ranks are threads of one process,
 * or the processes of mpirun: both train to the same bits. */
#ifndef RANKS_H
#define RANKS_H

#include "report.h"

enum { MAX_RANKS = 16 }; /* as threads */

/* As train_model(), by several ranks; the model names device, kind, symbols, batch, seed and optimizer. Of the
 * processes of mpirun all call, and each gets the perplexity. */
result_t train_on_ranks(const model_t *model, const options_t *options, const text_t *text,
                        const schedule_t *schedule, progress_t *progress);

/* What one rank reached, and several. */
void report_ranks(report_t *report, const options_t *options, const summary_t *summary);

/* The perplexities are the same but for rounding. */
bool report_ranks_verdict(report_t *report, const options_t *options, const summary_t *summary);

/* The processes of mpirun: with MPI processes.c, without it processes_none.c. */

typedef struct processes {
    int number, rank; /* of all; of this one */
    int local_rank;   /* among those of this machine */
} processes_t;

/* Become one of them, and take no more than its share of the processors. Ends the program where there is no MPI. */
processes_t processes_begin(void);
/* Their group, when all have called. Who waits leaves the processors to those who work. */
cumoe_ep_t *processes_group(const cumoe_handle_t *handle);
void processes_end(void);

#endif
