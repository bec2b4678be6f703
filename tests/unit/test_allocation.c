/* The library allocates when something is created and never in a call; every allocation may fail. */
#include "tests/suite.h"
#include "tests/unit/allocation.h"
#include "tests/unit/optimizer_problem.h"

#include <stdlib.h>

static const layer_case_t CASE = {"allocation", 33, 12, 14, 6, 2, .pattern = PATTERN_RANDOM};

static cumoe_config_t small_config(void)
{
    cumoe_config_t config;
    cr_assert_eq(cumoe_config_init(&config), CUMOE_SUCCESS);
    config.hidden_size = config.intermediate_size = 8;
    config.num_experts = 4;
    config.top_k = 2;
    return config;
}

/* The wrappers must be in place, or these tests test nothing. */
Test(allocation, wrappers_are_in_place)
{
    allocation_count();
    allocation_fail(1);
    cr_expect_null(malloc(10));
    cr_expect(allocation_failed());
    void *volatile block = malloc(10);
    cr_expect_not_null(block);
    cr_expect_eq(allocation_count(), 2);
    free(block);

    allocation_count();
    cumoe_handle_t *handle = suite_handle();
    cr_expect_neq(allocation_count(), 0);
    cumoe_handle_destroy(handle);
}

static cumoe_handle_t *the_handle;
static cumoe_layer_t *the_layer;
static cumoe_weights_t the_weights;
static void *the_memory;

static cumoe_status_t create_handle(void)
{
    return cumoe_handle_create(&the_handle, CUMOE_BACKEND_CPU, 0);
}

static cumoe_status_t create_layer(void)
{
    const cumoe_config_t config = small_config();
    return cumoe_layer_create(&the_layer, the_handle, &config);
}

static cumoe_status_t create_weights(void)
{
    return cumoe_weights_create(the_layer, CUMOE_DTYPE_DEFAULT, &the_weights);
}

static cumoe_status_t create_memory(void)
{
    return cumoe_memory_alloc(the_handle, 1000, &the_memory);
}

/* Fail one allocation after the other: the output stays as it is and nothing is left behind. */
static void fail_each(const char *what, cumoe_status_t (*create)(void), const void *object, size_t size)
{
    unsigned char before[sizeof(cumoe_weights_t)];
    cr_assert(size <= sizeof before);
    memcpy(before, object, size);
    const long live = allocation_live();
    int failures = 0;
    for (long n = 1;; n++) {
        allocation_fail(n);
        const cumoe_status_t status = create();
        const int failed = allocation_failed();
        allocation_fail(0);
        if (!failed) {
            cr_expect_eq(status, CUMOE_SUCCESS, "%s: %s", what, cumoe_last_error());
            break;
        }
        failures++;
        cr_expect_eq(status, CUMOE_OUT_OF_MEMORY, "%s, allocation %ld: %s", what, n, cumoe_status_name(status));
        cr_expect_eq(allocation_live(), live, "%s, allocation %ld: something was left behind", what, n);
        cr_expect(memcmp(before, object, size) == 0, "%s, allocation %ld: the output was changed", what, n);
    }
    cr_expect(failures > 0, "%s allocates nothing?", what);
}

Test(allocation, every_allocation_of_a_creation_may_fail)
{
    const long live = allocation_live();
    fail_each("handle", create_handle, &the_handle, sizeof the_handle);
    fail_each("layer", create_layer, &the_layer, sizeof the_layer);
    memset(&the_weights, 0x77, sizeof the_weights);
    fail_each("weights", create_weights, &the_weights, sizeof the_weights);
    fail_each("memory", create_memory, &the_memory, sizeof the_memory);
    cumoe_memory_free(the_handle, the_memory);
    cumoe_weights_destroy(the_layer, &the_weights);
    cumoe_layer_destroy(the_layer);
    cumoe_handle_destroy(the_handle);
    cr_expect_eq(allocation_live(), live, "destroying leaves something behind");
}

static cumoe_ep_t *the_ep[3];
static cumoe_ep_plan_t *the_plan;

static cumoe_status_t create_ep(void)
{
    return cumoe_ep_create_local(the_ep, the_handle, 3, 1);
}

static cumoe_status_t create_ep_of_one(void)
{
    return cumoe_ep_create_local(the_ep, the_handle, 1, 1);
}

static cumoe_status_t create_bounded_layer(void)
{
    cumoe_config_t config = small_config();
    config.ep = the_ep[0];
    config.exchange_capacity = 9;
    return cumoe_layer_create(&the_layer, the_handle, &config);
}

static cumoe_status_t create_planned_layer(void)
{
    cumoe_config_t config = small_config();
    config.ep = the_ep[0];
    return cumoe_layer_create(&the_layer, the_handle, &config);
}

