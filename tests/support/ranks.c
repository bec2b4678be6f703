#include "tests/support/ranks.h"

#include "tests/support/device.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

/* ---- tokens ---- */

static int64_t first_token_of(const ranks_options_t *o, int64_t tokens, int32_t rank)
{
    const int64_t W = o->num_ranks, left = W - rank;
    if (o->split == SPLIT_LAST) return rank < W ? 0 : tokens;
    if (o->split == SPLIT_UNEVEN) return tokens - tokens * left * left / (W * W);
    return tokens * rank / W;
}

static int64_t clamp(int64_t value, int64_t low, int64_t high)
{
    return value < low ? low : value > high ? high : value;
}

/* A copy of rows of an array of the whole problem, in a buffer of the rank's. */
static void *take_rows(rank_t *r, const void *whole, size_t row_size)
{
    void *data = buffer_get(&r->buffers, (size_t)r->tokens * row_size);
    if (whole && r->tokens)
        memcpy(data, (const char *)whole + (size_t)r->first_token * row_size, (size_t)r->tokens * row_size);
    return data;
}

/* ---- weights ---- */

static bool of_experts(problem_matrix_t matrix)
{
    return matrix >= MATRIX_UP;
}

/* The whole's experts, or groups, of which the rank has a matrix: first, count. */
static void blocks_of(const rank_t *r, problem_matrix_t m, int64_t *first, int64_t *count)
{
    *first = of_experts(m) ? r->first_expert : 0;
    *count = of_experts(m) ? r->experts : problem_matrix_blocks(r->whole, m);
}

static void **pointer_of(cumoe_weights_t *weights, problem_matrix_t m)
{
    return (void **)(uintptr_t)problem_matrix_pointer(weights, m);
}

/* The rank's arrays like FROM, contiguous and separate; with its numbers, or, where there is no matrix, NULL. */
static cumoe_weights_t take_weights(rank_t *r, const cumoe_weights_t *from, bool gradients)
{
    cumoe_weights_t made = {.struct_size = sizeof made, .dtype = from->dtype, .gate_dtype = from->gate_dtype};
    for (problem_matrix_t m = 0; m < NUM_MATRICES; m++) {
        if (!problem_has_matrix(r->whole, m) || (gradients && !problem_has_gradient(r->whole, m))) continue;
        int64_t first, count;
        blocks_of(r, m, &first, &count);
        const real_view_t view = problem_matrix_view(r->whole, from, m, 0);
        const size_t elements = (size_t)(view.rows * view.cols);
        char *data = buffer_get(&r->buffers, (size_t)count * elements * real_size(view.dtype));
        double *values = malloc((elements + 1) * sizeof *values);
        for (int64_t b = 0; values && b < count; b++) {
            const real_view_t to = {data + (size_t)b * elements * real_size(view.dtype),
                                    view.dtype,
                                    view.rows,
                                    view.cols,
                                    view.cols,
                                    1};
            real_gather(problem_matrix_view(r->whole, from, m, first + b), values);
            real_scatter(to, values);
        }
        free(values);
        *pointer_of(&made, m) = data;
    }
    return made;
}

/* What is there before the backward call: shares of the gates' gradients are added up, so one rank brings it. */
static void reset_gradients(rank_t *r)
{
    const problem_t *p = r->whole;
    for (problem_matrix_t m = 0; m < NUM_MATRICES; m++) {
        if (!problem_has_gradient(p, m)) continue;
        int64_t first, count;
        blocks_of(r, m, &first, &count);
        const real_view_t view = problem_matrix_view(p, &p->gradients, m, 0);
        const int64_t elements = view.rows * view.cols;
        const bool nothing = !of_experts(m) && cumoe_ep_rank(r->ep) > 0;
        void *data = *pointer_of(&r->gradients, m);
        buffer_poison(data, (size_t)(count * elements) * real_size(view.dtype));
        for (int64_t i = 0; p->layer_case.mode == CUMOE_GRADIENT_ADD && i < count * elements; i++)
            real_set(data, view.dtype, i, nothing ? 0 : p->gradient_before[m][first * elements + i]);
    }
}

/* ---- arguments ---- */

