/* A layer on the simulated device: forward, backward and an optimizer step, with every call of CUDA failing once,
 * and captured in a graph. Whether the numbers are right is the business of the suites. */
#include "tests/sim/check.h"
#include "tests/sim/simulator.h"

#include <cumoe/cumoe.h>

#include <cuda_runtime.h>
#include <math.h>
#include <string.h>
#include <string>
#include <vector>

namespace
{

constexpr int64_t T = 13, H = 24, I = 20;
constexpr int32_t E = 5, K = 2;

/* One training step, and what it made. Members are filled as far as it came. */
struct Step {
    cumoe_gate_kind_t gate = CUMOE_GATE_NOISY_TOPK;
    int32_t training = 1;
    cumoe_handle_t *handle = nullptr;
    cumoe_layer_t *layer = nullptr;
    cumoe_weights_t weights = {}, gradients = {};
    cumoe_stream_t stream = nullptr;
    void *x = nullptr, *y = nullptr, *dy = nullptr, *dx = nullptr;
    void *workspace = nullptr, *saved = nullptr, *state = nullptr;
    size_t workspace_size = 0, saved_size = 0, state_size = 0;

    Step() = default;
    Step(const Step &) = delete;
    Step &operator=(const Step &) = delete;
    ~Step()
    {
        for (void *memory : {x, y, dy, dx, workspace, saved, state}) cumoe_memory_free(handle, memory);
        if (gradients.allocation) cumoe_weights_destroy(layer, &gradients);
        if (weights.allocation) cumoe_weights_destroy(layer, &weights);
        cumoe_stream_destroy(handle, stream);
        cumoe_layer_destroy(layer);
        cumoe_handle_destroy(handle);
    }
};

#define TRY(call)                                                                                                  \
    do {                                                                                                           \
        const cumoe_status_t status = (call);                                                                      \
        if (status != CUMOE_SUCCESS) return status;                                                                \
    } while (0)

cumoe_status_t open(cumoe_dtype_t dtype, Step *step)
{
    TRY(cumoe_handle_create(&step->handle, CUMOE_BACKEND_CUDA, 0));
    cumoe_config_t config;
    TRY(cumoe_config_init(&config));
    config.dtype = dtype;
    config.hidden_size = H;
    config.intermediate_size = I;
    config.num_experts = E;
    config.top_k = K;
    config.gate = step->gate;
    config.loss_weight[CUMOE_LOSS_IMPORTANCE] = 0.01f;
    config.loss_weight[CUMOE_LOSS_LOAD] = 0.01f;
    TRY(cumoe_layer_create(&step->layer, step->handle, &config));
    TRY(cumoe_stream_create(step->handle, &step->stream));
    return CUMOE_SUCCESS;
}

cumoe_status_t prepare(cumoe_dtype_t dtype, Step *step)
{
    TRY(open(dtype, step));
    TRY(cumoe_weights_create(step->layer, CUMOE_DTYPE_DEFAULT, &step->weights));
    TRY(cumoe_weights_create(step->layer, CUMOE_DTYPE_DEFAULT, &step->gradients));
    TRY(cumoe_weights_init(step->layer, 1, &step->weights, step->stream));
    TRY(cumoe_layer_buffer_sizes(step->layer, T, &step->workspace_size, &step->saved_size));
    TRY(cumoe_optimizer_state_size(step->layer, CUMOE_OPTIMIZER_FACTORED_ADAM, &step->weights, &step->state_size));
    TRY(cumoe_memory_alloc(step->handle, step->workspace_size, &step->workspace));
    TRY(cumoe_memory_alloc(step->handle, step->saved_size, &step->saved));
    TRY(cumoe_memory_alloc(step->handle, step->state_size, &step->state));
    const size_t element = dtype == CUMOE_F32 ? 4 : 2, size = T * H * element;
    for (void **memory : {&step->x, &step->y, &step->dy, &step->dx})
        TRY(cumoe_memory_alloc(step->handle, size, memory));
    std::vector<float> single(T * H);
    std::vector<uint16_t> half(T * H); // bf16: the upper half of a float
    for (void *memory : {step->x, step->dy}) {
        for (size_t i = 0; i < single.size(); i++) {
            single[i] = sinf(static_cast<float>(i * i % 997) + (memory == step->x ? 0.0f : 0.5f));
            uint32_t bits;
            memcpy(&bits, &single[i], 4);
            half[i] = static_cast<uint16_t>(bits >> 16);
        }
        const void *from = element == 4 ? static_cast<void *>(single.data()) : half.data();
        TRY(cumoe_memory_copy(step->handle, memory, from, size, CUMOE_COPY_TO_DEVICE, step->stream));
    }
    return CUMOE_SUCCESS;
}

cumoe_status_t forward_and_backward(const Step &step)
{
    cumoe_forward_args_t forward = {};
    forward.struct_size = sizeof forward;
    forward.num_tokens = T;
    forward.weights = &step.weights;
    forward.x = step.x;
    forward.y = step.y;
    forward.training = step.training;
    forward.seed = 3;
    forward.workspace = step.workspace;
    forward.workspace_size = step.workspace_size;
    forward.saved = step.saved;
    forward.saved_size = step.saved_size;
    TRY(cumoe_layer_forward(step.layer, &forward, step.stream));
    cumoe_backward_args_t backward = {};
    backward.struct_size = sizeof backward;
    backward.num_tokens = T;
    backward.weights = &step.weights;
    backward.x = step.x;
    backward.dy = step.dy;
    backward.dx = step.dx;
    backward.training = step.training;
    backward.gradients = &step.gradients;
    backward.workspace = step.workspace;
    backward.workspace_size = step.workspace_size;
    backward.saved = step.saved;
    backward.saved_size = step.saved_size;
    return cumoe_layer_backward(step.layer, &backward, step.stream);
}

cumoe_status_t optimize(const Step &step)
{
    cumoe_optimizer_args_t args = {};
    args.struct_size = sizeof args;
    args.optimizer = CUMOE_OPTIMIZER_FACTORED_ADAM;
    args.weights = &step.weights;
    args.gradients = &step.gradients;
    args.values = {0.01, 1, 1, 0};
    args.state = step.state;
    args.state_size = step.state_size;
    return cumoe_optimizer_step(step.layer, &args, step.stream);
}

/* The bytes of y, dx, all gradients and all weights. */
typedef std::vector<char> Bits;

cumoe_status_t read(const Step &step, cumoe_dtype_t dtype, Bits *bits)
{
    const size_t element = dtype == CUMOE_F32 ? 4 : 2;
    const struct {
        const void *data;
        size_t size;
    } arrays[] = {
        {step.y, T * H * element},
        {step.dx, T * H * element},
        {step.gradients.w_up, E * I * H * element},
        {step.gradients.w_down, E * I * H * element},
        {step.gradients.w_gate, E * H * sizeof(float)},
        {step.gradients.w_noise, E * H * sizeof(float)},
        {step.gradients.thresholds, E * sizeof(float)},
        {step.weights.w_up, E * I * H * element},
        {step.weights.w_down, E * I * H * element},
        {step.weights.w_gate, E * H * sizeof(float)},
        {step.weights.w_noise, E * H * sizeof(float)},
    };
    bits->clear();
    for (const auto &array : arrays) {
        if (!array.data) continue;
        const size_t begin = bits->size();
        bits->resize(begin + array.size);
        TRY(cumoe_memory_copy(step.handle, bits->data() + begin, array.data, array.size, CUMOE_COPY_TO_HOST,
                              step.stream));
    }
    return cumoe_stream_synchronize(step.handle, step.stream);
}

/* All of it, up to the bits and without the end, whose calls cannot say that they fail. */
cumoe_status_t train(cumoe_dtype_t dtype, Step *step, Bits *bits)
{
    TRY(prepare(dtype, step));
    TRY(forward_and_backward(*step));
    TRY(optimize(*step));
    return read(*step, dtype, bits);
}

bool is_zero(const Bits &bits)
{
    for (const char byte : bits)
        if (byte) return false;
    return true;
}

void test_every_call_fails_once()
{
    Bits expected;
    int64_t until_end, in_all;
    {
        const int64_t begin = sim_num_calls();
        {
            Step step;
            EXPECT(train(CUMOE_F32, &step, &expected) == CUMOE_SUCCESS, "%s", cumoe_last_error());
            until_end = sim_num_calls() - begin;
        }
        in_all = sim_num_calls() - begin;
    }
    EXPECT(!is_zero(expected), "nothing was computed");
    EXPECT(sim_num_objects() == 0, "%lld left", static_cast<long long>(sim_num_objects()));

    for (int64_t call = 1; call <= in_all; call++) {
        const long long n = static_cast<long long>(call);
        EXPECT(cumoe_handle_create(nullptr, CUMOE_BACKEND_CPU, 0) != CUMOE_SUCCESS, "a sentence of another call");
        const std::string before = cumoe_last_error();
        {
            Step step;
            Bits bits;
            sim_fail_call(call);
            const cumoe_status_t status = train(CUMOE_F32, &step, &bits);
            EXPECT((status == CUMOE_SUCCESS) == (call > until_end), "call %lld of %lld: status %d", n,
                   static_cast<long long>(in_all), status);
            if (status != CUMOE_SUCCESS) {
                EXPECT(before != cumoe_last_error() && strstr(cumoe_last_error(), "cumoe_"), "call %lld: %s", n,
                       cumoe_last_error());
                EXPECT(cudaPeekAtLastError() == cudaSuccess, "call %lld leaves an error", n);
            }
        }
        sim_fail_call(0);
        EXPECT(cudaPeekAtLastError() == cudaSuccess, "call %lld leaves an error", n);
        EXPECT(sim_num_objects() == 0, "call %lld: %lld left", n, static_cast<long long>(sim_num_objects()));
    }

    Step step;
    Bits bits;
    EXPECT(train(CUMOE_F32, &step, &bits) == CUMOE_SUCCESS && bits == expected, "%s", cumoe_last_error());
}

/* A graph replays what was enqueued; a call that allocates or waits would have broken the capture. */
void test_capture(cumoe_dtype_t dtype, cumoe_gate_kind_t gate = CUMOE_GATE_NOISY_TOPK, int32_t training = 1)
{
    Step step;
    step.gate = gate;
    step.training = training;
    Bits expected, bits;
    EXPECT(prepare(dtype, &step) == CUMOE_SUCCESS, "%s", cumoe_last_error());
    EXPECT(forward_and_backward(step) == CUMOE_SUCCESS, "%s", cumoe_last_error());
    EXPECT(read(step, dtype, &expected) == CUMOE_SUCCESS, "%s", cumoe_last_error());
    EXPECT(!is_zero(expected), "nothing was computed");

    const int64_t objects = sim_num_objects();
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    EXPECT(cudaStreamBeginCapture(step.stream, cudaStreamCaptureModeGlobal) == cudaSuccess, "%d", 0);
    EXPECT(forward_and_backward(step) == CUMOE_SUCCESS, "%s", cumoe_last_error());
    EXPECT(sim_num_objects() == objects, "%lld made", static_cast<long long>(sim_num_objects() - objects));
    EXPECT(cudaStreamEndCapture(step.stream, &graph) == cudaSuccess, "%s", "something allocates or waits");
    if (!graph) return;
    EXPECT(cudaGraphInstantiate(&executable, graph, 0) == cudaSuccess, "%d", 0);
    for (uint64_t seed = 1; seed <= 2; seed++) {
        sim_set_seed(seed);
        (void)cudaMemset(step.y, 0xff, T * H * (dtype == CUMOE_F32 ? 4 : 2));
        (void)cudaMemset(step.workspace, 0xff, step.workspace_size);
        (void)cudaMemset(step.saved, 0xff, step.saved_size);
        EXPECT(cudaGraphLaunch(executable, step.stream) == cudaSuccess, "%d", 0);
        EXPECT(read(step, dtype, &bits) == CUMOE_SUCCESS, "%s", cumoe_last_error());
        EXPECT(bits == expected, "other bits in replay %d", static_cast<int>(seed));
    }
    EXPECT(cudaGraphExecDestroy(executable) == cudaSuccess && cudaGraphDestroy(graph) == cudaSuccess, "%d", 0);
}

/* Two devices: work goes to the handle's, whatever the thread's is. */
void test_other_device()
{
    Bits expected, bits;
    {
        Step step;
        EXPECT(train(CUMOE_F32, &step, &expected) == CUMOE_SUCCESS, "%s", cumoe_last_error());
    }
    sim_set_devices(2, 8, 0, size_t{1} << 30);
    (void)cudaSetDevice(1);
    {
        Step step;
        EXPECT(train(CUMOE_F32, &step, &bits) == CUMOE_SUCCESS && bits == expected, "%s", cumoe_last_error());
        int device = -1;
        EXPECT(cudaGetDevice(&device) == cudaSuccess && device == 1, "%d", device);
    }
    (void)cudaSetDevice(0);
    sim_set_devices(1, 8, 0, size_t{1} << 30);
}

void test_what_is_supported()
{
    Step step;
    EXPECT(open(CUMOE_F32, &step) == CUMOE_SUCCESS, "%s", cumoe_last_error());
    cumoe_config_t config;
    EXPECT(cumoe_config_init(&config) == CUMOE_SUCCESS, "%s", cumoe_last_error());
    config.hidden_size = H;
    config.intermediate_size = I;
    config.num_experts = E;
    config.top_k = K;
    for (const cumoe_dtype_t dtype : {CUMOE_F32, CUMOE_F64, CUMOE_BF16, CUMOE_F16}) {
        config.dtype = dtype;
        cumoe_layer_t *layer = nullptr;
        EXPECT(cumoe_layer_create(&layer, step.handle, &config) == CUMOE_SUCCESS, "%s", cumoe_last_error());
        cumoe_layer_destroy(layer);
    }
    config.dtype = CUMOE_F32;
    config.compute = CUMOE_COMPUTE_TF32;
    cumoe_layer_t *layer = nullptr;
    EXPECT(cumoe_layer_create(&layer, step.handle, &config) == CUMOE_SUCCESS, "%s", cumoe_last_error());
    cumoe_layer_destroy(layer);
    for (const cumoe_gate_kind_t gate : {CUMOE_GATE_BALANCED, CUMOE_GATE_SOFTMAX_TOPK, CUMOE_GATE_SIGMOID_TOPK}) {
        config.gate = gate;
        EXPECT(cumoe_layer_create(&layer, step.handle, &config) == CUMOE_SUCCESS, "%s", cumoe_last_error());
        cumoe_layer_destroy(layer);
    }
}

} // namespace

int main()
{
    sim_set_devices(1, 8, 0, size_t{1} << 30);
    test_what_is_supported();
    test_capture(CUMOE_F32);
    test_capture(CUMOE_BF16);
    test_capture(CUMOE_F32, CUMOE_GATE_BALANCED);
    test_capture(CUMOE_F32, CUMOE_GATE_BALANCED, 0);
    test_other_device();
    test_every_call_fails_once();
    EXPECT(sim_num_objects() == 0, "%lld left", static_cast<long long>(sim_num_objects()));
    return check::result();
}
