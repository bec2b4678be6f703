/* Wrong calls of what concerns ranks: each gets its status and a sentence. A group of one rank needs no threads. */
#include "tests/suite.h"
#include "tests/unit/refusal.h"

#include <math.h>

typedef struct fixture {
    cumoe_handle_t *handle;
    cumoe_ep_t *ep;
    cumoe_config_t config;
    cumoe_layer_t *alone, *planned, *bounded;
    cumoe_ep_plan_t *plan;
    report_t report;
} fixture_t;

static cumoe_layer_t *make(fixture_t *x, const cumoe_ep_t *ep, int64_t capacity)
{
    cumoe_layer_t *layer = NULL;
    x->config.ep = ep;
    x->config.exchange_capacity = capacity;
    cr_assert_eq(cumoe_layer_create(&layer, x->handle, &x->config), CUMOE_SUCCESS, "%s", cumoe_last_error());
    return layer;
}

static void set_up(fixture_t *x)
{
    *x = (fixture_t){.handle = suite_handle()};
    cr_assert_eq(cumoe_config_init(&x->config), CUMOE_SUCCESS);
    x->config.hidden_size = x->config.intermediate_size = 8;
    x->config.num_experts = 6;
    x->config.top_k = 2;
    cr_assert_eq(cumoe_ep_create_local(&x->ep, x->handle, 1, 5), CUMOE_SUCCESS);
    x->alone = make(x, NULL, 0);
    x->planned = make(x, x->ep, 0);
    x->bounded = make(x, x->ep, 10);
    cr_assert_eq(cumoe_ep_plan_create(x->planned, &x->plan), CUMOE_SUCCESS);
}

static void tear_down(fixture_t *x)
{
    EXPECT_EMPTY(x->report);
    cumoe_ep_plan_destroy(x->plan);
    cumoe_layer_destroy(x->alone);
    cumoe_layer_destroy(x->planned);
    cumoe_layer_destroy(x->bounded);
    cumoe_ep_destroy(x->ep);
    cumoe_handle_destroy(x->handle);
}

