/* cumoe-perf-cpu: the layer on the CPU against its yardsticks, every contestant in the same run, on the same
 * numbers, in turns. */
#include "bench.h"

#include <cblas.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#undef I /* of complex.h */

double relative_difference(const float *a, const float *b, int64_t count)
{
    double difference = 0, size = 0;
    for (int64_t i = 0; i < count; i++) {
        difference += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        size += (double)b[i] * b[i];
    }
    return difference == 0 ? 0 : sqrt(difference / size);
}

bool agree(const char *what, const float *a, const float *b, int64_t count, double bound)
{
    const double difference = relative_difference(a, b, count);
    const bool good = difference <= bound; /* false for NaN */
    if (!good) fprintf(stderr, "cumoe-perf-cpu: %s: relative difference %.2g\n", what, difference);
    return good;
}

int main(int argc, char **argv)
{
    const options_t options = options_parse(argc, argv);
    FILE *json = options.json ? fopen(options.json, "w") : NULL;
    if (options.json && !json) {
        fprintf(stderr, "cumoe-perf-cpu: --json %s: %s\n", options.json, strerror(errno));
        return 2;
    }
    openblas_set_num_threads(options.threads);
    times_t times[2];
    bool good = true;
    report_machine(&options);
    for (int glu = 0; glu < 2; glu++) {
        const shape_t shape = {options.tokens,  options.hidden, options.intermediate,
                               options.experts, options.top_k,  glu};
        good &= (options.dtype == F32 ? bench_openblas : bench_types)(&options, &shape, &times[glu]);
        report_table(&times[glu], glu == 0);
    }
    for (int glu = 0; glu < 2 && times[glu].note[0]; glu++) printf("\n%s\n", times[glu].note);
    if (json) good &= report_json(json, &options, times, 2);
    for (int glu = 0; glu < 2; glu++) times_destroy(&times[glu]);
    return good ? EXIT_SUCCESS : EXIT_FAILURE;
}
