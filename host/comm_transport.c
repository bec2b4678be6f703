/* Ranks with a transport of bytes between them (cumoe/transport.h): what a call needs, in messages of host memory.
 * Before anything else all ranks tell each other what they call. */
#include "host/comm.h"
#include "host/kinds.h"

#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    MOST = CUMOE_GATE_MAX_SUMS, /* arrays of a call */
    PIECE = 1 << 20,            /* bytes of arrays that are summed at a time */
    UNIT = 8                    /* where ranks share out bytes no number is cut */
};

typedef enum call_kind { CALL_EXCHANGE, CALL_SUM } call_kind_t;

/* What a rank tells another: without padding, so that it can be compared as bytes. */
typedef struct call {
    int64_t kind, count;
    int64_t array[MOST][2]; /* exchange: row_size and rows for the other rank; sum: numbers and their type */
} call_t;

typedef enum state { GOOD, ABORTED, FAILED } state_t;

typedef struct member {
    cumoe_ep_t ep;
    cumoe_transport_t transport;
    atomic_int state;
    atomic_bool inside;            /* a call */
    char reason[512];              /* of FAILED */
    call_t *mine, *needed, *their; /* [W] what this rank tells the others, is to hear from them, and hears */
    cumoe_message_t *messages, *staged;
    int32_t num_messages;
    char *stage; /* host memory that grows */
    size_t stage_size;
} member_t;

