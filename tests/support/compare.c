#include "tests/support/compare.h"

#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void report_fail(report_t *report, const char *format, ...)
{
    report->failures++;
    const size_t room = sizeof report->text - report->length;
    if (room < 256) return;
    char *line = report->text + report->length;
    int used = snprintf(line, room, "%s%s", report->context ? report->context : "", report->context ? ": " : "");
    va_list list;
    va_start(list, format);
    if (used >= 0 && (size_t)used < room) used += vsnprintf(line + used, room - (size_t)used, format, list);
    va_end(list);
    report->length += used < 0 ? 0 : (size_t)used < room - 2 ? (size_t)used : room - 2;
    report->text[report->length++] = '\n';
    report->text[report->length] = '\0';
}

/* ---- BF16 and F16: sign, exponent, fraction; the exponent gets what the fraction leaves of 15 bits ---- */

static int fraction_bits(cumoe_dtype_t dtype)
{
    return dtype == CUMOE_F16 ? 10 : 7;
}

/* Exponent of the smallest normal number. */
static int min_exponent(int fraction)
{
    return 2 - (1 << (14 - fraction));
}

static double decode(uint16_t bits, int fraction)
{
    const int exponent = (bits & 0x7fff) >> fraction, last = (1 << (15 - fraction)) - 1;
    const int steps = (bits & ((1 << fraction) - 1)) + (exponent > 0 ? 1 << fraction : 0);
    double magnitude = ldexp(steps, min_exponent(fraction) + (exponent > 0 ? exponent - 1 : 0) - fraction);
    if (exponent == last) magnitude = bits & ((1 << fraction) - 1) ? NAN : INFINITY;
    return bits & 0x8000 ? -magnitude : magnitude;
}

/* The bits of a magnitude count the steps from 0 up to it, and infinity comes where the next number would. */
static uint16_t encode(double value, int fraction)
{
    const uint16_t sign = signbit(value) ? 0x8000 : 0, infinity = (uint16_t)(0x7fff >> fraction << fraction);
    if (isnan(value)) return sign | 0x7fff;
    if (isinf(value)) return sign | infinity;
    int exponent;
    frexp(value, &exponent);
    const int above = value == 0 || exponent <= min_exponent(fraction) ? 0 : exponent - 1 - min_exponent(fraction);
    const double steps = rint(ldexp(fabs(value), fraction - min_exponent(fraction) - above));
    const double bits = ldexp(above, fraction) + steps;
    return sign | (bits < infinity ? (uint16_t)bits : infinity);
}

double real_get(const void *data, cumoe_dtype_t dtype, int64_t i)
{
    if (dtype == CUMOE_F64) return ((const double *)data)[i];
    if (dtype == CUMOE_F32) return (double)((const float *)data)[i];
    return decode(((const uint16_t *)data)[i], fraction_bits(dtype));
}

void real_set(void *data, cumoe_dtype_t dtype, int64_t i, double value)
{
    if (dtype == CUMOE_F64)
        ((double *)data)[i] = value;
    else if (dtype == CUMOE_F32)
        ((float *)data)[i] = (float)value;
    else
        ((uint16_t *)data)[i] = encode(value, fraction_bits(dtype));
}

size_t real_size(cumoe_dtype_t dtype)
{
    return dtype == CUMOE_F64 ? sizeof(double) : dtype == CUMOE_F32 ? sizeof(float) : sizeof(uint16_t);
}

double real_round(cumoe_dtype_t dtype, double value)
{
    if (dtype == CUMOE_F64) return value;
    if (dtype == CUMOE_F32) return (double)(float)value;
    return decode(encode(value, fraction_bits(dtype)), fraction_bits(dtype));
}

double real_rounding_unit(cumoe_dtype_t dtype)
{
    if (dtype == CUMOE_F64) return DBL_EPSILON / 2;
    if (dtype == CUMOE_F32) return (double)FLT_EPSILON / 2;
    return ldexp(0.5, -fraction_bits(dtype));
}

void real_gather(real_view_t view, double *values)
{
    for (int64_t row = 0; row < view.rows; row++)
        for (int64_t col = 0; col < view.cols; col++)
            *values++ = real_get(view.data, view.dtype, row * view.row_stride + col * view.col_stride);
}

void real_scatter(real_view_t view, const double *values)
{
    for (int64_t row = 0; row < view.rows; row++)
        for (int64_t col = 0; col < view.cols; col++)
            real_set(view.data, view.dtype, row * view.row_stride + col * view.col_stride, *values++);
}

double compare_scaled(report_t *report, const char *what, int64_t n, const double *actual, const double *expected,
                      const double *size, double limit)
{
    double error = 0, norm = 0;
    int64_t wrong = 0, first = 0;
    for (int64_t i = 0; i < n; i++) {
        const double a = actual[i], e = expected[i];
        if (isfinite(a) && isfinite(e)) {
            error += (a - e) * (a - e);
            norm += size ? size[i] * size[i] : e * e;
        } else if (!(isnan(a) && isnan(e)) && a != e && wrong++ == 0) {
            first = i;
        }
    }
    if (wrong > 0)
        report_fail(report,
                    "%s: %" PRId64 " elements are not finite where they should be, or the reverse (the first: "
                    "element %" PRId64 " = %g, expected %g)",
                    what, wrong, first, actual[first], expected[first]);
    /* Where 0 is expected, nothing else gives a scale. What underflows in F32 may be lost, but no more than that.
     */
    const double scale = norm == 0 ? 1 : limit == 0 ? sqrt(norm) : fmax(sqrt(norm), 1e-30 / limit);
    const double scaled = sqrt(error) / scale;
    if (limit > 0) report->worst = fmax(report->worst, scaled / limit);
    if (!(scaled <= limit))
        report_fail(report, "%s: off by %.3g of the size %.6g, allowed is %.3g", what, scaled, sqrt(norm), limit);
    return scaled;
}

double compare_view(report_t *report, const char *what, real_view_t actual, const double *expected,
                    const double *size, double limit)
{
    double *values = malloc((size_t)(actual.rows * actual.cols) * sizeof *values + 1);
    if (!values) {
        report_fail(report, "%s: no memory to compare", what);
        return INFINITY;
    }
    real_gather(actual, values);
    const double scaled = compare_scaled(report, what, actual.rows * actual.cols, values, expected, size, limit);
    free(values);
    return scaled;
}

double compare_vector(report_t *report, const char *what, const void *actual, cumoe_dtype_t dtype, int64_t n,
                      const double *expected, double limit)
{
    const real_view_t view = {
        .data = (void *)actual, .dtype = dtype, .rows = 1, .cols = n, .row_stride = n, .col_stride = 1};
    return compare_view(report, what, view, expected, NULL, limit);
}

void compare_bits(report_t *report, const char *what, const void *actual, const void *expected, size_t size)
{
    const unsigned char *a = actual, *e = expected;
    size_t different = 0, first = size;
    for (size_t i = 0; i < size; i++) {
        if (a[i] == e[i]) continue;
        if (first == size) first = i;
        different++;
    }
    if (different > 0)
        report_fail(report, "%s: %zu of %zu bytes differ, the first at byte %zu", what, different, size, first);
}
