#include "model.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static bool is_dense(const kind_t *kind)
{
    return kind->experts == 1;
}

/* Noisy gates have two. */
static int64_t gate_matrices(const kind_t *kind)
{
    return is_dense(kind) ? 0 : kind->balanced ? 1 : 2;
}

int64_t kind_parameters(const kind_t *kind)
{
    int64_t experts = (int64_t)kind->experts * 2 * kind->intermediate * WIDTH;
    return experts + gate_matrices(kind) * kind->experts * WIDTH + (kind->balanced ? kind->experts : 0);
}

int64_t kind_operations(const kind_t *kind)
{
    int64_t experts = (is_dense(kind) ? 1 : TOP_K) * 2 * (int64_t)kind->intermediate * WIDTH;
    return experts + gate_matrices(kind) * kind->experts * WIDTH;
}

static int rank_of(const model_t *model)
{
    return model->ep ? cumoe_ep_rank(model->ep) : 0;
}

static int num_ranks_of(const model_t *model)
{
    return model->ep ? cumoe_ep_num_ranks(model->ep) : 1;
}

/* The most characters in a call of this rank. */
static int64_t part_of_batch(const model_t *model)
{
    return (model->batch + num_ranks_of(model) - 1) / num_ranks_of(model);
}

/* A dense layer is a mixture of one expert, to which the caller sends every character with weight 1. */
static void create_layer(model_t *model)
{
    cumoe_config_t config;
    check(cumoe_config_init(&config));
    config.hidden_size = WIDTH;
    config.intermediate_size = model->kind->intermediate;
    config.num_experts = model->kind->experts;
    config.top_k = is_dense(model->kind) ? 1 : TOP_K;
    config.gate = is_dense(model->kind)   ? CUMOE_GATE_EXTERNAL
                  : model->kind->balanced ? CUMOE_GATE_BALANCED
                                          : CUMOE_GATE_NOISY_TOPK;
    if (model->kind->balanced)
        config.max_rows = 2 * model->batch * TOP_K; /* thresholds may take more than on average */
    config.ep = model->ep;
    if (model->ep) config.exchange_capacity = part_of_batch(model) * TOP_K; /* nothing is ever dropped */
    config.loss_weight[CUMOE_LOSS_IMPORTANCE] = model->kind->importance_weight;
    config.loss_weight[CUMOE_LOSS_LOAD] = model->kind->load_weight;
    check(cumoe_layer_create(&model->layer, model->device->handle, &config));
    check(cumoe_weights_create(model->layer, CUMOE_DTYPE_DEFAULT, &model->weights));
    check(cumoe_weights_create(model->layer, CUMOE_DTYPE_DEFAULT, &model->gradients));
    check(cumoe_weights_init(model->layer, model->seed, &model->weights, NULL));
    check(cumoe_optimizer_state_size(model->layer, model->optimizer, &model->weights, &model->state_size));
    check(cumoe_memory_alloc(model->device->handle, model->state_size, &model->state));
}

static void create_parameter(parameter_t *parameter, int64_t count)
{
    const size_t n = (size_t)count, size = sizeof(float);
    *parameter = (parameter_t){.value = host_alloc(n, size),
                               .gradient = host_alloc(n, size),
                               .first_moment = host_alloc(n, size),
                               .second_moment = host_alloc(n, size),
                               .count = count};
}

static void destroy_parameter(parameter_t *parameter)
{
    free(parameter->value);
    free(parameter->gradient);
    free(parameter->first_moment);
    free(parameter->second_moment);
}

static void create_parameters(model_t *model)
{
    const int64_t columns = (model->symbols + SYMBOL_ALIGN - 1) / SYMBOL_ALIGN * SYMBOL_ALIGN;
    create_parameter(&model->embedding, (int64_t)WINDOW * model->symbols * WIDTH);
    create_parameter(&model->projection, WIDTH * columns);
    random_normal(model->embedding.value, model->embedding.count, sqrt(1.0 / WINDOW), model->seed);
    model->softmax = (softmax_t){.symbols = model->symbols,
                                 .columns = (int)columns,
                                 .matrix = model->projection.value,
                                 .gradient = model->projection.gradient,
                                 .transposed = host_alloc((size_t)(WIDTH * columns), sizeof(float)),
                                 .probability = host_alloc((size_t)(model->batch * columns), sizeof(float)),
                                 .loss = host_alloc((size_t)model->batch, sizeof(double))};
}

