/* What every Criterion suite needs: a handle, and a report that becomes a failure. */
#ifndef CUMOE_TESTS_SUITE_H
#define CUMOE_TESTS_SUITE_H

#include "tests/support/device.h"
#include "tests/support/pairwise.h"
#include "tests/support/random.h"

#include <criterion/criterion.h>
#include <string.h>

#define EXPECT_EMPTY(report) cr_expect((report).failures == 0, "%s", (report).text)

static inline cumoe_handle_t *suite_handle(void)
{
    cumoe_handle_t *handle = NULL;
    const cumoe_status_t status = cumoe_handle_create(&handle, device_backend(), 0);
    cr_assert(status == CUMOE_SUCCESS, "%s", cumoe_last_error());
    return handle;
}

/* Types and activations for what hangs on neither: some of each, without the reference. */
enum { NUM_SUITE_OPTIONS = 6 };

static inline problem_options_t suite_options(int i, const gate_variant_t *variant, uint64_t seed)
{
    static const problem_options_t options[NUM_SUITE_OPTIONS] = {
        {.dtype = CUMOE_F32, .activation = CUMOE_ACTIVATION_RELU},
        {.dtype = CUMOE_F64, .activation = CUMOE_ACTIVATION_GELU, .bias = true},
        {.dtype = CUMOE_BF16,
         .activation = CUMOE_ACTIVATION_SWIGLU_CLAMPED,
         .bias = true,
         .gradient_dtype = CUMOE_F32},
        {.dtype = CUMOE_F16, .activation = CUMOE_ACTIVATION_GEGLU, .gate_dtype = CUMOE_F16, .recompute = 1},
        {.dtype = CUMOE_F32, .activation = CUMOE_ACTIVATION_SWIGLU, .bias = true},
        {.dtype = CUMOE_BF16, .activation = CUMOE_ACTIVATION_IDENTITY},
    };
    problem_options_t chosen = options[i];
    chosen.variant = *variant;
    chosen.seed = seed;
    chosen.without_reference = true;
    return chosen;
}

/* Both runs on the same inputs: everything that comes back has the same bits. */
static inline void suite_compare_runs(problem_t *a, problem_t *b, report_t *report)
{
    if (!problem_run_forward(a, report) || !problem_run_backward(a, report)) return;
    problem_bits_t forward = problem_outputs(a, false), backward = problem_outputs(a, true);
    if (problem_run_forward(b, report)) problem_compare_outputs(b, false, &forward, report);
    if (problem_run_backward(b, report)) problem_compare_outputs(b, true, &backward, report);
    problem_bits_free(&forward);
    problem_bits_free(&backward);
}

/* Call body for every case of the table that means anything with the gate: with F32 and both kinds of activation,
 * with F64, and with 16 bits and everything else in turn. */
typedef void suite_body_t(problem_t *problem, report_t *report);

static inline void suite_one_case(const cumoe_handle_t *handle, const layer_case_t *layer_case,
                                  const problem_options_t *options, suite_body_t *body, report_t *report)
{
    problem_t problem;
    if (problem_create(&problem, handle, layer_case, options, report)) body(&problem, report);
    problem_destroy(&problem);
}

enum { NUM_CASE_OPTIONS = 4 };

static inline problem_options_t suite_case_options(int i, int n)
{
    const cumoe_dtype_t half = i % 2 ? CUMOE_BF16 : CUMOE_F16, gate = i % 4 < 2 ? half : CUMOE_DTYPE_DEFAULT;
    const problem_options_t options[NUM_CASE_OPTIONS] = {
        {.dtype = CUMOE_F32, .activation = CUMOE_ACTIVATION_RELU},
        {.dtype = CUMOE_F32, .activation = CUMOE_ACTIVATION_SWIGLU},
        {.dtype = CUMOE_F64, .activation = CUMOE_ACTIVATION_SWIGLU},
        {.dtype = half,
         .gate_dtype = gate,
         .index_weight_dtype = gate,
         .gradient_dtype = i % 3 ? CUMOE_DTYPE_DEFAULT : CUMOE_F32,
         .activation = (cumoe_activation_t)(i % CUMOE_NUM_ACTIVATIONS),
         .bias = i % 5 < 3,
         .recompute = i % 7 < 3},
    };
    return options[n];
}

/* The gates that came with the first version run with all options. Those behind them run with two of the four in
 * turn, since only the gate is another: everything behind it takes what the routing says. Where time is short a
 * case runs with one set of options, with the noisy gate in training and, in turn, one of the others. */
