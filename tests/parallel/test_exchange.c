/* Rows of the caller's own between ranks: every byte arrives where it belongs; who expects other rows is told. */
#include "tests/parallel/rows.h"
#include "tests/suite.h"

static void run(int32_t num_ranks, double timeout, rank_body_t *body)
{
    const problem_t nothing = {.name = "rows", .handle = suite_handle()};
    const ranks_options_t ranks = {.num_ranks = num_ranks, .timeout = timeout};
    report_t report = {0};
    ranks_run(&nothing, &ranks, body, NULL, &report);
    cumoe_handle_destroy((cumoe_handle_t *)(uintptr_t)nothing.handle);
    EXPECT_EMPTY(report);
}

Test(exchange, rows)
{
    for (int32_t num_ranks = 1; num_ranks <= 4; num_ranks++) run(num_ranks, 60, rows_exchange);
}

/* A row of 4 bytes for each, and from each; rank 2 expects two of rank 0, or rows of another size. */
static void expect_told(rank_t *r, int64_t of_rank_0, size_t row_size)
{
    const int64_t one[3] = {1, 1, 1}, other[3] = {of_rank_0, 1, 1};
    const bool differs = cumoe_ep_rank(r->ep) == 2;
    char *from = buffer_get_zero(&r->buffers, 32), *to = buffer_get_zero(&r->buffers, 32);
    device_call_t call;
    device_begin(&call, r->whole->handle);
    const cumoe_ep_exchange_args_t args = {.struct_size = sizeof args,
                                           .send = device_address(&call, from),
                                           .recv = device_address(&call, to),
                                           .sent = one,
                                           .received = differs ? other : one,
                                           .row_size = differs ? row_size : 4};
    report_check(&r->report, cumoe_ep_exchange(r->ep, &args, call.stream) == CUMOE_COMM_ERROR);
    report_check(&r->report, strstr(cumoe_last_error(), "makes another call, or with other sizes") != NULL);
    report_check(&r->report, device_end(&call) == CUMOE_SUCCESS);
}

static void expect_more(rank_t *r)
{
    expect_told(r, 2, 4);
}

static void expect_wider(rank_t *r)
{
    expect_told(r, 1, 8);
}

Test(exchange, other_rows)
{
    run(3, 60, expect_more);
    run(3, 60, expect_wider);
}

/* Rank 1 does not come. */
static void wait_for_one(rank_t *r)
{
    const int64_t none[3] = {0};
    const cumoe_ep_exchange_args_t args = {
        .struct_size = sizeof args, .sent = none, .received = none, .row_size = 4};
    if (cumoe_ep_rank(r->ep) == 1) return;
    report_check(&r->report, cumoe_ep_exchange(r->ep, &args, NULL) == CUMOE_COMM_ERROR);
    report_check(&r->report, strstr(cumoe_last_error(), "rank 1 did not come in time") != NULL);
}

Test(exchange, late)
{
    run(3, 0.3, wait_for_one);
}
