/* The same bits whatever the order of blocks and threads, the number of SMs, and the stream. Every run of a problem
 * has a stream of its own. */
#include "tests/sim/simulator.h"
#include "tests/suite.h"

static const layer_case_t CASES[] = {
    {"order", 45, 37, 19, 7, 2, .pattern = PATTERN_RANDOM, .mask_period = 5, .dead_tokens = 3},
    {"order, one expert", 150, 16, 24, 2, 1, .pattern = PATTERN_RANDOM, .mode = CUMOE_GRADIENT_ADD},
    {"order, wide", 19, 70, 140, 3, 3, .pattern = PATTERN_RANDOM, .glu = CUMOE_GLU_INTERLEAVED},
};

static void compare_orders(problem_t *p, report_t *report)
{
    static const int32_t max_sms[] = {0, 1, 3};
    if (!problem_run_forward(p, report) || !problem_run_backward(p, report)) return;
    problem_bits_t forward = problem_outputs(p, false), backward = problem_outputs(p, true);
    for (int i = 0; i < 3; i++) {
        problem_options_t options = p->options;
        problem_t other;
        options.max_sms = max_sms[i];
        sim_set_seed(p->options.seed + 1 + (uint64_t)i);
        if (problem_create(&other, p->handle, &p->layer_case, &options, report)) {
            if (problem_run_forward(&other, report)) problem_compare_outputs(&other, false, &forward, report);
            if (problem_run_backward(&other, report)) problem_compare_outputs(&other, true, &backward, report);
        }
        problem_destroy(&other);
    }
    problem_bits_free(&forward);
    problem_bits_free(&backward);
}

Test(order, does_not_matter)
{
    const uint64_t seed = random_seed("order", 92);
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    for (int i = 0; i < 2 * NUM_SUITE_OPTIONS; i++) {
        const problem_options_t options = suite_options(
            i % NUM_SUITE_OPTIONS, &GATE_VARIANTS[(i + i / NUM_SUITE_OPTIONS) % NUM_GATE_VARIANTS], seed);
        suite_one_case(handle, &CASES[i % 3], &options, compare_orders, &report);
    }
    cumoe_handle_destroy(handle);
    EXPECT_EMPTY(report);
    cr_expect_eq(sim_num_objects(), 0, "%d left", (int)sim_num_objects());
}
