/* What one rank has of a layer with ranks, and the calls that are timed. */
#include "exchange.h"

#include <math.h>
#include <stdlib.h>

size_t share_row_size(const share_t *s)
{
    return (size_t)s->subject->config.hidden_size * token_size(&s->subject->config);
}

const int64_t *share_dispatched(const share_t *s, bool to_others)
{
    return s->padded ? s->padded : to_others ? s->sent.tokens : s->received.tokens;
}

const int64_t *share_returned(const share_t *s, bool to_others)
{
    return s->padded ? s->padded : to_others ? s->received.rows : s->sent.rows;
}

/* ---- calls ---- */

static void exchange_rows(share_t *s)
{
    const size_t row = share_row_size(s);
    rank_exchange(s->rank, s->out, share_dispatched(s, true), s->in, share_dispatched(s, false), row);
    rank_exchange(s->rank, s->in, share_returned(s, true), s->out, share_returned(s, false), row);
}

static cumoe_status_t forward(share_t *s)
{
    const cumoe_stream_t stream = s->rank->device.stream;
    if (s->plan) {
        const cumoe_status_t status = cumoe_ep_plan(s->layer.layer, &s->layer.forward, s->plan, &s->sizes, stream);
        if (status != CUMOE_SUCCESS) return status;
    }
    return cumoe_layer_forward(s->layer.layer, &s->layer.forward, stream);
}

void share_enqueue(share_t *s, int timed)
{
    const cumoe_stream_t stream = s->rank->device.stream;
    if (timed == ROWS) exchange_rows(s);
    if (timed == RANKS_FORWARD) perf_check(forward(s));
    if (timed == RANKS_BACKWARD) perf_check(cumoe_layer_backward(s->layer.layer, &s->layer.backward, stream));
    if (timed == EXPERTS_FORWARD) perf_check(cumoe_layer_forward(s->experts.layer, &s->experts.forward, stream));
    if (timed == EXPERTS_BACKWARD) perf_check(cumoe_layer_backward(s->experts.layer, &s->experts.backward, stream));
}

/* ---- memory ---- */

/* Counted first, as bench.c does, for an even routing: of rows what the layer and the experts alone keep. */
static bool fits(const share_t *s, char *why, size_t why_size)
{
    const subject_t *subject = s->subject;
    const cumoe_config_t *c = &subject->config;
    const double T = (double)subject->num_tokens, W = s->rank->count, H = c->hidden_size;
    cumoe_cost_t cost = {.struct_size = sizeof cost};
    perf_check(cumoe_config_cost(c, subject->num_tokens, 1, s->rank->count, &cost));
    const bool back = subject->parts & OF_BACKWARD;
    const double rows = fmax(T * c->top_k, W * (double)c->exchange_capacity);
    const double of_rows = 2 * rows * ((double)z_width(c) + c->intermediate_size + 3 * H);
    const double needed = s->rank->beside * ((double)cost.weights_size + (back ? (double)cost.gradients_size : 0) +
                                             (double)token_size(c) * (back ? 2 : 1) * (of_rows + 4 * T * H));
    const double there = device_memory(&s->rank->device);
    if (needed <= 0.95 * there) return true;
    snprintf(why, why_size, "needs about %.1f GB of memory for %d ranks, and %.1f are free", 1e-9 * needed,
             s->rank->beside, 1e-9 * there);
    return false;
}

static int64_t *host_counts(const share_t *s)
{
    int64_t *counts = calloc((size_t)s->rank->count + 1, sizeof *counts);
    if (!counts) abort();
    return counts;
}

/* ---- the layer of ranks ---- */

static void new_layer(share_t *s)
{
    cumoe_config_t config = s->subject->config;
    memory_t *m = &s->memory;
    size_t workspace_size, saved_size;
    const int64_t T = s->subject->num_tokens;
    config.ep = s->rank->ep;
    config.max_threads = s->rank->device.threads;
    run_create(&s->layer, m, s->subject, &config, s->rank->number * T, T);
    if (m->failed) return;
    for (int32_t r = 0, count; r < s->rank->count; r++, s->first[r] = s->first[r - 1] + count)
        perf_check(cumoe_layer_experts_of_rank(s->layer.layer, r, &s->first[r], &count));
    perf_check(cumoe_layer_buffer_sizes(s->layer.layer, T, &workspace_size, &saved_size));
    run_buffers(&s->layer, m, workspace_size, config.exchange_capacity ? saved_size : 0);
    if (config.exchange_capacity) return;
    perf_check(cumoe_ep_plan_create(s->layer.layer, &s->plan));
    perf_check(cumoe_ep_routing_size(s->layer.layer, T, &s->layer.forward.routing_size));
    s->layer.forward.routing = memory_take(m, (int64_t)s->layer.forward.routing_size, 1);
    s->layer.backward.routing = s->layer.forward.routing;
    s->layer.backward.routing_size = s->layer.forward.routing_size;
}

