/* Learning rates as pure functions of the step. */
#ifndef SCHEDULE_H
#define SCHEDULE_H

#include <stdint.h>

typedef enum schedule_kind {
    SCHEDULE_LINEAR,         /* peak at first, falls in a straight line to 0 after the last step */
    SCHEDULE_LANGUAGE_MODEL, /* the paper's: rises to peak over 1000 steps, then falls as step^-0.5 */
    SCHEDULE_TRANSLATION,    /* the paper's: rises to peak over 2000 steps, stays until 10000, then step^-0.5 */
    NUM_SCHEDULES
} schedule_kind_t;

/* The learning rate of a step, which counts from 1; steps is the length of the run. */
double schedule_rate(schedule_kind_t kind, double peak, int64_t step, int64_t steps);

/* The name on the command line, and what the rate does. */
const char *schedule_name(schedule_kind_t kind);
const char *schedule_text(schedule_kind_t kind);

#endif
