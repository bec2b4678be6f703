#include "schedule.h"

#include <math.h>

/* Rises to peak over the first steps, stays there until step hold, and falls as step^-0.5. */
static double warm_up_and_root(double peak, int64_t step, int64_t warm_up, int64_t hold)
{
    if (step <= warm_up) return peak * (double)step / (double)warm_up;
    return step <= hold ? peak : peak * sqrt((double)hold / (double)step);
}

double schedule_rate(schedule_kind_t kind, double peak, int64_t step, int64_t steps)
{
    switch (kind) {
    case SCHEDULE_LANGUAGE_MODEL:
        return warm_up_and_root(peak, step, 1000, 1000);
    case SCHEDULE_TRANSLATION:
        return warm_up_and_root(peak, step, 2000, 10000);
    default:
        return peak * (1 - (double)(step - 1) / (double)steps);
    }
}

static const char *const words[NUM_SCHEDULES][2] = {
    [SCHEDULE_LINEAR] = {"linear", "falls to 0 in a straight line"},
    [SCHEDULE_LANGUAGE_MODEL] = {"lm", "rises over 1000 steps, then falls as step^-0.5"},
    [SCHEDULE_TRANSLATION] = {"translation",
                              "rises over 2000 steps, stays until step 10000, then falls as step^-0.5"},
};

const char *schedule_name(schedule_kind_t kind)
{
    return words[kind][0];
}

const char *schedule_text(schedule_kind_t kind)
{
    return words[kind][1];
}
