/* The buffers between stages, filled with what the reference says the stages before have left there. Every buffer
 * of rows has exactly R rows: one too many written, and the guard zone tells. */
#ifndef CUMOE_TESTS_STAGE_BUFFERS_H
#define CUMOE_TESTS_STAGE_BUFFERS_H

#include "tests/support/device.h"
#include "tests/support/problem.h"

/* How many rows reach an expert. */
int64_t stage_num_rows(const problem_t *problem);

/* What the gate leaves behind. */
cumoe_routing_t stage_routing(problem_t *problem);

/* The same arrays, poisoned. */
cumoe_routing_t stage_empty_routing(problem_t *problem);

/* What permute leaves behind; the rest of the arrays is poison. */
cumoe_rows_t stage_rows(problem_t *problem, report_t *report);
cumoe_rows_t stage_empty_rows(problem_t *problem);

/* Rounded to the token type, in rows: values[slot * width + i], and a poisoned buffer of that size. second (or
 * NULL) stands behind values in every row. */
void *stage_pack(problem_t *problem, const cumoe_rows_t *rows, const double *values, const double *second,
                 int64_t width);
void *stage_empty(problem_t *problem, int64_t width);

/* Rows as the library wrote them against values by slot. */
void stage_compare(const problem_t *problem, const cumoe_rows_t *rows, const char *what, const void *actual,
                   const double *expected, const double *second, int64_t width, report_t *report);

/* What a sum in F32 may be off whose terms a stage has rounded by itself. */
double stage_sum_limit(const problem_t *problem);

/* Poisoned scratch of exactly the size that the stage asks for, 64-byte aligned. */
void *stage_workspace(problem_t *problem, cumoe_stage_t stage, size_t *size, report_t *report);

/* A status other than success, or a written guard zone, goes into the report. */
bool stage_succeeded(const problem_t *problem, cumoe_status_t status, report_t *report);

/* The second half of z and dz, or NULL without glu. */
const double *stage_glu(const problem_t *problem, const double *values);

#endif
