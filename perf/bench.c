/* A layer with all its buffers in device memory, and the arguments of every call. */
#include "bench.h"

#include <stdlib.h>

/* ---- memory ---- */

/* Device memory, set to 0; NULL once an allocation has failed. */
static void *device_array(bench_t *b, int64_t count, size_t size)
{
    void *array = NULL;
    const size_t bytes = (size_t)count * size;
    if (b->failed) return NULL;
    b->failed = cumoe_memory_alloc(b->device->handle, bytes, &array);
    if (b->failed || !array) return NULL;
    b->array[b->arrays++] = array;
    perf_check(cumoe_memory_set(b->device->handle, array, 0, bytes, b->device->stream));
    return array;
}

static void *host_array(int64_t count, size_t size)
{
    void *array = malloc((size_t)count * size + 1);
    if (!array) abort();
    return array;
}

static void upload(const bench_t *b, void *device, void *host, size_t size)
{
    perf_check(cumoe_memory_copy(b->device->handle, device, host, size, CUMOE_COPY_TO_DEVICE, b->device->stream));
    device_wait(b->device);
    free(host);
}

static int64_t max_rows(const bench_t *b)
{
    int64_t rows;
    perf_check(cumoe_layer_max_rows(b->layer, b->subject.num_tokens, &rows, NULL));
    return rows;
}

static int64_t max_slots(const bench_t *b)
{
    int64_t slots;
    perf_check(cumoe_layer_max_rows(b->layer, b->subject.num_tokens, NULL, &slots));
    return slots;
}

/* Counted first: the CPU promises memory that is not there, and a GPU would fail half way. Of rows: what the stages
 * and the layer keep, and the yardsticks as much again. */
static bool fits(const bench_t *b, char *why, size_t why_size)
{
    const subject_t *s = &b->subject;
    const cumoe_config_t *c = &s->config;
    cumoe_cost_t cost = {.struct_size = sizeof cost};
    perf_check(cumoe_config_cost(c, s->num_tokens, 1, 1, &cost));
    const double there = device_memory(b->device), tokens = (double)s->num_tokens, H = c->hidden_size;
    const double rows = 2 * tokens * c->top_k * ((double)z_width(c) + c->intermediate_size + 2 * H);
    const bool back = s->parts & OF_BACKWARD, loop = b->device->cpu && has_part(s, BACKWARD);
    const double gradients = (double)cost.gradients_size * (back ? loop ? 2 : 1 : 0);
    const double state = has_part(s, OPTIMIZER) ? (double)cost.adam_state_size : 0;
    const double needed = (double)cost.weights_size + gradients + state +
                          (double)token_size(c) * (back ? 2 : 1) * (rows + 4 * tokens * H);
    if (needed <= 0.95 * there) return true;
    snprintf(why, why_size, "needs about %.1f GB of memory, and %.1f are free", 1e-9 * needed, 1e-9 * there);
    return false;
}

/* ---- arguments ---- */

static cumoe_routing_t new_routing(bench_t *b)
{
    const cumoe_config_t *c = &b->subject.config;
    const int64_t slots = max_slots(b), choices = b->subject.num_tokens * c->top_k_groups;
    const bool varies = c->gate == CUMOE_GATE_BALANCED;
    return (cumoe_routing_t){.call = device_array(b, 1, sizeof(cumoe_call_t)),
                             .tokens = device_array(b, 1, sizeof(int64_t)),
                             .expert = device_array(b, slots, sizeof(int32_t)),
                             .weight = device_array(b, slots, sizeof(float)),
                             .importance = device_array(b, c->num_experts, sizeof(int64_t)),
                             .load = device_array(b, c->num_experts, sizeof(int64_t)),
                             .token_slot = varies ? device_array(b, b->subject.num_tokens + 1, 4) : NULL,
                             .slot_token = varies ? device_array(b, slots, sizeof(int32_t)) : NULL,
                             .excess = varies ? device_array(b, c->num_experts, sizeof(int32_t)) : NULL,
                             .primary_group = device_array(b, choices, sizeof(int32_t)),
                             .primary_weight = device_array(b, choices, sizeof(float)),
                             .primary_load = device_array(b, c->num_groups, sizeof(int64_t)),
                             .primary_count = device_array(b, c->num_groups, sizeof(int32_t))};
}

