/* One training step: forward, a task loss, backward, an optimizer step. What goes where is the point; the numbers
 * show that the step lowers the loss, and that every gradient arrives. */
#include <cumoe/cumoe.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { T = 256, H = 32, I = 64, E = 8, K = 2 };

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

static void to_host(const cumoe_handle_t *handle, void *host, const void *device, size_t size)
{
    check(cumoe_memory_copy(handle, host, device, size, CUMOE_COPY_TO_HOST, NULL));
    check(cumoe_stream_synchronize(handle, NULL));
}

/* The length of count numbers in device memory, as a vector. */
static double length(const cumoe_handle_t *handle, const void *device, size_t count)
{
    float *host = malloc(count * sizeof *host);
    if (!host) exit(EXIT_FAILURE);
    to_host(handle, host, device, count * sizeof *host);
    double square = 0;
    for (size_t i = 0; i < count; i++) square += (double)host[i] * host[i];
    free(host);
    return sqrt(square);
}

/* The task: y[t] = x[t] with its elements in reverse. Returns the squared error per element; dy is its gradient. */
static double task_loss(const float *x, const float *y, float *dy)
{
    double loss = 0;
    for (int t = 0; t < T; t++)
        for (int i = 0; i < H; i++) {
            float error = y[t * H + i] - x[t * H + H - 1 - i];
            loss += (double)error * error / (T * H);
            dy[t * H + i] = 2 * error / (T * H);
        }
    return loss;
}

int main(void)
{
    /* STEP 1: device, layer, weights; gradients are a second set of the same arrays. */
    cumoe_handle_t *handle;
    check(cumoe_handle_create(&handle, CUMOE_BACKEND_AUTO, 0));
    cumoe_config_t config;
    check(cumoe_config_init(&config));
    config.hidden_size = H;
    config.intermediate_size = I;
    config.num_experts = E;
    config.top_k = K;
    config.loss_weight[CUMOE_LOSS_IMPORTANCE] = 0.01F; /* the balancing losses, as parts of the total loss */
    config.loss_weight[CUMOE_LOSS_LOAD] = 0.01F;
    cumoe_layer_t *layer;
    check(cumoe_layer_create(&layer, handle, &config));
    cumoe_weights_t weights, gradients;
    check(cumoe_weights_create(layer, CUMOE_DTYPE_DEFAULT, &weights));
    check(cumoe_weights_create(layer, CUMOE_DTYPE_DEFAULT, &gradients));
    check(cumoe_weights_init(layer, 1, &weights, NULL));

    /* STEP 2: the buffers of a call, and the optimizer's state. saved carries what backward needs from its forward.
     */
    static float x[T * H], y[T * H], dy[T * H];
    size_t workspace_size, saved_size, state_size;
    check(cumoe_layer_buffer_sizes(layer, T, &workspace_size, &saved_size));
    void *workspace = device_alloc(handle, workspace_size), *saved = device_alloc(handle, saved_size);
    check(cumoe_optimizer_state_size(layer, CUMOE_OPTIMIZER_ADAM, &weights, &state_size));
    void *state = device_alloc(handle, state_size);
    void *x_device = device_alloc(handle, sizeof x), *y_device = device_alloc(handle, sizeof y);
    void *dy_device = device_alloc(handle, sizeof dy);
    void *losses_device = device_alloc(handle, CUMOE_NUM_LOSSES * sizeof(float));
    void *statistics_device = device_alloc(handle, sizeof(cumoe_statistics_t));
    for (int i = 0; i < T * H; i++) x[i] = sinf(0.37F * (float)(i * i % 9973));
    check(cumoe_memory_copy(handle, x_device, x, sizeof x, CUMOE_COPY_TO_DEVICE, NULL));

    double before = 0, after = 0;
    for (int step = 0; step < 2; step++) {
        /* STEP 3: forward. training turns the noise on; the same seed and offset give the same noise, so that the
         * two passes here can be compared. A real training changes the offset in every step. */
        cumoe_forward_args_t forward = {.struct_size = sizeof forward,
                                        .num_tokens = T,
                                        .weights = &weights,
                                        .x = x_device,
                                        .y = y_device,
                                        .training = 1,
                                        .seed = 1,
                                        .losses = losses_device,
                                        .statistics = statistics_device,
                                        .workspace = workspace,
                                        .workspace_size = workspace_size,
                                        .saved = saved,
                                        .saved_size = saved_size};
        check(cumoe_layer_forward(layer, &forward, NULL));

        /* STEP 4: the task loss, and the total that is minimised. The layer's losses come back unweighted. */
        float losses[CUMOE_NUM_LOSSES];
        cumoe_statistics_t statistics;
        to_host(handle, y, y_device, sizeof y);
        to_host(handle, losses, losses_device, sizeof losses);
        to_host(handle, &statistics, statistics_device, sizeof statistics);
        double task = task_loss(x, y, dy), total = task;
        for (int i = 0; i < CUMOE_NUM_LOSSES; i++) total += config.loss_weight[i] * losses[i];
        printf("%s the step: task loss %.4f, importance loss %.4f, load loss %.4f, total %.4f\n",
               step ? "after " : "before", task, losses[CUMOE_LOSS_IMPORTANCE], losses[CUMOE_LOSS_LOAD], total);
        printf("  %lld rows to %d experts, the busiest got %lld\n", (long long)statistics.rows, E,
               (long long)statistics.max_count);
        if (step) {
            after = total;
            break;
        }
        before = total;

        /* STEP 5: backward. It adds the gradients of the balancing losses by config.loss_weight. */
        check(cumoe_memory_copy(handle, dy_device, dy, sizeof dy, CUMOE_COPY_TO_DEVICE, NULL));
        cumoe_backward_args_t backward = {.struct_size = sizeof backward,
                                          .num_tokens = T,
                                          .weights = &weights,
                                          .x = x_device,
                                          .dy = dy_device,
                                          .training = 1,
                                          .gradients = &gradients,
                                          .workspace = workspace,
                                          .workspace_size = workspace_size,
                                          .saved = saved,
                                          .saved_size = saved_size};
        check(cumoe_layer_backward(layer, &backward, NULL));

        printf("  |dw_up| = %.4f", length(handle, gradients.w_up, (size_t)E * I * H));
        printf("  |dw_down| = %.4f", length(handle, gradients.w_down, (size_t)E * H * I));
        printf("  |dw_gate| = %.4f", length(handle, gradients.w_gate, (size_t)E * H));
        printf("  |dw_noise| = %.4f\n", length(handle, gradients.w_noise, (size_t)E * H));

        /* STEP 6: Adam updates all weights in place. Its state needs no initial values: step 1 writes them. */
        cumoe_optimizer_args_t adam = {.struct_size = sizeof adam,
                                       .optimizer = CUMOE_OPTIMIZER_ADAM,
                                       .weights = &weights,
                                       .gradients = &gradients,
                                       .values = {.learning_rate = 0.01, .step = step + 1},
                                       .state = state,
                                       .state_size = state_size};
        check(cumoe_optimizer_step(layer, &adam, NULL));
    }

    void *buffers[] = {workspace, saved, state, x_device, y_device, dy_device, losses_device, statistics_device};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) cumoe_memory_free(handle, buffers[i]);
    cumoe_weights_destroy(layer, &gradients);
    cumoe_weights_destroy(layer, &weights);
    cumoe_layer_destroy(layer);
    cumoe_handle_destroy(handle);
    return after < before ? EXIT_SUCCESS : EXIT_FAILURE;
}
