/* The pairwise selection of types, activations, layouts, biases and the rest, against the reference. */
#include "tests/suite.h"

#include <stdio.h>

static void body_forward(problem_t *problem, report_t *report)
{
    if (problem_run_forward(problem, report)) problem_check_forward(problem, report);
}

static void body_backward(problem_t *problem, report_t *report)
{
    if (!problem_run_forward(problem, report) || !problem_run_backward(problem, report)) return;
    problem_check_backward(problem, report);
}

Test(pairwise, forward)
{
    suite_pairwise("pairwise forward", body_forward);
}

Test(pairwise, backward)
{
    suite_pairwise("pairwise backward", body_backward);
}

/* Do values v of factor f and w of factor g stand in one of these combinations, or in any admissible one? */
static bool meet(int n, const int *chosen, int f, int v, int g, int w)
{
    const int all = pairs_combinations(&PAIRWISE);
    for (int i = 0; i < (chosen ? n : all); i++) {
        int row[PAIRS_MAX_FACTORS];
        pairs_combination(&PAIRWISE, chosen ? chosen[i] : i, row);
        if (row[f] == v && row[g] == w && PAIRWISE.admissible(row)) return true;
    }
    return false;
}

Test(pairwise, selection_is_complete)
{
    int chosen[MAX_PAIRWISE], met = 0;
    const int n = pairs_choose(&PAIRWISE, MAX_PAIRWISE, chosen);
    cr_assert(n > 0);
    for (int i = 0; i < n; i++) {
        int row[PAIRS_MAX_FACTORS];
        pairs_combination(&PAIRWISE, chosen[i], row);
        cr_expect(PAIRWISE.admissible(row), "combination %d", chosen[i]);
    }
    for (int f = 0; f < PAIRWISE.factors; f++)
        for (int g = 0; g < f; g++)
            for (int pair = 0; pair < PAIRWISE.levels[f] * PAIRWISE.levels[g]; pair++) {
                const int v = pair / PAIRWISE.levels[g], w = pair % PAIRWISE.levels[g];
                const bool wanted = meet(n, NULL, f, v, g, w);
                met += wanted;
                cr_expect_eq(meet(n, chosen, f, v, g, w), wanted, "value %d of factor %d, value %d of factor %d", v,
                             f, w, g);
            }
    fprintf(stderr, "%d combinations of %d, %d pairs\n", n, pairs_combinations(&PAIRWISE), met);
}