static cumoe_rows_t new_rows(bench_t *b)
{
    const cumoe_config_t *c = &b->subject.config;
    const int64_t slots = max_slots(b), rows = max_rows(b);
    const bool tiles = cumoe_handle_backend(b->device->handle) != CUMOE_BACKEND_CPU;
    return (cumoe_rows_t){.offset = device_array(b, c->num_experts + 1, sizeof(int32_t)),
                          .row_token = device_array(b, rows, sizeof(int32_t)),
                          .row_slot = device_array(b, rows, sizeof(int32_t)),
                          .slot_row = device_array(b, slots, sizeof(int32_t)),
                          .tile = tiles ? device_array(b, cumoe_tile_size(rows, c->num_experts), 4) : NULL};
}

/* What a caller brings: tokens, gradients of the layer's output, and for EXTERNAL the routing. */
static void new_inputs(bench_t *b)
{
    const subject_t *s = &b->subject;
    const cumoe_config_t *c = &s->config;
    const int64_t elements = s->num_tokens * c->hidden_size, slots = s->num_tokens * c->top_k;
    const bool external = c->gate == CUMOE_GATE_EXTERNAL;
    const size_t size = token_size(c);
    void *x = device_array(b, elements, size), *dy = goes_back(b) ? device_array(b, elements, size) : NULL;
    int32_t *index = external ? device_array(b, slots, sizeof *index) : NULL;
    float *index_weight = external ? device_array(b, slots, sizeof *index_weight) : NULL;
    b->forward.x = x;
    b->backward.dy = dy;
    b->forward.index = index;
    b->forward.index_weight = index_weight;
    if (b->failed) return;
    for (int i = 0; i < (dy ? 2 : 1); i++) {
        void *host = host_array(elements, size);
        input_tokens(s, i == 0, i == 0 ? 1 : 2, host);
        upload(b, i == 0 ? x : dy, host, (size_t)elements * size);
    }
    if (external) {
        int32_t *expert = host_array(slots, sizeof *expert);
        float *weight = host_array(slots, sizeof *weight);
        input_routing(s, 4, expert, weight);
        upload(b, index, expert, (size_t)slots * sizeof *expert);
        upload(b, index_weight, weight, (size_t)slots * sizeof *weight);
    }
    for (int groups = 0; !external && groups <= (c->num_groups > 0); groups++) {
        const int64_t values = (int64_t)(groups ? c->num_groups : c->num_experts) * c->hidden_size;
        float *w_gate = host_array(values, sizeof *w_gate);
        input_gate(s, groups != 0, w_gate);
        upload(b, groups ? b->weights.w_gate_primary : b->weights.w_gate, w_gate, (size_t)values * sizeof *w_gate);
    }
}

static void layer_arguments(bench_t *b)
{
    const int64_t T = b->subject.num_tokens, elements = T * b->subject.config.hidden_size;
    size_t workspace_size, saved_size;
    perf_check(cumoe_layer_buffer_sizes(b->layer, T, &workspace_size, &saved_size));
    const size_t size = token_size(&b->subject.config);
    void *workspace = device_array(b, (int64_t)workspace_size, 1), *saved = device_array(b, (int64_t)saved_size, 1);
    b->layer_y = device_array(b, elements, size);
    b->layer_dx = goes_back(b) ? device_array(b, elements, size) : NULL;
    b->forward = (cumoe_forward_args_t){.struct_size = sizeof b->forward,
                                        .num_tokens = T,
                                        .weights = &b->weights,
                                        .x = b->forward.x,
                                        .y = b->layer_y,
                                        .training = 1,
                                        .seed = 1,
                                        .index = b->forward.index,
                                        .index_weight = b->forward.index_weight,
                                        .workspace = workspace,
                                        .workspace_size = workspace_size,
                                        .saved = saved,
                                        .saved_size = saved_size};
    b->inference = b->forward;
    b->inference.training = 0;
    b->inference.saved = NULL;
    b->inference.saved_size = 0;
    b->backward = (cumoe_backward_args_t){.struct_size = sizeof b->backward,
                                          .num_tokens = T,
                                          .weights = &b->weights,
                                          .x = b->forward.x,
                                          .dy = b->backward.dy,
                                          .training = 1,
                                          .dx = b->layer_dx,
                                          .gradients = &b->gradients,
                                          .workspace = workspace,
                                          .workspace_size = workspace_size,
                                          .saved = saved,
                                          .saved_size = saved_size};
}

