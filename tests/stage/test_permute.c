/* permute, bit for bit, and permute_backward. */
#include "tests/suite.h"
#include "tests/support/stages.h"

Test(permute, forward)
{
    for (int v = 0; v < NUM_GATE_VARIANTS; v++) suite_all_cases("permute", &GATE_VARIANTS[v], stage_check_permute);
}

Test(permute, backward)
{
    for (int v = 0; v < NUM_GATE_VARIANTS; v++)
        suite_all_cases("permute_backward", &GATE_VARIANTS[v], stage_check_permute_backward);
}

Test(permute, backward_pairwise)
{
    suite_pairwise("permute_backward", stage_check_permute_backward);
}
