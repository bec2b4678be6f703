/* Exchanges over NCCL on a stream of the layer's own: beside products, in a graph, and where calls fail. */
#include "tests/parallel/nccl_group.h"

#include <cuda_runtime_api.h>

/* ---- capture ---- */

/* Exchanges and sums in a graph: nothing in them waits. */
Test(nccl_streams, captured)
{
    use_stand_in();
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    problem_t p;
    make_problem(&p, handle);
    cr_assert(problem_run_forward(&p, &report) && problem_run_backward(&p, &report), "%s", report.text);
    const ranks_options_t options = {.num_ranks = 1, .capacity = 3 * p.tokens * p.top_k, .chunks = 3};
    rank_t r = {0};
    cumoe_ep_t *ep = NULL;
    cr_assert_eq(join_alone(&ep, handle), CUMOE_SUCCESS, "%s", cumoe_last_error());
    cr_assert(rank_create(&r, &p, &options, ep), "%s", r.report.text);

    device_call_t call;
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    cumoe_forward_args_t forward = r.forward;
    cumoe_backward_args_t backward = r.backward;
    device_begin(&call, handle);
    device_forward_args(&call, &forward);
    device_backward_args(&call, &backward);
    cr_assert_eq(cumoe_stream_synchronize(handle, call.stream), CUMOE_SUCCESS);
    (void)stand_in.elsewhere(call.stream);
    cr_assert_eq(cudaStreamBeginCapture(call.stream, cudaStreamCaptureModeGlobal), cudaSuccess);
    cr_assert_eq(cumoe_layer_forward(r.layer, &forward, call.stream), CUMOE_SUCCESS, "%s", cumoe_last_error());
    cr_assert_eq(cumoe_layer_backward(r.layer, &backward, call.stream), CUMOE_SUCCESS, "%s", cumoe_last_error());
    cr_assert_eq(cumoe_ep_sum_gradients(r.layer, backward.gradients, call.stream), CUMOE_SUCCESS, "%s",
                 cumoe_last_error());
    cr_expect_gt(stand_in.elsewhere(NULL), 0, "chunks are exchanged on the stream of products");
    cr_assert_eq(cudaStreamEndCapture(call.stream, &graph), cudaSuccess);
    cr_assert_eq(cudaGraphInstantiate(&executable, graph, 0), cudaSuccess);
    cr_assert_eq(cudaGraphLaunch(executable, call.stream), cudaSuccess);
    cr_assert_eq(device_download(&call), CUMOE_SUCCESS, "%s", cumoe_last_error());
    rank_check(&r);
    EXPECT_EMPTY(r.report);
    cr_assert_eq(cudaGraphExecDestroy(executable), cudaSuccess);
    cr_assert_eq(cudaGraphDestroy(graph), cudaSuccess);
    cr_assert_eq(device_end(&call), CUMOE_SUCCESS);
    rank_destroy(&r);
    cumoe_ep_destroy(ep);
    problem_destroy(&p);
    cumoe_handle_destroy(handle);
    expect_clean(0);
}

/* ---- failures between streams ---- */

static size_t count_changes(const unsigned char *data, size_t size)
{
    size_t changes = 0;
    for (size_t i = 0; i < size; i++) changes += data[i] != i % 251;
    return changes;
}

static void set_numbers(unsigned char *data, size_t size)
{
    for (size_t i = 0; i < size; i++) data[i] = (unsigned char)(i % 251);
}

/* Forward in chunks, in which a call of CUDA fails, be it the library's or the stand-in's; how many calls there
 * were. Once the caller's stream is done, nobody writes into the buffers. */
static int64_t fail_forward(const problem_t *p, const ranks_options_t *options, int64_t number)
{
    rank_t r = {0};
    cumoe_ep_t *ep = NULL;
    device_call_t call;
    cr_assert_eq(join_alone(&ep, p->handle), CUMOE_SUCCESS, "%s", cumoe_last_error());
    cr_assert(rank_create(&r, p, options, ep), "%s", r.report.text);
    cumoe_forward_args_t forward = r.forward;
    device_begin(&call, p->handle);
    device_forward_args(&call, &forward);
    cr_assert_eq(cumoe_stream_synchronize(p->handle, call.stream), CUMOE_SUCCESS);
    const int64_t before = sim_num_calls();
    sim_fail_call(number);
    const cumoe_status_t status = cumoe_layer_forward(r.layer, &forward, call.stream);
    const int64_t calls = sim_num_calls() - before;
    sim_fail_call(0);
    cr_expect(status == CUMOE_SUCCESS || status == CUMOE_CUDA_ERROR || status == CUMOE_COMM_ERROR, "%s",
              cumoe_last_error());
    cudaStreamSynchronize(call.stream);
    set_numbers(forward.workspace, forward.workspace_size);
    set_numbers(forward.saved, forward.saved_size);
    cumoe_layer_destroy(r.layer); /* everything of its own stream is done */
    r.layer = NULL;
    cr_expect_eq(count_changes(forward.workspace, forward.workspace_size) +
                     count_changes(forward.saved, forward.saved_size),
                 0, "call %lld", (long long)number);
    (void)device_end(&call);
    rank_destroy(&r);
    cumoe_ep_destroy(ep);
    return calls;
}

Test(nccl_streams, chunks_fail)
{
    use_stand_in();
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    problem_t p;
    make_problem(&p, handle);
    cr_assert(problem_run_forward(&p, &report), "%s", report.text);
    const ranks_options_t options = {.num_ranks = 1, .capacity = 3 * p.tokens * p.top_k, .chunks = 3};
    const int64_t calls = fail_forward(&p, &options, 0);
    cr_expect_gt(calls, 100);
    for (int64_t number = 1; number <= calls; number++) fail_forward(&p, &options, number);
    problem_destroy(&p);
    cumoe_handle_destroy(handle);
    cr_expect_eq(stand_in.live(), 0); /* misuse tells nothing where its own questions for the device fail */
}
