/* --resume: the trainings of an interrupted run, out of the table that it wrote. */
#ifndef RESUME_H
#define RESUME_H

#include "inspect.h"
#include "options.h"
#include "report.h"
#include "train.h"

typedef struct past past_t;

/* Read the table of the experiment in this folder; NULL where there is none. Ends the program if it is of another
 * protocol. */
past_t *past_read(const options_t *options, const text_t *text, const schedule_t *schedule);

/* Whether the past has this training with its balance, and what it gave (the loads of single experts are 0). */
bool past_find(const past_t *past, const kind_t *kind, uint64_t seed, result_t *result, balance_t *balance);

void past_free(past_t *past); /* NULL is ignored */

#endif
