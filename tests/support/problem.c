#include "tests/support/problem.h"

#include "tests/support/noise.h"

#include <stdio.h>

/* Upstream gradients of the losses, those of a call and those of the config; the last three belong to no loss. */
static const double LOSS_GRADIENT[CUMOE_NUM_LOSSES] = {0.75, 1.25, 0.875, 0.375, 1.5, 3, 3, 3};
static const float LOSS_WEIGHT[CUMOE_NUM_LOSSES] = {0.1F, 0.1F, 0.25F, 0.125F, 1};

static const uint64_t NOISE_OFFSET = (UINT64_C(1) << 33) + 3;

enum { NOISE_STREAM = 7 };

/* So small that clamps happen; a number of 16 bits, so that pre-activations meet it exactly. */
static const float SWIGLU_LIMIT = 0.75F, SWIGLU_OFFSET = 0.625F;

static double round_bf16(double value)
{
    return real_round(CUMOE_BF16, value);
}

static double round_f16(double value)
{
    return real_round(CUMOE_F16, value);
}

/* ---- what the library gets ---- */

static void *rows_buffer(problem_t *p, const double *values, int64_t stride)
{
    const size_t size = real_size(p->options.dtype);
    void *data = buffer_get(&p->buffers, (size_t)(p->tokens * stride) * size);
    const real_view_t view = {data, p->options.dtype, p->tokens, p->hidden_size, stride, 1};
    if (values) real_scatter(view, values);
    return data;
}

static void *reals_buffer(problem_t *p, cumoe_dtype_t dtype, const double *values, int64_t n)
{
    void *data = buffer_get(&p->buffers, (size_t)n * real_size(dtype));
    for (int64_t i = 0; values && i < n; i++) real_set(data, dtype, i, values[i]);
    return data;
}

static void set_external(problem_t *p)
{
    const int64_t slots = p->tokens * p->top_k;
    const bool wide = p->layer_case.wide_index;
    int64_t *wide_index = buffer_get(&p->buffers, (size_t)slots * sizeof *wide_index);
    int32_t *index = buffer_get(&p->buffers, (size_t)slots * sizeof *index);
    for (int64_t s = 0; s < slots; s++) {
        wide_index[s] = p->input.index[s];
        index[s] = (int32_t)p->input.index[s];
    }
    p->forward.index = wide ? (const void *)wide_index : index;
    p->forward.index_dtype = wide ? CUMOE_I64 : CUMOE_DTYPE_DEFAULT;
    const cumoe_dtype_t weight_dtype = p->options.index_weight_dtype;
    p->forward.index_weight =
        reals_buffer(p, weight_dtype ? weight_dtype : p->gate_type, p->input.index_weight, slots);
    p->forward.index_weight_dtype = weight_dtype;
    p->backward.dindex_weight = reals_buffer(p, p->gate_type, NULL, slots);
}

