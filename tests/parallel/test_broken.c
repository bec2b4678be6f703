/* Ranks that fail, leave, are late or do something else: the others get a status and a sentence, in time. */
#include "tests/suite.h"
#include "tests/support/ranks.h"

#include <pthread.h>
#include <time.h>

static const layer_case_t CASE = {"broken", 24, 8, 12, 6, 2, .pattern = PATTERN_RANDOM};

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* The call failed for the reason that TEXT is part of, and so does the next, at once. */
static void expect_broken(rank_t *r, cumoe_status_t status, const char *text)
{
    if (status != CUMOE_COMM_ERROR)
        report_fail(&r->report, "%s, but COMM_ERROR is expected", cumoe_status_name(status));
    else if (!strstr(cumoe_last_error(), text))
        report_fail(&r->report, "\"%s\" does not say \"%s\"", cumoe_last_error(), text);
    const double begin = now();
    report_check(&r->report, cumoe_ep_wait(r->ep, NULL, 0) == CUMOE_COMM_ERROR);
    report_check(&r->report, cumoe_ep_sum_gradients(r->layer, &r->gradients, NULL) == CUMOE_COMM_ERROR);
    report_check(&r->report, now() - begin < 5);
}

static void run_bodies(rank_body_t *body, double timeout, int64_t capacity)
{
    const problem_options_t options = {.dtype = CUMOE_F32,
                                       .variant = GATE_VARIANTS[VARIANT_NOISY],
                                       .seed = random_seed("broken", 51),
                                       .max_threads = 1,
                                       .without_reference = true};
    const ranks_options_t ranks = {.num_ranks = 3, .capacity = capacity, .timeout = timeout};
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    problem_t p;
    cr_assert(problem_create(&p, handle, &CASE, &options, &report), "%s", report.text);
    ranks_run(&p, &ranks, body, NULL, &report);
    problem_destroy(&p);
    cumoe_handle_destroy(handle);
    EXPECT_EMPTY(report);
}

static cumoe_status_t plan(rank_t *r)
{
    cumoe_ep_sizes_t sizes;
    return device_ep_plan(r->handle, r->layer, &r->forward, r->plan, &sizes);
}

static bool create(rank_t *r)
{
    return rank_create(r, r->whole, r->options, r->ep);
}

/* Rank 1 does nothing. */
static void one_is_late(rank_t *r)
{
    const double begin = now();
    if (!create(r) || cumoe_ep_rank(r->ep) == 1) return;
    expect_broken(r, plan(r), "rank 1 did not come in time");
    report_check(&r->report, now() - begin > 1.9 && now() - begin < 8);
}
Test(broken, late)
{
    run_bodies(one_is_late, 2, 0);
}

/* Who breaks a group while others are still in the call before may break that as well. */
static pthread_barrier_t all_are_there;

static void run_bodies_together(rank_body_t *body)
{
    pthread_barrier_init(&all_are_there, NULL, 3);
    run_bodies(body, 60, 0);
    pthread_barrier_destroy(&all_are_there);
}

/* Rank 2 gives up while the others wait for it. */
static void one_aborts(rank_t *r)
{
    const bool created = create(r);
    pthread_barrier_wait(&all_are_there);
    if (!created) return;
    if (cumoe_ep_rank(r->ep) == 2) cumoe_ep_abort(r->ep);
    expect_broken(r, plan(r), "rank 2 has aborted");
}
Test(broken, aborts)
{
    run_bodies_together(one_aborts);
}

/* Rank 1 makes one call with the others, and leaves. */
static void one_leaves(rank_t *r)
{
    const double begin = now();
    const bool planned = create(r) && report_check(&r->report, plan(r) == CUMOE_SUCCESS);
    pthread_barrier_wait(&all_are_there);
    if (!planned) return;
    if (cumoe_ep_rank(r->ep) == 1) {
        cumoe_ep_plan_destroy(r->plan), r->plan = NULL;
        cumoe_layer_destroy(r->layer), r->layer = NULL;
        cumoe_ep_destroy(r->ep), r->ep = NULL;
        return;
    }
    expect_broken(r, plan(r), "rank 1 has left");
    report_check(&r->report, now() - begin < 10); /* of 60 */
}
Test(broken, leaves)
{
    run_bodies_together(one_leaves);
}

