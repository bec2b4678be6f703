/* permute, bit for bit, and permute_backward. */
#include "tests/suite.h"
#include "tests/support/stages.h"

Test(permute, forward)
{
    suite_all_routings("permute", stage_check_permute);
}

/* Slots without a row in the middle of the others: a group without a usable logit, dropped rows. */
Test(permute, forward_with_gaps)
{
    suite_all_cases("permute", VARIANT_HIERARCHICAL, stage_check_permute);
    suite_all_cases("permute", VARIANT_BALANCED_FEW_ROWS, stage_check_permute);
}

Test(permute, backward)
{
    suite_all_routings("permute_backward", stage_check_permute_backward);
}

Test(permute, backward_pairwise)
{
    suite_pairwise("permute_backward", stage_check_permute_backward);
}