static void create_buffers(model_t *model)
{
    const device_t *device = model->device;
    const size_t batch = (size_t)part_of_batch(model), rows = batch * WIDTH * sizeof(float);
    check(cumoe_layer_buffer_sizes(model->layer, (int64_t)batch, &model->workspace_size, &model->saved_size));
    check(cumoe_memory_alloc(device->handle, model->workspace_size, &model->workspace));
    check(cumoe_memory_alloc(device->handle, model->saved_size, &model->saved));
    model->x = mirror_create(device, rows);
    model->y = mirror_create(device, rows);
    model->dy = mirror_create(device, rows);
    model->dx = mirror_create(device, rows);
    int64_t slots;
    check(cumoe_layer_max_rows(model->layer, (int64_t)batch, NULL, &slots));
    model->expert = mirror_create(device, (size_t)slots * sizeof(int32_t));
    model->gate = mirror_create(device, (size_t)slots * sizeof(float));
    model->importance = mirror_create(device, (size_t)model->kind->experts * sizeof(float));
    model->load = mirror_create(device, (size_t)model->kind->experts * sizeof(float));
    if (model->kind->balanced) {
        model->expert_offset = mirror_create(device, (batch + 1) * sizeof(int32_t));
        model->threshold = mirror_create(device, (size_t)model->kind->experts * sizeof(float));
    }
    if (model->ep) model->sum = mirror_create(device, (size_t)model->embedding.count * sizeof(float));
    if (!is_dense(model->kind)) return;
    model->index = mirror_create(device, batch * sizeof(int32_t));
    model->index_weight = mirror_create(device, batch * sizeof(float));
    for (size_t t = 0; t < batch; t++) {
        ((int32_t *)model->index.host)[t] = 0;
        ((float *)model->index_weight.host)[t] = 1;
    }
    mirror_to_device(device, &model->index);
    mirror_to_device(device, &model->index_weight);
}

void model_create(model_t *model)
{
    create_layer(model);
    create_parameters(model);
    create_buffers(model);
}

void model_destroy(model_t *model)
{
    destroy_parameter(&model->embedding);
    destroy_parameter(&model->projection);
    free(model->softmax.transposed);
    free(model->softmax.probability);
    free(model->softmax.loss);
    mirror_t *buffers[] = {
        &model->x,      &model->y,    &model->dy,         &model->dx,   &model->index,         &model->index_weight,
        &model->expert, &model->gate, &model->importance, &model->load, &model->expert_offset, &model->threshold,
        &model->sum};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) mirror_destroy(model->device, buffers[i]);
    cumoe_memory_free(model->device->handle, model->workspace);
    cumoe_memory_free(model->device->handle, model->saved);
    cumoe_memory_free(model->device->handle, model->state);
    cumoe_weights_destroy(model->layer, &model->gradients);
    cumoe_weights_destroy(model->layer, &model->weights);
    cumoe_layer_destroy(model->layer);
}

typedef struct layer_mode {
    bool training; /* noise */
    bool save;     /* a backward follows */
    bool report;   /* experts, gates, importance and load are wanted */
    uint64_t offset;
} layer_mode_t;

/* y = layer(x), where x is the embedding sum of the batch. */
static void layer_forward(model_t *model, const batch_t *batch, layer_mode_t mode)
{
    embedding_forward(batch, model->symbols, model->embedding.value, model->x.host);
    mirror_to_device(model->device, &model->x);
    cumoe_forward_args_t args = {.struct_size = sizeof args,
                                 .num_tokens = batch->size,
                                 .weights = &model->weights,
                                 .x = model->x.device,
                                 .y = model->y.device,
                                 .training = mode.training,
                                 .seed = model->seed,
                                 .offset = mode.offset,
                                 .first_token = batch->first,
                                 .index = model->index.device,
                                 .index_weight = model->index_weight.device,
                                 .workspace = model->workspace,
                                 .workspace_size = model->workspace_size};
    if (mode.save) {
        args.saved = model->saved;
        args.saved_size = model->saved_size;
    }
    if (mode.report) {
        args.chosen_expert = model->expert.device;
        args.chosen_weight = model->gate.device;
        args.chosen_offset = model->expert_offset.device;
        args.batch_threshold = mode.training ? model->threshold.device : NULL;
        args.importance = model->importance.device;
        args.load = model->load.device;
    }
    check(cumoe_layer_forward(model->layer, &args, NULL));
    mirror_to_host(model->device, &model->y);
}