/* Rank 0 plans, the others go on with something else. */
static void one_calls_another(rank_t *r)
{
    if (!create(r)) return;
    cumoe_status_t status;
    if (cumoe_ep_rank(r->ep) == 0)
        status = plan(r);
    else
        status = device_ep_sum_gradients(r->handle, r->layer, &r->gradients);
    expect_broken(r, status, "makes another call, or with other sizes");
}
Test(broken, another_call)
{
    run_bodies(one_calls_another, 60, 0);
}

/* Rank 2 has another idea of a layer. */
static void one_differs(rank_t *r)
{
    cumoe_config_t config = r->whole->config;
    config.ep = r->ep;
    config.exchange_capacity = 7;
    if (cumoe_ep_rank(r->ep) == 2) config.intermediate_size++;
    const cumoe_status_t status = cumoe_layer_create(&r->layer, r->whole->handle, &config);
    report_check(&r->report, status == CUMOE_COMM_ERROR);
    report_check(&r->report, strstr(cumoe_last_error(), "config.intermediate_size of rank 2") != NULL);
    report_check(&r->report, r->layer == NULL);
}
Test(broken, another_config)
{
    run_bodies(one_differs, 60, 7);
}

/* Ranks with different capacities are found when the layer is made. */
static void capacities_differ(rank_t *r)
{
    cumoe_config_t config = r->whole->config;
    config.ep = r->ep;
    config.exchange_capacity = 7 + (cumoe_ep_rank(r->ep) == 1);
    report_check(&r->report, cumoe_layer_create(&r->layer, r->whole->handle, &config) == CUMOE_COMM_ERROR);
    report_check(&r->report, strstr(cumoe_last_error(), "config.exchange_capacity of rank 1") != NULL);
}
Test(broken, another_capacity)
{
    run_bodies(capacities_differ, 60, 7);
}

static void chunks_differ(rank_t *r)
{
    cumoe_config_t config = r->whole->config;
    config.ep = r->ep;
    config.exchange_chunks = 1 + (cumoe_ep_rank(r->ep) == 1);
    report_check(&r->report, cumoe_layer_create(&r->layer, r->whole->handle, &config) == CUMOE_COMM_ERROR);
    report_check(&r->report, strstr(cumoe_last_error(), "config.exchange_chunks of rank 1") != NULL);
}
Test(broken, other_chunks)
{
    run_bodies(chunks_differ, 60, 0);
}

/* Two threads of rank 0 call for it at once. */
static void *sum_nothing(void *argument)
{
    rank_t *r = argument;
    static int64_t numbers[2];
    static int next;
    const int mine = __atomic_fetch_add(&next, 1, __ATOMIC_SEQ_CST);
    return cumoe_ep_sum(r->ep, &numbers[mine], 1, CUMOE_I64, NULL) == CUMOE_COMM_ERROR ? r : NULL;
}

static void two_calls_at_once(rank_t *r)
{
    pthread_t threads[2];
    if (cumoe_ep_rank(r->ep) > 0) return;
    for (int i = 0; i < 2; i++) cr_assert(pthread_create(&threads[i], NULL, sum_nothing, r) == 0);
    for (int i = 0; i < 2; i++) {
        void *refused;
        pthread_join(threads[i], &refused);
        report_check(&r->report, refused != NULL);
    }
}

Test(broken, two_calls_of_a_rank)
{
    run_bodies(two_calls_at_once, 60, 0);
}

/* A plan that is made again serves the new call alone. */
static void plan_again(rank_t *r)
{
    if (!create(r) || !report_check(&r->report, plan(r) == CUMOE_SUCCESS)) return;
    cumoe_forward_args_t first = r->forward;
    first.plan = r->plan;
    r->forward.routing = buffer_get(&r->buffers, r->forward.routing_size);
    report_check(&r->report, plan(r) == CUMOE_SUCCESS);
    report_check(&r->report, device_layer_forward(r->handle, r->layer, &first) == CUMOE_INVALID_ARGUMENT);
    report_check(&r->report, strstr(cumoe_last_error(), "a plan of its own") != NULL);
}

Test(broken, plan_of_another_call)
{
    run_bodies(plan_again, 60, 0);
}