cumoe_status_t cumoe_transport_fail(cumoe_status_t status, const char *format, ...)
{
    char sentence[256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(sentence, sizeof sentence, format, arguments);
    va_end(arguments);
    return cumoe__fail(status, "%s", sentence);
}

static cumoe_status_t fail(const member_t *m, const char *reason)
{
    return cumoe__fail(CUMOE_COMM_ERROR, "cumoe: rank %d of a group of %d over %s: %s", m->ep.rank, m->ep.num_ranks,
                       m->transport.name, reason);
}

static cumoe_status_t check_state(member_t *m)
{
    const int state = atomic_load(&m->state);
    if (state == FAILED) return cumoe__fail(CUMOE_COMM_ERROR, "%s", m->reason);
    return state == ABORTED ? fail(m, "it has aborted") : CUMOE_SUCCESS;
}

static void transport_abort(void *comm)
{
    member_t *m = comm;
    int good = GOOD;
    atomic_compare_exchange_strong(&m->state, &good, ABORTED);
    m->transport.abort(m->transport.context);
}

/* One call of a rank at a time. */
static cumoe_status_t begin_call(member_t *m)
{
    CUMOE_TRY(check_state(m));
    if (!atomic_exchange(&m->inside, true)) return CUMOE_SUCCESS;
    transport_abort(m);
    return fail(m, "it makes two calls at once");
}

/* Whatever went wrong in a call, the group is of no more use. */
static cumoe_status_t end_call(member_t *m, cumoe_status_t status)
{
    if (status != CUMOE_SUCCESS) {
        snprintf(m->reason, sizeof m->reason, "%s", cumoe_last_error());
        atomic_store(&m->state, FAILED);
        m->transport.abort(m->transport.context);
    }
    atomic_store(&m->inside, false);
    return status;
}

/* ---- messages ---- */

static void add_message(member_t *m, int32_t rank, bool receive, void *data, size_t size)
{
    if (size > 0 && rank != m->ep.rank)
        m->messages[m->num_messages++] = (cumoe_message_t){rank, receive, data, size};
}

/* Carry messages, which are in host memory. */
static cumoe_status_t carry(member_t *m, const cumoe_message_t *messages)
{
    const int32_t count = m->num_messages;
    m->num_messages = 0;
    if (count == 0) return CUMOE_SUCCESS;
    if (m->transport.exchange(m->transport.context, messages, count, m->ep.timeout) == CUMOE_SUCCESS)
        return CUMOE_SUCCESS;
    char reason[256];
    snprintf(reason, sizeof reason, "%s", cumoe_last_error());
    return fail(m, reason);
}

static cumoe_status_t copy(const member_t *m, void *to, const void *from, size_t size, cumoe_copy_t kind,
                           cumoe_stream_t stream)
{
    return size ? m->ep.handle->ops->memory_copy(m->ep.handle->device, to, from, size, kind, stream)
                : CUMOE_SUCCESS;
}

static cumoe_status_t synchronize(const member_t *m, cumoe_stream_t stream)
{
    return m->ep.handle->ops->stream_synchronize(m->ep.handle->device, stream);
}

static cumoe_status_t grow_stage(member_t *m, size_t size)
{
    if (size <= m->stage_size) return CUMOE_SUCCESS;
    free(m->stage);
    m->stage = malloc(size);
    m->stage_size = m->stage ? size : 0;
    CUMOE_REQUIRE(m->stage, OUT_OF_MEMORY, "cumoe: no host memory for %zu bytes between rank %d and others", size,
                  m->ep.rank);
    return CUMOE_SUCCESS;
}

/* Carry messages of device memory through the stage. */
static cumoe_status_t carry_staged(member_t *m, cumoe_stream_t stream)
{
    const int32_t count = m->num_messages;
    size_t size = 0, at = 0;
    for (int32_t i = 0; i < count; i++) size += m->messages[i].size;
    CUMOE_TRY(grow_stage(m, size));
    for (int32_t i = 0; i < count; at += m->messages[i++].size) {
        const cumoe_message_t *message = &m->messages[i];
        m->staged[i] = *message;
        m->staged[i].data = m->stage + at;
        if (!message->receive)
            CUMOE_TRY(copy(m, m->stage + at, message->data, message->size, CUMOE_COPY_TO_HOST, stream));
    }
    CUMOE_TRY(synchronize(m, stream));
    CUMOE_TRY(carry(m, m->staged));
    for (int32_t i = 0; i < count; i++)
        if (m->messages[i].receive)
            CUMOE_TRY(
                copy(m, m->messages[i].data, m->staged[i].data, m->messages[i].size, CUMOE_COPY_TO_DEVICE, stream));
    return synchronize(m, stream);
}

/* Hear from all ranks that they call what is needed. */
static cumoe_status_t agree(member_t *m)
{
    const int32_t W = m->ep.num_ranks;
    for (int32_t r = 0; r < W; r++) {
        add_message(m, r, false, &m->mine[r], sizeof *m->mine);
        add_message(m, r, true, &m->their[r], sizeof *m->their);
    }
    CUMOE_TRY(carry(m, m->messages));
    m->their[m->ep.rank] = m->mine[m->ep.rank];
    for (int32_t r = 0; r < W; r++) {
        if (memcmp(&m->their[r], &m->needed[r], sizeof *m->their) == 0) continue;
        char reason[80];
        snprintf(reason, sizeof reason, "rank %d makes another call, or with other sizes", r);
        return fail(m, reason);
    }
    return CUMOE_SUCCESS;
}

/* ---- exchange ---- */

static char *rows_of(const cumoe_transfer_t *t, const cumoe_blocks_t *blocks, const void *data, int32_t r)
{
    return (char *)(uintptr_t)data + (size_t)blocks->begin[r] * t->row_size;
}

static cumoe_status_t exchange(member_t *m, const cumoe_transfer_t *transfers, int count, cumoe_stream_t stream)
{
    const int32_t W = m->ep.num_ranks, me = m->ep.rank;
    CUMOE_TRY(synchronize(m, stream));
    for (int32_t r = 0; r < W; r++) {
        m->mine[r] = m->needed[r] = (call_t){.kind = CALL_EXCHANGE, .count = count};
        for (int i = 0; i < count; i++) {
            m->mine[r].array[i][0] = m->needed[r].array[i][0] = (int64_t)transfers[i].row_size;
            m->mine[r].array[i][1] = transfers[i].sent.count[r];
            m->needed[r].array[i][1] = transfers[i].received.count[r];
        }
    }
    CUMOE_TRY(agree(m));
    for (int i = 0; i < count; i++) {
        const cumoe_transfer_t *t = &transfers[i];
        for (int32_t r = 0; r < W; r++) {
            add_message(m, r, false, rows_of(t, &t->sent, t->send, r), (size_t)t->sent.count[r] * t->row_size);
            add_message(m, r, true, rows_of(t, &t->received, t->recv, r),
                        (size_t)t->received.count[r] * t->row_size);
        }
        CUMOE_TRY(copy(m, rows_of(t, &t->received, t->recv, me), rows_of(t, &t->sent, t->send, me),
                       (size_t)t->sent.count[me] * t->row_size, CUMOE_COPY_ON_DEVICE, stream));
    }
    return m->ep.handle->backend == CUMOE_BACKEND_CPU ? carry(m, m->messages) : carry_staged(m, stream);
}

static cumoe_status_t transport_exchange(void *comm, const cumoe_transfer_t *transfers, int count,
                                         cumoe_stream_t stream)
{
    CUMOE_TRY(begin_call(comm));
    return end_call(comm, exchange(comm, transfers, count, stream));
}

/* ---- sum ---- */

/* Arrays stand one behind the other, each from a multiple of UNIT on: a row of bytes that is summed in pieces. Of a
 * piece each rank adds up a slice, in the order of ranks, and tells the others. */
typedef struct row {
    const cumoe_sum_t *sums;
    int count;
} row_t;

static size_t round_up(size_t size)
{
    return (size + UNIT - 1) / UNIT * UNIT;
}

static size_t size_of(const cumoe_sum_t *sum)
{
    return sum->data ? (size_t)sum->count * cumoe__dtype_size(sum->dtype) : 0;
}

/* What array I has in common with bytes first .. first + size - 1 of the row. */
typedef struct part {
    char *data;
    size_t at, size; /* from first on */
} part_t;

static part_t part_of(const row_t *row, int i, size_t first, size_t size)
{
    size_t begin = 0;
    for (int j = 0; j < i; j++) begin += round_up(size_of(&row->sums[j]));
    const size_t end = begin + size_of(&row->sums[i]), last = first + size;
    const size_t from = begin > first ? begin : first, to = end < last ? end : last;
    if (from >= to) return (part_t){0};
    return (part_t){(char *)row->sums[i].data + (from - begin), from - first, to - from};
}

static cumoe_status_t copy_piece(const member_t *m, const row_t *row, size_t first, size_t size, cumoe_copy_t kind,
                                 cumoe_stream_t stream)
{
    for (int i = 0; i < row->count; i++) {
        const part_t part = part_of(row, i, first, size);
        char *host = m->stage + part.at;
        const bool to_host = kind == CUMOE_COPY_TO_HOST;
        CUMOE_TRY(copy(m, to_host ? host : part.data, to_host ? part.data : host, part.size, kind, stream));
    }
    return synchronize(m, stream);
}

/* Where the slice of a rank begins in a piece. */
static size_t cut(size_t slice, int32_t rank, size_t size)
{
    const size_t begin = slice * (size_t)rank;
    return begin < size ? begin : size;
}

static cumoe_status_t sum_piece(member_t *m, const row_t *row, size_t first, size_t size, cumoe_stream_t stream)
{
    const int32_t W = m->ep.num_ranks, me = m->ep.rank;
    const size_t slice = round_up((size + (size_t)W - 1) / (size_t)W);
    const size_t my_begin = cut(slice, me, size), my_size = cut(slice, me + 1, size) - my_begin;
    CUMOE_TRY(grow_stage(m, size + slice * (size_t)W));
    char *piece = m->stage, *slices = m->stage + size; /* [W, slice] this rank's slice, as all ranks have it */
    memset(piece, 0, size);
    CUMOE_TRY(copy_piece(m, row, first, size, CUMOE_COPY_TO_HOST, stream));
    for (int32_t r = 0; r < W; r++) {
        const size_t begin = cut(slice, r, size);
        add_message(m, r, false, piece + begin, cut(slice, r + 1, size) - begin);
        add_message(m, r, true, slices + (size_t)r * slice, my_size);
    }
    CUMOE_TRY(carry(m, m->messages));
    memcpy(slices + (size_t)me * slice, piece + my_begin, my_size);
    for (int i = 0; i < row->count; i++) {
        const part_t part = part_of(row, i, first + my_begin, my_size);
        for (int32_t r = 1; r < W; r++)
            cumoe__comm_add(slices + part.at, slices + (size_t)r * slice + part.at, part.size, row->sums[i].dtype);
    }
    for (int32_t r = 0; r < W; r++) {
        const size_t begin = cut(slice, r, size);
        add_message(m, r, false, slices, my_size);
        add_message(m, r, true, piece + begin, cut(slice, r + 1, size) - begin);
    }
    CUMOE_TRY(carry(m, m->messages));
    memcpy(piece + my_begin, slices, my_size);
    return copy_piece(m, row, first, size, CUMOE_COPY_TO_DEVICE, stream);
}

static cumoe_status_t sum(member_t *m, const cumoe_sum_t *sums, int count, cumoe_stream_t stream)
{
    call_t call = {.kind = CALL_SUM, .count = count};
    size_t size = 0;
    for (int i = 0; i < count; i++) {
        call.array[i][0] = sums[i].data ? sums[i].count : 0;
        call.array[i][1] = sums[i].dtype;
        size += round_up(size_of(&sums[i]));
    }
    for (int32_t r = 0; r < m->ep.num_ranks; r++) m->mine[r] = m->needed[r] = call;
    CUMOE_TRY(agree(m));
    const row_t row = {sums, count};
    for (size_t first = 0; first < size; first += PIECE)
        CUMOE_TRY(sum_piece(m, &row, first, size - first < PIECE ? size - first : PIECE, stream));
    return CUMOE_SUCCESS;
}

static cumoe_status_t transport_sum(void *comm, const cumoe_sum_t *sums, int count, cumoe_stream_t stream)
{
    CUMOE_TRY(begin_call(comm));
    return end_call(comm, sum(comm, sums, count, stream));
}

/* ---- the group ---- */

/* Whatever waits for others does so inside of a call. */
static cumoe_status_t transport_wait(void *comm, cumoe_stream_t stream, double timeout)
{
    (void)timeout;
    CUMOE_TRY(check_state(comm));
    return synchronize(comm, stream);
}

static void free_member(member_t *m)
{
    free(m->mine);
    free(m->messages);
    free(m->stage);
    free(m);
}

static void transport_destroy(void *comm)
{
    member_t *m = comm;
    m->transport.destroy(m->transport.context);
    free_member(m);
}

static const cumoe_comm_ops_t transport_ops = {.destroy = transport_destroy,
                                               .abort = transport_abort,
                                               .exchange = transport_exchange,
                                               .sum = transport_sum,
                                               .wait = transport_wait};

static member_t *make_member(size_t W)
{
    member_t *m = calloc(1, sizeof *m);
    if (!m) return NULL;
    m->mine = malloc(3 * W * sizeof *m->mine);
    m->messages = malloc(2 * (2 * W * MOST) * sizeof *m->messages);
    if (!m->mine || !m->messages) return free_member(m), NULL;
    m->needed = m->mine + W;
    m->their = m->mine + 2 * W;
    m->staged = m->messages + 2 * W * MOST;
    return m;
}

cumoe_status_t cumoe_ep_create_with(cumoe_ep_t **ep, const cumoe_handle_t *handle,
                                    const cumoe_transport_t *transport, double timeout)
{
    const char *function = "cumoe_ep_create_with";
    cumoe_transport_t t = {.struct_size = sizeof t};
    CUMOE_REQUIRE(ep, INVALID_ARGUMENT, "%s: ep = NULL, but the result needs a place", function);
    CUMOE_REQUIRE(handle, INVALID_ARGUMENT, "%s: handle = NULL, but must come from cumoe_handle_create()",
                  function);
    CUMOE_REQUIRE(transport, INVALID_ARGUMENT, "%s: transport = NULL, but is required", function);
    CUMOE_TRY(cumoe__struct_read(function, "transport", transport, sizeof t, &t, sizeof t));
    CUMOE_REQUIRE(t.num_ranks >= 1 && t.num_ranks <= CUMOE_EP_MAX_RANKS, INVALID_ARGUMENT,
                  "%s: transport.num_ranks = %d, but must be 1..%d", function, t.num_ranks, CUMOE_EP_MAX_RANKS);
    CUMOE_REQUIRE(t.rank >= 0 && t.rank < t.num_ranks, INVALID_ARGUMENT,
                  "%s: transport.rank = %d, but must be 0..%d (num_ranks - 1)", function, t.rank, t.num_ranks - 1);
    CUMOE_REQUIRE(t.name && t.exchange && t.abort && t.destroy, INVALID_ARGUMENT,
                  "%s: transport.%s = NULL, but is required", function,
                  !t.name       ? "name"
                  : !t.exchange ? "exchange"
                  : !t.abort    ? "abort"
                                : "destroy");
    CUMOE_TRY(cumoe__check_timeout(function, &timeout));
    member_t *m = make_member((size_t)t.num_ranks);
    CUMOE_REQUIRE(m, OUT_OF_MEMORY, "%s: no host memory for %d ranks", function, t.num_ranks);
    m->transport = t;
    m->ep = (cumoe_ep_t){.ops = &transport_ops,
                         .comm = m,
                         .handle = handle,
                         .rank = t.rank,
                         .num_ranks = t.num_ranks,
                         .timeout = timeout};
    *ep = &m->ep;
    return CUMOE_SUCCESS;
}
