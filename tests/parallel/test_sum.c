/* Sums over ranks: exact for integers, in the order of ranks for others, for arrays of any length. */
#include "tests/suite.h"
#include "tests/support/ranks.h"

enum { NUM_RANKS = 3, MOST = 20011 }; /* more than is summed at a time */

static double element(cumoe_dtype_t dtype, int32_t rank, int64_t i)
{
    if (dtype == CUMOE_F32 || dtype == CUMOE_F64) return (1 + rank) / (double)(3 + i % 17) + (rank == 1 ? 1e6 : 0);
    return (double)((i * 7919 + rank) % 100003 - 50000);
}

static void set(void *data, cumoe_dtype_t dtype, int64_t i, double value)
{
    if (dtype == CUMOE_I32)
        ((int32_t *)data)[i] = (int32_t)value;
    else if (dtype == CUMOE_I64)
        ((int64_t *)data)[i] = (int64_t)value * ((int64_t)1 << 30);
    else
        real_set(data, dtype, i, value);
}

/* What adding in the order of ranks gives. */
static void set_expected(void *data, cumoe_dtype_t dtype, int64_t i)
{
    double total = element(dtype, 0, i);
    float narrow = (float)total;
    for (int32_t r = 1; r < NUM_RANKS; r++) {
        total += element(dtype, r, i);
        narrow += (float)element(dtype, r, i);
    }
    set(data, dtype, i, dtype == CUMOE_F32 ? (double)narrow : total);
}

static void check_sums(rank_t *r)
{
    static const cumoe_dtype_t dtypes[] = {CUMOE_I32, CUMOE_I64, CUMOE_F32, CUMOE_F64};
    static const int64_t counts[] = {0, 1, 5, MOST};
    for (int d = 0; d < 4; d++)
        for (int c = 0; c < 4; c++) {
            const size_t size = dtypes[d] == CUMOE_I32 || dtypes[d] == CUMOE_F32 ? 4 : 8;
            void *data = buffer_get(&r->buffers, (size_t)counts[c] * size);
            void *expected = buffer_get(&r->buffers, (size_t)counts[c] * size);
            for (int64_t i = 0; i < counts[c]; i++) {
                set(data, dtypes[d], i, element(dtypes[d], cumoe_ep_rank(r->ep), i));
                set_expected(expected, dtypes[d], i);
            }
            device_call_t call;
            device_begin(&call, r->whole->handle);
            void *address = device_address(&call, data);
            report_check(&r->report,
                         cumoe_ep_sum(r->ep, address, counts[c], dtypes[d], call.stream) == CUMOE_SUCCESS);
            report_check(&r->report, device_end(&call) == CUMOE_SUCCESS);
            compare_bits(&r->report, "sum", data, expected, (size_t)counts[c] * size);
        }
    report_check(&r->report, buffer_guards_intact(&r->buffers));
}

Test(sum, every_type)
{
    const problem_t nothing = {.name = "sums", .handle = suite_handle()};
    const ranks_options_t ranks = {.num_ranks = NUM_RANKS};
    report_t report = {0};
    ranks_run(&nothing, &ranks, check_sums, NULL, &report);
    cumoe_handle_destroy((cumoe_handle_t *)(uintptr_t)nothing.handle);
    EXPECT_EMPTY(report);
}
