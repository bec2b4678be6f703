/* The two benchmarks, each for one shape and activation: compare results, then take time. */
#ifndef CUMOE_PERF_BENCH_H
#define CUMOE_PERF_BENCH_H

#include "options.h"
#include "report.h"

/* The layer in F32 against OpenBLAS. False, reported on stderr, if results disagree. */
bool bench_openblas(const options_t *options, const shape_t *shape, times_t *times);

/* The layer with 16-bit tokens and experts against the layer in F32. */
bool bench_types(const options_t *options, const shape_t *shape, times_t *times);

/* || a - b || / || b || */
double relative_difference(const float *a, const float *b, int64_t count);

/* False, reported on stderr, if that exceeds the bound or is NaN. */
bool agree(const char *what, const float *a, const float *b, int64_t count, double bound);

#endif