#define REFUSE(call, status, function, argument, value)                                                            \
    expect_refusal(&x.report, call, CUMOE_##status, function, argument, value)

Test(parallel_errors, groups)
{
    fixture_t x;
    set_up(&x);
    cumoe_ep_t *ep[4] = {NULL};
    const char *local = "cumoe_ep_create_local";
    REFUSE(cumoe_ep_create_local(NULL, x.handle, 2, 0), INVALID_ARGUMENT, local, "ep", "NULL");
    REFUSE(cumoe_ep_create_local(ep, NULL, 2, 0), INVALID_ARGUMENT, local, "handle", "NULL");
    REFUSE(cumoe_ep_create_local(ep, x.handle, 0, 0), INVALID_ARGUMENT, local, "num_ranks", "0");
    REFUSE(cumoe_ep_create_local(ep, x.handle, 1025, 0), INVALID_ARGUMENT, local, "num_ranks", "1025");
    REFUSE(cumoe_ep_create_local(ep, x.handle, 2, -1), INVALID_ARGUMENT, local, "timeout", "-1");
    REFUSE(cumoe_ep_create_local(ep, x.handle, 2, NAN), INVALID_ARGUMENT, local, "timeout", "nan");
    REFUSE(cumoe_ep_create_local(ep, x.handle, 2, INFINITY), INVALID_ARGUMENT, local, "timeout", "inf");
    REFUSE(cumoe_ep_create_local(ep, x.handle, 2, 1.1e9), INVALID_ARGUMENT, local, "timeout", "1.1e+09");
    report_check(&x.report, ep[0] == NULL);

    REFUSE(cumoe_ep_wait(NULL, NULL, 0), INVALID_ARGUMENT, "cumoe_ep_wait", "ep", "NULL");
    REFUSE(cumoe_ep_wait(x.ep, NULL, -2), INVALID_ARGUMENT, "cumoe_ep_wait", "timeout", "-2");
    if (device_backend() == CUMOE_BACKEND_CPU)
        REFUSE(cumoe_ep_wait(x.ep, (cumoe_stream_t)(uintptr_t)64, 0), INVALID_ARGUMENT, "cumoe_ep_wait", "stream",
               NULL);
    report_check(&x.report, cumoe_ep_wait(x.ep, NULL, 0) == CUMOE_SUCCESS);

    int64_t number = 5;
    const char *sum = "cumoe_ep_sum";
    REFUSE(cumoe_ep_sum(NULL, &number, 1, CUMOE_I64, NULL), INVALID_ARGUMENT, sum, "ep", "NULL");
    REFUSE(cumoe_ep_sum(x.ep, NULL, 1, CUMOE_I64, NULL), INVALID_ARGUMENT, sum, "data", "NULL");
    REFUSE(cumoe_ep_sum(x.ep, (char *)&number + 2, 1, CUMOE_I32, NULL), INVALID_ARGUMENT, sum, "data", NULL);
    REFUSE(cumoe_ep_sum(x.ep, &number, -1, CUMOE_I64, NULL), INVALID_ARGUMENT, sum, "count", "-1");
    REFUSE(cumoe_ep_sum(x.ep, &number, 1, CUMOE_BF16, NULL), INVALID_ARGUMENT, sum, "dtype", "3");
    report_check(&x.report, cumoe_ep_sum(x.ep, NULL, 0, CUMOE_F32, NULL) == CUMOE_SUCCESS);
    report_check(&x.report, number == 5);
    report_check(&x.report, cumoe_ep_rank(NULL) == -1 && cumoe_ep_num_ranks(NULL) == -1);
    report_check(&x.report, cumoe_ep_rank(x.ep) == 0 && cumoe_ep_num_ranks(x.ep) == 1);
    cumoe_ep_destroy(NULL);
    cumoe_ep_abort(NULL);
    tear_down(&x);
}

Test(parallel_errors, exchanges)
{
    fixture_t x;
    set_up(&x);
    const char *exchange = "cumoe_ep_exchange";
    int64_t two = 2, three = 3, negative = -1, many = ((int64_t)1 << 58) / 5 + 1;
    char from[16] = "0123456789", to[16] = "";
    const cumoe_ep_exchange_args_t good = {sizeof good, from, to, &two, &two, 5};
    cumoe_ep_exchange_args_t a = good;
    REFUSE(cumoe_ep_exchange(NULL, &a, NULL), INVALID_ARGUMENT, exchange, "ep", "NULL");
    REFUSE(cumoe_ep_exchange(x.ep, NULL, NULL), INVALID_ARGUMENT, exchange, "args", "NULL");
#define WRONG(field, wrong, name, value)                                                                           \
    do {                                                                                                           \
        a = good;                                                                                                  \
        a.field = wrong;                                                                                           \
        REFUSE(cumoe_ep_exchange(x.ep, &a, NULL), INVALID_ARGUMENT, exchange, name, value);                        \
    } while (0)
    WRONG(struct_size, 8, "args.struct_size", "8");
    WRONG(sent, NULL, "sent", "NULL");
    WRONG(received, NULL, "received", "NULL");
    WRONG(row_size, 0, "row_size", "0");
    WRONG(row_size, SIZE_MAX, "row_size", "18446744073709551615");
    WRONG(sent, &negative, "sent[0]", "-1");
    WRONG(received, &many, "received[0]", "57646075230342349");
    WRONG(received, &three, "received[0]", "3");
    WRONG(send, NULL, "send", "NULL");
    WRONG(recv, NULL, "recv", "NULL");
    WRONG(recv, from + 9, "recv", NULL);
#undef WRONG
    if (device_backend() == CUMOE_BACKEND_CPU)
        REFUSE(cumoe_ep_exchange(x.ep, &good, (cumoe_stream_t)(uintptr_t)64), INVALID_ARGUMENT, exchange, "stream",
               NULL);
    report_check(&x.report, to[0] == 0);
    a = good;
    two = 0;
    a.send = a.recv = NULL;
    report_check(&x.report, cumoe_ep_exchange(x.ep, &a, NULL) == CUMOE_SUCCESS);
    tear_down(&x);
}

Test(parallel_errors, layers)
{
    fixture_t x;
    set_up(&x);
    const char *create = "cumoe_layer_create";
    cumoe_ep_t *seven[7];
    cumoe_handle_t *other = suite_handle();
    cumoe_layer_t *layer = NULL;
    cr_assert_eq(cumoe_ep_create_local(seven, x.handle, 7, 1), CUMOE_SUCCESS);

    cumoe_config_t config = x.config;
    config.exchange_capacity = -1;
    REFUSE(cumoe_layer_create(&layer, x.handle, &config), INVALID_ARGUMENT, create, "config.exchange_capacity",
           "-1");
    config = x.config;
    config.ep = seven[0];
    REFUSE(cumoe_layer_create(&layer, x.handle, &config), INVALID_ARGUMENT, create, "config.num_experts", "6");
    config.num_experts = 14;
    config.gate = CUMOE_GATE_HIERARCHICAL;
    config.num_groups = config.top_k_groups = 2;
    REFUSE(cumoe_layer_create(&layer, x.handle, &config), INVALID_ARGUMENT, create, "config.num_groups", "2");
    config = x.config;
    config.ep = seven[0];
    config.num_experts = 7;
    config.exchange_capacity = INT32_MAX / 7 - 15; /* chunks round it up */
    REFUSE(cumoe_layer_create(&layer, x.handle, &config), INVALID_ARGUMENT, create, "config.exchange_capacity",
           "306783363");
    for (int32_t chunks = -1; chunks <= 17; chunks += 18) { /* none, and more than there may be */
        config = x.config;
        config.num_experts = 20;
        config.exchange_chunks = chunks;
        REFUSE(cumoe_layer_create(&layer, x.handle, &config), INVALID_ARGUMENT, create, "config.exchange_chunks",
               "0..16");
    }
    config.ep = seven[0];
    config.exchange_chunks = 3; /* of 2 experts */
    REFUSE(cumoe_layer_create(&layer, x.handle, &config), INVALID_ARGUMENT, create, "config.exchange_chunks",
           "0..2");
    config = x.config;
    config.gate = CUMOE_GATE_BALANCED;
    REFUSE(cumoe_layer_create(&layer, x.handle, &config), UNSUPPORTED_CONFIG, create, "config.gate", "BALANCED");
    config = x.config;
    REFUSE(cumoe_layer_create(&layer, other, &config), INVALID_ARGUMENT, create, "config.ep", NULL);
    report_check(&x.report, layer == NULL);

    int32_t first, count;
    const char *experts = "cumoe_layer_experts_of_rank";
    REFUSE(cumoe_layer_experts_of_rank(NULL, 0, &first, &count), INVALID_ARGUMENT, experts, "layer", "NULL");
    REFUSE(cumoe_layer_experts_of_rank(x.planned, 1, &first, &count), INVALID_ARGUMENT, experts, "rank", "1");
    REFUSE(cumoe_layer_experts_of_rank(x.alone, -1, &first, &count), INVALID_ARGUMENT, experts, "rank", "-1");
    REFUSE(cumoe_layer_experts_of_rank(x.alone, 0, NULL, &count), INVALID_ARGUMENT, experts, "first", "NULL");
    REFUSE(cumoe_layer_experts_of_rank(x.alone, 0, &first, NULL), INVALID_ARGUMENT, experts, "count", "NULL");
    report_check(&x.report, cumoe_layer_experts_of_rank(x.alone, 0, &first, &count) == CUMOE_SUCCESS);
    report_check(&x.report, first == 0 && count == 6);

    size_t size, per_token;
    REFUSE(cumoe_layer_saved_bound(x.bounded, &size, &per_token), UNSUPPORTED_CONFIG, "cumoe_layer_saved_bound",
           "config.ep", NULL);
    const cumoe_permute_args_t permute = {.struct_size = sizeof permute};
    REFUSE(cumoe_permute(x.planned, &permute, NULL), UNSUPPORTED_CONFIG, "cumoe_permute", "config.ep", NULL);
    for (int r = 0; r < 7; r++) cumoe_ep_destroy(seven[r]);
    cumoe_handle_destroy(other);
    tear_down(&x);
}

Test(parallel_errors, plans)
{
    fixture_t x;
    set_up(&x);
    cumoe_ep_plan_t *plan = NULL;
    size_t size;
    cumoe_ep_sizes_t sizes;
    cumoe_weights_t weights;
    cr_assert_eq(cumoe_weights_create(x.planned, CUMOE_DTYPE_DEFAULT, &weights), CUMOE_SUCCESS);
    REFUSE(cumoe_ep_plan_create(NULL, &plan), INVALID_ARGUMENT, "cumoe_ep_plan_create", "layer", "NULL");
    REFUSE(cumoe_ep_plan_create(x.planned, NULL), INVALID_ARGUMENT, "cumoe_ep_plan_create", "plan", "NULL");
    REFUSE(cumoe_ep_plan_create(x.alone, &plan), INVALID_ARGUMENT, "cumoe_ep_plan_create", "config.ep", NULL);
    REFUSE(cumoe_ep_plan_create(x.bounded, &plan), INVALID_ARGUMENT, "cumoe_ep_plan_create",
           "config.exchange_capacity", NULL);
    REFUSE(cumoe_ep_routing_size(x.bounded, 3, &size), INVALID_ARGUMENT, "cumoe_ep_routing_size",
           "config.exchange_capacity", NULL);
    REFUSE(cumoe_ep_routing_size(x.planned, -1, &size), INVALID_ARGUMENT, "cumoe_ep_routing_size", "num_tokens",
           "-1");
    REFUSE(cumoe_ep_routing_size(x.planned, 3, NULL), INVALID_ARGUMENT, "cumoe_ep_routing_size", "routing_size",
           "NULL");
    cumoe_ep_plan_destroy(NULL);

    /* Without tokens a call needs little. */
    cr_assert_eq(cumoe_layer_buffer_sizes(x.planned, 0, &size, NULL), CUMOE_SUCCESS);
    cumoe_forward_args_t a = {.struct_size = sizeof a, .weights = &weights, .workspace_size = size};
    cr_assert_eq(cumoe_memory_alloc(x.handle, size, &a.workspace), CUMOE_SUCCESS);
    cr_assert_eq(cumoe_ep_routing_size(x.planned, 0, &a.routing_size), CUMOE_SUCCESS);
    cr_assert_eq(cumoe_memory_alloc(x.handle, a.routing_size, &a.routing), CUMOE_SUCCESS);
    REFUSE(cumoe_ep_plan(x.planned, &a, NULL, &sizes, NULL), INVALID_ARGUMENT, "cumoe_ep_plan", "plan", NULL);
    REFUSE(cumoe_ep_plan(x.bounded, &a, x.plan, &sizes, NULL), INVALID_ARGUMENT, "cumoe_ep_plan", "plan", NULL);
    REFUSE(cumoe_ep_plan(x.planned, &a, x.plan, NULL, NULL), INVALID_ARGUMENT, "cumoe_ep_plan", "sizes", "NULL");
    a.plan = x.plan;
    REFUSE(cumoe_layer_forward(x.planned, &a, NULL), INVALID_ARGUMENT, "cumoe_layer_forward", "plan",
           "has not made it yet");
    REFUSE(cumoe_layer_forward(x.alone, &a, NULL), INVALID_ARGUMENT, "cumoe_layer_forward", "plan", NULL);
    REFUSE(cumoe_layer_forward(x.bounded, &a, NULL), INVALID_ARGUMENT, "cumoe_layer_forward", "plan", NULL);
    a.plan = NULL;
    REFUSE(cumoe_layer_forward(x.planned, &a, NULL), INVALID_ARGUMENT, "cumoe_layer_forward", "plan", "NULL");
    a.routing_size--;
    REFUSE(cumoe_ep_plan(x.planned, &a, x.plan, &sizes, NULL), BUFFER_TOO_SMALL, "cumoe_ep_plan", "routing_size",
           NULL);
    a.routing_size++;
    cr_expect_eq(cumoe_ep_plan(x.planned, &a, x.plan, &sizes, NULL), CUMOE_SUCCESS, "%s", cumoe_last_error());
    report_check(&x.report, sizes.rows_sent == 0 && sizes.tokens_received == 0);
    a.plan = x.plan;
    a.workspace_size = sizes.workspace_size - 1;
    REFUSE(cumoe_layer_forward(x.planned, &a, NULL), BUFFER_TOO_SMALL, "cumoe_layer_forward", "workspace_size",
           NULL);

    REFUSE(cumoe_ep_sum_gradients(NULL, &weights, NULL), INVALID_ARGUMENT, "cumoe_ep_sum_gradients", "layer",
           "NULL");
    REFUSE(cumoe_ep_sum_gradients(x.planned, NULL, NULL), INVALID_ARGUMENT, "cumoe_ep_sum_gradients", "gradients",
           "NULL");
    cr_expect_eq(cumoe_ep_sum_gradients(x.planned, &weights, NULL), CUMOE_SUCCESS, "%s", cumoe_last_error());
    cumoe_memory_free(x.handle, a.workspace);
    cumoe_memory_free(x.handle, a.routing);
    cumoe_weights_destroy(x.planned, &weights);
    tear_down(&x);
}
