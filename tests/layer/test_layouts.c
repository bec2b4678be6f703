/* Weights and gradients as other libraries store them: packing reads every layout, so outputs, gradients and
 * initial values have the bits of separate, contiguous arrays, which are those of cumoe_weights_create(). */
#include "tests/suite.h"

static const layer_case_t PLAIN = {"separate", 29, 13, 18, 5, 2, .pattern = PATTERN_RANDOM};

typedef struct placement {
    const char *name;
    cumoe_glu_placement_t glu;
    case_layout_t layout;
} placement_t;

static const placement_t PLACEMENTS[] = {
    {"transposed", CUMOE_GLU_SEPARATE, LAYOUT_TRANSPOSED},
    {"padded", CUMOE_GLU_SEPARATE, LAYOUT_PADDED},
    {"glu first", CUMOE_GLU_FIRST, LAYOUT_PLAIN},
    {"glu first, transposed", CUMOE_GLU_FIRST, LAYOUT_TRANSPOSED},
    {"glu first, padded", CUMOE_GLU_FIRST, LAYOUT_PADDED},
    {"glu last", CUMOE_GLU_LAST, LAYOUT_PLAIN},
    {"interleaved", CUMOE_GLU_INTERLEAVED, LAYOUT_PLAIN},
    {"interleaved, padded", CUMOE_GLU_INTERLEAVED, LAYOUT_PADDED},
    {"gpt-oss", CUMOE_GLU_INTERLEAVED, LAYOUT_TRANSPOSED},
};

enum { NUM_PLACEMENTS = sizeof PLACEMENTS / sizeof *PLACEMENTS };

static layer_case_t case_of(const placement_t *placement, bool plain_gradients)
{
    layer_case_t layer_case = PLAIN;
    layer_case.name = placement->name;
    layer_case.glu = placement->glu;
    layer_case.layout = placement->layout;
    layer_case.plain_gradients = plain_gradients;
    return layer_case;
}

/* Element by element, wherever it stands. */
static void compare_matrices(const problem_t *a, const cumoe_weights_t *expected, const problem_t *b,
                             const cumoe_weights_t *actual, report_t *report)
{
    buffer_list_t buffers = {0};
    for (problem_matrix_t m = 0; m < NUM_MATRICES; m++) {
        if (!*problem_matrix_pointer(expected, m)) continue;
        const size_t size = (size_t)problem_matrix_elements(a, m) * sizeof(double);
        double *e = buffer_get(&buffers, size), *v = buffer_get(&buffers, size);
        problem_matrix_get(a, expected, m, e);
        problem_matrix_get(b, actual, m, v);
        compare_bits(report, PROBLEM_MATRIX_NAMES[m], v, e, size);
    }
    buffer_free_all(&buffers);
}

static void compare_placements(problem_t *plain, problem_t *foreign, report_t *report)
{
    const size_t bytes = (size_t)(plain->tokens * plain->hidden_size) * real_size(plain->options.dtype);
    if (!problem_run_forward(foreign, report) || !problem_run_backward(foreign, report)) return;
    compare_bits(report, "y", foreign->forward.y, plain->forward.y, bytes);
    compare_bits(report, "dx", foreign->backward.dx, plain->backward.dx, bytes);
    compare_matrices(plain, &plain->gradients, foreign, &foreign->gradients, report);
}

/* Experts' arrays one element further, as a mapped file may have them. */
static void shift_experts(problem_t *p)
{
    for (problem_matrix_t m = MATRIX_UP; m < NUM_MATRICES; m++) {
        void **pointer = (void **)(uintptr_t)problem_matrix_pointer(&p->weights, m);
        if (!*pointer || p->weight_bytes[m] == 0) continue;
        const size_t element = real_size(p->options.dtype);
        char *shifted = (char *)buffer_get(&p->buffers, p->weight_bytes[m] + element) + element;
        memcpy(shifted, *pointer, p->weight_bytes[m]);
        *pointer = shifted;
    }
}

Test(layouts, stand_anywhere_on_the_cpu)
{
    const uint64_t seed = random_seed("anywhere", 82);
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    for (int i = 0; i < NUM_SUITE_OPTIONS && cumoe_handle_backend(handle) == CUMOE_BACKEND_CPU; i++) {
        const problem_options_t options = suite_options(i, &GATE_VARIANTS[VARIANT_NOISY], seed);
        problem_t plain;
        cr_assert(problem_create(&plain, handle, &PLAIN, &options, &report), "%s", report.text);
        cr_assert(problem_run_forward(&plain, &report) && problem_run_backward(&plain, &report), "%s", report.text);
        for (int n = 0; n < NUM_PLACEMENTS; n++) {
            const layer_case_t layer_case = case_of(&PLACEMENTS[n], true);
            problem_t foreign;
            cr_assert(problem_create(&foreign, handle, &layer_case, &options, &report), "%s", report.text);
            shift_experts(&foreign);
            compare_placements(&plain, &foreign, &report);
            problem_destroy(&foreign);
        }
        problem_destroy(&plain);
    }
    cumoe_handle_destroy(handle);
    EXPECT_EMPTY(report);
}