static void set_forward(rank_t *r)
{
    const problem_t *p = r->whole;
    const size_t element = real_size(p->options.dtype), real = real_size(p->gate_type), K = (size_t)p->top_k;
    const size_t row = (size_t)p->forward.x_stride * element, E = (size_t)p->experts;
    cumoe_forward_args_t *a = &r->forward;
    *a = p->forward;
    a->num_tokens = r->tokens;
    a->weights = &r->weights;
    a->x = take_rows(r, p->forward.x, row);
    a->y = take_rows(r, NULL, row);
    if (a->token_mask) a->token_mask = take_rows(r, a->token_mask, 1);
    if (a->index) a->index = take_rows(r, a->index, K * (a->index_dtype == CUMOE_I64 ? 8 : 4));
    if (a->index_weight)
        a->index_weight =
            take_rows(r, a->index_weight, K * (a->index_weight_dtype ? real_size(a->index_weight_dtype) : real));
    a->chosen_expert = take_rows(r, NULL, K * sizeof(int32_t));
    a->chosen_weight = take_rows(r, NULL, K * real);
    a->expert_count = buffer_get(&r->buffers, E * sizeof(int32_t));
    a->importance = buffer_get(&r->buffers, E * real);
    a->load = buffer_get(&r->buffers, E * real);
    a->losses = buffer_get(&r->buffers, CUMOE_NUM_LOSSES * real);
    a->statistics = buffer_get(&r->buffers, sizeof *a->statistics);
    a->first_token += a->call ? 0 : r->first_token;
    if (!p->call) return;
    r->call = buffer_get(&r->buffers, sizeof *r->call);
    *r->call = *p->call;
    r->call->first_token += r->first_token;
    r->call->live_tokens = r->live_tokens;
    a->call = r->call;
}

static void set_backward(rank_t *r)
{
    const problem_t *p = r->whole;
    const size_t row = (size_t)p->forward.x_stride * real_size(p->options.dtype);
    cumoe_backward_args_t *a = &r->backward;
    *a = p->backward;
    a->num_tokens = r->tokens;
    a->weights = &r->weights;
    a->gradients = &r->gradients;
    a->x = r->forward.x;
    a->token_mask = r->forward.token_mask;
    a->dy = take_rows(r, p->backward.dy, row);
    a->dx = take_rows(r, NULL, row);
    if (a->loss_gradient) {
        const size_t size = CUMOE_NUM_LOSSES * real_size(p->gate_type);
        void *data = buffer_get(&r->buffers, size);
        memcpy(data, p->backward.loss_gradient, size);
        a->loss_gradient = data;
    }
    if (a->dindex_weight) a->dindex_weight = take_rows(r, NULL, (size_t)p->top_k * real_size(p->gate_type));
}

/* Ranks need not want the same, and without tokens an array is nothing. */
static void leave_out(rank_t *r)
{
    if (r->tokens == 0) {
        r->forward.x = r->backward.x = r->backward.dy = NULL;
        r->forward.y = r->backward.dx = NULL;
    }
    if (r->options->split != SPLIT_UNEVEN || cumoe_ep_rank(r->ep) != 1) return;
    r->backward.dx = NULL;
    r->forward.losses = r->forward.load = NULL;
    r->forward.statistics = NULL;
}

static bool succeeded(rank_t *r, cumoe_status_t status)
{
    if (status != CUMOE_SUCCESS) report_fail(&r->report, "%s", cumoe_last_error());
    return status == CUMOE_SUCCESS;
}

/* Poisoned memory looks like free places: with a capacity it is something else. */
static void *get_scratch(rank_t *r, size_t size)
{
    void *data = buffer_get(&r->buffers, size);
    return r->options->capacity ? memset(data, 0x5b, size) : data;
}

static void give_buffers(rank_t *r, size_t workspace_size, size_t saved_size)
{
    r->forward.workspace = r->backward.workspace = get_scratch(r, workspace_size);
    r->forward.workspace_size = r->backward.workspace_size = workspace_size;
    void *saved = get_scratch(r, saved_size);
    r->forward.saved = saved, r->backward.saved = saved;
    r->forward.saved_size = r->backward.saved_size = saved_size;
}