/* The first call says where tokens go, and how large the buffers of an exact one are. */
static void first_call(share_t *s)
{
    const cumoe_stream_t stream = s->rank->device.stream;
    if (s->plan) {
        perf_check(cumoe_ep_plan(s->layer.layer, &s->layer.forward, s->plan, &s->sizes, stream));
        run_buffers(&s->layer, &s->memory, s->sizes.workspace_size, s->sizes.saved_size);
        s->layer.forward.plan = s->layer.backward.plan = s->plan;
    } else {
        perf_check(cumoe_layer_forward(s->layer.layer, &s->layer.forward, stream));
    }
}

/* ---- traffic ---- */

/* What comes from others, by what they say. */
static void hear_counts(share_t *s)
{
    const int32_t W = s->rank->count;
    memory_t scratch = {.device = &s->rank->device};
    int64_t *one = host_counts(s), *pairs = calloc(2 * (size_t)W, sizeof *pairs);
    if (!pairs) abort();
    for (int32_t r = 0; r < W; r++) {
        one[r] = 1;
        pairs[2 * r] = s->sent.rows[r];
        pairs[2 * r + 1] = s->sent.tokens[r];
    }
    const size_t size = 2 * sizeof *pairs;
    void *send = memory_take(&scratch, W, size), *recv = memory_take(&scratch, W, size);
    perf_check(scratch.failed);
    memory_upload(&scratch, send, pairs, (size_t)W * size);
    rank_exchange(s->rank, send, one, recv, one, size);
    pairs = memory_download(&scratch, recv, (size_t)W * size);
    for (int32_t r = 0; r < W; r++) {
        s->received.num_rows += s->received.rows[r] = pairs[2 * r];
        s->received.num_tokens += s->received.tokens[r] = pairs[2 * r + 1];
    }
    memory_free(&scratch);
    free(pairs);
    free(one);
}

static bool plan_agrees(const share_t *s, char *why, size_t why_size)
{
    const cumoe_ep_sizes_t *z = &s->sizes;
    if (!s->plan || (z->rows_sent == s->sent.num_rows && z->tokens_sent == s->sent.num_tokens &&
                     z->rows_received == s->received.num_rows && z->tokens_received == s->received.num_tokens))
        return true;
    snprintf(why, why_size,
             "wrong: the plan has %lld rows of %lld tokens for others, and %lld of %lld from them; the choices of "
             "experts make it %lld of %lld, and %lld of %lld",
             (long long)z->rows_sent, (long long)z->tokens_sent, (long long)z->rows_received,
             (long long)z->tokens_received, (long long)s->sent.num_rows, (long long)s->sent.num_tokens,
             (long long)s->received.num_rows, (long long)s->received.num_tokens);
    return false;
}

static void count_traffic(share_t *s)
{
    const subject_t *subject = s->subject;
    const int64_t slots = subject->num_tokens * subject->config.top_k;
    int32_t *chosen = memory_download(&s->memory, s->layer.forward.chosen_expert, (size_t)slots * sizeof *chosen);
    s->expert = malloc((size_t)(slots + 1) * sizeof *s->expert);
    s->incomplete = malloc((size_t)subject->num_tokens + 1);
    if (!s->expert || !s->incomplete) abort();
    rows_list(s, chosen, &s->sent, &s->dropped, s->incomplete, s->expert);
    free(chosen);
    s->layer.forward.chosen_expert = NULL;
    hear_counts(s);
    if (subject->config.exchange_capacity == 0) return;
    s->padded = host_counts(s);
    for (int32_t r = 0; r < s->rank->count; r++)
        s->padded[r] = num_chunks(&subject->config) * room_of_chunk(&subject->config);
}

static int64_t sum_of(const share_t *s, const int64_t *counts)
{
    int64_t sum = 0;
    for (int32_t r = 0; r < s->rank->count; r++) sum += counts[r];
    return sum;
}

static void new_rows(share_t *s)
{
    const int64_t out[2] = {sum_of(s, share_dispatched(s, true)), sum_of(s, share_returned(s, false))};
    const int64_t in[2] = {sum_of(s, share_dispatched(s, false)), sum_of(s, share_returned(s, true))};
    s->out = memory_take(&s->memory, out[0] > out[1] ? out[0] : out[1], share_row_size(s));
    s->in = memory_take(&s->memory, in[0] > in[1] ? in[0] : in[1], share_row_size(s));
}

void exchange_traffic(share_t *s, exchange_t *e)
{
    const int32_t me = s->rank->number;
    const double row = (double)share_row_size(s);
    const int64_t *const counts[] = {share_dispatched(s, true), share_dispatched(s, false), share_returned(s, true),
                                     share_returned(s, false)};
    double bytes[4];
    for (int i = 0; i < 4; i++) bytes[i] = row * (double)sum_of(s, counts[i]);
    double most[] = {bytes[0] - row * (double)counts[0][me],
                     row * (double)counts[0][me],
                     bytes[2] - row * (double)counts[2][me],
                     row * (double)counts[2][me],
                     fmax(bytes[0], bytes[1]),
                     fmax(bytes[2], bytes[3]),
                     (double)s->received.num_rows};
    rank_max(s->rank, most, 7);
    for (int i = 0; i < 2; i++) e->dispatched[i] = most[i], e->returned[i] = most[2 + i];
    e->largest = most[4] + most[5];
    e->most_rows = (int64_t)most[6];
    const int64_t mine[2] = {s->sent.num_rows, s->dropped};
    int64_t *all = calloc(2 * (size_t)s->rank->count, sizeof *all);
    if (!all) abort();
    rank_tell(s->rank, mine, sizeof mine, all);
    for (int32_t r = 0; r < s->rank->count; r++) e->rows += all[2 * r], e->dropped += all[2 * r + 1];
    free(all);
}

