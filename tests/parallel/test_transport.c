/* A transport of a user's own (cumoe/transport.h), here of sockets between threads: the bits of one device, sums in
 * the order of ranks, failures that every call repeats. */
#define _GNU_SOURCE
#include "tests/parallel/rows.h"
#include "tests/suite.h"
#include "tests/support/ranks.h"

#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

/* ---- the transport ---- */

enum { W = 3, TIMEOUT = 20 };

typedef struct sockets {
    int32_t rank;
    int fd[W];
    int fails_at, exchanges; /* number of the exchange that fails, -1 = none */
    int aborted, destroyed;
} sockets_t;

/* Whatever can be moved of a message now. */
static ssize_t move(const sockets_t *s, const cumoe_message_t *m, size_t done)
{
    return m->receive ? recv(s->fd[m->rank], (char *)m->data + done, m->size - done, MSG_DONTWAIT)
                      : send(s->fd[m->rank], (char *)m->data + done, m->size - done, MSG_DONTWAIT | MSG_NOSIGNAL);
}

/* Messages in their order, those of different ranks and directions beside each other. */
static cumoe_status_t exchange(void *context, const cumoe_message_t *messages, int32_t count, double timeout)
{
    sockets_t *s = context;
    if (s->exchanges++ == s->fails_at) return cumoe_transport_fail(CUMOE_COMM_ERROR, "a failure of %s", "the test");
    size_t *done = calloc((size_t)count, sizeof *done);
    int32_t left = count;
    const time_t end = time(NULL) + (time_t)timeout;
    bool lost = !done;
    while (left > 0 && !lost) {
        lost = time(NULL) > end;
        bool busy[W][2] = {{false}};
        for (int32_t i = 0; i < count && !lost; i++) {
            const cumoe_message_t *m = &messages[i];
            if (done[i] == m->size || busy[m->rank][m->receive]) continue;
            const ssize_t moved = move(s, m, done[i]);
            lost = moved == 0 || (moved < 0 && errno != EAGAIN);
            if (moved > 0) done[i] += (size_t)moved;
            busy[m->rank][m->receive] = done[i] < m->size;
            left -= done[i] == m->size;
        }
        sched_yield();
    }
    free(done);
    return lost ? cumoe_transport_fail(CUMOE_COMM_ERROR, "a rank is late, or has closed its sockets")
                : CUMOE_SUCCESS;
}

static void hang_up(void *context)
{
    sockets_t *s = context;
    s->aborted++;
    for (int r = 0; r < W; r++)
        if (r != s->rank) shutdown(s->fd[r], SHUT_RDWR);
}

static void close_all(void *context)
{
    sockets_t *s = context;
    s->destroyed++;
    for (int r = 0; r < W; r++)
        if (r != s->rank) close(s->fd[r]);
}

static cumoe_transport_t transport_of(sockets_t *sockets, int32_t rank)
{
    return (cumoe_transport_t){.struct_size = sizeof(cumoe_transport_t),
                               .name = "sockets",
                               .rank = rank,
                               .num_ranks = W,
                               .context = sockets,
                               .exchange = exchange,
                               .abort = hang_up,
                               .destroy = close_all};
}

