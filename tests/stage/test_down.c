/* experts_down and experts_down_backward. */
#include "tests/suite.h"
#include "tests/support/stages.h"

Test(down, forward)
{
    suite_all_routings("down", stage_check_down);
}

Test(down, forward_pairwise)
{
    suite_pairwise("down", stage_check_down);
}

Test(down, backward)
{
    suite_all_routings("down_backward", stage_check_down_backward);
}

Test(down, backward_far_from_zero)
{
    suite_activations("down, far from zero", &LARGE_CASE, CUMOE_F32, stage_check_down_backward);
}

Test(down, backward_pairwise)
{
    suite_pairwise("down_backward", stage_check_down_backward);
}