int32_t ranks_least_experts(const problem_t *whole, int32_t num_ranks)
{
    const int64_t units = whole->groups ? whole->groups : whole->experts;
    return (int32_t)(units / num_ranks * (whole->experts / units));
}

bool rank_create(rank_t *r, const problem_t *whole, const ranks_options_t *options, cumoe_ep_t *ep)
{
    const int32_t rank = cumoe_ep_rank(ep);
    *r = (rank_t){.whole = whole,
                  .options = options,
                  .ep = ep,
                  .handle = whole->handle,
                  .body = r->body,
                  .context = r->context};
    cumoe_config_t config = whole->config;
    config.ep = ep;
    config.exchange_capacity = options->capacity;
    const int32_t least = ranks_least_experts(whole, options->num_ranks);
    config.exchange_chunks = options->chunks < least ? options->chunks : least;
    if (!succeeded(r, cumoe_layer_create(&r->layer, r->handle, &config))) return false;
    if (!succeeded(r, cumoe_layer_experts_of_rank(r->layer, rank, &r->first_expert, &r->experts))) return false;
    r->first_token = first_token_of(options, whole->tokens, rank);
    r->tokens = first_token_of(options, whole->tokens, rank + 1) - r->first_token;
    if (options->split == SPLIT_LAST && rank + 1 < options->num_ranks) r->tokens = 0;
    r->live_tokens = clamp(whole->live_tokens - r->first_token, 0, r->tokens);
    r->weights = take_weights(r, &whole->weights, false);
    r->gradients = take_weights(r, &whole->gradients, true);
    set_forward(r);
    set_backward(r);
    leave_out(r);
    size_t workspace_size, saved_size;
    if (!succeeded(r, cumoe_layer_buffer_sizes(r->layer, r->tokens, &workspace_size, &saved_size))) return false;
    give_buffers(r, workspace_size, saved_size);
    if (options->capacity > 0) return true;
    if (!succeeded(r, cumoe_ep_routing_size(r->layer, r->tokens, &r->forward.routing_size))) return false;
    r->backward.routing = r->forward.routing = buffer_get(&r->buffers, r->forward.routing_size);
    r->backward.routing_size = r->forward.routing_size;
    return succeeded(r, cumoe_ep_plan_create(r->layer, &r->plan));
}

void rank_destroy(rank_t *r)
{
    cumoe_ep_plan_destroy(r->plan);
    cumoe_layer_destroy(r->layer);
    buffer_free_all(&r->buffers);
}

/* ---- the calls ---- */

/* The rank that has an expert. */
static int32_t rank_of(rank_t *r, int32_t expert)
{
    int32_t first = 0, count = 0, rank = 0;
    while (succeeded(r, cumoe_layer_experts_of_rank(r->layer, rank, &first, &count)) && expert >= first + count)
        rank++;
    return rank;
}

/* A token travels once to a rank, whatever the number of its experts there. */
static void check_traffic(rank_t *r, const cumoe_ep_sizes_t *sizes)
{
    const int64_t K = r->whole->top_k;
    int64_t rows = 0, tokens = 0;
    for (int64_t t = 0; t < r->tokens; t++) {
        bool sent[RANKS_MAX] = {false};
        for (int64_t slot = t * K; slot < (t + 1) * K; slot++) {
            if (r->forward.chosen_expert[slot] < 0) continue;
            const int32_t to = rank_of(r, r->forward.chosen_expert[slot]);
            rows++;
            tokens += !sent[to];
            sent[to] = true;
        }
    }
    report_check(&r->report, sizes->rows_sent == rows);
    report_check(&r->report, sizes->tokens_sent == tokens);
}

static bool make_plan(rank_t *r)
{
    cumoe_ep_sizes_t sizes;
    if (!succeeded(r, device_ep_plan(r->handle, r->layer, &r->forward, r->plan, &sizes))) return false;
    check_traffic(r, &sizes);
    give_buffers(r, sizes.workspace_size, sizes.saved_size);
    r->forward.plan = r->backward.plan = r->plan;
    return true;
}

bool rank_forward(rank_t *r)
{
    if (r->plan && !make_plan(r)) return false;
    return succeeded(r, device_layer_forward(r->handle, r->layer, &r->forward));
}

