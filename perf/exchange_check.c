/* Whether ranks give what one device gives: rank 0 runs the layer without ranks on the tokens of all, and compares
 * hashes. */
#include "exchange.h"

#include <stdlib.h>
#include <string.h>

/* What a rank's results are made into. Without complete tokens a hash is 0. */
typedef struct hashes {
    uint64_t y, dx, dw;
} hashes_t;

static uint64_t add_bytes(uint64_t hash, const void *data, size_t size)
{
    const unsigned char *bytes = data;
    for (size_t at = 0; at < size; at += sizeof(uint64_t)) {
        uint64_t word = 0;
        memcpy(&word, bytes + at, size - at < sizeof word ? size - at : sizeof word);
        hash = (hash ^ word) * 0x9e3779b97f4a7c15u;
        hash ^= hash >> 29;
    }
    return hash;
}

/* [T, H] of the device, from token FIRST on; those that lack a row are left out. */
static uint64_t hash_tokens(const share_t *s, const void *tokens, int64_t first, const unsigned char *incomplete)
{
    const size_t row = share_row_size(s), T = (size_t)s->subject->num_tokens;
    char *host = memory_download(&s->memory, (const char *)tokens + (size_t)first * row, T * row);
    uint64_t hash = 0;
    for (size_t t = 0; t < T; t++)
        if (!incomplete[t]) hash = add_bytes(hash, host + t * row, row);
    free(host);
    return hash;
}

/* Of the gradients of experts first .. first + count - 1, which cumoe_weights_create() has made: all contiguous. */
static uint64_t hash_gradients(const share_t *s, const cumoe_weights_t *w, int64_t first, int64_t count)
{
    const cumoe_config_t *c = &s->subject->config;
    const size_t H = (size_t)c->hidden_size, I = (size_t)c->intermediate_size, size = token_size(c);
    const struct {
        const void *array;
        size_t of_expert;
    } arrays[] = {{w->w_up, I * H}, {w->w_glu, I * H}, {w->w_down, H * I},
                  {w->b_up, I},     {w->b_glu, I},     {w->b_down, H}};
    uint64_t hash = 0;
    for (int i = 0; i < 6; i++) {
        if (!arrays[i].array) continue;
        const size_t bytes = arrays[i].of_expert * size;
        for (int64_t e = first; e < first + count; e++) { /* one at a time: there are many */
            void *host = memory_download(&s->memory, (const char *)arrays[i].array + (size_t)e * bytes, bytes);
            hash = add_bytes(hash, host, bytes);
            free(host);
        }
    }
    return hash;
}

/* Of rank R's tokens and experts, in a run that begins with token and expert so and so. */
static hashes_t hash_run(const share_t *s, const run_t *run, int32_t r, int64_t first_token, int64_t first_expert,
                         const unsigned char *incomplete, bool gradients)
{
    hashes_t hashes = {.y = hash_tokens(s, run->forward.y, first_token, incomplete)};
    if (!(s->subject->parts & OF_BACKWARD)) return hashes;
    hashes.dx = hash_tokens(s, run->backward.dx, first_token, incomplete);
    if (gradients) hashes.dw = hash_gradients(s, &run->gradients, first_expert, s->first[r + 1] - s->first[r]);
    return hashes;
}

