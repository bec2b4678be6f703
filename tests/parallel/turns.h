/* Ranks in turn: their number, ways to share out the tokens, and to size and cut the exchange. */
#ifndef CUMOE_TESTS_TURNS_H
#define CUMOE_TESTS_TURNS_H

#include "tests/suite.h"
#include "tests/support/ranks.h"

/* No more ranks than there are units to share out. */
static inline int32_t ranks_for(const problem_t *p, int32_t wanted)
{
    const int64_t units = p->groups ? p->groups : p->experts;
    return units < wanted ? (int32_t)units : wanted;
}

/* The same bits as one device gives. */
static inline void check_ranks_of(problem_t *p, ranks_create_t *create, report_t *report)
{
    static int turn;
    if (p->options.variant.gate == CUMOE_GATE_BALANCED) return;
    if (!problem_run_forward(p, report) || !problem_run_backward(p, report)) return;
    turn++;
    const int32_t chunks = turn % 7 == 6 ? CUMOE_MAX_CHUNKS : turn % 7 % 4; /* 0 = chosen */
    const ranks_options_t options = {.num_ranks = ranks_for(p, 1 + turn % 4),
                                     .split = (ranks_split_t)(turn / 4 % NUM_SPLITS),
                                     .capacity = turn % 3 ? 0 : (p->tokens * p->top_k + 3) * (chunks + 1),
                                     .chunks = chunks,
                                     .create = create};
    ranks_check(p, &options, report);
}

static inline void check_ranks_in_turn(problem_t *p, report_t *report)
{
    if (!suite_spares(p)) check_ranks_of(p, NULL, report);
}

#endif
