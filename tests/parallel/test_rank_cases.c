/* Hostile cases on 1, 2, 3, 4 ranks: the same bits as on one device. */
#include "tests/parallel/turns.h"

Test(rank_cases, all_gates)
{
    suite_all_gates_alone("rank cases", check_ranks_in_turn);
}
