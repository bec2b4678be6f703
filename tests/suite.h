/* What every Criterion suite needs: a handle, and a report that becomes a failure. */
#ifndef CUMOE_TESTS_SUITE_H
#define CUMOE_TESTS_SUITE_H

#include "tests/support/problem.h"
#include "tests/support/random.h"

#include <criterion/criterion.h>

#define EXPECT_EMPTY(report) cr_expect((report).failures == 0, "%s", (report).text)

static inline cumoe_handle_t *suite_handle(void)
{
    cumoe_handle_t *handle = NULL;
    const cumoe_status_t status = cumoe_handle_create(&handle, CUMOE_BACKEND_CPU, 0);
    cr_assert(status == CUMOE_SUCCESS, "%s", cumoe_last_error());
    return handle;
}

/* Call body for every case of the table that means anything with the gate, with both activations and types. */
typedef void suite_body_t(problem_t *problem, report_t *report);

static inline void suite_one_case(const cumoe_handle_t *handle, const layer_case_t *layer_case,
                                  const problem_options_t *options, suite_body_t *body, report_t *report)
{
    problem_t problem;
    if (problem_create(&problem, handle, layer_case, options, report)) body(&problem, report);
    problem_destroy(&problem);
}

static inline void suite_all_cases(const char *test, const gate_variant_t *variant, suite_body_t *body)
{
    const uint64_t seed = random_seed(test, 1);
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    for (int i = 0; i < NUM_LAYER_CASES; i++)
        for (int f64 = 0; f64 < 2 && case_applies(&LAYER_CASES[i], variant); f64++)
            for (int glu = 0; glu < 2; glu++) {
                const problem_options_t options = {
                    .dtype = f64 ? CUMOE_F64 : CUMOE_F32,
                    .activation = glu ? CUMOE_ACTIVATION_SWIGLU : CUMOE_ACTIVATION_RELU,
                    .variant = *variant,
                    .seed = seed + (uint64_t)i,
                };
                suite_one_case(handle, &LAYER_CASES[i], &options, body, &report);
            }
    cumoe_handle_destroy(handle);
    EXPECT_EMPTY(report);
}

#endif
