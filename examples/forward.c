/* A first program: one mixture-of-experts layer, computed forward on whatever device there is. */
#include <cumoe/cumoe.h>

#include <stdio.h>
#include <stdlib.h>

static void check(cumoe_status_t status)
{
    if (status == CUMOE_SUCCESS) return;
    fprintf(stderr, "%s: %s\n", cumoe_status_name(status), cumoe_last_error());
    exit(EXIT_FAILURE);
}

int main(void)
{
    enum { T = 4, H = 8, K = 2 }; /* tokens, width of a token, experts per token */

    /* STEP 1: open a device. AUTO takes a GPU if there is one, else the CPU. */
    cumoe_handle_t *handle;
    check(cumoe_handle_create(&handle, CUMOE_BACKEND_AUTO, 0));

    /* STEP 2: say what the layer computes. The defaults are the paper's: noisy top-k gate, ReLU experts, fp32. */
    cumoe_config_t config;
    check(cumoe_config_init(&config));
    config.hidden_size = H;
    config.intermediate_size = 16;
    config.num_experts = 8;
    config.top_k = K;
    cumoe_layer_t *layer;
    check(cumoe_layer_create(&layer, handle, &config));

    /* STEP 3: make its weights on the device. */
    cumoe_weights_t weights;
    check(cumoe_weights_create(layer, CUMOE_DTYPE_DEFAULT, &weights));
    check(cumoe_weights_init(layer, 1, &weights, NULL));

    /* STEP 4: allocate input, outputs and scratch, and bring the input over. */
    float x[T][H] = {{1}, {0, 2}, {0, 0, 3}, {0, 0, 0, 4}}, y[T][H];
    int32_t expert[T][K];
    void *x_device, *y_device, *expert_device, *workspace;
    size_t workspace_size;
    check(cumoe_layer_buffer_sizes(layer, T, &workspace_size, NULL));
    check(cumoe_memory_alloc(handle, sizeof x, &x_device));
    check(cumoe_memory_alloc(handle, sizeof y, &y_device));
    check(cumoe_memory_alloc(handle, sizeof expert, &expert_device));
    check(cumoe_memory_alloc(handle, workspace_size, &workspace));
    check(cumoe_memory_copy(handle, x_device, x, sizeof x, CUMOE_COPY_TO_DEVICE, NULL));

    /* STEP 5: compute. The gate starts without preferences, so training = 1 lets its noise choose. */
    cumoe_forward_args_t args = {.struct_size = sizeof args,
                                 .num_tokens = T,
                                 .weights = &weights,
                                 .x = x_device,
                                 .y = y_device,
                                 .chosen_expert = expert_device,
                                 .training = 1,
                                 .seed = 1,
                                 .workspace = workspace,
                                 .workspace_size = workspace_size};
    check(cumoe_layer_forward(layer, &args, NULL));

    /* STEP 6: bring the results back and wait for them. */
    check(cumoe_memory_copy(handle, y, y_device, sizeof y, CUMOE_COPY_TO_HOST, NULL));
    check(cumoe_memory_copy(handle, expert, expert_device, sizeof expert, CUMOE_COPY_TO_HOST, NULL));
    check(cumoe_stream_synchronize(handle, NULL));
    printf("%s\n", cumoe_handle_description(handle));
    for (int t = 0; t < T; t++)
        printf("token %d: experts %d and %d, y = %6.3f %6.3f ...\n", t, expert[t][0], expert[t][1], y[t][0],
               y[t][1]);

    /* STEP 7: give everything back. */
    cumoe_memory_free(handle, x_device);
    cumoe_memory_free(handle, y_device);
    cumoe_memory_free(handle, expert_device);
    cumoe_memory_free(handle, workspace);
    cumoe_weights_destroy(layer, &weights);
    cumoe_layer_destroy(layer);
    cumoe_handle_destroy(handle);
    return EXIT_SUCCESS;
}
