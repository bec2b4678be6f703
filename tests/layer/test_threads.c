/* Promises about bits: any number of threads, repeated calls, threads that share a layer. */
#include "tests/suite.h"

#include <pthread.h>

static const layer_case_t MANY[] = {
    {"threads, odd", 701, 37, 53, 11, 3, .pattern = PATTERN_RANDOM, .glu = CUMOE_GLU_INTERLEAVED},
    {"threads, few experts", 333, 64, 96, 2, 1, .pattern = PATTERN_RANDOM, .mode = CUMOE_GRADIENT_ADD},
    {"threads, many experts", 97, 19, 23, 61, 4, .pattern = PATTERN_RANDOM, .mask_period = 5, .dead_tokens = 9},
    {"threads, one token", 1, 300, 200, 3, 2, .pattern = PATTERN_RANDOM},
};

/* The same bits for 1, 2, 3 and 7 threads. */
Test(threads, number_of_threads)
{
    static const int32_t threads[] = {2, 3, 7, 0};
    const uint64_t seed = random_seed("threads", 22);
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    for (int v = 0; v < NUM_GATE_VARIANTS; v++) /* each with two of the four cases, later kinds with one */
        for (int i = 0; i < (v <= VARIANT_EXTERNAL ? 2 : 1) * NUM_SUITE_OPTIONS; i++) {
            const layer_case_t *layer_case = &MANY[(i + v / 4 + i / NUM_SUITE_OPTIONS) % 4];
            problem_options_t options = suite_options(i % NUM_SUITE_OPTIONS, &GATE_VARIANTS[v], seed);
            problem_t one;
            options.max_threads = 1;
            cr_assert(problem_create(&one, handle, layer_case, &options, &report), "%s", report.text);
            for (int n = 0; n < 4; n++) {
                problem_t other;
                options.max_threads = threads[n];
                cr_assert(problem_create(&other, handle, layer_case, &options, &report), "%s", report.text);
                suite_compare_runs(&one, &other, &report);
                problem_destroy(&other);
            }
            problem_destroy(&one);
        }
    cumoe_handle_destroy(handle);
    EXPECT_EMPTY(report);
}

/* The same call again, on the same buffers: the same bits, from the same saved as often as one likes. */
Test(threads, repeated_calls)
{
    const uint64_t seed = random_seed("repeat", 23);
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    for (int v = 0; v < NUM_GATE_VARIANTS; v++)
        for (int i = 0; i < NUM_SUITE_OPTIONS; i++) {
            const problem_options_t options = suite_options(i, &GATE_VARIANTS[v], seed);
            problem_t p;
            cr_assert(problem_create(&p, handle, &MANY[i % 4], &options, &report), "%s", report.text);
            for (int n = 0; n < (v <= VARIANT_EXTERNAL ? 3 : 1); n++) suite_compare_runs(&p, &p, &report);
            problem_bits_t first = problem_outputs(&p, true);
            if (problem_run_backward(&p, &report)) problem_compare_outputs(&p, true, &first, &report);
            problem_bits_free(&first);
            problem_destroy(&p);
        }
    cumoe_handle_destroy(handle);
    EXPECT_EMPTY(report);
}

/* ---- threads that share one layer, each with its own buffers ---- */

enum { NUM_THREADS = 4, ROUNDS = 20 };

typedef struct worker {
    problem_t problem;
    problem_bits_t forward, backward; /* what it must give: computed alone */
    report_t report;
} worker_t;

static void *work(void *argument)
{
    worker_t *w = argument;
    for (int round = 0; round < ROUNDS; round++) {
        if (problem_run_forward(&w->problem, &w->report))
            problem_compare_outputs(&w->problem, false, &w->forward, &w->report);
        if (problem_run_backward(&w->problem, &w->report))
            problem_compare_outputs(&w->problem, true, &w->backward, &w->report);
    }
    return NULL;
}

Test(threads, share_a_layer)
{
    static worker_t workers[NUM_THREADS];
    static const layer_case_t layer_case = {"shared layer", 83, 21, 27, 7, 2, .pattern = PATTERN_RANDOM};
    const uint64_t seed = random_seed("share a layer", 31);
    cumoe_handle_t *handle = suite_handle();
    for (int i = 0; i < NUM_THREADS; i++) {
        worker_t *w = &workers[i];
        const problem_options_t options = {.dtype = CUMOE_F32,
                                           .activation = CUMOE_ACTIVATION_SWIGLU,
                                           .variant = GATE_VARIANTS[VARIANT_NOISY],
                                           .seed = seed + (uint64_t)i,
                                           .max_threads = 2,
                                           .without_reference = true};
        cr_assert(problem_create(&w->problem, handle, &layer_case, &options, &w->report), "%s", w->report.text);
        cr_assert(problem_run_forward(&w->problem, &w->report) && problem_run_backward(&w->problem, &w->report));
        w->forward = problem_outputs(&w->problem, false);
        w->backward = problem_outputs(&w->problem, true);
        if (i == 0) continue;
        cumoe_layer_destroy(w->problem.layer);
        w->problem.layer = workers[0].problem.layer;
    }
    pthread_t threads[NUM_THREADS];
    for (int i = 0; i < NUM_THREADS; i++) cr_assert(pthread_create(&threads[i], NULL, work, &workers[i]) == 0);
    for (int i = 0; i < NUM_THREADS; i++) pthread_join(threads[i], NULL);
    for (int i = NUM_THREADS - 1; i >= 0; i--) {
        worker_t *w = &workers[i];
        EXPECT_EMPTY(w->report);
        problem_bits_free(&w->forward);
        problem_bits_free(&w->backward);
        if (i > 0) w->problem.layer = NULL;
        problem_destroy(&w->problem);
    }
    cumoe_handle_destroy(handle);
}
