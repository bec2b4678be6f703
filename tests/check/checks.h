/* What cumoe-check runs: every stage and the whole layer over the tables of cases. */
#ifndef CUMOE_TESTS_CHECKS_H
#define CUMOE_TESTS_CHECKS_H

#include "tests/support/problem.h"

typedef void check_body_t(problem_t *problem, report_t *report);

/* One line of output. */
typedef struct check {
    const char *part; /* of the library: a stage, or the layer's forward or backward pass */
    check_body_t *body;
    int layer_pass; /* 0 = a stage, 1 = forward, 2 = backward: those have outputs to hash */
    layer_case_t layer_case;
    problem_options_t options;
} check_t;

/* Call visit for every check that the backend has, until it gives back false. */
typedef bool check_visit_t(const check_t *check, void *context);
void checks_visit(cumoe_backend_t backend, uint64_t seed, check_visit_t *visit, void *context);

#endif
