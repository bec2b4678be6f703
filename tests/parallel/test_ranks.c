/* The same batch on 1, 2, 3, 4 ranks: the same bits as on one device. */
#include "tests/suite.h"
#include "tests/support/ranks.h"

/* As many ranks as there are units to share out, up to MOST. */
static int32_t most_ranks(const problem_t *p, int32_t most)
{
    const int64_t units = p->groups ? p->groups : p->experts;
    return units < most ? (int32_t)units : most;
}

/* Numbers of ranks, ways to share out the tokens, and to size the exchange, in turn. */
static void check_ranks(problem_t *p, report_t *report)
{
    static int turn;
    if (p->options.variant.gate == CUMOE_GATE_BALANCED) return;
    if (!problem_run_forward(p, report) || !problem_run_backward(p, report)) return;
    turn++;
    const ranks_options_t options = {.num_ranks = most_ranks(p, 1 + turn % 4),
                                     .split = (ranks_split_t)(turn / 4 % NUM_SPLITS),
                                     .capacity = turn % 3 ? 0 : p->tokens * p->top_k + 3};
    ranks_check(p, &options, report);
}

Test(ranks, all_cases)
{
    suite_all_gates_alone("ranks", check_ranks);
}

Test(ranks, pairwise)
{
    suite_pairwise_alone("ranks pairwise", check_ranks);
}
