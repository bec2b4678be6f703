/* Rows of the caller's own (cumoe_ep_exchange()): whose they are can be seen in each byte. */
#ifndef CUMOE_TESTS_ROWS_H
#define CUMOE_TESTS_ROWS_H

#include "tests/support/device.h"
#include "tests/support/ranks.h"

enum { ROWS_MANY = 300 };

/* Rows from one rank to another: many, some or none; the last of several ranks sends nothing. */
static inline int64_t rows_between(int32_t from, int32_t to, int32_t num_ranks)
{
    if (num_ranks > 1 && from == num_ranks - 1) return 0;
    return from == 0 && to == 1 ? ROWS_MANY : (from + 2 * to) % 4;
}

static inline unsigned char rows_byte(int32_t from, int32_t to, int64_t row, size_t i)
{
    return (unsigned char)(1 + 61 * from + 17 * to + 5 * row + (int64_t)i);
}

/* The array of a rank: what it sends, or what it is to receive; and how many rows for, or from, each. */
static inline unsigned char *rows_of(rank_t *r, bool sends, size_t row_size, int64_t count[RANKS_MAX], size_t *size)
{
    const int32_t me = cumoe_ep_rank(r->ep), W = cumoe_ep_num_ranks(r->ep);
    *size = 0;
    for (int32_t other = 0; other < W; other++) {
        count[other] = sends ? rows_between(me, other, W) : rows_between(other, me, W);
        *size += (size_t)count[other] * row_size;
    }
    unsigned char *rows = buffer_get(&r->buffers, *size), *at = rows;
    for (int32_t other = 0; other < W; other++)
        for (int64_t row = 0; row < count[other]; row++)
            for (size_t i = 0; i < row_size; i++) *at++ = rows_byte(sends ? me : other, sends ? other : me, row, i);
    return rows;
}

/* A rank_body_t. */
static inline void rows_exchange(rank_t *r)
{
    static const size_t row_sizes[] = {1, 7, 32, 1000};
    for (int i = 0; i < 4; i++) {
        int64_t sent[RANKS_MAX], received[RANKS_MAX];
        size_t size;
        device_call_t call;
        const void *send = rows_of(r, true, row_sizes[i], sent, &size);
        const unsigned char *expected = rows_of(r, false, row_sizes[i], received, &size);
        unsigned char *recv = buffer_get(&r->buffers, size);
        device_begin(&call, r->whole->handle);
        const cumoe_ep_exchange_args_t args = {.struct_size = sizeof args,
                                               .send = device_address(&call, send),
                                               .recv = device_address(&call, recv),
                                               .sent = sent,
                                               .received = received,
                                               .row_size = row_sizes[i]};
        if (cumoe_ep_exchange(r->ep, &args, call.stream) != CUMOE_SUCCESS)
            report_fail(&r->report, "%s", cumoe_last_error());
        report_check(&r->report, cumoe_ep_wait(r->ep, call.stream, 0) == CUMOE_SUCCESS);
        report_check(&r->report, device_end(&call) == CUMOE_SUCCESS);
        compare_bits(&r->report, "rows", recv, expected, size);
    }
    report_check(&r->report, buffer_guards_intact(&r->buffers));
}

#endif
