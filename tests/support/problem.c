#include "tests/support/problem.h"

#include "tests/support/noise.h"
#include "tests/support/random.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Logits, thresholds and kinks of relu closer than this could fall on different sides in F32. */
static const double MARGIN = 1e-4;

/* Upstream gradients of the losses; the last three belong to losses that these gates do not have. */
static const double LOSS_GRADIENT[CUMOE_NUM_LOSSES] = {0.75, 1.25, 3, 3, 3};

static const uint64_t NOISE_OFFSET = (UINT64_C(1) << 33) + 3;

enum { NOISE_STREAM = 7, MAX_REDRAWS = 100 };

static double *doubles(problem_t *p, int64_t n)
{
    return buffer_get_zero(&p->buffers, (size_t)n * sizeof(double));
}

static bool masked(const problem_t *p, int64_t t)
{
    return p->layer_case.mask_period > 0 && t % p->layer_case.mask_period == 0;
}

/* ---- numbers ---- */

static void fill_normal(random_state_t *random, double *values, int64_t n, double scale)
{
    for (int64_t i = 0; i < n; i++) values[i] = (double)(float)(scale * random_normal(random));
}

/* Rows that are not live, and every other row of padding, are NaN: nobody may look at them. */
static void fill_token(const problem_t *p, random_state_t *random, double *x, int64_t t)
{
    const int64_t H = p->hidden_size;
    const case_pattern_t pattern = p->layer_case.pattern;
    double *row = x + t * H;
    fill_normal(random, row, H, 1);
    const bool one_sided = pattern == PATTERN_ONE_EXPERT || pattern == PATTERN_EMPTY_EXPERTS;
    if (one_sided) row[0] = 1 + fabs(row[0]);
    if (pattern == PATTERN_ALL_REFUSED) row[0] = t % 2 ? 1 : -1;
    for (int64_t h = 0; h < H; h++) {
        if (pattern == PATTERN_ZERO_X) row[h] = 0;
        if (t >= p->live_tokens || (masked(p, t) && t % 2) || (pattern == PATTERN_NONFINITE_TOKENS && t % 3 == 0))
            row[h] = NAN;
    }
}

/* Column 0 of w_gate decides who wins. */
static void bend_gate(const problem_t *p, double *w_gate)
{
    const int64_t H = p->hidden_size, E = p->experts;
    for (int64_t e = 0; e < E; e++) {
        double *first = w_gate + e * H;
        switch (p->layer_case.pattern) {
        case PATTERN_ONE_EXPERT:
            *first = e == E - 1 ? 100 : 0;
            break;
        case PATTERN_EMPTY_EXPERTS:
            *first = e == E - 1 || e == 0 ? -100 : 0;
            break;
        case PATTERN_TIES:
            memset(first, 0, (size_t)H * sizeof *first);
            break;
        case PATTERN_NONFINITE_WEIGHTS:
            if (e < 3) *first = (const double[]){NAN, INFINITY, -INFINITY}[e];
            break;
        case PATTERN_ALL_REFUSED:
            *first = -INFINITY;
            break;
        default:
            break;
        }
    }
}

static int64_t pick_expert(const problem_t *p, random_state_t *random, int64_t t, int64_t j)
{
    const int64_t E = p->experts, K = p->top_k;
    const int64_t sentinels[] = {-1, E, -7, E + 9, INT32_MIN, INT32_MAX, p->layer_case.wide_index ? INT64_MIN : -2};
    switch (p->layer_case.pattern) {
    case PATTERN_ONE_EXPERT:
        return j == 0 ? E - 1 : random_below(random, E);
    case PATTERN_EMPTY_EXPERTS:
        return 1 + random_below(random, E - 2);
    case PATTERN_DUPLICATES:
        return t % E;
    case PATTERN_SENTINELS:
        if (t % 5 == 0 || (t + j) % 2 == 0) return sentinels[(t * K + j) % 7];
        return random_below(random, E);
    default:
        return random_below(random, E);
    }
}