static void set_forward(problem_t *p)
{
    const int64_t T = p->tokens, E = p->experts, stride = p->hidden_size + p->layer_case.stride_gap;
    p->forward = (cumoe_forward_args_t){
        .struct_size = sizeof p->forward,
        .num_tokens = T,
        .weights = &p->weights,
        .x = rows_buffer(p, p->input.x, stride),
        .x_stride = stride,
        .y = rows_buffer(p, NULL, stride),
        .y_stride = stride,
        .token_mask = p->input.token_mask,
        .training = p->options.variant.training,
        .seed = p->options.seed,
        .offset = NOISE_OFFSET,
        .first_token = p->layer_case.first_token,
        .chosen_expert = buffer_get(&p->buffers, (size_t)p->max_slots * sizeof(int32_t)),
        .chosen_weight = reals_buffer(p, p->gate_type, NULL, p->max_slots),
        .expert_count = buffer_get(&p->buffers, (size_t)E * sizeof(int32_t)),
        .importance = reals_buffer(p, p->gate_type, NULL, E),
        .load = reals_buffer(p, p->gate_type, NULL, E),
        .losses = reals_buffer(p, p->gate_type, NULL, CUMOE_NUM_LOSSES),
        .statistics = buffer_get(&p->buffers, sizeof(cumoe_statistics_t)),
        .workspace = buffer_get(&p->buffers, p->workspace_size),
        .workspace_size = p->workspace_size,
        .saved = buffer_get(&p->buffers, p->saved_size),
        .saved_size = p->saved_size,
    };
    if (p->options.variant.gate == CUMOE_GATE_BALANCED) {
        p->forward.chosen_offset = buffer_get(&p->buffers, (size_t)(T + 1) * sizeof(int32_t));
        if (p->options.variant.training) p->forward.batch_threshold = reals_buffer(p, p->gate_type, NULL, E);
    }
    if (p->layer_case.dead_tokens == 0) return;
    p->call = buffer_get(&p->buffers, sizeof *p->call);
    *p->call = (cumoe_call_t){p->options.seed, NOISE_OFFSET, p->layer_case.first_token, p->live_tokens};
    p->forward.call = p->call;
    p->forward.seed = 12345; /* replaced by call, like the two below */
    p->forward.offset = 12345;
    p->forward.first_token = 12345;
}

static void set_backward(problem_t *p)
{
    const int64_t stride = p->forward.x_stride;
    p->backward = (cumoe_backward_args_t){
        .struct_size = sizeof p->backward,
        .num_tokens = p->tokens,
        .weights = &p->weights,
        .x = p->forward.x,
        .x_stride = stride,
        .dy = rows_buffer(p, p->input.dy, stride),
        .dy_stride = stride,
        .token_mask = p->forward.token_mask,
        .training = p->forward.training,
        .loss_gradient =
            p->options.variant.training ? reals_buffer(p, p->gate_type, LOSS_GRADIENT, CUMOE_NUM_LOSSES) : NULL,
        .dx = rows_buffer(p, NULL, stride),
        .dx_stride = stride,
        .gradients = &p->gradients,
        .gradient_mode = p->layer_case.mode,
        .workspace = p->forward.workspace,
        .workspace_size = p->workspace_size,
        .saved = p->forward.saved,
        .saved_size = p->saved_size,
    };
}

static void set_weights(problem_t *p)
{
    const layer_case_t *c = &p->layer_case;
    const bool plain = c->plain_gradients;
    p->weights = (cumoe_weights_t){.gate_dtype = p->options.gate_dtype};
    p->gradients = (cumoe_weights_t){.dtype = p->options.gradient_dtype};
    problem_weights_layout(p, &p->weights, c->glu, c->layout, p->weight_bytes);
    problem_weights_layout(p, &p->gradients, plain ? CUMOE_GLU_SEPARATE : c->glu, plain ? LAYOUT_PLAIN : c->layout,
                           p->gradient_bytes);
    p->gradients.gate_bias = NULL; /* it has no gradient */
    p->gradient_bytes[MATRIX_GATE_BIAS] = 0;
    for (problem_matrix_t m = 0; m < NUM_MATRICES; m++)
        if (problem_has_matrix(p, m)) problem_matrix_set(p, &p->weights, m, p->values[m]);
}

static void set_gate(problem_t *p)
{
    const gate_variant_t *variant = &p->options.variant;
    const bool of_all_logits = variant->gate == CUMOE_GATE_SOFTMAX_TOPK || variant->gate == CUMOE_GATE_SIGMOID_TOPK;
    const int64_t average = p->tokens * p->top_k;
    p->config.top_k = variant->gate == CUMOE_GATE_SOFTMAX ? 0 : (int32_t)p->top_k;
    p->config.gate = variant->gate;
    p->config.noise_stream = NOISE_STREAM;
    p->config.num_groups = (int32_t)p->groups;
    p->config.top_k_groups = (int32_t)p->top_k_groups;
    if (of_all_logits) p->config.renormalize = variant->renormalize;
    p->config.max_rows = p->input.max_rows = (average * variant->max_rows + 99) / 100;
    for (int l = 0; l < CUMOE_NUM_LOSSES; l++) p->config.loss_weight[l] = LOSS_WEIGHT[l];
}

