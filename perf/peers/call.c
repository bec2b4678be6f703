/* What the C interface takes for the smallest useful calls: one token, H = I = 16, 4 experts, 2 of them, on one
 * thread. Prints the microseconds of forward and of backward, the least of many means. call_cost.py puts PyTorch
 * beside it. */
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
    double least[2] = {1e30, 1e30};
    for (int repetition = 0; repetition < REPETITIONS; repetition++) {
        double begin = microseconds();
        for (int i = 0; i < CALLS; i++) {
            const cumoe_forward_args_t args = {.struct_size = sizeof args,
                                               .num_tokens = 1,
                                               .weights = &weights,
                                               .x = x,
                                               .y = y,
                                               .index = index,
                                               .index_dtype = CUMOE_I64,
                                               .index_weight = weight,
                                               .workspace = workspace,
                                               .workspace_size = workspace_size,
                                               .saved = saved,
                                               .saved_size = saved_size};
            check(cumoe_layer_forward(layer, &args, NULL));
        }
        const double forward = (microseconds() - begin) / CALLS;
        begin = microseconds();
        for (int i = 0; i < CALLS; i++) {
            const cumoe_backward_args_t args = {.struct_size = sizeof args,
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
            check(cumoe_layer_backward(layer, &args, NULL));
        }
        const double backward = (microseconds() - begin) / CALLS;
        if (forward < least[0]) least[0] = forward;
        if (backward < least[1]) least[1] = backward;
    }
    printf("%.3f %.3f\n", least[0], least[1]);
    cumoe_memory_free(handle, saved);
    cumoe_memory_free(handle, workspace);
    cumoe_weights_destroy(layer, &gradients);
    cumoe_weights_destroy(layer, &weights);
    cumoe_layer_destroy(layer);
    cumoe_handle_destroy(handle);
    return EXIT_SUCCESS;
}