static void fill_numbers(problem_t *p, random_state_t *random)
{
    const int64_t T = p->tokens, H = p->hidden_size, I = p->intermediate_size, K = p->top_k;
    double *x = doubles(p, T * H), *dy = doubles(p, T * H), *index_weight = doubles(p, T * K);
    double *matrix[NUM_MATRICES];
    int64_t *index = buffer_get_zero(&p->buffers, (size_t)(T * K) * sizeof *index);
    for (int m = 0; m < NUM_MATRICES; m++) {
        const double scale = m == MATRIX_NOISE ? 0.5 : 1, columns = (double)(m == MATRIX_DOWN ? I : H);
        matrix[m] = doubles(p, problem_matrix_elements(p, m));
        fill_normal(random, matrix[m], problem_matrix_elements(p, m), scale / sqrt(columns));
        p->gradient_before[m] = doubles(p, problem_matrix_elements(p, m));
        fill_normal(random, p->gradient_before[m], problem_matrix_elements(p, m), 1);
    }
    bend_gate(p, matrix[MATRIX_GATE]);
    for (int64_t t = 0; t < T; t++) fill_token(p, random, x, t);
    fill_normal(random, dy, T * H, 1);
    for (int64_t i = 0; i < T * H; i++)
        if (i / H >= p->live_tokens || masked(p, i / H)) dy[i] = NAN;
    fill_normal(random, index_weight, T * K, 1);
    for (int64_t s = 0; s < T * K; s++) index[s] = pick_expert(p, random, s / K, s % K);

    reference_input_t *in = &p->input;
    in->x = x, in->dy = dy, in->index = index, in->index_weight = index_weight;
    in->w_gate = matrix[MATRIX_GATE], in->w_noise = matrix[MATRIX_NOISE];
    in->w_up = matrix[MATRIX_UP], in->w_glu = matrix[MATRIX_GLU], in->w_down = matrix[MATRIX_DOWN];
}

/* Draw the tokens again that stand too close to a kink of the function. */
static bool find_answer(problem_t *p, random_state_t *random, report_t *report)
{
    const case_pattern_t pattern = p->layer_case.pattern;
    const bool kinks_wanted = pattern == PATTERN_TIES || pattern == PATTERN_ZERO_X;
    if (!reference_create(&p->input, &p->expected)) {
        report_fail(report, "%s: no memory for the reference", p->name);
        return false;
    }
    int64_t close = 1;
    for (int attempt = 0; close > 0 && attempt < MAX_REDRAWS; attempt++) {
        reference_forward(&p->input, &p->expected);
        close = 0;
        for (int64_t t = 0; t < p->tokens && !kinks_wanted; t++) {
            if (reference_margin(&p->input, &p->expected, t) >= MARGIN) continue;
            fill_token(p, random, (double *)p->input.x, t);
            close++;
        }
    }
    if (close > 0) report_fail(report, "%s: no tokens with a margin of %g found", p->name, MARGIN);
    reference_backward(&p->input, &p->expected);
    reference_sizes(&p->input, &p->expected);
    return close == 0;
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

static void *reals_buffer(problem_t *p, const double *values, int64_t n)
{
    void *data = buffer_get(&p->buffers, (size_t)n * real_size(p->options.dtype));
    for (int64_t i = 0; values && i < n; i++) real_set(data, p->options.dtype, i, values[i]);
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
    p->forward.index_weight = reals_buffer(p, p->input.index_weight, slots);
    p->backward.dindex_weight = reals_buffer(p, NULL, slots);
}

static void set_forward(problem_t *p)
{
    const int64_t T = p->tokens, E = p->experts, K = p->top_k, stride = p->hidden_size + p->layer_case.stride_gap;
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
        .chosen_expert = buffer_get(&p->buffers, (size_t)(T * K) * sizeof(int32_t)),
        .chosen_weight = reals_buffer(p, NULL, T * K),
        .expert_count = buffer_get(&p->buffers, (size_t)E * sizeof(int32_t)),
        .importance = reals_buffer(p, NULL, E),
        .load = reals_buffer(p, NULL, E),
        .losses = reals_buffer(p, NULL, CUMOE_NUM_LOSSES),
        .statistics = buffer_get(&p->buffers, sizeof(cumoe_statistics_t)),
        .workspace = buffer_get(&p->buffers, p->workspace_size),
        .workspace_size = p->workspace_size,
        .saved = buffer_get(&p->buffers, p->saved_size),
        .saved_size = p->saved_size,
    };
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
        .loss_gradient = p->options.variant.training ? reals_buffer(p, LOSS_GRADIENT, CUMOE_NUM_LOSSES) : NULL,
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
    const double *const values[] = {p->input.w_gate, p->input.w_noise, p->input.w_up, p->input.w_glu,
                                    p->input.w_down};
    problem_weights_layout(p, &p->weights, c->glu, c->layout, p->weight_bytes);
    if (c->plain_gradients)
        problem_weights_layout(p, &p->gradients, CUMOE_GLU_SEPARATE, LAYOUT_PLAIN, p->gradient_bytes);
    else
        problem_weights_layout(p, &p->gradients, c->glu, c->layout, p->gradient_bytes);
    for (int m = 0; m < NUM_MATRICES; m++)
        if (problem_has_matrix(p, m)) problem_matrix_set(p, &p->weights, m, values[m]);
}