static cumoe_status_t create_plan(void)
{
    return cumoe_ep_plan_create(the_layer, &the_plan);
}

Test(allocation, every_allocation_between_ranks_may_fail)
{
    const long live = allocation_live();
    cr_assert_eq(create_handle(), CUMOE_SUCCESS);
    fail_each("group", create_ep, the_ep, sizeof the_ep);
    for (int r = 0; r < 3; r++) cumoe_ep_destroy(the_ep[r]);
    cr_assert_eq(create_ep_of_one(), CUMOE_SUCCESS);
    the_layer = NULL;
    fail_each("layer with a capacity", create_bounded_layer, &the_layer, sizeof the_layer);
    cumoe_layer_destroy(the_layer);
    fail_each("layer with plans", create_planned_layer, &the_layer, sizeof the_layer);
    fail_each("plan", create_plan, &the_plan, sizeof the_plan);
    cumoe_ep_plan_destroy(the_plan);
    cumoe_layer_destroy(the_layer);
    cumoe_ep_destroy(the_ep[0]);
    cumoe_handle_destroy(the_handle);
    cr_expect_eq(allocation_live(), live, "destroying leaves something behind");
}

/* After one call to warm up, forward, backward and everything else on the hot path allocate nothing of ours. */
Test(allocation, calls_allocate_nothing)
{
    cumoe_handle_t *handle = suite_handle();
    for (int variant = 0; variant < NUM_GATE_VARIANTS; variant++)
        for (int i = 0; i < NUM_SUITE_OPTIONS; i++) {
            report_t report = {0};
            problem_t p;
            const problem_options_t options = suite_options(i, &GATE_VARIANTS[variant], 1);
            cr_assert(problem_create(&p, handle, &CASE, &options, &report), "%s", report.text);
            for (int round = 0; round < 3; round++) {
                size_t workspace, saved;
                allocation_count();
                cr_assert_eq(cumoe_layer_buffer_sizes(p.layer, p.tokens, &workspace, &saved), CUMOE_SUCCESS);
                cr_assert_eq(cumoe_layer_forward(p.layer, &p.forward, NULL), CUMOE_SUCCESS, "%s",
                             cumoe_last_error());
                cr_assert_eq(cumoe_layer_backward(p.layer, &p.backward, NULL), CUMOE_SUCCESS, "%s",
                             cumoe_last_error());
                cr_assert_eq(cumoe_weights_init(p.layer, 1, &p.weights, NULL), CUMOE_SUCCESS, "%s",
                             cumoe_last_error());
                const long allocations = allocation_count();
                if (round > 0) cr_expect_eq(allocations, 0, "%s: %ld allocations", p.name, allocations);
            }
            problem_destroy(&p);
        }
    cumoe_handle_destroy(handle);
}

static void count_allocations(optimizer_problem_t *p, report_t *report)
{
    for (p->args.values.step = 1; p->args.values.step <= 3; p->args.values.step++) {
        size_t size;
        allocation_count();
        report_check(report, cumoe_optimizer_state_size(p->layer.layer, p->args.optimizer, &p->layer.weights,
                                                        &size) == CUMOE_SUCCESS);
        report_check(report, cumoe_optimizer_step(p->layer.layer, &p->args, NULL) == CUMOE_SUCCESS);
        report_check(report, allocation_count() == 0 || p->args.values.step == 1);
    }
}

Test(allocation, optimizer_steps_allocate_nothing)
{
    for (int optimizer = 0; optimizer < COUNT(OPTIMIZERS); optimizer++)
        for (int dtype = CUMOE_F64; dtype <= CUMOE_F16; dtype++) {
            const optimizer_case_t c = {.optimizer = OPTIMIZERS[optimizer],
                                        .options = {.dtype = (cumoe_dtype_t)dtype, .bias = true, .max_threads = 2},
                                        .layout = LAYOUT_TRANSPOSED};
            with_optimizer(&c, count_allocations);
        }
}

/* A refused call leaves nothing behind either. */
Test(allocation, refusals_leak_nothing)
{
    cumoe_handle_t *handle = suite_handle();
    const long live = allocation_live();
    cumoe_config_t config = small_config();
    cumoe_layer_t *layer = NULL;
    config.top_k = 99;
    for (int i = 0; i < 10; i++) cr_expect_eq(cumoe_layer_create(&layer, handle, &config), CUMOE_INVALID_ARGUMENT);
    for (int i = 0; i < 10; i++)
        cr_expect_eq(cumoe_handle_create(&the_handle, CUMOE_BACKEND_CUDA, 0), CUMOE_UNSUPPORTED_DEVICE);
    cr_expect_eq(allocation_live(), live);
    cumoe_handle_destroy(handle);
}
