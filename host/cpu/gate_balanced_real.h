/* BALANCED, in REAL. */

static inline REAL *FN(column)(const balanced_call_t *call, int64_t e)
{
    return (REAL *)call->scratch->gates + e * call->tokens;
}

static inline bool FN(is_taken)(const balanced_call_t *call, int64_t e, int64_t t)
{
    const REAL g = FN(column)(call, e)[t], cut = ((const REAL *)call->scratch->cut)[e], least = (REAL)call->least;
    if (!(g >= 0)) return false;
    if (!(g > cut || (g == cut && t <= call->scratch->last[e]))) return false;
    return g > least || (g == least && t * call->config->num_experts + e <= call->last_of_all);
}

/* softmax(c) of a token, into the columns. The number of logits that were NaN or +Inf. */
static int64_t FN(softmax_token)(const balanced_call_t *call, const cumoe_cpu_level_t *level, int64_t t,
                                 const REAL *clean, FN(gate_row_t) * row)
{
    const int64_t E = call->config->num_experts;
    REAL *g = row->first, sum = 1;
    row->found = 0, row->unusable = 0;
    if (cumoe__cpu_token_counts(call->args->token_mask, t))
        FN(decide_row)(call->config, level, call->args->routing.call, t, 0, NULL, clean, row);
    if (row->found > 0) {
        for (int64_t e = 0; e < E; e++)
            g[e] = row->noisy[e] > -(REAL)INFINITY ? FN(exp)(row->noisy[e] - row->value[0]) : 0;
        sum = FN(sum_row)(g, E);
    }
    for (int64_t e = 0; e < E; e++)
        FN(column)(call, e)[t] = row->found > 0 && row->noisy[e] > -(REAL)INFINITY ? g[e] / sum : -1;
    call->scratch->is_nan[t] = row->found == 0 && row->unusable > 0;
    return row->unusable;
}

static void FN(softmax_block)(const balanced_call_t *call, const cumoe_cpu_level_t *level, int64_t first,
                              int64_t tokens)
{
#pragma omp parallel num_threads(call->config->max_threads)
    {
        FN(gate_row_t) row = FN(thread_row)(level, call->scratch, omp_get_thread_num());
        int64_t *counters = call->scratch->counters + omp_get_thread_num() * CUMOE_CPU_GATE_COUNTERS;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < tokens; i++) {
            const REAL *clean = (const REAL *)call->scratch->logits + i * level->columns;
            counters[COUNT_NAN_LOGITS] += FN(softmax_token)(call, level, first + i, clean, &row);
            counters[COUNT_NAN_TOKENS] += call->scratch->is_nan[first + i];
        }
    }
}

/* Gates are not negative: their bits are in their order. */
static inline uint64_t FN(key)(REAL g)
{
    uint64_t bits = 0;
    memcpy(&bits, &g, sizeof g);
    return bits;
}

/* A gate, and how many of those that are equal to it are among the largest. */
typedef struct FN(selected) {
    REAL value;
    int64_t equal;
} FN(selected_t);

/* The wanted-th largest gate of some columns, by radix; there are as many. of_candidates: of those that are taken
 * so far. */

static FN(selected_t) FN(select_largest)(const balanced_call_t *call, int64_t first_expert, int64_t experts,
                                         int64_t wanted, bool of_candidates)
{
    const int64_t live = call->args->routing.call->live_tokens;
    uint64_t prefix = 0, mask = 0;
    for (int shift = 8 * (int)sizeof(REAL) - 8; shift >= 0; shift -= 8) {
        int64_t count[256] = {0};
        for (int64_t e = first_expert; e < first_expert + experts; e++) {
            const REAL *g = FN(column)(call, e);
            for (int64_t t = 0; t < live; t++)
                if (g[t] >= 0 && (FN(key)(g[t]) & mask) == prefix && (!of_candidates || FN(is_taken)(call, e, t)))
                    count[FN(key)(g[t]) >> shift & 255]++;
        }
        int digit = 255;
        for (; count[digit] < wanted; digit--) wanted -= count[digit];
        prefix |= (uint64_t)digit << shift;
        mask |= (uint64_t)255 << shift;
    }
    FN(selected_t) selected = {.equal = wanted};
    memcpy(&selected.value, &prefix, sizeof selected.value);
    return selected;
}

