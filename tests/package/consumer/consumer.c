/* A program of another project: it knows the installed headers and libraries, nothing else of this tree. */
#include <cumoe/cumoe.h>

#include <stdio.h>

#define TRY(call)                                                                                                  \
    do {                                                                                                           \
        if ((call) != CUMOE_SUCCESS) {                                                                             \
            fprintf(stderr, "%s\n", cumoe_last_error());                                                           \
            return 1;                                                                                              \
        }                                                                                                          \
    } while (0)

enum { TOKENS = 8, HIDDEN = 16 };

int main(void)
{
    cumoe_handle_t *handle;
    TRY(cumoe_handle_create(&handle, CUMOE_BACKEND_CPU, 0));

    cumoe_config_t config;
    TRY(cumoe_config_init(&config));
    config.hidden_size = HIDDEN;
    config.intermediate_size = 32;
    config.num_experts = 4;
    config.top_k = 2;
    cumoe_layer_t *layer;
    TRY(cumoe_layer_create(&layer, handle, &config));

    cumoe_weights_t weights;
    TRY(cumoe_weights_create(layer, CUMOE_DTYPE_DEFAULT, &weights));
    TRY(cumoe_weights_init(layer, 1, &weights, NULL));

    _Alignas(16) float x[TOKENS][HIDDEN] = {{1}, {2}, {3}}, y[TOKENS][HIDDEN];
    void *workspace;
    size_t workspace_size;
    TRY(cumoe_layer_buffer_sizes(layer, TOKENS, &workspace_size, NULL));
    TRY(cumoe_memory_alloc(handle, workspace_size, &workspace));

    cumoe_forward_args_t args = {
        .struct_size = sizeof args, .num_tokens = TOKENS, .weights = &weights, .x = x, .y = y};
    args.workspace = workspace;
    args.workspace_size = workspace_size;
    TRY(cumoe_layer_forward(layer, &args, NULL));
    TRY(cumoe_stream_synchronize(handle, NULL));
    printf("cumoe %d on %s: y[0][0] = %g\n", cumoe_version(), cumoe_handle_description(handle), y[0][0]);

    cumoe_memory_free(handle, workspace);
    cumoe_weights_destroy(layer, &weights);
    cumoe_layer_destroy(layer);
    cumoe_handle_destroy(handle);
    return cumoe_version() == CUMOE_VERSION && y[0][0] - y[0][0] == 0 ? 0 : 1;
}
