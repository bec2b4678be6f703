/* combine. Its backward pass is inside experts_down_backward. */
#include "tests/suite.h"
#include "tests/support/stages.h"

Test(combine, forward)
{
    suite_all_gates("combine", stage_check_combine);
}

Test(combine, forward_pairwise)
{
    suite_pairwise("combine", stage_check_combine);
}