static inline bool suite_leaves_out(int i, int n, const gate_variant_t *variant)
{
    const int v = (int)(variant - GATE_VARIANTS), later = NUM_GATE_VARIANTS - VARIANT_EXTERNAL - 1;
    const bool only = !case_applies(&LAYER_CASES[i], &GATE_VARIANTS[VARIANT_NOISY]); /* of its gate */
    const int in_turn = i % 2 ? VARIANT_EXTERNAL + 1 + i / 2 % later : 1 + i / 2 % VARIANT_EXTERNAL;
    if (device_is_slow()) return n != (i + v) % NUM_CASE_OPTIONS || (v != VARIANT_NOISY && v != in_turn && !only);
    return v > VARIANT_EXTERNAL && n % 2 != (i + v) % 2;
}

static inline void suite_cases(const char *test, int v, bool without_reference, suite_body_t *body)
{
    const uint64_t seed = random_seed(test, 1);
    cumoe_handle_t *handle = suite_handle();
    const gate_variant_t *variant = &GATE_VARIANTS[v];
    report_t report = {0};
    for (int i = 0; i < NUM_LAYER_CASES; i++)
        for (int n = 0; n < NUM_CASE_OPTIONS && case_applies(&LAYER_CASES[i], variant); n++) {
            if (suite_leaves_out(i, n, variant) || (i / NUM_CASE_OPTIONS + v + device_part()) % device_share() != 0)
                continue;
            problem_options_t options = suite_case_options(i, n);
            options.variant = *variant;
            options.seed = seed + (uint64_t)i;
            options.without_reference = without_reference;
            suite_one_case(handle, &LAYER_CASES[i], &options, body, &report);
        }
    cumoe_handle_destroy(handle);
    EXPECT_EMPTY(report);
}

static inline void suite_all_cases(const char *test, int v, suite_body_t *body)
{
    suite_cases(test, v, false, body);
}

static inline void suite_all_gates(const char *test, suite_body_t *body)
{
    for (int v = 0; v < NUM_GATE_VARIANTS; v++) suite_all_cases(test, v, body);
}

/* For what compares runs with each other. */
static inline void suite_all_gates_alone(const char *test, suite_body_t *body)
{
    for (int v = 0; v < NUM_GATE_VARIANTS; v++) suite_cases(test, v, true, body);
}

/* For what takes rows as they come: the gates whose slots are laid out in different ways. */
static inline void suite_all_routings(const char *test, suite_body_t *body)
{
    for (int v = VARIANT_NOISY; v <= VARIANT_EXTERNAL; v++) suite_all_cases(test, v, body);
    suite_all_cases(test, VARIANT_BALANCED, body);
}

/* Call body for every activation and the types up to last_dtype, with the caller's choice of experts. */
static inline void suite_activations(const char *test, const layer_case_t *layer_case, cumoe_dtype_t last_dtype,
                                     suite_body_t *body)
{
    const uint64_t seed = random_seed(test, 1);
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    for (cumoe_dtype_t dtype = CUMOE_F64; dtype <= last_dtype; dtype++)
        for (int activation = 0; activation < CUMOE_NUM_ACTIVATIONS; activation++) {
            const problem_options_t options = {.dtype = dtype,
                                               .activation = (cumoe_activation_t)activation,
                                               .variant = GATE_VARIANTS[VARIANT_EXTERNAL],
                                               .seed = seed};
            suite_one_case(handle, layer_case, &options, body, &report);
        }
    cumoe_handle_destroy(handle);
    EXPECT_EMPTY(report);
}

/* Where time is short, two of three problems are left to the other machines. */
static inline bool suite_spares(const problem_t *problem)
{
    return device_is_slow() && problem->options.seed % 3 != 0;
}

/* Call body for the pairwise selection. */
static inline void suite_pairs(const char *test, bool without_reference, suite_body_t *body)
{
    const uint64_t seed = random_seed(test, 1);
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    int chosen[MAX_PAIRWISE];
    const int num_chosen = pairs_choose(&PAIRWISE, MAX_PAIRWISE, chosen);
    cr_assert(num_chosen > 0);
    /* Where time is short every suite takes another part. */
    const int step = device_is_slow() ? 2 * device_share() : 1;
    for (int n = ((int)strlen(test) + 2 * device_part()) % step; n < num_chosen; n += step) {
        layer_case_t layer_case;
        problem_options_t options;
        pairwise_case(chosen[n], n, seed, &layer_case, &options);
        options.without_reference = without_reference;
        suite_one_case(handle, &layer_case, &options, body, &report);
    }
    cumoe_handle_destroy(handle);
    EXPECT_EMPTY(report);
}

static inline void suite_pairwise(const char *test, suite_body_t *body)
{
    suite_pairs(test, false, body);
}

static inline void suite_pairwise_alone(const char *test, suite_body_t *body)
{
    suite_pairs(test, true, body);
}

#endif
