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
    suite_all_cases("forward", &GATE_VARIANTS[0], body);
}

Test(forward, noisy_topk_at_inference)
{
    suite_all_cases("forward", &GATE_VARIANTS[1], body);
}

Test(forward, softmax)
{
    suite_all_cases("forward", &GATE_VARIANTS[2], body);
}

Test(forward, external)
{
    suite_all_cases("forward", &GATE_VARIANTS[3], body);
}

Test(forward, bare)
{
    for (int v = 0; v < NUM_GATE_VARIANTS; v++) suite_all_cases("bare", &GATE_VARIANTS[v], body_bare);
    suite_pairwise("bare", body_bare);
}