static void make_group(const cumoe_handle_t *handle, sockets_t sockets[W], cumoe_ep_t *ep[W])
{
    for (int32_t r = 0; r < W; r++) sockets[r] = (sockets_t){.rank = r, .fails_at = -1};
    for (int a = 0; a < W; a++)
        for (int b = a + 1; b < W; b++) {
            int pair[2];
            cr_assert(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
            sockets[a].fd[b] = pair[0];
            sockets[b].fd[a] = pair[1];
        }
    for (int32_t r = 0; r < W; r++) {
        const cumoe_transport_t transport = transport_of(&sockets[r], r);
        cr_assert(cumoe_ep_create_with(&ep[r], handle, &transport, TIMEOUT) == CUMOE_SUCCESS, "%s",
                  cumoe_last_error());
    }
}

/* ---- bits ---- */

static void check_transport(problem_t *p, report_t *report)
{
    static int turn;
    if (device_is_slow() && turn == 2) return; /* an exchange of each kind */
    if (p->options.variant.gate == CUMOE_GATE_BALANCED || (p->groups ? p->groups : p->experts) < W) return;
    if (!problem_run_forward(p, report) || !problem_run_backward(p, report)) return;
    sockets_t sockets[W];
    cumoe_ep_t *ep[W];
    const ranks_options_t options = {.num_ranks = W,
                                     .split = (ranks_split_t)(turn % NUM_SPLITS),
                                     .capacity = turn % 2 ? p->tokens * p->top_k + 3 : 0,
                                     .group = ep};
    turn++;
    make_group(p->handle, sockets, ep);
    ranks_check(p, &options, report);
    for (int r = 0; r < W; r++) report_check(report, sockets[r].destroyed == 1 && sockets[r].aborted == 0);
}

Test(transport, pairwise)
{
    suite_pairwise_alone("transport pairwise", check_transport);
}

/* ---- sums ---- */

enum { NUMBERS = 700001 }; /* more than a piece, and no multiple of anything */

static float summand(int32_t rank, int64_t i)
{
    return (float)(i % 1009 - 504) * (rank == 1 ? 1e4F : 1.1F); /* the order of additions shows */
}

static void sum_and_compare(rank_t *r)
{
    const int32_t rank = cumoe_ep_rank(r->ep);
    float *sum = buffer_get(&r->buffers, NUMBERS * sizeof *sum);
    for (int64_t i = 0; i < NUMBERS; i++) sum[i] = summand(rank, i);
    device_call_t call;
    device_begin(&call, r->whole->handle);
    void *address = device_address(&call, sum);
    report_check(&r->report, cumoe_ep_sum(r->ep, address, NUMBERS, CUMOE_F32, call.stream) == CUMOE_SUCCESS);
    report_check(&r->report, device_end(&call) == CUMOE_SUCCESS);
    int64_t wrong = 0;
    for (int64_t i = 0; i < NUMBERS; i++) wrong += sum[i] != (summand(0, i) + summand(1, i)) + summand(2, i);
    report_check(&r->report, wrong == 0 && buffer_guards_intact(&r->buffers));
}

Test(transport, sums_in_the_order_of_ranks)
{
    const problem_t nothing = {.name = "sums", .handle = suite_handle()};
    sockets_t sockets[W];
    cumoe_ep_t *ep[W];
    const ranks_options_t options = {.num_ranks = W, .group = ep};
    report_t report = {0};
    make_group(nothing.handle, sockets, ep);
    ranks_run(&nothing, &options, sum_and_compare, NULL, &report);
    cumoe_handle_destroy((cumoe_handle_t *)(uintptr_t)nothing.handle);
    EXPECT_EMPTY(report);
}

/* ---- rows of the caller's own ---- */

Test(transport, rows)
{
    const problem_t nothing = {.name = "rows", .handle = suite_handle()};
    sockets_t sockets[W];
    cumoe_ep_t *ep[W];
    const ranks_options_t options = {.num_ranks = W, .group = ep};
    report_t report = {0};
    make_group(nothing.handle, sockets, ep);
    ranks_run(&nothing, &options, rows_exchange, NULL, &report);
    cumoe_handle_destroy((cumoe_handle_t *)(uintptr_t)nothing.handle);
    EXPECT_EMPTY(report);
}

/* ---- failures ---- */

static void sum_another_number(rank_t *r)
{
    const int32_t rank = cumoe_ep_rank(r->ep), other = rank == 2 ? 0 : 2;
    char sentence[160];
    snprintf(sentence, sizeof sentence,
             "cumoe: rank %d of a group of 3 over sockets: rank %d makes another call, or with other sizes", rank,
             other);
    double *sum = buffer_get_zero(&r->buffers, 8 * sizeof *sum);
    device_call_t call;
    device_begin(&call, r->whole->handle);
    void *address = device_address(&call, sum);
    const int64_t count = rank == 2 ? 8 : 7;
    report_check(&r->report, cumoe_ep_sum(r->ep, address, count, CUMOE_F64, call.stream) == CUMOE_COMM_ERROR);
    if (strcmp(cumoe_last_error(), sentence) != 0) report_fail(&r->report, "%s", cumoe_last_error());
    report_check(&r->report, device_end(&call) == CUMOE_SUCCESS);
}

Test(transport, a_rank_makes_another_call)
{
    const problem_t nothing = {.name = "another call", .handle = suite_handle()};
    sockets_t sockets[W];
    cumoe_ep_t *ep[W];
    const ranks_options_t options = {.num_ranks = W, .group = ep};
    report_t report = {0};
    make_group(nothing.handle, sockets, ep);
    ranks_run(&nothing, &options, sum_another_number, NULL, &report);
    cumoe_handle_destroy((cumoe_handle_t *)(uintptr_t)nothing.handle);
    EXPECT_EMPTY(report);
}

static void run_until_told(rank_t *r)
{
    bool *told = r->context;
    const int32_t rank = cumoe_ep_rank(r->ep);
    if (rank_create(r, r->whole, r->options, r->ep) && rank_run(r)) return;
    r->report = (report_t){0};
    char sentence[512];
    snprintf(sentence, sizeof sentence, "%s", cumoe_last_error());
    told[rank] = true;
    report_check(&r->report, cumoe_ep_wait(r->ep, NULL, 0) == CUMOE_COMM_ERROR);
    report_check(&r->report, strcmp(sentence, cumoe_last_error()) == 0);
    if (rank == 1)
        report_check(&r->report, strcmp(sentence, "cumoe: rank 1 of a group of 3 over sockets: "
                                                  "a failure of the test") == 0);
}

/* Rank 1 fails in its exchange number n, until there is no such exchange. */
static void check_failures(problem_t *p, report_t *report)
{
    sockets_t sockets[W];
    cumoe_ep_t *ep[W];
    const ranks_options_t options = {.num_ranks = W, .group = ep};
    bool fails = true;
    int n = 0;
    for (; fails; n += device_is_slow() ? 7 : 1) {
        bool told[W] = {false};
        make_group(p->handle, sockets, ep);
        sockets[1].fails_at = n;
        ranks_run(p, &options, run_until_told, told, report);
        fails = sockets[1].exchanges > n;
        for (int r = 0; r < W; r++) report_check(report, told[r] == fails && sockets[r].aborted == fails);
    }
    report_check(report, n > 10);
}

Test(transport, an_exchange_fails)
{
    const problem_options_t options = {
        .dtype = CUMOE_F32, .variant = GATE_VARIANTS[VARIANT_NOISY], .seed = 1, .without_reference = true};
    const layer_case_t layer_case = {"failures", 12, 8, 8, 4, 2, .pattern = PATTERN_RANDOM};
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    suite_one_case(handle, &layer_case, &options, check_failures, &report);
    cumoe_handle_destroy(handle);
    EXPECT_EMPTY(report);
}

/* ---- refusals ---- */

Test(transport, refusals)
{
    cumoe_handle_t *handle = suite_handle();
    sockets_t sockets = {0};
    cumoe_ep_t *ep = NULL;
    const cumoe_transport_t good = transport_of(&sockets, 0);
    cumoe_transport_t bad;
#define REFUSED(call, text)                                                                                        \
    do {                                                                                                           \
        cr_expect((call) == CUMOE_INVALID_ARGUMENT);                                                               \
        cr_expect(strcmp(cumoe_last_error(), "cumoe_ep_create_with: " text) == 0, "%s", cumoe_last_error());       \
    } while (0)
#define BAD(field, value, text)                                                                                    \
    bad = good, bad.field = value;                                                                                 \
    REFUSED(cumoe_ep_create_with(&ep, handle, &bad, 0), text)
    REFUSED(cumoe_ep_create_with(NULL, handle, &good, 0), "ep = NULL, but the result needs a place");
    REFUSED(cumoe_ep_create_with(&ep, NULL, &good, 0), "handle = NULL, but must come from cumoe_handle_create()");
    REFUSED(cumoe_ep_create_with(&ep, handle, NULL, 0), "transport = NULL, but is required");
    REFUSED(cumoe_ep_create_with(&ep, handle, &good, -2), "timeout = -2, but must be 0..1e9 seconds (0 = 600)");
    BAD(struct_size, 8, "transport.struct_size = 8, but must be the size of the struct in the header, at least 56");
    BAD(num_ranks, 0, "transport.num_ranks = 0, but must be 1..1024");
    BAD(num_ranks, 1025, "transport.num_ranks = 1025, but must be 1..1024");
    BAD(rank, 3, "transport.rank = 3, but must be 0..2 (num_ranks - 1)");
    BAD(rank, -1, "transport.rank = -1, but must be 0..2 (num_ranks - 1)");
    BAD(name, NULL, "transport.name = NULL, but is required");
    BAD(exchange, NULL, "transport.exchange = NULL, but is required");
    BAD(abort, NULL, "transport.abort = NULL, but is required");
    BAD(destroy, NULL, "transport.destroy = NULL, but is required");
    cr_expect(ep == NULL && sockets.destroyed == 0);
    cumoe_handle_destroy(handle);
}