Test(layouts, have_the_bits_of_separate_arrays)
{
    const uint64_t seed = random_seed("layouts", 81);
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    for (int i = 0; i < NUM_SUITE_OPTIONS; i++) {
        const problem_options_t options = suite_options(i, &GATE_VARIANTS[VARIANT_NOISY], seed);
        problem_t plain;
        cr_assert(problem_create(&plain, handle, &PLAIN, &options, &report), "%s", report.text);
        cr_assert(problem_run_forward(&plain, &report) && problem_run_backward(&plain, &report), "%s", report.text);
        for (int n = 0; n < 2 * NUM_PLACEMENTS; n++) {
            const layer_case_t layer_case = case_of(&PLACEMENTS[n / 2], n % 2);
            problem_t foreign;
            if (problem_create(&foreign, handle, &layer_case, &options, &report))
                compare_placements(&plain, &foreign, &report);
            problem_destroy(&foreign);
        }
        problem_destroy(&plain);
    }
    cumoe_handle_destroy(handle);
    EXPECT_EMPTY(report);
}

Test(layouts, initial_values_are_those_of_separate_arrays)
{
    const uint64_t seed = random_seed("initial values", 82);
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    for (int i = 0; i < NUM_SUITE_OPTIONS; i++) {
        const problem_options_t options = suite_options(i, &GATE_VARIANTS[VARIANT_SOFTMAX], seed);
        problem_t plain;
        cr_assert(problem_create(&plain, handle, &PLAIN, &options, &report), "%s", report.text);
        cr_assert(device_weights_init(plain.handle, plain.layer, 3, &plain.weights) == CUMOE_SUCCESS, "%s",
                  cumoe_last_error());
        for (int n = 0; n < NUM_PLACEMENTS; n++) {
            const layer_case_t layer_case = case_of(&PLACEMENTS[n], false);
            problem_t foreign;
            cr_assert(problem_create(&foreign, handle, &layer_case, &options, &report), "%s", report.text);
            cr_assert(device_weights_init(foreign.handle, foreign.layer, 3, &foreign.weights) == CUMOE_SUCCESS,
                      "%s", cumoe_last_error());
            compare_matrices(&plain, &plain.weights, &foreign, &foreign.weights, &report);
            report_check(&report, buffer_guards_intact(&foreign.buffers));
            problem_destroy(&foreign);
        }
        problem_destroy(&plain);
    }
    cumoe_handle_destroy(handle);
    EXPECT_EMPTY(report);
}

/* Weights and gradients that the library allocated, with the same numbers in them. */
Test(layouts, created_weights_have_the_bits_of_borrowed_ones)
{
    const uint64_t seed = random_seed("created", 83);
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    static const int variants[] = {VARIANT_NOISY, VARIANT_SIGMOID, VARIANT_HIERARCHICAL, VARIANT_BALANCED};
    for (int i = 0; i < NUM_SUITE_OPTIONS * 4; i++) {
        if (i >= NUM_SUITE_OPTIONS && i % 3) continue;
        const problem_options_t options =
            suite_options(i % NUM_SUITE_OPTIONS, &GATE_VARIANTS[variants[i / NUM_SUITE_OPTIONS]], seed);
        problem_t borrowed, created;
        cumoe_weights_t weights = {0}, gradients = {0};
        cr_assert(problem_create(&borrowed, handle, &PLAIN, &options, &report), "%s", report.text);
        cr_assert(problem_create(&created, handle, &PLAIN, &options, &report), "%s", report.text);
        cr_assert(problem_run_forward(&borrowed, &report) && problem_run_backward(&borrowed, &report));
        cr_assert(cumoe_weights_create(created.layer, CUMOE_DTYPE_DEFAULT, &weights) == CUMOE_SUCCESS, "%s",
                  cumoe_last_error());
        cr_assert(cumoe_weights_create(created.layer, options.gradient_dtype, &gradients) == CUMOE_SUCCESS, "%s",
                  cumoe_last_error());
        const cumoe_weights_t w = problem_adopt_weights(&created, &weights),
                              g = problem_adopt_weights(&created, &gradients);
        for (problem_matrix_t m = 0; m < NUM_MATRICES; m++)
            if (problem_has_matrix(&created, m)) problem_matrix_set(&created, &w, m, created.values[m]);
        created.forward.weights = created.backward.weights = &w;
        created.backward.gradients = &g;
        if (problem_run_forward(&created, &report) && problem_run_backward(&created, &report)) {
            const size_t bytes = (size_t)(PLAIN.tokens * PLAIN.hidden_size) * real_size(options.dtype);
            compare_bits(&report, "y", created.forward.y, borrowed.forward.y, bytes);
            compare_bits(&report, "dx", created.backward.dx, borrowed.backward.dx, bytes);
            compare_matrices(&borrowed, &borrowed.gradients, &created, &g, &report);
        }
        cumoe_weights_destroy(created.layer, &weights);
        cumoe_weights_destroy(created.layer, &gradients);
        problem_destroy(&borrowed);
        problem_destroy(&created);
    }
    cumoe_handle_destroy(handle);
    EXPECT_EMPTY(report);
}