static bool set_layer(problem_t *p, report_t *report)
{
    cumoe_status_t status = cumoe_config_init(&p->config);
    p->config.hidden_size = (int32_t)p->hidden_size;
    p->config.intermediate_size = (int32_t)p->intermediate_size;
    p->config.num_experts = (int32_t)p->experts;
    p->config.top_k = p->options.variant.gate == CUMOE_GATE_SOFTMAX ? 0 : (int32_t)p->top_k;
    p->config.dtype = p->options.dtype;
    p->config.activation = p->options.activation;
    p->config.gate = p->options.variant.gate;
    p->config.noise_stream = NOISE_STREAM;
    p->config.recompute = p->options.recompute;
    p->config.max_threads = p->options.max_threads;
    if (status == CUMOE_SUCCESS) status = cumoe_layer_create(&p->layer, p->handle, &p->config);
    if (status == CUMOE_SUCCESS)
        status = cumoe_layer_buffer_sizes(p->layer, p->tokens, &p->workspace_size, &p->saved_size);
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
    p->intermediate_size = c->intermediate_size;
    p->experts = c->experts;
    p->top_k = p->options.variant.gate == CUMOE_GATE_SOFTMAX ? c->experts : c->top_k;
    p->input = (reference_input_t){
        .gate = p->options.variant.gate,
        .activation = p->options.activation,
        .tokens = p->tokens,
        .live_tokens = p->live_tokens,
        .hidden_size = p->hidden_size,
        .intermediate_size = p->intermediate_size,
        .experts = p->experts,
        .top_k = p->top_k,
        .training = p->options.variant.training,
    };
}

/* Everything of a call but the numbers. */
static void set_input(problem_t *p)
{
    double *noise = doubles(p, p->tokens * p->experts);
    noise_fill(p->options.seed, NOISE_STREAM, NOISE_OFFSET, p->layer_case.first_token, p->tokens, p->experts,
               noise);
    p->input.noise = noise;
    p->input.noise_epsilon = (double)p->config.noise_epsilon;
    for (int l = 0; l < CUMOE_NUM_LOSSES; l++)
        p->input.loss_gradient[l] =
            p->options.variant.training ? LOSS_GRADIENT[l] : (double)p->config.loss_weight[l];
    if (p->layer_case.mask_period == 0) return;
    uint8_t *mask = buffer_get(&p->buffers, (size_t)p->tokens);
    for (int64_t t = 0; t < p->tokens; t++) mask[t] = masked(p, t) ? 0 : (uint8_t)(1 + t % 255);
    p->input.token_mask = mask;
}

bool problem_create(problem_t *p, const cumoe_handle_t *handle, const layer_case_t *layer_case,
                    const problem_options_t *options, report_t *report)
{
    *p = (problem_t){.layer_case = *layer_case, .options = *options, .handle = handle};
    snprintf(p->name, sizeof p->name, "%s, %s, %s, %s, seed %llu", layer_case->name, options->variant.name,
             options->activation == CUMOE_ACTIVATION_SWIGLU ? "swiglu" : "relu",
             options->dtype == CUMOE_F64 ? "f64" : "f32", (unsigned long long)options->seed);
    random_state_t random = random_start(options->seed);
    set_sizes(p);
    if (!set_layer(p, report)) return false;
    set_input(p);
    fill_numbers(p, &random);
    if (!options->without_reference && !find_answer(p, &random, report)) return false;
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