/* The layer without ranks, if there is room for it. */
static bool run_whole(share_t *s, run_t *whole, memory_t *m, char unchecked[200])
{
    const subject_t *subject = s->subject;
    const int64_t T = subject->num_tokens * s->rank->count;
    cumoe_config_t config = subject->config;
    cumoe_cost_t cost = {.struct_size = sizeof cost};
    config.exchange_capacity = config.exchange_chunks = 0;
    config.max_threads = 0; /* the other ranks wait */
    size_t workspace_size, saved_size;
    if (T * config.top_k >= INT32_MAX || cumoe_config_cost(&config, T, 1, 1, &cost) != CUMOE_SUCCESS) {
        snprintf(unchecked, 200, "not checked: the layer without ranks does not take the tokens of all");
        return false;
    }
    const double there = device_memory(&s->rank->device), tokens = 4.0 * (double)T * (double)share_row_size(s);
    const double needed = (double)(cost.weights_size + cost.gradients_size + 2 * cost.saved_size) + tokens;
    if (needed > 0.9 * there) {
        snprintf(unchecked, 200, "not checked: the layer without ranks needs about %.1f GB, and %.1f are free",
                 1e-9 * needed, 1e-9 * there);
        return false;
    }
    run_create(whole, m, subject, &config, 0, T);
    if (!m->failed) perf_check(cumoe_layer_buffer_sizes(whole->layer, T, &workspace_size, &saved_size));
    if (!m->failed) run_buffers(whole, m, workspace_size, saved_size);
    if (m->failed) {
        snprintf(unchecked, 200, "not checked: the layer without ranks: %.140s", cumoe_last_error());
        return false;
    }
    perf_check(cumoe_layer_forward(whole->layer, &whole->forward, s->rank->device.stream));
    if (subject->parts & OF_BACKWARD)
        perf_check(cumoe_layer_backward(whole->layer, &whole->backward, s->rank->device.stream));
    return true;
}

/* What is not as it should be of rank R; NULL = all is well. */
static const char *compare(share_t *s, const run_t *whole, int32_t r, const hashes_t *theirs, bool gradients)
{
    const int64_t T = s->subject->num_tokens, K = s->subject->config.top_k;
    unsigned char *incomplete = malloc((size_t)T + 1);
    int64_t *counts = malloc(2 * (size_t)s->rank->count * sizeof *counts), dropped;
    int32_t *chosen =
        memory_download(&s->memory, whole->forward.chosen_expert + r * T * K, (size_t)(T * K) * sizeof *chosen);
    if (!incomplete || !counts) abort();
    traffic_t traffic = {.rows = counts, .tokens = counts + s->rank->count};
    rows_list(s, chosen, &traffic, &dropped, incomplete, NULL);
    const hashes_t ours = hash_run(s, whole, r, r * T, s->first[r], incomplete, gradients);
    free(chosen);
    free(counts);
    free(incomplete);
    return ours.y != theirs->y     ? "y"
           : ours.dx != theirs->dx ? "dx"
           : ours.dw != theirs->dw ? "gradients of experts"
                                   : NULL;
}

static bool compare_all(share_t *s, const hashes_t *theirs, bool gradients, char unchecked[200], char *why,
                        size_t why_size)
{
    run_t whole = {0};
    memory_t memory = {.device = &s->rank->device};
    const char *wrong = NULL;
    int32_t r = 0;
    if (run_whole(s, &whole, &memory, unchecked))
        for (; r < s->rank->count && !wrong; r++) wrong = compare(s, &whole, r, &theirs[r], gradients);
    if (wrong)
        snprintf(why, why_size, "wrong: %s of rank %d of %d has not the bits of the layer without ranks", wrong,
                 r - 1, s->rank->count);
    device_wait(&s->rank->device);
    run_destroy(&whole);
    memory_free(&memory);
    return !wrong;
}

bool share_check(share_t *s, char unchecked[200], char *why, size_t why_size)
{
    bool same = true;
    double dropped = (double)s->dropped;
    unchecked[0] = '\0';
    rank_max(s->rank, &dropped, 1);
    share_enqueue(s, RANKS_FORWARD);
    if (s->subject->parts & OF_BACKWARD) share_enqueue(s, RANKS_BACKWARD);
    perf_check(cumoe_ep_wait(s->rank->ep, s->rank->device.stream, 0));
    const hashes_t mine = hash_run(s, &s->layer, s->rank->number, 0, 0, s->incomplete, dropped == 0);
    hashes_t *all = malloc((size_t)s->rank->count * sizeof *all);
    if (!all) abort();
    rank_tell(s->rank, &mine, sizeof mine, all);
    if (s->rank->number == 0) same = compare_all(s, all, dropped == 0, unchecked, why, why_size);
    free(all);
    return rank_agree(s->rank, same, why, why_size);
}
