/* The whole case table, forward, against the reference. */
#include "tests/suite.h"

static void body(problem_t *problem, report_t *report)
{
    if (problem_run_forward(problem, report)) problem_check_forward(problem, report);
}

/* Without saved, and without any optional output: y all the same. */
static void body_bare(problem_t *problem, report_t *report)
{
    const int64_t bytes = problem->tokens * problem->forward.y_stride * (int64_t)real_size(problem->options.dtype);
    if (!problem_run_forward(problem, report)) return;
    void *y = problem->forward.y, *bare_y = buffer_get(&problem->buffers, (size_t)bytes);
    cumoe_forward_args_t bare = problem->forward;
    cumoe_status_t status = cumoe_layer_buffer_sizes(problem->layer, problem->tokens, &bare.workspace_size, NULL);
    report_check(report, status == CUMOE_SUCCESS);
    bare.y = bare_y;
    bare.workspace = buffer_get(&problem->buffers, bare.workspace_size);
    bare.saved = NULL;
    bare.saved_size = 0;
    bare.chosen_expert = NULL;
    bare.chosen_weight = NULL;
    bare.chosen_offset = NULL;
    bare.batch_threshold = NULL;
    bare.expert_count = NULL;
    bare.importance = NULL;
    bare.load = NULL;
    bare.losses = NULL;
    bare.statistics = NULL;
    status = device_layer_forward(problem->handle, problem->layer, &bare);
    if (status != CUMOE_SUCCESS) report_fail(report, "%s", cumoe_last_error());
    compare_bits(report, "y without saved and optional outputs", bare_y, y, (size_t)bytes);
    report_check(report, buffer_guards_intact(&problem->buffers));
}

Test(forward, noisy_topk_in_training)
{
    suite_all_cases("forward", VARIANT_NOISY, body);
}

Test(forward, noisy_topk_at_inference)
{
    suite_all_cases("forward", VARIANT_NOISY_INFERENCE, body);
}

Test(forward, softmax)
{
    suite_all_cases("forward", VARIANT_SOFTMAX, body);
}

Test(forward, external)
{
    suite_all_cases("forward", VARIANT_EXTERNAL, body);
}

Test(forward, softmax_topk)
{
    suite_all_cases("forward", VARIANT_SOFTMAX_TOPK, body);
    suite_all_cases("forward", VARIANT_SOFTMAX_TOPK_PLAIN, body);
}

Test(forward, sigmoid_topk)
{
    suite_all_cases("forward", VARIANT_SIGMOID, body);
    suite_all_cases("forward", VARIANT_SIGMOID_PLAIN, body);
}

Test(forward, hierarchical)
{
    suite_all_cases("forward", VARIANT_HIERARCHICAL, body);
    suite_all_cases("forward", VARIANT_HIERARCHICAL_INFERENCE, body);
}

Test(forward, balanced)
{
    suite_all_cases("forward", VARIANT_BALANCED, body);
    suite_all_cases("forward", VARIANT_BALANCED_INFERENCE, body);
    suite_all_cases("forward", VARIANT_BALANCED_FEW_ROWS, body);
}

Test(forward, bare)
{
    suite_all_gates_alone("bare", body_bare);
    suite_pairwise_alone("bare", body_bare);
}