/* Training: the m tokens with the largest gates. cut, last and batch_threshold of one expert. */
static void FN(cut_column)(const balanced_call_t *call, int64_t e, int64_t m)
{
    const int64_t live = call->args->routing.call->live_tokens;
    const REAL *g = FN(column)(call, e);
    REAL *cut = (REAL *)call->scratch->cut + e;
    int32_t *last = call->scratch->last + e;
    int64_t candidates = 0;
    for (int64_t t = 0; t < live; t++) candidates += g[t] >= 0;
    const int64_t wanted = m < candidates ? m : candidates;
    *cut = (REAL)INFINITY;
    *last = -1;
    if (wanted > 0) {
        const FN(selected_t) selected = FN(select_largest)(call, e, 1, wanted, false);
        int64_t equal = selected.equal, t = 0;
        for (;; t++)
            if (g[t] == selected.value && --equal == 0) break;
        *cut = selected.value;
        *last = (int32_t)t;
    }
    if (call->args->batch_threshold) ((REAL *)call->args->batch_threshold)[e] = wanted > 0 ? *cut : 0;
}

/* One expert's part of L_batchwise (eq. 20): the gates on which the two masks differ. Fixed point, so that the
 * order is free. */
static double FN(threshold_loss)(const balanced_call_t *call, int64_t e)
{
    const double unit = cumoe__cpu_fixed_unit(call->config);
    const REAL *g = FN(column)(call, e), threshold = ((const REAL *)call->args->weights->thresholds)[e];
    int64_t sum = 0;
    int32_t excess = 0;
    for (int64_t t = 0; t < call->args->routing.call->live_tokens; t++) {
        const int difference = (g[t] >= 0 && g[t] > threshold) - FN(is_taken)(call, e, t);
        excess += difference;
        sum += difference * (int64_t)((double)g[t] / unit + 0.5);
    }
    call->args->routing.excess[e] = excess;
    return (double)sum * unit - (excess ? (double)threshold * excess : 0);
}

static double FN(take_largest)(const balanced_call_t *call, int64_t m)
{
    const cumoe_config_t *c = call->config;
    double *loss = call->scratch->numbers, sum = 0;
#pragma omp parallel for schedule(dynamic, 1) num_threads(c->max_threads)
    for (int64_t e = 0; e < c->num_experts; e++) {
        FN(cut_column)(call, e, m);
        loss[e] = FN(threshold_loss)(call, e);
    }
    for (int64_t e = 0; e < c->num_experts; e++) sum += loss[e];
    return sum;
}

/* Inference: what is above the thresholds, the largest of it if there is more than fits. */
static void FN(take_above)(balanced_call_t *call, int64_t most)
{
    const cumoe_config_t *c = call->config;
    const int64_t live = call->args->routing.call->live_tokens;
    int64_t candidates = 0;
#pragma omp parallel for schedule(static) num_threads(c->max_threads) reduction(+ : candidates)
    for (int64_t e = 0; e < c->num_experts; e++) {
        ((REAL *)call->scratch->cut)[e] = ((const REAL *)call->args->weights->thresholds)[e];
        call->scratch->last[e] = -1;
        call->args->routing.excess[e] = 0;
        for (int64_t t = 0; t < live; t++) candidates += FN(is_taken)(call, e, t);
    }
    if (candidates <= most) return;
    const FN(selected_t) selected = FN(select_largest)(call, 0, c->num_experts, most, true);
    int64_t equal = selected.equal, at = 0;
    for (;; at++) {
        const int64_t e = at % c->num_experts, t = at / c->num_experts;
        if (FN(is_taken)(call, e, t) && FN(column)(call, e)[t] == selected.value && --equal == 0) break;
    }
    call->least = (double)selected.value;
    call->last_of_all = at;
    call->dropped_rows = candidates - most;
}

