/* A transport of a user's own (cumoe/transport.h), here of sockets between threads: the bits of one device, sums in
 * the order of ranks, failures that every call repeats. */
#define _GNU_SOURCE
#include "tests/suite.h"
#include "tests/support/ranks.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <unistd.h>

/* ---- the transport ---- */

enum { W = 3 };

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
    bool lost = !done || timeout <= 0;
    while (left > 0 && !lost) {
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
    return lost ? cumoe_transport_fail(CUMOE_COMM_ERROR, "a rank has closed its sockets") : CUMOE_SUCCESS;
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
        cr_assert(cumoe_ep_create_with(&ep[r], handle, &transport, 0) == CUMOE_SUCCESS, "%s", cumoe_last_error());
    }
}

static void destroy_group(sockets_t sockets[W], cumoe_ep_t *ep[W])
{
    for (int32_t r = 0; r < W; r++) {
        cumoe_ep_destroy(ep[r]);
        cr_expect(sockets[r].destroyed == 1);
    }
}

/* ---- bits ---- */

static void check_transport(problem_t *p, report_t *report)
{
    static int turn;
    if (p->options.variant.gate == CUMOE_GATE_BALANCED || (p->groups ? p->groups : p->experts) < W) return;
    if (!problem_run_forward(p, report) || !problem_run_backward(p, report)) return;
    const ranks_options_t options = {.num_ranks = W,
                                     .split = (ranks_split_t)(turn % NUM_SPLITS),
                                     .capacity = turn % 2 ? p->tokens * p->top_k + 3 : 0};
    turn++;
    sockets_t sockets[W];
    cumoe_ep_t *ep[W];
    make_group(p->handle, sockets, ep);
    ranks_check_group(p, &options, ep, report);
    destroy_group(sockets, ep);
}

Test(transport, pairwise)
{
    suite_pairwise_alone("transport pairwise", check_transport);
}

/* ---- sums ---- */

/* Gates of more than a piece, of which nothing is a multiple of anything. */
enum { EXPERTS = 613, HIDDEN = 577, NUMBERS = EXPERTS * HIDDEN };

typedef struct summing {
    pthread_t thread;
    const cumoe_handle_t *handle;
    cumoe_ep_t *ep;
    bool good;
} summing_t;

static float summand(int32_t rank, int64_t i)
{
    return (float)(i % 1009 - 504) * (rank == 1 ? 1e4F : 1.1F); /* the order of additions shows */
}

static bool sum_gates(summing_t *s, float *numbers)
{
    cumoe_config_t config;
    cumoe_layer_t *layer;
    if (cumoe_config_init(&config) != CUMOE_SUCCESS) return false;
    config.hidden_size = HIDDEN;
    config.intermediate_size = 1;
    config.num_experts = EXPERTS;
    config.top_k = 1;
    config.ep = s->ep;
    if (cumoe_layer_create(&layer, s->handle, &config) != CUMOE_SUCCESS) return false;
    cumoe_weights_t gradients = {
        .struct_size = sizeof gradients, .w_gate = numbers, .w_noise = numbers + NUMBERS + 3};
    const bool good = device_ep_sum_gradients(s->handle, layer, &gradients) == CUMOE_SUCCESS;
    cumoe_layer_destroy(layer);
    return good;
}

static void *summing_work(void *argument)
{
    summing_t *s = argument;
    const int32_t rank = cumoe_ep_rank(s->ep);
    buffer_list_t buffers = {0};
    float *numbers = buffer_get(&buffers, (2 * NUMBERS + 3) * sizeof *numbers);
    for (int64_t i = 0; i < 2 * NUMBERS + 3; i++) numbers[i] = summand(rank, i);
    s->good = sum_gates(s, numbers);
    for (int64_t i = 0; i < 2 * NUMBERS + 3; i++) {
        float sum = summand(0, i);
        for (int32_t r = 1; r < W; r++) sum += summand(r, i);
        s->good = s->good && numbers[i] == (i >= NUMBERS && i < NUMBERS + 3 ? summand(rank, i) : sum);
    }
    buffer_free_all(&buffers);
    return NULL;
}

Test(transport, sums_in_the_order_of_ranks)
{
    cumoe_handle_t *handle = suite_handle();
    sockets_t sockets[W];
    cumoe_ep_t *ep[W];
    summing_t sums[W];
    make_group(handle, sockets, ep);
    for (int r = 0; r < W; r++) {
        sums[r] = (summing_t){.handle = handle, .ep = ep[r]};
        cr_assert(pthread_create(&sums[r].thread, NULL, summing_work, &sums[r]) == 0);
    }
    for (int r = 0; r < W; r++) {
        pthread_join(sums[r].thread, NULL);
        cr_expect(sums[r].good, "rank %d", r);
    }
    destroy_group(sockets, ep);
    cumoe_handle_destroy(handle);
}

/* ---- failures ---- */

typedef struct failing {
    pthread_t thread;
    const problem_t *whole;
    const ranks_options_t *options;
    cumoe_ep_t *ep;
    bool done, repeated; /* what the failing call said */
    char sentence[512];
} failing_t;

static void *failing_work(void *argument)
{
    failing_t *f = argument;
    rank_t part;
    f->done = rank_create(&part, f->whole, f->options, f->ep) && rank_run(&part);
    snprintf(f->sentence, sizeof f->sentence, "%s", cumoe_last_error());
    f->repeated = cumoe_ep_wait(f->ep, NULL, 0) == CUMOE_COMM_ERROR && strcmp(f->sentence, cumoe_last_error()) == 0;
    rank_destroy(&part);
    return NULL;
}

/* Rank 1 fails in its exchange number n, until there is no such exchange. */
static void check_failures(problem_t *p, report_t *report)
{
    const ranks_options_t options = {.num_ranks = W};
    int n = 0;
    if (!problem_run_forward(p, report) || !problem_run_backward(p, report)) return;
    for (bool reached = true; reached; n++) {
        sockets_t sockets[W];
        cumoe_ep_t *ep[W];
        failing_t ranks[W];
        make_group(p->handle, sockets, ep);
        sockets[1].fails_at = n;
        for (int r = 0; r < W; r++) {
            ranks[r] = (failing_t){.whole = p, .options = &options, .ep = ep[r]};
            cr_assert(pthread_create(&ranks[r].thread, NULL, failing_work, &ranks[r]) == 0);
        }
        for (int r = 0; r < W; r++) pthread_join(ranks[r].thread, NULL);
        reached = sockets[1].exchanges > n;
        for (int r = 0; r < W; r++) {
            report_check(report, ranks[r].done == !reached);
            report_check(report, ranks[r].repeated == reached);
            report_check(report, sockets[r].aborted == reached);
        }
        if (reached)
            report_check(report, strcmp(ranks[1].sentence, "cumoe: rank 1 of a group of 3 over sockets: "
                                                           "a failure of the test") == 0);
        destroy_group(sockets, ep);
    }
    report_check(report, n > 10);
}

Test(transport, an_exchange_fails)
{
    const problem_options_t options = {
        .dtype = CUMOE_F32, .variant = GATE_VARIANTS[VARIANT_NOISY], .seed = 1, .without_reference = true};
    const layer_case_t layer_case = {.name = "failures", 12, 8, 8, 4, 2};
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
    REFUSED(cumoe_ep_create_with(&ep, handle, &good, -2),
            "timeout = -2, but must be finite and >= 0 seconds (0 = 600)");
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
