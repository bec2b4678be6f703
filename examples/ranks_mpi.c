/* Expert parallelism over MPI: mpirun -n 2 ranks_mpi. Each process has tokens of its own and its share of the
 * experts. Forward, backward, and the gradients of the gate, which every process has, added up. */
#include <cumoe/cumoe.h>
#include <cumoe/mpi.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { T = 128, H = 32, I = 64, E = 8, K = 2 }; /* T tokens in each process, E experts in all of them together */

/* A process that fails ends all: MPI_Finalize() would wait for it. */
static void check(cumoe_status_t status)
{
    if (status == CUMOE_SUCCESS) return;
    fprintf(stderr, "%s: %s\n", cumoe_status_name(status), cumoe_last_error());
    MPI_Abort(MPI_COMM_WORLD, EXIT_FAILURE);
}

static void *device_alloc(const cumoe_handle_t *handle, size_t size)
{
    void *ptr;
    check(cumoe_memory_alloc(handle, size, &ptr));
    return ptr;
}

int main(int argc, char **argv)
{
    /* STEP 1: MPI, a device, and the group of all processes, which goes into the config. */
    int level;
    MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &level);
    cumoe_handle_t *handle;
    check(cumoe_handle_create(&handle, CUMOE_BACKEND_AUTO, 0));
    cumoe_ep_t *ep;
    check(cumoe_ep_create_mpi(&ep, handle, MPI_COMM_WORLD, 60)); /* seconds that a process may be late */
    const int32_t rank = cumoe_ep_rank(ep);
    cumoe_config_t config;
    check(cumoe_config_init(&config));
    config.hidden_size = H;
    config.intermediate_size = I;
    config.num_experts = E;
    config.top_k = K;
    config.ep = ep;
    config.exchange_capacity = T * K; /* rows from each process to each: room for all */

    /* STEP 2: the layer, and what this process has of its weights: its experts, and the whole gate. */
    cumoe_layer_t *layer;
    cumoe_weights_t weights, gradients;
    int32_t first_expert, num_experts;
    check(cumoe_layer_create(&layer, handle, &config));
    check(cumoe_layer_experts_of_rank(layer, rank, &first_expert, &num_experts));
    check(cumoe_weights_create(layer, CUMOE_DTYPE_DEFAULT, &weights));
    check(cumoe_weights_create(layer, CUMOE_DTYPE_DEFAULT, &gradients));
    check(cumoe_weights_init(layer, 1, &weights, NULL));

    /* STEP 3: forward. first_token is the place of this process among all tokens; importance and losses are those
     * of all of them. */
    static float x[T * H];
    for (int i = 0; i < T * H; i++) x[i] = sinf(0.37F * (float)((rank * T * H + i) % 9973));
    size_t workspace_size, saved_size;
    check(cumoe_layer_buffer_sizes(layer, T, &workspace_size, &saved_size));
    void *workspace = device_alloc(handle, workspace_size), *saved = device_alloc(handle, saved_size);
    void *x_device = device_alloc(handle, sizeof x), *y = device_alloc(handle, sizeof x);
    void *statistics_device = device_alloc(handle, sizeof(cumoe_statistics_t));
    check(cumoe_memory_copy(handle, x_device, x, sizeof x, CUMOE_COPY_TO_DEVICE, NULL));
    cumoe_forward_args_t forward = {.struct_size = sizeof forward,
                                    .num_tokens = T,
                                    .weights = &weights,
                                    .x = x_device,
                                    .y = y,
                                    .training = 1,
                                    .seed = 1,
                                    .first_token = (int64_t)rank * T,
                                    .statistics = statistics_device,
                                    .workspace = workspace,
                                    .workspace_size = workspace_size,
                                    .saved = saved,
                                    .saved_size = saved_size};
    check(cumoe_layer_forward(layer, &forward, NULL));

    /* STEP 4: backward, here with dy = y. Gradients of experts are complete; those of the gate become so. */
    cumoe_backward_args_t backward = {.struct_size = sizeof backward,
                                      .num_tokens = T,
                                      .weights = &weights,
                                      .x = x_device,
                                      .dy = y,
                                      .training = 1,
                                      .gradients = &gradients,
                                      .workspace = workspace,
                                      .workspace_size = workspace_size,
                                      .saved = saved,
                                      .saved_size = saved_size};
    check(cumoe_layer_backward(layer, &backward, NULL));
    check(cumoe_ep_sum_gradients(layer, &gradients, NULL));

    /* STEP 5: wait for the device, and for no process longer than it may be late. */
    cumoe_statistics_t statistics;
    float w_gate[E * H];
    check(cumoe_memory_copy(handle, &statistics, statistics_device, sizeof statistics, CUMOE_COPY_TO_HOST, NULL));
    check(cumoe_memory_copy(handle, w_gate, gradients.w_gate, sizeof w_gate, CUMOE_COPY_TO_HOST, NULL));
    check(cumoe_ep_wait(ep, NULL, 0));
    double square = 0;
    for (int i = 0; i < E * H; i++) square += (double)w_gate[i] * w_gate[i];
    printf("process %d of %d: experts %d to %d, %lld rows of all processes, |dw_gate| = %.6f\n", rank,
           cumoe_ep_num_ranks(ep), first_expert, first_expert + num_experts - 1, (long long)statistics.rows,
           sqrt(square));

    void *buffers[] = {workspace, saved, x_device, y, statistics_device};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) cumoe_memory_free(handle, buffers[i]);
    cumoe_weights_destroy(layer, &gradients);
    cumoe_weights_destroy(layer, &weights);
    cumoe_layer_destroy(layer);
    cumoe_ep_destroy(ep); /* before MPI_Finalize() */
    cumoe_handle_destroy(handle);
    MPI_Finalize();
    return square > 0 && statistics.exchange_overflow == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