/* Slots of up to TOKENS tokens, counted behind each token. */
static void FN(count_tokens)(const balanced_call_t *call, int64_t first, int64_t tokens)
{
    int32_t *count = call->args->routing.token_slot + first + 1;
    for (int64_t e = 0; e < call->config->num_experts; e++)
        for (int64_t i = 0; i < tokens; i++) count[i] += FN(is_taken)(call, e, first + i);
    for (int64_t i = 0; i < tokens; i++) count[i] += call->scratch->is_nan[first + i];
}

/* Experts and gates of the same tokens, in their slots. */
static void FN(place_tokens)(const balanced_call_t *call, int64_t first, int64_t tokens)
{
    const cumoe_routing_t *r = &call->args->routing;
    int32_t next[TOKENS];
    memcpy(next, r->token_slot + first, (size_t)tokens * sizeof *next);
    for (int64_t e = 0; e < call->config->num_experts; e++)
        for (int64_t i = 0; i < tokens; i++) {
            if (!FN(is_taken)(call, e, first + i)) continue;
            r->expert[next[i]] = (int32_t)e;
            ((REAL *)r->weight)[next[i]++] = FN(column)(call, e)[first + i];
        }
}

/* Gates become weights, their share of the sum; and what hangs on a token's slots. */
static void FN(finish_token)(const balanced_call_t *call, int64_t t, int64_t *importance)
{
    const cumoe_routing_t *r = &call->args->routing;
    const double scale = 1 / cumoe__cpu_fixed_unit(call->config);
    REAL *weight = r->weight, sum = 0;
    for (int32_t slot = r->token_slot[t]; slot < r->token_slot[t + 1]; slot++) {
        r->slot_token[slot] = (int32_t)t;
        if (call->scratch->is_nan[t]) {
            r->expert[slot] = -1;
            weight[slot] = NAN;
        }
        sum += weight[slot];
    }
    for (int32_t slot = r->token_slot[t]; slot < r->token_slot[t + 1]; slot++) {
        if (r->expert[slot] < 0) continue;
        weight[slot] = sum > 0 ? weight[slot] / sum : 0;
        importance[r->expert[slot]] += (int64_t)((double)weight[slot] * scale + 0.5);
    }
}

static void FN(write_slots)(const balanced_call_t *call)
{
    const cumoe_config_t *c = call->config;
    const cumoe_routing_t *r = &call->args->routing;
    const int64_t live = r->call->live_tokens, T = call->args->num_tokens;

    /* Count, sum up, write: in blocks of tokens, as the gates stand in columns. */
    memset(r->token_slot, 0, (size_t)(T + 1) * sizeof *r->token_slot);
#pragma omp parallel for schedule(static) num_threads(c->max_threads)
    for (int64_t first = 0; first < live; first += TOKENS) {
        const int64_t tokens = live - first < TOKENS ? live - first : TOKENS;
        FN(count_tokens)(call, first, tokens);
    }
    for (int64_t t = 0; t < T; t++) r->token_slot[t + 1] += r->token_slot[t];
    for (int64_t slot = r->token_slot[T]; slot < cumoe__max_slots(c, T); slot++) { /* not in use */
        r->expert[slot] = -1;
        ((REAL *)r->weight)[slot] = 0;
    }
#pragma omp parallel num_threads(c->max_threads)
    {
        int64_t *importance = call->scratch->sums + omp_get_thread_num() * 2 * (int64_t)c->num_experts;
#pragma omp for schedule(static)
        for (int64_t first = 0; first < live; first += TOKENS) {
            const int64_t tokens = live - first < TOKENS ? live - first : TOKENS;
            FN(place_tokens)(call, first, tokens);
            for (int64_t t = first; t < first + tokens; t++) FN(finish_token)(call, t, importance);
        }
    }
}
