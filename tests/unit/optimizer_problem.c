#include "optimizer_problem.h"

#include <stdio.h>
#include <string.h>

static void make_numbers(optimizer_problem_t *p, problem_matrix_t matrix)
{
    optimizer_numbers_t *n = &p->numbers[matrix];
    const real_view_t view = problem_matrix_view(&p->layer, &p->layer.weights, matrix, 0);
    n->rows = view.rows;
    n->cols = view.cols;
    n->elements = problem_matrix_elements(&p->layer, matrix);
    const size_t size = (size_t)n->elements * sizeof(double);
    double **arrays[] = {&n->value,    &n->gradient, &n->moment1,      &n->moment2,
                         &n->row_mean, &n->col_mean, &n->moment1_size, &n->tolerance};
    for (int i = 0; i < COUNT(arrays); i++) *arrays[i] = buffer_get_zero(&p->layer.buffers, size);
}

/* What the layer's name does not tell. */
static void extend_name(problem_t *layer, const optimizer_case_t *wanted)
{
    const size_t length = strlen(layer->name);
    snprintf(layer->name + length, sizeof layer->name - length, ", optimizer %d, glu %d %d, layout %d %d",
             wanted->optimizer, wanted->glu, wanted->gradient_glu, wanted->layout, wanted->gradient_layout);
}

bool optimizer_create(optimizer_problem_t *p, const cumoe_handle_t *handle, const optimizer_case_t *wanted,
                      report_t *report)
{
    *p = (optimizer_problem_t){.gradient_size = wanted->gradient_size ? wanted->gradient_size : 1,
                               .random = random_start(wanted->options.seed + 1)};
    const layer_case_t layer_case = {.name = "step",
                                     .tokens = 1,
                                     .hidden_size = wanted->H ? wanted->H : 13,
                                     .intermediate_size = wanted->I ? wanted->I : 17,
                                     .experts = wanted->E ? wanted->E : 3,
                                     .top_k = 1,
                                     .glu = wanted->glu,
                                     .layout = wanted->layout};
    problem_t *layer = &p->layer;
    problem_options_t options = wanted->options;
    if (!options.dtype) options.dtype = CUMOE_F32;
    if (!options.variant.name) options.variant = GATE_VARIANTS[VARIANT_NOISY];
    if (!options.max_threads) options.max_threads = 1; /* waiting for threads takes longer than small steps */
    options.without_reference = true;
    if (!problem_create(layer, handle, &layer_case, &options, report)) return false;
    extend_name(layer, wanted);
    report->context = layer->name;
    layer->gradients = (cumoe_weights_t){.dtype = options.gradient_dtype};
    problem_weights_layout(layer, &layer->gradients, wanted->gradient_glu, wanted->gradient_layout,
                           layer->gradient_bytes);
    layer->gradients.gate_bias = NULL; /* it has no gradient */
    layer->gradient_bytes[MATRIX_GATE_BIAS] = 0;
    for (problem_matrix_t m = 0; m < NUM_MATRICES; m++) {
        if (!problem_has_matrix(layer, m)) continue;
        make_numbers(p, m);
        if (optimizer_has_gradient(p, m)) problem_matrix_set(layer, &layer->gradients, m, p->numbers[m].gradient);
    }
    p->args = (cumoe_optimizer_args_t){.struct_size = sizeof p->args,
                                       .optimizer = wanted->optimizer,
                                       .weights = &layer->weights,
                                       .gradients = &layer->gradients,
                                       .values = {.learning_rate = 0.01, .step = 1}};
    if (cumoe_optimizer_state_size(layer->layer, wanted->optimizer, &layer->weights, &p->args.state_size) !=
        CUMOE_SUCCESS) {
        report_fail(report, "%s", cumoe_last_error());
        return false;
    }
    p->args.state = buffer_get(&layer->buffers, p->args.state_size);
    return true;
}

void optimizer_destroy(optimizer_problem_t *p)
{
    problem_destroy(&p->layer);
}

bool optimizer_has_gradient(const optimizer_problem_t *p, problem_matrix_t matrix)
{
    return problem_has_matrix(&p->layer, matrix) && *problem_matrix_pointer(&p->layer.gradients, matrix);
}

void optimizer_draw_gradients(optimizer_problem_t *p)
{
    for (problem_matrix_t m = 0; m < NUM_MATRICES; m++) {
        if (!optimizer_has_gradient(p, m)) continue;
        const optimizer_numbers_t *n = &p->numbers[m];
        for (int64_t i = 0; i < n->elements; i++) n->gradient[i] = p->gradient_size * random_normal(&p->random);
        problem_matrix_set(&p->layer, &p->layer.gradients, m, n->gradient);
    }
}

/* A copy of all arrays of weights or gradients. */
static void copy_arrays(cumoe_weights_t *copy, const size_t *bytes, buffer_list_t *buffers)
{
    for (problem_matrix_t m = 0; m < NUM_MATRICES; m++) {
        void **pointer = (void **)problem_matrix_pointer(copy, m);
        if (bytes[m] && *pointer) *pointer = memcpy(buffer_get(buffers, bytes[m]), *pointer, bytes[m]);
    }
}