/* The residual connection: sum += row, over the batch. */
static void add_rows(const batch_t *batch, float *sum, const float *rows)
{
    for (int64_t i = 0; i < batch->size * WIDTH; i++) sum[i] += rows[i];
}

static void layer_backward(model_t *model, const batch_t *batch)
{
    mirror_to_device(model->device, &model->dy);
    cumoe_backward_args_t args = {.struct_size = sizeof args,
                                  .num_tokens = batch->size,
                                  .weights = &model->weights,
                                  .x = model->x.device,
                                  .dy = model->dy.device,
                                  .training = 1,
                                  .dx = model->dx.device,
                                  .gradients = &model->gradients,
                                  .workspace = model->workspace,
                                  .workspace_size = model->workspace_size,
                                  .saved = model->saved,
                                  .saved_size = model->saved_size};
    check(cumoe_layer_backward(model->layer, &args, NULL));
    mirror_to_host(model->device, &model->dx);
}

/* The parameters beside the layer's are the same on every rank, and so are their gradients: the sums of the parts.
 */
static void sum_over_ranks(model_t *model, const parameter_t *parameter)
{
    const size_t size = (size_t)parameter->count * sizeof(float);
    memcpy(model->sum.host, parameter->gradient, size);
    mirror_to_device(model->device, &model->sum);
    check(cumoe_ep_sum(model->ep, model->sum.device, parameter->count, CUMOE_F32, NULL));
    mirror_to_host(model->device, &model->sum);
    memcpy(parameter->gradient, model->sum.host, size);
}

/* The layer's parameters stay on the device; ours are on the host. */
static void update(model_t *model, int64_t step, double learning_rate)
{
    cumoe_optimizer_args_t args = {.struct_size = sizeof args,
                                   .optimizer = model->optimizer,
                                   .weights = &model->weights,
                                   .gradients = &model->gradients,
                                   .values = {.learning_rate = learning_rate, .step = step},
                                   .state = model->state,
                                   .state_size = model->state_size};
    check(cumoe_optimizer_step(model->layer, &args, NULL));
    adam_step(&model->embedding, step, learning_rate);
    adam_step(&model->projection, step, learning_rate);
}

void model_fill(const model_t *model, batch_t *batch, const text_t *text, const int32_t *position, int64_t size)
{
    batch_fill_part(batch, text, position, size, rank_of(model), num_ranks_of(model));
}

double model_sum(model_t *model, double value)
{
    if (!model->ep) return value;
    memcpy(model->sum.host, &value, sizeof value);
    mirror_to_device(model->device, &model->sum);
    check(cumoe_ep_sum(model->ep, model->sum.device, 1, CUMOE_F64, NULL));
    mirror_to_host(model->device, &model->sum);
    memcpy(&value, model->sum.host, sizeof value);
    return value;
}

double model_train(model_t *model, const batch_t *batch, int64_t step, double learning_rate)
{
    layer_forward(model, batch, (layer_mode_t){.training = true, .save = true, .offset = (uint64_t)step});
    float *hidden = model->y.host, *dx = model->dx.host;
    add_rows(batch, hidden, model->x.host);
    double loss = softmax_forward(&model->softmax, batch, hidden);

    softmax_backward(&model->softmax, batch, hidden, model->dy.host);
    layer_backward(model, batch);
    add_rows(batch, dx, model->dy.host);
    embedding_backward(batch, model->symbols, model->embedding.gradient, dx);
    if (model->ep) {
        check(cumoe_ep_sum_gradients(model->layer, &model->gradients, NULL));
        sum_over_ranks(model, &model->embedding);
        sum_over_ranks(model, &model->projection);
    }

    update(model, step, learning_rate);
    return loss;
}

double model_evaluate(model_t *model, const batch_t *batch)
{
    layer_forward(model, batch, (layer_mode_t){.report = !is_dense(model->kind)});
    mirror_to_host(model->device, &model->expert);
    mirror_to_host(model->device, &model->expert_offset);
    mirror_to_host(model->device, &model->gate);
    add_rows(batch, model->y.host, model->x.host);
    return softmax_forward(&model->softmax, batch, model->y.host);
}

void model_route(model_t *model, const batch_t *batch, uint64_t offset)
{
    layer_forward(model, batch, (layer_mode_t){.training = true, .report = true, .offset = offset});
    mirror_to_host(model->device, &model->expert);
    mirror_to_host(model->device, &model->expert_offset);
    mirror_to_host(model->device, &model->importance);
    mirror_to_host(model->device, &model->load);
}
