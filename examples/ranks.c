/* Expert parallelism: processes share the experts of a layer, and each has tokens of its own. Forward, backward,
 * and the gradients of the gate, which every process has, added up. This file is two programs:
 *
 *   torchrun --no-python --nproc-per-node 2 ./ranks   GPUs over NCCL, one for each process; also by srun, or by
 *                                                     hand: examples/README.md
 *   mpirun -n 2 ./ranks_mpi                           processes of MPI, on GPUs or on CPUs
 *
 * A process that fails ends, and the launcher ends the others. */
#include <cumoe/cumoe.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { T = 256, H = 32, I = 64, E = 8, K = 2 }; /* T and E: of all processes together */

static void check(cumoe_status_t status)
{
    if (status == CUMOE_SUCCESS) return;
    fprintf(stderr, "%s: %s\n", cumoe_status_name(status), cumoe_last_error());
    exit(EXIT_FAILURE);
}

static void *device_alloc(const cumoe_handle_t *handle, size_t size)
{
    void *ptr;
    check(cumoe_memory_alloc(handle, size, &ptr));
    return ptr;
}

/* STEP 1: a device for each process, and the group of all of them. */
#ifndef WITH_MPI
static void join(cumoe_handle_t **handle, cumoe_ep_t **ep)
{
    const char *local_rank = getenv("LOCAL_RANK"); /* torchrun's */
    if (!local_rank) local_rank = getenv("SLURM_LOCALID");
    check(cumoe_handle_create(handle, CUMOE_BACKEND_CUDA, local_rank ? atoi(local_rank) : 0));
    check(cumoe_ep_create(ep, *handle, NULL)); /* NULL: who meets where is in the environment as well */
}
#else
#include <cumoe/mpi.h>

static void join(cumoe_handle_t **handle, cumoe_ep_t **ep)
{
    int level, local_rank;
    MPI_Comm machine;
    MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &level);
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &machine);
    MPI_Comm_rank(machine, &local_rank);
    MPI_Comm_free(&machine);
    /* A GPU of its own; else the one that is shared, or the CPU. */
    if (cumoe_handle_create(handle, CUMOE_BACKEND_CUDA, local_rank) != CUMOE_SUCCESS)
        check(cumoe_handle_create(handle, CUMOE_BACKEND_AUTO, 0));
    check(cumoe_ep_create_mpi(ep, *handle, MPI_COMM_WORLD, 0));
}
#endif

int main(void)
{
    cumoe_handle_t *handle;
    cumoe_ep_t *ep;
    join(&handle, &ep);
    const int32_t rank = cumoe_ep_rank(ep), num_ranks = cumoe_ep_num_ranks(ep);

    /* STEP 2: the group goes into the config. Of the weights a process has its experts, and the whole gate. */
    cumoe_config_t config;
    check(cumoe_config_init(&config));
    config.hidden_size = H;
    config.intermediate_size = I;
    config.num_experts = E;
    config.top_k = K;
    config.ep = ep;
    config.exchange_capacity = T * K; /* rows from each process to each: room for all */
    cumoe_layer_t *layer;
    cumoe_weights_t weights, gradients;
    int32_t first_expert, num_experts;
    check(cumoe_layer_create(&layer, handle, &config));
    check(cumoe_layer_experts_of_rank(layer, rank, &first_expert, &num_experts));
    check(cumoe_weights_create(layer, CUMOE_DTYPE_DEFAULT, &weights));
    check(cumoe_weights_create(layer, CUMOE_DTYPE_DEFAULT, &gradients));
    check(cumoe_weights_init(layer, 1, &weights, NULL));

    /* STEP 3: forward, with this process's part of the tokens. first_token is its place among all of them. */
    const int32_t first_token = T * rank / num_ranks, num_tokens = T * (rank + 1) / num_ranks - first_token;
    float x[T * H];
    for (int i = 0; i < T * H; i++) x[i] = sinf(0.37F * (float)(i * i % 9973));
    size_t workspace_size, saved_size;
    check(cumoe_layer_buffer_sizes(layer, num_tokens, &workspace_size, &saved_size));
    void *workspace = device_alloc(handle, workspace_size), *saved = device_alloc(handle, saved_size);
    void *x_device = device_alloc(handle, sizeof x), *y = device_alloc(handle, sizeof x);
    check(cumoe_memory_copy(handle, x_device, x + first_token * H, (size_t)num_tokens * H * sizeof *x,
                            CUMOE_COPY_TO_DEVICE, NULL));
    cumoe_forward_args_t forward = {.struct_size = sizeof forward,
                                    .num_tokens = num_tokens,
                                    .weights = &weights,
                                    .x = x_device,
                                    .y = y,
                                    .training = 1,
                                    .seed = 1,
                                    .first_token = first_token,
                                    .workspace = workspace,
                                    .workspace_size = workspace_size,
                                    .saved = saved,
                                    .saved_size = saved_size};
    check(cumoe_layer_forward(layer, &forward, NULL));

    /* STEP 4: backward, here with dy = y. Gradients of experts are complete; those of the gate become so. An
     * optimizer step, as in training_step.c, could follow. */
    cumoe_backward_args_t backward = {.struct_size = sizeof backward,
                                      .num_tokens = num_tokens,
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

    /* STEP 5: wait for the device, and for no process longer than it may be late. The length is the same on every
     * process, and for any number of them. */
    float w_gate[E * H];
    check(cumoe_ep_wait(ep, NULL, 0));
    check(cumoe_memory_copy(handle, w_gate, gradients.w_gate, sizeof w_gate, CUMOE_COPY_TO_HOST, NULL));
    check(cumoe_stream_synchronize(handle, NULL));
    double square = 0;
    for (int i = 0; i < E * H; i++) square += (double)w_gate[i] * w_gate[i];
    printf("rank %d of %d: %s; tokens %d to %d, experts %d to %d, |dw_gate| = %.4f\n", rank, num_ranks,
           cumoe_handle_description(handle), first_token, first_token + num_tokens - 1, first_expert,
           first_expert + num_experts - 1, sqrt(square));

    void *buffers[] = {workspace, saved, x_device, y};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) cumoe_memory_free(handle, buffers[i]);
    cumoe_weights_destroy(layer, &gradients);
    cumoe_weights_destroy(layer, &weights);
    cumoe_layer_destroy(layer);
    cumoe_ep_destroy(ep);
    cumoe_handle_destroy(handle);
#ifdef WITH_MPI
    MPI_Finalize(); /* when the group is gone */
#endif
    return square > 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