static void compare_arrays(report_t *report, const cumoe_weights_t *actual, const cumoe_weights_t *expected,
                           const size_t *bytes)
{
    for (problem_matrix_t m = 0; m < NUM_MATRICES; m++) {
        const void *was = *problem_matrix_pointer(expected, m);
        if (bytes[m] && was)
            compare_bits(report, PROBLEM_MATRIX_NAMES[m], *problem_matrix_pointer(actual, m), was, bytes[m]);
    }
}

/* All that is no element of an array of weights is poison as before. */
static void check_gaps(const problem_t *layer, report_t *report)
{
    cumoe_weights_t copy = layer->weights;
    buffer_list_t buffers = {0};
    copy_arrays(&copy, layer->weight_bytes, &buffers);
    for (problem_matrix_t m = 0; m < NUM_MATRICES; m++)
        for (int64_t b = 0; b < problem_matrix_blocks(layer, m) && problem_has_matrix(layer, m); b++) {
            const real_view_t view = problem_matrix_view(layer, &copy, m, b);
            const size_t size = real_size(view.dtype);
            for (int64_t i = 0; i < view.rows * view.cols; i++) {
                const int64_t at = i / view.cols * view.row_stride + i % view.cols * view.col_stride;
                buffer_poison((char *)view.data + (size_t)at * size, size);
            }
        }
    for (problem_matrix_t m = 0; m < NUM_MATRICES; m++)
        if (layer->weight_bytes[m] && !buffer_is_poison(*problem_matrix_pointer(&copy, m), layer->weight_bytes[m]))
            report_fail(report, "something was written between the elements of %s", PROBLEM_MATRIX_NAMES[m]);
    buffer_free_all(&buffers);
}

void optimizer_run_step(optimizer_problem_t *p, report_t *report)
{
    problem_t *layer = &p->layer;
    buffer_list_t buffers = {0};
    cumoe_weights_t gradients = layer->gradients;
    copy_arrays(&gradients, layer->gradient_bytes, &buffers);
    report->context = layer->name;
    const cumoe_status_t status = device_optimizer_step(layer->handle, layer->layer, &p->args);
    if (status != CUMOE_SUCCESS) report_fail(report, "%s", cumoe_last_error());
    compare_arrays(report, &layer->gradients, &gradients, layer->gradient_bytes);
    check_gaps(layer, report);
    report_check(report, buffer_guards_intact(&layer->buffers));
    buffer_free_all(&buffers);
}

void optimizer_run_idle_step(optimizer_problem_t *p, report_t *report)
{
    buffer_list_t buffers = {0};
    cumoe_weights_t before = p->layer.weights;
    copy_arrays(&before, p->layer.weight_bytes, &buffers);
    optimizer_run_step(p, report);
    compare_arrays(report, &p->layer.weights, &before, p->layer.weight_bytes);
    buffer_free_all(&buffers);
}

static void check_array(const optimizer_problem_t *p, problem_matrix_t matrix, report_t *report)
{
    const optimizer_numbers_t *n = &p->numbers[matrix];
    const cumoe_dtype_t dtype = problem_matrix_view(&p->layer, &p->layer.weights, matrix, 0).dtype;
    buffer_list_t buffers = {0};
    double *actual = buffer_get(&buffers, (size_t)n->elements * sizeof *actual);
    problem_matrix_get(&p->layer, &p->layer.weights, matrix, actual);
    int64_t wrong = 0, first = 0;
    for (int64_t i = n->elements - 1; i >= 0; i--) {
        const double low = real_round(dtype, n->value[i] - n->tolerance[i]);
        const double high = real_round(dtype, n->value[i] + n->tolerance[i]);
        if (actual[i] >= low && actual[i] <= high) continue;
        wrong++;
        first = i;
    }
    if (wrong > 0)
        report_fail(report, "step %lld, %s: %lld of %lld wrong, first [%lld] is %.9g, expected %.9g +- %.3g",
                    (long long)p->args.values.step, PROBLEM_MATRIX_NAMES[matrix], (long long)wrong,
                    (long long)n->elements, (long long)first, actual[first], n->value[first], n->tolerance[first]);
    buffer_free_all(&buffers);
}

void optimizer_check(const optimizer_problem_t *p, report_t *report)
{
    for (problem_matrix_t m = 0; m < NUM_MATRICES; m++)
        if (problem_has_matrix(&p->layer, m)) check_array(p, m, report);
}

void optimizer_step(optimizer_problem_t *p, int64_t t, report_t *report)
{
    p->args.values.step = t;
    optimizer_draw_gradients(p);
    optimizer_expect_step(p);
    optimizer_run_step(p, report);
    optimizer_check(p, report);
}

void optimizer_compare(const optimizer_problem_t *actual, const optimizer_problem_t *expected, report_t *report)
{
    compare_arrays(report, &actual->layer.weights, &expected->layer.weights, expected->layer.weight_bytes);
}