static bool set_layer(problem_t *p, report_t *report)
{
    cumoe_status_t status = cumoe_config_init(&p->config);
    set_gate(p);
    p->config.hidden_size = (int32_t)p->hidden_size;
    p->config.intermediate_size = p->layer_case.intermediate_size;
    p->config.num_experts = (int32_t)p->experts;
    p->config.dtype = p->options.dtype;
    p->config.activation = p->options.activation;
    p->config.swiglu_limit = SWIGLU_LIMIT;
    p->config.swiglu_offset = SWIGLU_OFFSET;
    p->config.expert_bias = p->options.bias;
    p->config.recompute = p->options.recompute;
    p->config.max_threads = p->options.max_threads;
    p->config.max_sms = p->options.max_sms;
    p->config.compute = p->options.compute;
    if (status == CUMOE_SUCCESS) status = cumoe_layer_create(&p->layer, p->handle, &p->config);
    if (status == CUMOE_SUCCESS)
        status = cumoe_layer_buffer_sizes(p->layer, p->tokens, &p->workspace_size, &p->saved_size);
    if (status == CUMOE_SUCCESS) status = cumoe_layer_max_rows(p->layer, p->tokens, &p->max_rows, &p->max_slots);
    if (status != CUMOE_SUCCESS) report_fail(report, "%s: %s", p->name, cumoe_last_error());
    return status == CUMOE_SUCCESS;
}

static uint64_t hash_bytes(uint64_t hash, const void *data, size_t size)
{
    for (size_t i = 0; i < size; i++) hash = (hash ^ ((const unsigned char *)data)[i]) * 0x100000001b3u;
    return hash;
}

uint64_t problem_input_hash(const problem_t *p)
{
    const size_t rows = (size_t)(p->tokens * p->forward.x_stride) * real_size(p->options.dtype);
    uint64_t hash = hash_bytes(0xcbf29ce484222325u, p->forward.x, rows);
    hash = hash_bytes(hash, p->backward.dy, rows);
    for (int m = 0; m < NUM_MATRICES; m++)
        if (p->weight_bytes[m])
            hash = hash_bytes(hash, *problem_matrix_pointer(&p->weights, m), p->weight_bytes[m]);
    return hash;
}

/* What is known before the numbers: the sizes. */
static void set_sizes(problem_t *p)
{
    const layer_case_t *c = &p->layer_case;
    p->tokens = c->tokens;
    p->live_tokens = c->tokens - c->dead_tokens;
    p->hidden_size = c->hidden_size;
    p->gate_type = p->options.dtype == CUMOE_F64 ? CUMOE_F64 : CUMOE_F32;
    p->intermediate_size =
        p->options.activation == CUMOE_ACTIVATION_IDENTITY ? c->hidden_size : c->intermediate_size;
    p->experts = c->experts;
    p->top_k = p->options.variant.gate == CUMOE_GATE_SOFTMAX ? c->experts : c->top_k;
    if (p->options.variant.gate == CUMOE_GATE_HIERARCHICAL) {
        const case_groups_t groups = case_groups(c);
        p->groups = groups.groups, p->top_k_groups = groups.top_k_groups;
    }
    p->input = (reference_input_t){
        .gate = p->options.variant.gate,
        .activation = p->options.activation,
        .round = p->options.dtype == CUMOE_BF16  ? round_bf16
                 : p->options.dtype == CUMOE_F16 ? round_f16
                                                 : NULL,
        .tokens = p->tokens,
        .live_tokens = p->live_tokens,
        .hidden_size = p->hidden_size,
        .intermediate_size = p->intermediate_size,
        .experts = p->experts,
        .top_k = p->top_k,
        .groups = p->groups,
        .top_k_groups = p->top_k_groups,
        .renormalize = p->options.variant.renormalize,
        .training = p->options.variant.training,
    };
    /* Tensor cores multiply numbers of 16 bits, and this factor has no array that the caller sees. */
    if (cumoe_handle_backend(p->handle) == CUMOE_BACKEND_CUDA) p->input.round_scaled = p->input.round;
}