/* Of all stages, which run one after the other. */
static void *new_workspace(bench_t *b, size_t *size)
{
    *size = 0;
    for (int stage = 0; stage < CUMOE_NUM_STAGES; stage++) {
        size_t needed;
        perf_check(cumoe_stage_workspace_size(b->layer, (cumoe_stage_t)stage, b->subject.num_tokens, &needed));
        if (needed > *size) *size = needed;
    }
    return device_array(b, (int64_t)*size, 1);
}

static void forward_arguments(bench_t *b, cumoe_routing_t routing, cumoe_rows_t rows, void *workspace, size_t size)
{
    const cumoe_config_t *c = &b->subject.config;
    const int64_t T = b->subject.num_tokens, rows_size = max_rows(b);
    void *z = device_array(b, rows_size * z_width(c), token_size(&b->subject.config));
    void *hidden = device_array(b, rows_size * c->intermediate_size, token_size(&b->subject.config));
    void *output = device_array(b, rows_size * c->hidden_size, token_size(&b->subject.config));
    b->stages_y = device_array(b, T * c->hidden_size, token_size(&b->subject.config));
    b->gate = (cumoe_gate_args_t){.struct_size = sizeof b->gate,
                                  .num_tokens = T,
                                  .weights = &b->weights,
                                  .x = b->forward.x,
                                  .training = 1,
                                  .seed = 1,
                                  .index = b->forward.index,
                                  .index_weight = b->forward.index_weight,
                                  .routing = routing,
                                  .workspace = workspace,
                                  .workspace_size = size};
    b->permute = (cumoe_permute_args_t){.struct_size = sizeof b->permute,
                                        .num_tokens = T,
                                        .routing = routing,
                                        .rows = rows,
                                        .workspace = workspace,
                                        .workspace_size = size};
    b->up = (cumoe_up_args_t){.struct_size = sizeof b->up,
                              .num_tokens = T,
                              .weights = &b->weights,
                              .rows = rows,
                              .x = b->forward.x,
                              .z = z,
                              .hidden = hidden,
                              .workspace = workspace,
                              .workspace_size = size};
    b->down = (cumoe_down_args_t){.struct_size = sizeof b->down,
                                  .num_tokens = T,
                                  .weights = &b->weights,
                                  .rows = rows,
                                  .hidden = hidden,
                                  .output = output,
                                  .workspace = workspace,
                                  .workspace_size = size};
    b->combine = (cumoe_combine_args_t){.struct_size = sizeof b->combine,
                                        .num_tokens = T,
                                        .routing = routing,
                                        .rows = rows,
                                        .output = output,
                                        .y = b->stages_y};
}

static void backward_arguments(bench_t *b, cumoe_routing_t routing, cumoe_rows_t rows, void *workspace, size_t size)
{
    const cumoe_config_t *c = &b->subject.config;
    const int64_t T = b->subject.num_tokens, elements = T * c->hidden_size;
    void *dz = device_array(b, max_rows(b) * z_width(c), token_size(&b->subject.config));
    void *drows = device_array(b, max_rows(b) * c->hidden_size, token_size(&b->subject.config));
    void *dweight = device_array(b, max_slots(b), sizeof(float));
    void *dx_gate = c->gate == CUMOE_GATE_EXTERNAL ? NULL : device_array(b, elements, sizeof(float));
    b->stages_dx = device_array(b, elements, token_size(&b->subject.config));
    b->down_backward = (cumoe_down_backward_args_t){.struct_size = sizeof b->down_backward,
                                                    .num_tokens = T,
                                                    .weights = &b->weights,
                                                    .routing = routing,
                                                    .rows = rows,
                                                    .z = b->up.z,
                                                    .dy = b->backward.dy,
                                                    .dz = dz,
                                                    .dweight = dweight,
                                                    .gradients = &b->gradients,
                                                    .workspace = workspace,
                                                    .workspace_size = size};
    b->gate_backward = (cumoe_gate_backward_args_t){.struct_size = sizeof b->gate_backward,
                                                    .num_tokens = T,
                                                    .weights = &b->weights,
                                                    .x = b->forward.x,
                                                    .training = 1,
                                                    .routing = routing,
                                                    .dweight = dweight,
                                                    .dx_gate = dx_gate,
                                                    .gradients = &b->gradients,
                                                    .workspace = workspace,
                                                    .workspace_size = size};
    b->up_backward = (cumoe_up_backward_args_t){.struct_size = sizeof b->up_backward,
                                                .num_tokens = T,
                                                .weights = &b->weights,
                                                .rows = rows,
                                                .x = b->forward.x,
                                                .dz = dz,
                                                .drows = drows,
                                                .gradients = &b->gradients,
                                                .workspace = workspace,
                                                .workspace_size = size};
    b->permute_backward = (cumoe_permute_backward_args_t){.struct_size = sizeof b->permute_backward,
                                                          .num_tokens = T,
                                                          .routing = routing,
                                                          .rows = rows,
                                                          .drows = drows,
                                                          .dx_gate = dx_gate,
                                                          .dx = b->stages_dx};
}