/* ---- the experts alone ---- */

static cumoe_weights_t lend(cumoe_weights_t weights)
{
    weights.w_gate = weights.w_noise = weights.w_gate_primary = weights.w_noise_primary = NULL;
    weights.thresholds = weights.gate_bias = weights.allocation = NULL;
    return weights;
}

/* One expert for each row, as it comes from the others; weights and gradients are those of the rank's layer. */
static void new_experts(share_t *s)
{
    memory_t *m = &s->memory;
    subject_t subject = *s->subject;
    cumoe_config_t *c = &subject.config;
    const int64_t rows = s->received.num_rows;
    c->gate = CUMOE_GATE_EXTERNAL;
    c->num_experts = s->first[s->rank->number + 1] - s->first[s->rank->number];
    c->top_k = 1;
    c->num_groups = c->top_k_groups = 0;
    c->exchange_capacity = c->exchange_chunks = 0;
    c->max_threads = s->rank->device.threads;
    subject.num_tokens = rows > 0 ? rows : 1;
    s->experts.weights = lend(s->layer.weights);
    s->experts.gradients = lend(s->layer.gradients);
    run_create(&s->experts, m, &subject, c, 0, rows);
    if (m->failed) return;
    size_t workspace_size, saved_size;
    perf_check(cumoe_layer_buffer_sizes(s->experts.layer, rows, &workspace_size, &saved_size));
    run_buffers(&s->experts, m, workspace_size, saved_size);
}

/* The rows' experts instead of random ones. Collective. */
static void hear_experts(share_t *s)
{
    memory_t scratch = {.device = &s->rank->device};
    const size_t size = (size_t)s->sent.num_rows * sizeof *s->expert;
    void *send = memory_take(&scratch, s->sent.num_rows, sizeof *s->expert);
    perf_check(scratch.failed);
    memory_upload(&scratch, send, s->expert, size);
    s->expert = NULL;
    rank_exchange(s->rank, send, s->sent.rows, (void *)(uintptr_t)s->experts.forward.index, s->received.rows,
                  sizeof *s->expert);
    device_wait(&s->rank->device);
    memory_free(&scratch);
}

/* ---- all of it ---- */

/* Nothing else than what a device has not is an answer. */
static bool made(const share_t *s, char *why, size_t why_size)
{
    const cumoe_status_t failed = s->memory.failed;
    if (failed != CUMOE_UNSUPPORTED_CONFIG && failed != CUMOE_UNSUPPORTED_DEVICE && failed != CUMOE_OUT_OF_MEMORY)
        perf_check(failed);
    if (failed) snprintf(why, why_size, "%s", cumoe_last_error());
    return !failed;
}

bool share_create(share_t *s, rank_t *rank, const subject_t *subject, bool *wrong, char *why, size_t why_size)
{
    *s = (share_t){.rank = rank, .subject = subject, .memory = {.device = &rank->device}};
    traffic_t *const both[] = {&s->sent, &s->received};
    for (int i = 0; i < 2; i++) *both[i] = (traffic_t){.rows = host_counts(s), .tokens = host_counts(s)};
    s->first = calloc((size_t)rank->count + 1, sizeof *s->first);
    if (!s->first) abort();
    *wrong = false;
    if (!rank_agree(rank, fits(s, why, why_size), why, why_size)) return false;
    new_layer(s);
    if (!rank_agree(rank, made(s, why, why_size), why, why_size)) return false;
    first_call(s);
    if (!rank_agree(rank, made(s, why, why_size), why, why_size)) return false;
    count_traffic(s);
    *wrong = !rank_agree(rank, plan_agrees(s, why, why_size), why, why_size);
    if (*wrong) return false;
    new_rows(s);
    new_experts(s);
    if (!rank_agree(rank, made(s, why, why_size), why, why_size)) return false;
    s->experts.forward.chosen_expert = NULL;
    hear_experts(s);
    share_enqueue(s, EXPERTS_FORWARD); /* for a backward call that is timed alone */
    return true;
}

void share_destroy(share_t *s)
{
    device_wait(&s->rank->device);
    cumoe_ep_plan_destroy(s->plan);
    run_destroy(&s->experts);
    run_destroy(&s->layer);
    memory_free(&s->memory);
    free(s->first);
    free(s->padded);
    free(s->incomplete);
    free(s->expert);
    free(s->sent.rows), free(s->sent.tokens);
    free(s->received.rows), free(s->received.tokens);
}