bool rank_backward(rank_t *r)
{
    reset_gradients(r);
    if (!succeeded(r, device_layer_backward(r->handle, r->layer, &r->backward))) return false;
    return succeeded(r, device_ep_sum_gradients(r->handle, r->layer, &r->gradients));
}

bool rank_run(rank_t *r)
{
    return rank_forward(r) && rank_backward(r);
}

/* ---- what came out ---- */

static void compare_rows(rank_t *r, const char *what, const void *actual, const void *whole, size_t row_size)
{
    if (!actual) return;
    compare_bits(&r->report, what, actual, (const char *)whole + (size_t)r->first_token * row_size,
                 (size_t)r->tokens * row_size);
}

static void compare_statistics(rank_t *r)
{
    cumoe_statistics_t actual = *r->forward.statistics;
    const cumoe_statistics_t *expected = r->whole->forward.statistics;
    report_check(&r->report, actual.exchange_overflow == 0);
    compare_bits(&r->report, "statistics", &actual, expected, sizeof actual);
}

/* What the gate gives. */
static void check_gate(rank_t *r)
{
    const problem_t *p = r->whole;
    const cumoe_forward_args_t *a = &r->forward, *w = &p->forward;
    const size_t E = (size_t)p->experts, K = (size_t)p->top_k, real = real_size(p->gate_type);
    compare_rows(r, "chosen_expert", a->chosen_expert, w->chosen_expert, K * sizeof(int32_t));
    compare_rows(r, "chosen_weight", a->chosen_weight, w->chosen_weight, K * real);
    compare_bits(&r->report, "expert_count", a->expert_count, w->expert_count, E * sizeof(int32_t));
    compare_bits(&r->report, "importance", a->importance, w->importance, E * real);
    if (a->load) compare_bits(&r->report, "load", a->load, w->load, E * real);
    for (int l = 0; a->losses && l < CUMOE_NUM_LOSSES; l++) {
        const double expected = real_get(w->losses, p->gate_type, l);
        if (l == CUMOE_LOSS_Z)
            compare_vector(&r->report, "z-loss", (const char *)a->losses + (size_t)l * real, p->gate_type, 1,
                           &expected, problem_gate_limit(p));
        else
            compare_bits(&r->report, "loss", (const char *)a->losses + (size_t)l * real,
                         (const char *)w->losses + (size_t)l * real, real);
    }
    if (a->statistics) compare_statistics(r);
}

/* Gradients of experts have the same bits; those of gates are sums of shares. */
static void check_gradient(rank_t *r, problem_matrix_t m)
{
    const problem_t *p = r->whole;
    int64_t first, count;
    blocks_of(r, m, &first, &count);
    const real_view_t view = problem_matrix_view(p, &p->gradients, m, 0);
    const size_t elements = (size_t)(view.rows * view.cols), n = (size_t)count * elements;
    double *actual = malloc((n + 1) * sizeof *actual), *expected = malloc((n + 1) * sizeof *expected);
    for (int64_t b = 0; actual && expected && b < count; b++)
        real_gather(problem_matrix_view(p, &p->gradients, m, first + b), expected + (size_t)b * elements);
    for (size_t i = 0; actual && i < n; i++)
        actual[i] = real_get(*problem_matrix_pointer(&r->gradients, m), view.dtype, (int64_t)i);
    if (of_experts(m))
        compare_bits(&r->report, PROBLEM_MATRIX_NAMES[m], actual, expected, n * sizeof *actual);
    else
        compare_scaled(&r->report, PROBLEM_MATRIX_NAMES[m], (int64_t)n, actual, expected, NULL,
                       problem_gate_limit(p));
    free(actual);
    free(expected);
}

void rank_check_experts(rank_t *r)
{
    const problem_t *p = r->whole;
    const size_t row = (size_t)p->forward.y_stride * real_size(p->options.dtype);
    compare_rows(r, "y", r->forward.y, p->forward.y, row);
    compare_rows(r, "dx", r->backward.dx, p->backward.dx, row);
    compare_rows(r, "dindex_weight", r->backward.dindex_weight, p->backward.dindex_weight,
                 (size_t)p->top_k * real_size(p->gate_type));
    for (problem_matrix_t m = 0; m < NUM_MATRICES; m++)
        if (problem_has_gradient(p, m)) check_gradient(r, m);
    report_check(&r->report, buffer_guards_intact(&r->buffers));
}

