/* A layer with all its buffers: of a rank, of its experts alone, or of all tokens without ranks. */
#include "exchange.h"

#include <stdlib.h>

/* ---- memory ---- */

void *memory_take(memory_t *m, int64_t count, size_t size)
{
    void *array = NULL;
    const size_t bytes = (size_t)count * size;
    if (m->failed || bytes == 0) return NULL;
    m->failed = cumoe_memory_alloc(m->device->handle, bytes, &array);
    if (m->failed) return NULL;
    m->array[m->arrays++] = array;
    perf_check(cumoe_memory_set(m->device->handle, array, 0, bytes, m->device->stream));
    return array;
}

void memory_free(memory_t *m)
{
    for (int i = 0; i < m->arrays; i++) cumoe_memory_free(m->device->handle, m->array[i]);
    m->arrays = 0;
}

void memory_upload(const memory_t *m, void *array, void *host, size_t size)
{
    if (array)
        perf_check(
            cumoe_memory_copy(m->device->handle, array, host, size, CUMOE_COPY_TO_DEVICE, m->device->stream));
    device_wait(m->device);
    free(host);
}

void *memory_download(const memory_t *m, const void *array, size_t size)
{
    void *host = malloc(size + 1);
    if (!host) abort();
    if (size)
        perf_check(cumoe_memory_copy(m->device->handle, host, array, size, CUMOE_COPY_TO_HOST, m->device->stream));
    device_wait(m->device);
    return host;
}

/* ---- what a caller brings ---- */

static void *host_array(int64_t count, size_t size)
{
    void *array = malloc((size_t)count * size + 1);
    if (!array) abort();
    return array;
}

/* Of each rank other tokens, which do not depend on how many layers have them. */
static void *new_tokens(memory_t *m, const subject_t *s, int64_t first, int64_t count, bool ones)
{
    const int64_t H = s->config.hidden_size, T = s->num_tokens;
    const size_t size = token_size(&s->config);
    char *array = memory_take(m, count * H, size);
    for (int64_t t = 0; array && t < count; t += T) {
        subject_t some = *s;
        some.num_tokens = count - t < T ? count - t : T;
        void *host = host_array(some.num_tokens * H, size);
        input_tokens(&some, ones, 100 + 2 * (uint64_t)((first + t) / T) + (ones ? 0 : 1), host);
        memory_upload(m, array + (size_t)(t * H) * size, host, (size_t)(some.num_tokens * H) * size);
    }
    return array;
}

static void new_routing(run_t *run, memory_t *m, const subject_t *s, int64_t first, int64_t count)
{
    const int64_t K = s->config.top_k, T = s->num_tokens;
    int32_t *index = memory_take(m, count * K, sizeof *index);
    float *index_weight = memory_take(m, count * K, sizeof *index_weight);
    for (int64_t t = 0; index_weight && t < count; t += T) {
        int32_t *expert = host_array(T * K, sizeof *expert);
        float *weight = host_array(T * K, sizeof *weight);
        input_routing(s, 4 + (uint64_t)((first + t) / T), expert, weight);
        memory_upload(m, index + t * K, expert, (size_t)(T * K) * sizeof *expert);
        memory_upload(m, index_weight + t * K, weight, (size_t)(T * K) * sizeof *weight);
    }
    run->forward.index = index;
    run->forward.index_weight = index_weight;
}

static void new_gates(const run_t *run, memory_t *m, const subject_t *s)
{
    const cumoe_config_t *c = &s->config;
    for (int groups = 0; groups <= (c->num_groups > 0); groups++) {
        const int64_t values = (int64_t)(groups ? c->num_groups : c->num_experts) * c->hidden_size;
        float *w_gate = host_array(values, sizeof *w_gate);
        input_gate(s, groups != 0, w_gate);
        memory_upload(m, groups ? run->weights.w_gate_primary : run->weights.w_gate, w_gate,
                      (size_t)values * sizeof *w_gate);
    }
}

/* ---- the layer ---- */

static void set_arguments(run_t *run, memory_t *m, const cumoe_config_t *c, int64_t first, int64_t num_tokens)
{
    const size_t size = token_size(c);
    const bool back = run->gradients.struct_size > 0;
    cumoe_forward_args_t *f = &run->forward;
    f->struct_size = sizeof *f;
    f->num_tokens = num_tokens;
    f->weights = &run->weights;
    f->y = memory_take(m, num_tokens * c->hidden_size, size);
    f->training = 1;
    f->seed = 1;
    f->first_token = first;
    f->chosen_expert = memory_take(m, num_tokens * c->top_k, sizeof(int32_t));
    run->backward = (cumoe_backward_args_t){.struct_size = sizeof run->backward,
                                            .num_tokens = num_tokens,
                                            .weights = &run->weights,
                                            .x = f->x,
                                            .dy = run->backward.dy,
                                            .training = 1,
                                            .dx = back ? memory_take(m, num_tokens * c->hidden_size, size) : NULL,
                                            .gradients = &run->gradients};
}

void run_create(run_t *run, memory_t *m, const subject_t *s, const cumoe_config_t *config, int64_t first,
                int64_t num_tokens)
{
    const cumoe_handle_t *handle = m->device->handle;
    const bool back = s->parts & OF_BACKWARD;
    if (!m->failed) m->failed = cumoe_layer_create(&run->layer, handle, config);
    const bool lent = run->weights.struct_size > 0;
    if (!m->failed && !lent) m->failed = cumoe_weights_create(run->layer, CUMOE_DTYPE_DEFAULT, &run->weights);
    if (!m->failed && !lent && back)
        m->failed = cumoe_weights_create(run->layer, CUMOE_DTYPE_DEFAULT, &run->gradients);
    if (!m->failed && !lent) m->failed = cumoe_weights_init(run->layer, 1, &run->weights, m->device->stream);
    if (m->failed) return;
    run->forward.x = new_tokens(m, s, first, num_tokens, true);
    run->backward.dy = back ? new_tokens(m, s, first, num_tokens, false) : NULL;
    if (config->gate == CUMOE_GATE_EXTERNAL)
        new_routing(run, m, s, first, num_tokens);
    else
        new_gates(run, m, s);
    set_arguments(run, m, config, first, num_tokens);
}

void run_buffers(run_t *run, memory_t *m, size_t workspace_size, size_t saved_size)
{
    void *workspace = memory_take(m, (int64_t)workspace_size, 1), *saved = memory_take(m, (int64_t)saved_size, 1);
    run->forward.workspace = run->backward.workspace = workspace;
    run->forward.workspace_size = run->backward.workspace_size = workspace_size;
    run->forward.saved = saved;
    run->backward.saved = saved;
    run->forward.saved_size = run->backward.saved_size = saved_size;
}

void run_destroy(run_t *run)
{
    if (!run->layer) return;
    cumoe_weights_destroy(run->layer, &run->weights);
    cumoe_weights_destroy(run->layer, &run->gradients);
    cumoe_layer_destroy(run->layer);
    run->layer = NULL;
}
