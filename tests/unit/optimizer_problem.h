/* A layer's parameters and gradients, each in a layout of their own, arguments of an optimizer step, and beside
 * them the step in double precision as cumoe/optimizer.h states it. */
#ifndef CUMOE_TESTS_OPTIMIZER_PROBLEM_H
#define CUMOE_TESTS_OPTIMIZER_PROBLEM_H

#include "tests/suite.h"

typedef struct optimizer_case {
    problem_options_t options; /* dtype 0 = F32, no variant = NOISY_TOPK, max_threads 0 = 1 */
    int32_t H, I, E;           /* 0 = 13, 17, 3 */
    cumoe_optimizer_t optimizer;
    cumoe_glu_placement_t glu, gradient_glu;
    case_layout_t layout, gradient_layout;
    double gradient_size; /* of the random gradients; 0 = 1 */
} optimizer_case_t;

/* The numbers of an array, [E, rows, cols] each but for the means. */
typedef struct optimizer_numbers {
    int64_t rows, cols, elements; /* elements = 0: the layer has no such array */
    double *value, *gradient, *moment1, *moment2;
    double *row_mean, *col_mean; /* [E, rows], [E, cols] */
    double *moment1_size;        /* moment1 of |gradient|: the scale of its rounding errors */
    double *tolerance;           /* of value: what the roundings of F32 (F64) arithmetic explain */
} optimizer_numbers_t;

typedef struct optimizer_problem {
    problem_t layer;
    double gradient_size;
    random_state_t random;
    optimizer_numbers_t numbers[NUM_MATRICES];
    cumoe_optimizer_args_t args; /* state: of the right size, poisoned */
} optimizer_problem_t;

/* false, with a line in the report: the layer or its state could not be had. Destroy it in either case. */
bool optimizer_create(optimizer_problem_t *p, const cumoe_handle_t *handle, const optimizer_case_t *wanted,
                      report_t *report);
void optimizer_destroy(optimizer_problem_t *p);

/* Does the layer have the array, and is its gradient given? */
bool optimizer_has_gradient(const optimizer_problem_t *p, problem_matrix_t matrix);

/* Fill all gradients with random numbers. */
void optimizer_draw_gradients(optimizer_problem_t *p);

/* The step of p->args in double precision; before the library's, since a first step begins with the values that it
 * finds. */
void optimizer_expect_step(optimizer_problem_t *p);

/* The library's step: success, and gradients, guards and all between the elements stay as they are. */
void optimizer_run_step(optimizer_problem_t *p, report_t *report);

/* The same for a step that changes no bit of the parameters. */
void optimizer_run_idle_step(optimizer_problem_t *p, report_t *report);

/* Are the parameters what was expected? */
void optimizer_check(const optimizer_problem_t *p, report_t *report);

/* Draw, expect, run and check step t. */
void optimizer_step(optimizer_problem_t *p, int64_t t, report_t *report);

/* The same bits in all parameters? The two have the same layout. */
void optimizer_compare(const optimizer_problem_t *actual, const optimizer_problem_t *expected, report_t *report);

/* ---- for suites ---- */

#define COUNT(array) ((int)(sizeof(array) / sizeof(array)[0]))

static const cumoe_optimizer_t OPTIMIZERS[] = {CUMOE_OPTIMIZER_ADAM, CUMOE_OPTIMIZER_FACTORED_ADAM};

typedef void optimizer_body_t(optimizer_problem_t *p, report_t *report);

static inline void with_optimizer(const optimizer_case_t *wanted, optimizer_body_t *body)
{
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    optimizer_problem_t p;
    if (optimizer_create(&p, handle, wanted, &report)) body(&p, &report);
    optimizer_destroy(&p);
    cumoe_handle_destroy(handle);
    EXPECT_EMPTY(report);
}

#endif
