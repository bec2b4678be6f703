/* Each public stage alone against the reference: the bodies of the suites in tests/stage/ and of tests/check/. */
#ifndef CUMOE_TESTS_STAGES_H
#define CUMOE_TESTS_STAGES_H

#include "tests/support/problem.h"

void stage_check_gate(problem_t *problem, report_t *report);
void stage_check_permute(problem_t *problem, report_t *report);
void stage_check_up(problem_t *problem, report_t *report);
void stage_check_down(problem_t *problem, report_t *report);
void stage_check_combine(problem_t *problem, report_t *report);
void stage_check_down_backward(problem_t *problem, report_t *report);
void stage_check_up_backward(problem_t *problem, report_t *report);
void stage_check_permute_backward(problem_t *problem, report_t *report);

/* Not for EXTERNAL, which has no gate to differentiate. */
void stage_check_gate_backward(problem_t *problem, report_t *report);

/* Arguments of cumoe_gate(), with buffers for what comes out. */
cumoe_gate_args_t stage_gate_args(problem_t *problem, report_t *report);

#endif