/* Everything of a call but the numbers. */
static void set_input(problem_t *p)
{
    const noise_name_t name = {p->options.seed, NOISE_OFFSET, NOISE_STREAM, p->layer_case.first_token};
    double *noise = buffer_get(&p->buffers, (size_t)(p->tokens * p->experts) * sizeof *noise);
    double *primary = buffer_get(&p->buffers, (size_t)(p->tokens * p->groups) * sizeof *primary);
    noise_fill(name, p->tokens, p->experts, p->groups ? p->experts / p->groups : p->experts, noise);
    noise_fill_primary(name, p->tokens, p->groups, primary);
    p->input.noise = noise, p->input.noise_primary = primary;
    p->input.noise_epsilon = (double)p->config.noise_epsilon;
    p->input.swiglu_limit = (double)p->config.swiglu_limit;
    p->input.swiglu_alpha = (double)p->config.swiglu_alpha;
    p->input.swiglu_offset = (double)p->config.swiglu_offset;
    for (int l = 0; l < CUMOE_NUM_LOSSES; l++)
        p->input.loss_gradient[l] =
            p->options.variant.training ? LOSS_GRADIENT[l] : (double)p->config.loss_weight[l];
    if (p->layer_case.mask_period == 0) return;
    uint8_t *mask = buffer_get(&p->buffers, (size_t)p->tokens);
    for (int64_t t = 0; t < p->tokens; t++)
        mask[t] = t % p->layer_case.mask_period == 0 ? 0 : (uint8_t)(1 + t % 255);
    p->input.token_mask = mask;
}

void problem_name(char *name, size_t size, const layer_case_t *layer_case, const problem_options_t *o)
{
    static const char *const types[] = {"?", "f64", "f32", "bf16", "f16"};
    static const char *const activations[CUMOE_NUM_ACTIVATIONS] = {
        "relu",  "swiglu", "gelu",           "gelu tanh", "silu",
        "relu2", "geglu",  "swiglu clamped", "identity",  "geglu tanh"};
    const char *tf32 = o->compute == CUMOE_COMPUTE_TF32 ? " by tf32" : "";
    snprintf(name, size, "%s, %s, %s%s, %s%s (gate %s, gradients %s), %s, seed %llu", layer_case->name,
             o->variant.name, activations[o->activation], o->bias ? " with biases" : "", types[o->dtype], tf32,
             o->gate_dtype ? types[o->gate_dtype] : "as ever",
             o->gradient_dtype ? types[o->gradient_dtype] : "alike", o->recompute ? "recompute" : "keep",
             (unsigned long long)o->seed);
}

bool problem_create(problem_t *p, const cumoe_handle_t *handle, const layer_case_t *layer_case,
                    const problem_options_t *options, report_t *report)
{
    *p = (problem_t){.layer_case = *layer_case, .options = *options, .handle = handle};
    report->context = NULL; /* the name of the problem before, which may be gone */
    problem_name(p->name, sizeof p->name, layer_case, options);
    random_state_t random = random_start(options->seed);
    set_sizes(p);
    if (!set_layer(p, report)) return false;
    set_input(p);
    problem_draw_numbers(p, &random);
    if (!options->without_reference && !problem_find_answer(p, &random, report)) return false;
    set_weights(p);
    set_forward(p);
    set_backward(p);
    if (options->variant.gate == CUMOE_GATE_EXTERNAL) set_external(p);
    p->input_hash = problem_input_hash(p);
    return true;
}

void problem_destroy(problem_t *p)
{
    cumoe_layer_destroy(p->layer);
    reference_destroy(&p->expected);
    buffer_free_all(&p->buffers);
}
