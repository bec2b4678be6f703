/* Chunks of experts in arrays of all layouts: a rank that has all experts, in the problem's own arrays. Between
 * forward and backward, saved moves, and what stood in the buffers is gone. */
#include "tests/parallel/turns.h"

static void *get_filled(buffer_list_t *buffers, size_t size)
{
    return memset(buffer_get(buffers, size), 0x5b, size);
}

static void compare_chunked(problem_t *p, buffer_list_t *buffers, report_t *report)
{
    const problem_bits_t forward = problem_outputs(p, false), backward = problem_outputs(p, true);
    cr_assert_eq(cumoe_layer_buffer_sizes(p->layer, p->tokens, &p->workspace_size, &p->saved_size), CUMOE_SUCCESS);
    p->forward.workspace = p->backward.workspace = get_filled(buffers, p->workspace_size);
    p->forward.workspace_size = p->backward.workspace_size = p->workspace_size;
    p->forward.saved = get_filled(buffers, p->saved_size);
    p->forward.saved_size = p->backward.saved_size = p->saved_size;
    if (problem_run_forward(p, report)) {
        problem_compare_outputs(p, false, &forward, report);
        p->backward.saved = memcpy(get_filled(buffers, p->saved_size), p->forward.saved, p->saved_size);
        memset(p->forward.saved, 0xee, p->saved_size);
        if (problem_run_backward(p, report)) problem_compare_outputs(p, true, &backward, report);
    }
    report_check(report, buffer_guards_intact(buffers));
    problem_bits_free((problem_bits_t *)&forward);
    problem_bits_free((problem_bits_t *)&backward);
}

static void check_chunks(problem_t *p, report_t *report)
{
    static int turn;
    if (p->options.variant.gate == CUMOE_GATE_BALANCED) return;
    if (!problem_run_forward(p, report) || !problem_run_backward(p, report)) return;
    const int32_t wanted = turn++ % 3 ? 1 + turn % 3 : CUMOE_MAX_CHUNKS;
    problem_t chunked = *p;
    buffer_list_t buffers = {0};
    cumoe_ep_t *ep = NULL;
    cr_assert_eq(cumoe_ep_create_local(&ep, p->handle, 1, 0), CUMOE_SUCCESS, "%s", cumoe_last_error());
    chunked.config.ep = ep;
    chunked.config.exchange_chunks = p->experts < wanted ? (int32_t)p->experts : wanted;
    chunked.config.exchange_capacity = (p->tokens * p->top_k + 1) * chunked.config.exchange_chunks;
    cr_assert_eq(cumoe_layer_create(&chunked.layer, p->handle, &chunked.config), CUMOE_SUCCESS, "%s",
                 cumoe_last_error());
    compare_chunked(&chunked, &buffers, report);
    cumoe_layer_destroy(chunked.layer);
    cumoe_ep_destroy(ep);
    buffer_free_all(&buffers);
}

Test(layouts, pairwise)
{
    suite_pairwise_alone("layouts", check_chunks);
}
