/* Calls captured in a graph: nothing in them allocates or waits, and a replay reads the numbers of the call anew.
 */
#include "tests/sim/simulator.h"
#include "tests/suite.h"

#include <cuda_runtime_api.h>

#define EXPECT_CUDA(call) cr_assert_eq(call, cudaSuccess, "%s", cudaGetErrorString(cudaPeekAtLastError()))

typedef struct capture {
    device_call_t call;
    cudaGraph_t graph;
    cudaGraphExec_t executable;
} capture_t;

/* Forward and backward of the problem as one graph, which holds the addresses of the twins. */
static void capture(capture_t *c, const problem_t *p)
{
    cumoe_forward_args_t forward = p->forward;
    cumoe_backward_args_t backward = p->backward;
    device_begin(&c->call, p->handle);
    device_forward_args(&c->call, &forward);
    device_backward_args(&c->call, &backward);
    cr_assert_eq(cumoe_stream_synchronize(p->handle, c->call.stream), CUMOE_SUCCESS);
    EXPECT_CUDA(cudaStreamBeginCapture(c->call.stream, cudaStreamCaptureModeGlobal));
    const int64_t objects = sim_num_objects();
    cr_assert_eq(cumoe_layer_forward(p->layer, &forward, c->call.stream), CUMOE_SUCCESS, "%s", cumoe_last_error());
    cr_assert_eq(cumoe_layer_backward(p->layer, &backward, c->call.stream), CUMOE_SUCCESS, "%s",
                 cumoe_last_error());
    cr_expect_eq(sim_num_objects(), objects, "a call made or freed something");
    EXPECT_CUDA(cudaStreamEndCapture(c->call.stream, &c->graph));
    EXPECT_CUDA(cudaGraphInstantiate(&c->executable, c->graph, 0));
}

static void replay(capture_t *c, problem_t *p)
{
    problem_poison_outputs(p, false);
    problem_poison_outputs(p, true);
    device_upload_all(&c->call);
    EXPECT_CUDA(cudaGraphLaunch(c->executable, c->call.stream));
    cr_assert_eq(device_download(&c->call), CUMOE_SUCCESS, "%s", cumoe_last_error());
}

static void release(capture_t *c)
{
    EXPECT_CUDA(cudaGraphExecDestroy(c->executable));
    EXPECT_CUDA(cudaGraphDestroy(c->graph));
    cr_assert_eq(device_end(&c->call), CUMOE_SUCCESS, "%s", cumoe_last_error());
}

static void compare_replays(problem_t *p, report_t *report)
{
    const int64_t T = p->tokens, live[] = {T, 7, 0, -5, T + 9, T - 1};
    capture_t c;
    capture(&c, p);
    for (int i = 0; i < 6; i++) {
        p->call->seed = 90 + (uint64_t)i;
        p->call->live_tokens = live[i];
        if (!problem_run_forward(p, report) || !problem_run_backward(p, report)) break;
        problem_bits_t forward = problem_outputs(p, false), backward = problem_outputs(p, true);
        replay(&c, p);
        problem_compare_outputs(p, false, &forward, report);
        problem_compare_outputs(p, true, &backward, report);
        report_check(report, buffer_guards_intact(&p->buffers));
        problem_bits_free(&forward);
        problem_bits_free(&backward);
    }
    release(&c);
}

/* Also with live_tokens that are changed in device memory between the replays, and outside of 0..T. */
Test(graph, replays_have_the_bits_of_calls)
{
    static const layer_case_t layer_case = {"graph", 33, 14, 18, 6, 2, .dead_tokens = 1};
    const uint64_t seed = random_seed("graph", 91);
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    for (int i = 0; i < NUM_SUITE_OPTIONS; i++)
        for (int v = 0; v < NUM_GATE_VARIANTS; v++) {
            if (v > VARIANT_EXTERNAL ? (i + v) % 3 != 0 : v % VARIANT_EXTERNAL != 0) continue;
            const problem_options_t options = suite_options(i, &GATE_VARIANTS[v], seed);
            suite_one_case(handle, &layer_case, &options, compare_replays, &report);
        }
    cumoe_handle_destroy(handle);
    EXPECT_EMPTY(report);
    cr_expect_eq(sim_num_objects(), 0, "%d left", (int)sim_num_objects());
}
