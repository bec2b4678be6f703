/* Parameters of ranks: initial values and optimizer steps are those of one device, and a rank has its own experts.
 */
#include "tests/suite.h"
#include "tests/support/ranks.h"

#include <stdlib.h>

static const layer_case_t CASE = {"parameters",     12, 7, 9, 10, 4, .pattern = PATTERN_RANDOM, .groups = 5,
                                  .top_k_groups = 2};

/* Matrices of experts [first, first + count) in contiguous arrays, as doubles. */
static void read_matrix(const problem_t *p, const cumoe_weights_t *w, problem_matrix_t m, int64_t first,
                        int64_t count, double *values)
{
    for (int64_t b = 0; b < count; b++) {
        const real_view_t view = problem_matrix_view(p, w, m, first + b);
        real_gather(view, values + b * view.rows * view.cols);
    }
}

/* The rank's arrays against those of all ranks, bit for bit. */
static void compare_weights(rank_t *r, const cumoe_weights_t *whole, problem_matrix_t begin)
{
    const problem_t *p = r->whole;
    for (problem_matrix_t m = begin; m < NUM_MATRICES; m++) {
        if (!problem_has_matrix(p, m)) continue;
        const real_view_t view = problem_matrix_view(p, whole, m, 0);
        const int64_t first = m >= MATRIX_UP ? r->first_expert : 0;
        const int64_t count = m >= MATRIX_UP ? r->experts : problem_matrix_blocks(p, m);
        const int64_t n = count * view.rows * view.cols;
        double *expected = malloc((size_t)n * sizeof *expected), *actual = malloc((size_t)n * sizeof *actual);
        if (!expected || !actual) abort();
        read_matrix(p, whole, m, first, count, expected);
        for (int64_t i = 0; i < n; i++)
            actual[i] = real_get(*problem_matrix_pointer(&r->weights, m), view.dtype, i);
        compare_bits(&r->report, PROBLEM_MATRIX_NAMES[m], actual, expected, (size_t)n * sizeof *actual);
        free(expected);
        free(actual);
    }
}

static void check_initial_values(rank_t *r)
{
    if (!rank_create(r, r->whole, r->options, r->ep)) return;
    const int32_t together = (int32_t)(r->whole->experts / r->whole->groups);
    report_check(&r->report, r->first_expert % together == 0 && r->experts % together == 0);
    const cumoe_status_t status = device_weights_init(r->handle, r->layer, 77, &r->weights);
    report_check(&r->report, status == CUMOE_SUCCESS);
    compare_weights(r, r->context, 0);
}

Test(parameters, initial_values)
{
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    for (int32_t W = 1; W <= 5; W++) {
        const problem_options_t options = {.dtype = W % 2 ? CUMOE_BF16 : CUMOE_F32,
                                           .activation = CUMOE_ACTIVATION_SWIGLU,
                                           .bias = true,
                                           .variant = GATE_VARIANTS[VARIANT_HIERARCHICAL],
                                           .seed = random_seed("initial values", 53),
                                           .without_reference = true};
        const ranks_options_t ranks = {.num_ranks = W, .capacity = 3};
        problem_t p;
        cr_assert(problem_create(&p, handle, &CASE, &options, &report), "%s", report.text);
        cr_assert_eq(device_weights_init(handle, p.layer, 77, &p.weights), CUMOE_SUCCESS);
        ranks_run(&p, &ranks, check_initial_values, &p.weights, &report);
        problem_destroy(&p);
    }
    cumoe_handle_destroy(handle);
    EXPECT_EMPTY(report);
}

/* Two steps with the gradients of the problem's backward pass. */
static cumoe_status_t take_steps(const cumoe_handle_t *handle, const cumoe_layer_t *layer, buffer_list_t *buffers,
                                 cumoe_optimizer_t optimizer, const cumoe_weights_t *weights,
                                 const cumoe_weights_t *gradients)
{
    size_t size;
    cumoe_status_t status = cumoe_optimizer_state_size(layer, optimizer, weights, &size);
    cumoe_optimizer_args_t args = {.struct_size = sizeof args,
                                   .optimizer = optimizer,
                                   .weights = weights,
                                   .gradients = gradients,
                                   .values = {.learning_rate = 0.01F},
                                   .state = buffer_get(buffers, status == CUMOE_SUCCESS ? size : 0),
                                   .state_size = size};
    for (args.values.step = 1; status == CUMOE_SUCCESS && args.values.step <= 2; args.values.step++)
        status = device_optimizer_step(handle, layer, &args);
    return status;
}

typedef struct steps {
    cumoe_optimizer_t optimizer;
    const problem_t *after; /* one device, after the steps */
} steps_t;

static void check_steps(rank_t *r)
{
    const steps_t *steps = r->context;
    if (!rank_create(r, r->whole, r->options, r->ep) || !rank_run(r)) return;
    report_check(&r->report, take_steps(r->handle, r->layer, &r->buffers, steps->optimizer, &r->weights,
                                        &r->gradients) == CUMOE_SUCCESS);
    compare_weights(r, &steps->after->weights, MATRIX_UP); /* gates: their gradients differ by rounding */
}

Test(parameters, optimizer_steps)
{
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    for (int i = 0; i < 4; i++) {
        const problem_options_t options = {.dtype = i % 2 ? CUMOE_BF16 : CUMOE_F32,
                                           .activation = CUMOE_ACTIVATION_GEGLU,
                                           .bias = true,
                                           .gradient_dtype = CUMOE_F32,
                                           .variant = GATE_VARIANTS[VARIANT_HIERARCHICAL],
                                           .seed = random_seed("optimizer steps", 54),
                                           .max_threads = 1,
                                           .without_reference = true};
        const ranks_options_t ranks = {.num_ranks = 2 + i};
        problem_t p, after;
        cr_assert(problem_create(&p, handle, &CASE, &options, &report), "%s", report.text);
        cr_assert(problem_create(&after, handle, &CASE, &options, &report), "%s", report.text);
        steps_t steps = {i < 2 ? CUMOE_OPTIMIZER_ADAM : CUMOE_OPTIMIZER_FACTORED_ADAM, &after};
        if (problem_run_forward(&p, &report) && problem_run_forward(&after, &report) &&
            problem_run_backward(&after, &report)) {
            cr_assert_eq(
                take_steps(handle, after.layer, &after.buffers, steps.optimizer, &after.weights, &after.gradients),
                CUMOE_SUCCESS, "%s", cumoe_last_error());
            ranks_run(&p, &ranks, check_steps, &steps, &report);
        }
        problem_destroy(&p);
        problem_destroy(&after);
    }
    cumoe_handle_destroy(handle);
    EXPECT_EMPTY(report);
}
