/* Comparisons that gather what is wrong into a report; a test fails when the report is not empty. */
#ifndef CUMOE_TESTS_COMPARE_H
#define CUMOE_TESTS_COMPARE_H

#include <cumoe/types.h>

#include <stdbool.h>

typedef struct report {
    const char *context; /* stands in front of every line; may be NULL */
    int failures;
    double worst; /* the largest error, in units of what is allowed */
    size_t length;
    char text[4096];
} report_t;

/* Add a line. */
void report_fail(report_t *report, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* A line when the condition does not hold; gives it back. */
#define report_check(report, condition)                                                                            \
    ((condition) ? true : (report_fail((report), "%s:%d: %s", __FILE__, __LINE__, #condition), false))

/* Element i of an array of F64, F32, BF16 or F16 as a double, and back (rounded to nearest even). */
double real_get(const void *data, cumoe_dtype_t dtype, int64_t i);
void real_set(void *data, cumoe_dtype_t dtype, int64_t i, double value);
size_t real_size(cumoe_dtype_t dtype);

/* The number of the type nearest to value. */
double real_round(cumoe_dtype_t dtype, double value);

/* Half a unit in the last place at 1. */
double real_rounding_unit(cumoe_dtype_t dtype);

/* A matrix that stands in an array with strides. */
typedef struct real_view {
    void *data;
    cumoe_dtype_t dtype;
    int64_t rows, cols, row_stride, col_stride;
} real_view_t;

/* Copy a view into [rows, cols] doubles, and back (rounded). */
void real_gather(real_view_t view, double *values);
void real_scatter(real_view_t view, const double *values);

/* || actual - expected || <= limit * || size ||, where size (NULL = expected) says how large the terms are that
 * expected is the sum of; <= limit where that is 0; <= 1e-30 at any rate (underflow in F32); and NaN or Inf exactly
 * where they are expected. Gives the error in that scale. */
double compare_scaled(report_t *report, const char *what, int64_t n, const double *actual, const double *expected,
                      const double *size, double limit);

/* The same for an array as the library writes it. */
double compare_view(report_t *report, const char *what, real_view_t actual, const double *expected,
                    const double *size, double limit);
double compare_vector(report_t *report, const char *what, const void *actual, cumoe_dtype_t dtype, int64_t n,
                      const double *expected, double limit);

/* Byte for byte. */
void compare_bits(report_t *report, const char *what, const void *actual, const void *expected, size_t size);

#endif
