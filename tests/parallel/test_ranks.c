/* The same batch on 1, 2, 3, 4 ranks: the same bits as on one device. */
#include "tests/suite.h"
#include "tests/support/ranks.h"

/* As many ranks as there are units to share out, up to MOST. */
static int32_t most_ranks(const problem_t *p, int32_t most)
{
    const int64_t units = p->groups ? p->groups : p->experts;
    return units < most ? (int32_t)units : most;
}

static void check_ranks(problem_t *p, report_t *report)
{
    static int turn;
    if (p->options.variant.gate == CUMOE_GATE_BALANCED) return;
    if (!problem_run_forward(p, report) || !problem_run_backward(p, report)) return;
    for (int32_t W = 1; W <= most_ranks(p, 4); W++, turn++) {
        const ranks_options_t exact = {.num_ranks = W, .split = (ranks_split_t)(turn % NUM_SPLITS)};
        ranks_check(p, &exact, report);
        const ranks_options_t bounded = {.num_ranks = W,
                                         .split = (ranks_split_t)((turn + 1) % NUM_SPLITS),
                                         .capacity = p->tokens * p->top_k + 3};
        if (turn % 2) ranks_check(p, &bounded, report);
    }
}

Test(ranks, all_cases)
{
    suite_all_gates_alone("ranks", check_ranks);
}

Test(ranks, pairwise)
{
    suite_pairwise_alone("ranks pairwise", check_ranks);
}
