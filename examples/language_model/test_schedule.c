/* The schedules at their corners: the rates that the paper's words say. */
#include "schedule.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

int main(void)
{
    static const struct {
        schedule_kind_t kind;
        int64_t step;
        double part; /* of peak */
    } cases[] = {
        {SCHEDULE_LINEAR, 1, 1},
        {SCHEDULE_LINEAR, 51, 0.5},
        {SCHEDULE_LINEAR, 100, 0.01},
        {SCHEDULE_LANGUAGE_MODEL, 1, 0.001},
        {SCHEDULE_LANGUAGE_MODEL, 500, 0.5},
        {SCHEDULE_LANGUAGE_MODEL, 1000, 1},
        {SCHEDULE_LANGUAGE_MODEL, 4000, 0.5},
        {SCHEDULE_LANGUAGE_MODEL, 100000, 0.1},
        {SCHEDULE_TRANSLATION, 1, 0.0005},
        {SCHEDULE_TRANSLATION, 1000, 0.5},
        {SCHEDULE_TRANSLATION, 2000, 1},
        {SCHEDULE_TRANSLATION, 10000, 1},
        {SCHEDULE_TRANSLATION, 40000, 0.5},
    };
    const double peak = 0.02;
    int wrong = 0;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const double rate = schedule_rate(cases[i].kind, peak, cases[i].step, 100);
        if (fabs(rate - peak * cases[i].part) <= 1e-14) continue;
        printf("%s, step %lld: %.17g, but must be %g\n", schedule_name(cases[i].kind), (long long)cases[i].step,
               rate, peak * cases[i].part);
        wrong++;
    }
    return wrong ? EXIT_FAILURE : EXIT_SUCCESS;
}