/* With a rate of 0, so that all rounds see the same weights. */
static void optimizer_arguments(bench_t *b)
{
    size_t size;
    perf_check(cumoe_optimizer_state_size(b->layer, CUMOE_OPTIMIZER_ADAM, &b->weights, &size));
    void *state = device_array(b, (int64_t)size, 1);
    if (b->failed == CUMOE_OUT_OF_MEMORY) {
        snprintf(b->no_optimizer, sizeof b->no_optimizer, "its state of %.1f GB finds no memory",
                 1e-9 * (double)size);
        b->failed = CUMOE_SUCCESS;
    }
    b->optimizer = (cumoe_optimizer_args_t){.struct_size = sizeof b->optimizer,
                                            .optimizer = CUMOE_OPTIMIZER_ADAM,
                                            .weights = &b->weights,
                                            .gradients = &b->gradients,
                                            .values = {.learning_rate = 0, .step = 1},
                                            .state = state,
                                            .state_size = size};
}

static cumoe_status_t fill(bench_t *b)
{
    const subject_t *s = &b->subject;
    cumoe_status_t status = cumoe_layer_create(&b->layer, b->device->handle, &s->config);
    if (!status) status = cumoe_weights_create(b->layer, CUMOE_DTYPE_DEFAULT, &b->weights);
    if (!status && s->parts & OF_BACKWARD)
        status = cumoe_weights_create(b->layer, CUMOE_DTYPE_DEFAULT, &b->gradients);
    if (!status) status = cumoe_weights_init(b->layer, 1, &b->weights, b->device->stream);
    if (status) return status;
    size_t workspace_size;
    new_inputs(b);
    layer_arguments(b);
    const cumoe_routing_t routing = new_routing(b);
    const cumoe_rows_t rows = new_rows(b);
    void *workspace = new_workspace(b, &workspace_size);
    forward_arguments(b, routing, rows, workspace, workspace_size);
    if (goes_back(b)) backward_arguments(b, routing, rows, workspace, workspace_size);
    if (!b->failed && has_part(s, OPTIMIZER)) optimizer_arguments(b);
    return b->failed;
}

/* The layer is measured without a yardstick that finds no memory. */
static void new_yardsticks(bench_t *b, blas_t *blas)
{
    if (!blas) return;
    b->dense = dense_create(b->device, blas, &b->subject, b->no_dense, sizeof b->no_dense);
    const unsigned layer = 1U << FORWARD | 1U << BACKWARD;
    if (b->device->cpu && b->subject.parts & layer) b->loop = loop_create(blas, &b->subject, &b->weights);
}

bench_t *bench_create(device_t *device, blas_t *blas, const subject_t *subject, char *why, size_t why_size)
{
    bench_t *b = calloc(1, sizeof *b);
    if (!b) abort();
    b->subject = *subject;
    b->device = device;
    const bool no_graphs = subject->launch == GRAPH && !device_has_graphs(device);
    if (no_graphs) snprintf(why, why_size, "there are no graphs on this device");
    if (!no_graphs && fits(b, why, why_size)) {
        const cumoe_status_t status = fill(b);
        if (status == CUMOE_SUCCESS) {
            new_yardsticks(b, blas);
            return b;
        }
        if (status != CUMOE_UNSUPPORTED_CONFIG && status != CUMOE_UNSUPPORTED_DEVICE &&
            status != CUMOE_OUT_OF_MEMORY)
            perf_check(status);
        snprintf(why, why_size, "%s", cumoe_last_error());
    }
    bench_destroy(b);
    return NULL;
}

void bench_destroy(bench_t *b)
{
    device_wait(b->device);
    for (int part = 0; part < NUM_PARTS; part++) device_free_graph(b->graph[part]);
    dense_destroy(b->dense);
    loop_destroy(b->loop);
    for (int i = 0; i < b->arrays; i++) cumoe_memory_free(b->device->handle, b->array[i]);
    if (b->layer) {
        cumoe_weights_destroy(b->layer, &b->weights);
        cumoe_weights_destroy(b->layer, &b->gradients);
    }
    cumoe_layer_destroy(b->layer);
    free(b);
}
