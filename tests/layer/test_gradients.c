/* Gradients without the reference: backward against central differences of what forward computes, in F64, for every
 * activation, with and without biases, in every placement of glu. */
#include "tests/suite.h"

#include <stdlib.h>

/* <dy, y> + sum over losses l of loss_gradient[l] * losses[l]; the gradient of the loss THRESHOLD goes to the
 * thresholds alone */
static double total(problem_t *p, problem_matrix_t m)
{
    double sum = 0;
    cr_assert(device_layer_forward(p->handle, p->layer, &p->forward) == CUMOE_SUCCESS, "%s", cumoe_last_error());
    for (int64_t i = 0; i < p->tokens * p->hidden_size; i++)
        sum += ((const double *)p->backward.dy)[i] * ((const double *)p->forward.y)[i];
    for (int l = 0; l < CUMOE_NUM_LOSSES; l++)
        if (l != CUMOE_LOSS_THRESHOLD || m == MATRIX_THRESHOLDS)
            sum += p->input.loss_gradient[l] * ((const double *)p->forward.losses)[l];
    return sum;
}

/* Central differences of n numbers that stand col_stride apart, of matrix m or, NUM_MATRICES, of none. */
static void differentiate(problem_t *p, problem_matrix_t m, double *values, int64_t n, int64_t stride,
                          double *differences)
{
    const double step = 1e-5;
    for (int64_t i = 0; i < n; i++) {
        const double value = values[i * stride];
        values[i * stride] = value + step;
        const double above = total(p, m);
        values[i * stride] = value - step;
        const double below = total(p, m);
        values[i * stride] = value;
        differences[i] = (above - below) / (2 * step);
    }
}

/* Importance and load are sums in units of 2^-40: divided by two steps, that is 5e-8 for every token. */
static const double LIMIT = 1e-6;

static double *doubles(problem_t *p, int64_t n)
{
    return buffer_get(&p->buffers, (size_t)n * sizeof(double));
}

static void check_matrix(problem_t *p, problem_matrix_t m, report_t *report)
{
    const int64_t n = problem_matrix_elements(p, m);
    double *differences = doubles(p, n), *gradient = doubles(p, n), *next = differences;
    for (int64_t b = 0; b < problem_matrix_blocks(p, m); b++) {
        const real_view_t v = problem_matrix_view(p, &p->weights, m, b);
        for (int64_t row = 0; row < v.rows; row++, next += v.cols)
            differentiate(p, m, (double *)v.data + row * v.row_stride, v.cols, v.col_stride, next);
    }
    problem_matrix_get(p, &p->gradients, m, gradient);
    compare_scaled(report, PROBLEM_MATRIX_NAMES[m], n, gradient, differences, NULL, LIMIT);
}

static void body(problem_t *p, report_t *report)
{
    if (!problem_run_forward(p, report) || !problem_run_backward(p, report)) return;
    for (problem_matrix_t m = 0; m < NUM_MATRICES; m++)
        if (problem_has_gradient(p, m)) check_matrix(p, m, report);
    const int64_t elements = p->tokens * p->hidden_size, slots = p->max_slots;
    double *differences = doubles(p, elements > slots ? elements : slots);
    differentiate(p, NUM_MATRICES, (double *)p->forward.x, elements, 1, differences);
    compare_scaled(report, "x", elements, p->backward.dx, differences, NULL, LIMIT);
    if (!p->forward.index_weight) return;
    differentiate(p, NUM_MATRICES, (double *)p->forward.index_weight, slots, 1, differences);
    compare_scaled(report, "index_weight", slots, p->backward.dindex_weight, differences, NULL, LIMIT);
}

static void check_placement(const char *test, cumoe_glu_placement_t glu, case_layout_t layout)
{
    const layer_case_t layer_case = {"gradients", 7, 5, 4, 3, 2, .glu = glu, .layout = layout};
    const uint64_t seed = random_seed(test, 61);
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    for (int activation = 0; activation < CUMOE_NUM_ACTIVATIONS; activation++)
        for (int bias = 0; bias < 2; bias++)
            for (int v = 0; v <= VARIANT_EXTERNAL; v += VARIANT_EXTERNAL) { /* noisy top-k, external */
                const problem_options_t options = {.dtype = CUMOE_F64,
                                                   .activation = (cumoe_activation_t)activation,
                                                   .bias = bias,
                                                   .variant = GATE_VARIANTS[v],
                                                   .seed = seed + (uint64_t)activation,
                                                   .max_threads = 1};
                suite_one_case(handle, &layer_case, &options, body, &report);
            }
    cumoe_handle_destroy(handle);
    EXPECT_EMPTY(report);
}

Test(gradients, separate)
{
    check_placement("gradients, separate", CUMOE_GLU_SEPARATE, LAYOUT_PLAIN);
}

Test(gradients, glu_first)
{
    check_placement("gradients, glu first", CUMOE_GLU_FIRST, LAYOUT_PADDED);
}

Test(gradients, glu_last)
{
    check_placement("gradients, glu last", CUMOE_GLU_LAST, LAYOUT_PLAIN);
}

Test(gradients, glu_interleaved)
{
    check_placement("gradients, interleaved", CUMOE_GLU_INTERLEAVED, LAYOUT_TRANSPOSED);
}

/* Every gate, at the edges of both levels: K1 < G and K2 < B, K1 = G, K2 = B, one group, groups of one expert. */
Test(gradients, every_gate)
{
    static const layer_case_t cases[] = {
        {"gradients", 7, 5, 4, 6, 4},  {"gradients", 7, 5, 4, 6, 3}, {"gradients", 7, 5, 4, 6, 2},
        {"gradients", 13, 4, 3, 6, 2}, {"gradients", 7, 5, 4, 7, 2}, {"gradients", 7, 5, 4, 5, 2},
        {"gradients", 8, 5, 4, 4, 4},
    };
    const uint64_t seed = random_seed("gradients, gates", 62);
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (int v = 0; v < NUM_GATE_VARIANTS; v++) {
            const problem_options_t options = {.dtype = CUMOE_F64,
                                               .activation = CUMOE_ACTIVATION_SWIGLU,
                                               .variant = GATE_VARIANTS[v],
                                               .seed = seed + i,
                                               .max_threads = 1};
            suite_one_case(handle, &cases[i], &options, body, &report);
        }
    cumoe_handle_destroy(handle);
    EXPECT_EMPTY(report);
}