/* Bytes of output number WHICH, from byte FIRST on. */
static uint64_t hash_bytes(int which, size_t first, const void *data, size_t size)
{
    const unsigned char *bytes = data;
    uint64_t sum = 0;
    for (size_t i = 0; data && i < size; i++) {
        random_state_t state = random_start(((uint64_t)which << 56) + (first + i) * 256 + bytes[i]);
        sum += random_bits(&state);
    }
    return sum;
}

uint64_t rank_hash(const rank_t *r)
{
    const problem_t *p = r->whole;
    const size_t real = real_size(p->gate_type), element = real_size(p->options.dtype);
    const size_t y_row = (size_t)p->forward.y_stride * element, dx_row = (size_t)p->backward.dx_stride * element;
    const size_t first = (size_t)r->first_token, tokens = (size_t)r->tokens;
    uint64_t hash = hash_bytes(0, first * y_row, r->forward.y, tokens * y_row) +
                    hash_bytes(1, first * dx_row, r->backward.dx, tokens * dx_row);
    if (cumoe_ep_rank(r->ep) == 0)
        hash += hash_bytes(2, 0, (const char *)r->forward.losses + CUMOE_LOSS_IMPORTANCE * real, real) +
                hash_bytes(3, 0, (const char *)r->forward.losses + CUMOE_LOSS_LOAD * real, real);
    for (problem_matrix_t m = 0; m < NUM_MATRICES; m++) {
        if (!problem_has_gradient(p, m) || !of_experts(m)) continue;
        int64_t begin, count;
        blocks_of(r, m, &begin, &count);
        const real_view_t view = problem_matrix_view(p, &p->gradients, m, 0);
        const size_t size = (size_t)(view.rows * view.cols) * real_size(view.dtype);
        hash += hash_bytes(4 + (int)m, (size_t)begin * size, *problem_matrix_pointer(&r->gradients, m),
                           (size_t)count * size);
    }
    return hash;
}

void rank_check(rank_t *r)
{
    check_gate(r);
    rank_check_experts(r);
}

/* ---- all of them ---- */

static void *work(void *argument)
{
    rank_t *r = argument;
    r->body(r);
    return NULL;
}

void ranks_run(const problem_t *whole, const ranks_options_t *options, rank_body_t *body, void *context,
               report_t *report)
{
    cumoe_ep_t *ep[RANKS_MAX];
    rank_t *ranks = calloc(RANKS_MAX, sizeof *ranks);
    pthread_t threads[RANKS_MAX];
    const int32_t W = options->num_ranks;
    ranks_create_t *create = options->create ? options->create : cumoe_ep_create_local;
    if (options->group) memcpy(ep, options->group, (size_t)W * sizeof *ep);
    if (!ranks || (!options->group && create(ep, whole->handle, W, options->timeout) != CUMOE_SUCCESS)) {
        report_fail(report, "%s", cumoe_last_error());
        free(ranks);
        return;
    }
    for (int32_t r = 0; r < W; r++) {
        ranks[r] = (rank_t){.whole = whole, .options = options, .ep = ep[r], .body = body, .context = context};
        if (pthread_create(&threads[r], NULL, work, &ranks[r]) != 0) abort();
    }
    for (int32_t r = 0; r < W; r++) pthread_join(threads[r], NULL);
    for (int32_t r = 0; r < W; r++) {
        if (ranks[r].report.failures)
            report_fail(report, "%s: rank %d of %d, split %d, capacity %lld, chunks %d:\n%s", whole->name, r, W,
                        options->split, (long long)options->capacity, options->chunks, ranks[r].report.text);
        rank_destroy(&ranks[r]);
        cumoe_ep_destroy(ranks[r].ep);
    }
    free(ranks);
}

static void create_run_check(rank_t *r)
{
    if (rank_create(r, r->whole, r->options, r->ep) && rank_run(r)) rank_check(r);
}

void ranks_check(const problem_t *whole, const ranks_options_t *options, report_t *report)
{
    ranks_run(whole, options, create_run_check, NULL, report);
}
