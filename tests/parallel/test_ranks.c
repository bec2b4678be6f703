/* The same batch on 1, 2, 3, 4 ranks: the same bits as on one device. */
#include "tests/parallel/turns.h"

Test(ranks, pairwise)
{
    suite_pairwise_alone("ranks", check_ranks_in_turn);
}
