/* experts_up and experts_up_backward. */
#include "tests/suite.h"
#include "tests/support/stages.h"

Test(up, forward)
{
    for (int v = 0; v < NUM_GATE_VARIANTS; v++) suite_all_cases("up", &GATE_VARIANTS[v], stage_check_up);
}

Test(up, forward_far_from_zero)
{
    suite_activations("up, far from zero", &LARGE_CASE, CUMOE_F32, stage_check_up);
}

Test(up, forward_pairwise)
{
    suite_pairwise("up", stage_check_up);
}

Test(up, backward)
{
    for (int v = 0; v < NUM_GATE_VARIANTS; v++)
        suite_all_cases("up_backward", &GATE_VARIANTS[v], stage_check_up_backward);
}

Test(up, backward_pairwise)
{
    suite_pairwise("up_backward", stage_check_up_backward);
}
