/* What the C interface takes for the smallest useful calls: one token, H = I = 16, 4 experts, 2 of them, on one
 * thread. Prints the microseconds of forward, of forward with saved and of backward, the least of many means.
 * call_cost.py puts PyTorch beside it. */
#include <cumoe/cumoe.h>

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { H = 16, E = 4, K = 2, REPETITIONS = 20, CALLS = 2000 };

static void check(cumoe_status_t status)
{
    if (status == CUMOE_SUCCESS) return;
    fprintf(stderr, "%s\n", cumoe_last_error());
    exit(EXIT_FAILURE);
}

static double microseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return 1e6 * (double)now.tv_sec + 1e-3 * (double)now.tv_nsec;
}

int main(void)
{
    cumoe_handle_t *handle;
    cumoe_layer_t *layer;
    cumoe_config_t config;
    cumoe_weights_t weights, gradients;
    check(cumoe_handle_create(&handle, CUMOE_BACKEND_CPU, 0));
    check(cumoe_config_init(&config));
    config.hidden_size = config.intermediate_size = H;
    config.num_experts = E;
    config.top_k = K;
    config.activation = CUMOE_ACTIVATION_SWIGLU;
    config.gate = CUMOE_GATE_EXTERNAL;
    config.max_threads = 1;
    check(cumoe_layer_create(&layer, handle, &config));
    check(cumoe_weights_create(layer, CUMOE_DTYPE_DEFAULT, &weights));
    check(cumoe_weights_create(layer, CUMOE_DTYPE_DEFAULT, &gradients));
    check(cumoe_weights_init(layer, 1, &weights, NULL));
    size_t workspace_size, saved_size;
    void *workspace, *saved;
    check(cumoe_layer_buffer_sizes(layer, 1, &workspace_size, &saved_size));
    check(cumoe_memory_alloc(handle, workspace_size, &workspace));
    check(cumoe_memory_alloc(handle, saved_size, &saved));

    static _Alignas(16) float x[H] = {1, 2}, y[H], dx[H], weight[K] = {0.5, 0.5}, dweight[K];
    static _Alignas(16) int64_t index[K] = {1, 2};
    const cumoe_forward_args_t forward = {.struct_size = sizeof forward,
                                          .num_tokens = 1,
                                          .weights = &weights,
                                          .x = x,
                                          .y = y,
                                          .index = index,
                                          .index_dtype = CUMOE_I64,
                                          .index_weight = weight,
                                          .workspace = workspace,
                                          .workspace_size = workspace_size};
    cumoe_forward_args_t keeping = forward;
    keeping.saved = saved;
    keeping.saved_size = saved_size;
    const cumoe_backward_args_t backward = {.struct_size = sizeof backward,
                                            .num_tokens = 1,
                                            .weights = &weights,
                                            .x = x,
                                            .dy = y,
                                            .dx = dx,
                                            .dindex_weight = dweight,
                                            .gradients = &gradients,
                                            .workspace = workspace,
                                            .workspace_size = workspace_size,
                                            .saved = saved,
                                            .saved_size = saved_size};
    double least[3] = {1e30, 1e30, 1e30};
    for (int repetition = 0; repetition < REPETITIONS; repetition++) {
        const double begin = microseconds();
        for (int i = 0; i < CALLS; i++) check(cumoe_layer_forward(layer, &forward, NULL));
        const double plain = microseconds();
        for (int i = 0; i < CALLS; i++) check(cumoe_layer_forward(layer, &keeping, NULL));
        const double kept = microseconds();
        for (int i = 0; i < CALLS; i++) check(cumoe_layer_backward(layer, &backward, NULL));
        const double took[3] = {plain - begin, kept - plain, microseconds() - kept};
        for (int i = 0; i < 3; i++)
            if (took[i] / CALLS < least[i]) least[i] = took[i] / CALLS;
    }
    printf("%.3f %.3f %.3f\n", least[0], least[1], least[2]);
    cumoe_memory_free(handle, saved);
    cumoe_memory_free(handle, workspace);
    cumoe_weights_destroy(layer, &gradients);
    cumoe_weights_destroy(layer, &weights);
    cumoe_layer_destroy(layer);
    cumoe_handle_destroy(handle);
    return EXIT_SUCCESS;
}
