/* experts_up and experts_up_backward. */
#include "tests/suite.h"
#include "tests/support/stages.h"

Test(up, forward)
{
    suite_all_routings("up", stage_check_up);
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
    suite_all_routings("up_backward", stage_check_up_backward);
}

Test(up, backward_pairwise)
{
    suite_pairwise("up_backward", stage_check_up_backward);
}
