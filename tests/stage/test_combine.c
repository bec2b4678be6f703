/* combine. Its backward pass is inside experts_down_backward. */
#include "tests/suite.h"
#include "tests/support/stages.h"

Test(combine, forward)
{
    for (int v = 0; v < NUM_GATE_VARIANTS; v++) suite_all_cases("combine", &GATE_VARIANTS[v], stage_check_combine);
}

Test(combine, forward_pairwise)
{
    suite_pairwise("combine", stage_check_combine);
}
