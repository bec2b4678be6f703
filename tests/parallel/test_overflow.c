/* A capacity that does not suffice: the rows that have no room are counted, and everything else is as if the caller
 * had not routed them. */
#include "tests/suite.h"
#include "tests/support/ranks.h"

static const layer_case_t CASES[] = {
    {"overflow", 61, 13, 11, 7, 3, .pattern = PATTERN_RANDOM},
    {"overflow, one expert", 41, 8, 16, 6, 2, .pattern = PATTERN_RANDOM, .mode = CUMOE_GRADIENT_ADD},
    {"overflow, duplicates", 37, 9, 11, 8, 3, .pattern = PATTERN_DUPLICATES},
    {"overflow, live tokens", 53, 17, 19, 8, 2, .pattern = PATTERN_RANDOM, .dead_tokens = 12, .mask_period = 4},
};

enum { NUM_CASES = sizeof CASES / sizeof *CASES, MAX_SLOTS = 256 };

typedef struct overflow {
    const problem_t *without; /* the same without the rows that are dropped */
    int64_t dropped[RANKS_MAX];
} overflow_t;

static bool routed(const problem_t *p, int64_t t, int32_t expert)
{
    return t < p->live_tokens && (!p->input.token_mask || p->input.token_mask[t]) && expert >= 0 &&
           expert < p->experts;
}

/* Of the tokens first .. end of a rank: of the rows for experts low .. high those beyond the capacity, in the order
 * of experts, tokens, choices. */
static int64_t drop(const problem_t *p, int32_t *index, int64_t first, int64_t end, int64_t low, int64_t high,
                    int64_t capacity)
{
    int64_t rows = 0, dropped = 0;
    for (int64_t e = low; e < high; e++)
        for (int64_t slot = first * p->top_k; slot < end * p->top_k; slot++)
            if (index[slot] == e && routed(p, slot / p->top_k, index[slot]) && ++rows > capacity) {
                index[slot] = -1;
                dropped++;
            }
    return dropped;
}

/* The same memory again, without a routed row: what stands there from before is nobody's row now. */
static void run_without_rows(rank_t *r)
{
    const problem_t *p = r->whole;
    memset((void *)(uintptr_t)r->forward.index, 0xff, (size_t)(r->tokens * p->top_k) * sizeof(int32_t));
    if (!rank_run(r)) return;
    const int64_t n = r->experts * p->hidden_size * p->intermediate_size;
    const cumoe_dtype_t dtype = problem_matrix_view(p, &p->gradients, MATRIX_DOWN, 0).dtype;
    int64_t others = 0;
    for (int64_t i = 0; i < n; i++) others += real_get(r->gradients.w_down, dtype, i) != 0;
    report_check(&r->report, others == 0);
}

static void create_run_check(rank_t *r)
{
    const overflow_t *o = r->context;
    if (!rank_create(r, r->whole, r->options, r->ep) || !rank_run(r)) return;
    report_check(&r->report, r->forward.statistics->exchange_overflow == o->dropped[cumoe_ep_rank(r->ep)]);
    compare_bits(&r->report, "expert_count", r->forward.expert_count, r->whole->forward.expert_count,
                 (size_t)r->whole->experts * sizeof(int32_t));
    r->whole = o->without;
    rank_check_experts(r);
    if (r->whole->layer_case.mode == CUMOE_GRADIENT_WRITE) run_without_rows(r);
}

/* Of what goes from a rank to another: each chunk of its experts has its share of the capacity. */
static int64_t drop_between(const problem_t *p, int32_t *index, const ranks_options_t *ranks, int32_t from,
                            int32_t to)
{
    const int64_t W = ranks->num_ranks, n = ranks->chunks;
    const int64_t low = p->experts * to / W, own = p->experts * (to + 1) / W - low;
    int64_t dropped = 0;
    for (int64_t c = 0; c < n; c++)
        dropped += drop(p, index, p->tokens * from / W, p->tokens * (from + 1) / W, low + own * c / n,
                        low + own * (c + 1) / n, (ranks->capacity + n - 1) / n);
    return dropped;
}

static void check(const cumoe_handle_t *handle, const layer_case_t *layer_case, cumoe_dtype_t dtype,
                  const ranks_options_t *ranks, report_t *report)
{
    const problem_options_t options = {.dtype = dtype,
                                       .activation = CUMOE_ACTIVATION_SWIGLU,
                                       .variant = GATE_VARIANTS[VARIANT_EXTERNAL],
                                       .seed = random_seed("overflow", 52),
                                       .recompute = ranks->capacity % 2,
                                       .max_threads = 1,
                                       .without_reference = true};
    problem_t p, without;
    cr_assert(problem_create(&p, handle, layer_case, &options, report), "%s", report->text);
    cr_assert(problem_create(&without, handle, layer_case, &options, report), "%s", report->text);
    int32_t *index = (int32_t *)(uintptr_t)without.forward.index;
    overflow_t o = {.without = &without};
    int64_t all = 0;
    for (int32_t from = 0; from < ranks->num_ranks; from++)
        for (int32_t to = 0; to < ranks->num_ranks; to++)
            o.dropped[from] += drop_between(&p, index, ranks, from, to);
    for (int32_t r = 0; r < ranks->num_ranks; r++) all += o.dropped[r];
    report_check(report, all > 0);
    if (problem_run_forward(&p, report) && problem_run_forward(&without, report) &&
        problem_run_backward(&without, report))
        ranks_run(&p, ranks, create_run_check, &o, report);
    problem_destroy(&p);
    problem_destroy(&without);
}

Test(overflow, dropped_rows)
{
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    for (int i = 0; i < NUM_CASES; i++)
        for (int32_t W = 1; W <= 4; W++) {
            const cumoe_dtype_t dtype = (cumoe_dtype_t)(CUMOE_F64 + (i + W) % 4);
            const int64_t share = CASES[i].tokens * CASES[i].top_k / (W * W);
            const int32_t least = (int32_t)CASES[i].experts / W, chunks = 1 + (i + W) % 3;
            const ranks_options_t ranks = {
                .num_ranks = W, .capacity = 1 + share / 3 + W % 2, .chunks = chunks < least ? chunks : least};
            check(handle, &CASES[i], dtype, &ranks, &report);
        }
    cumoe_handle_destroy(handle);
    EXPECT_EMPTY(report);
}
