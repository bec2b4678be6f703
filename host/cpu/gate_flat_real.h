/* Forward of gate_flat.c, in REAL. */

/* Softmax over all experts (eq. 2); expert e in slot e. */
CUMOE_CPU_CLONES static void FN(write_softmax)(const cumoe_config_t *c, const FN(gate_row_t) * row, int32_t *expert,
                                               REAL *weight)
{
    const int32_t E = c->num_experts;
    REAL most = -(REAL)INFINITY, sum = 0;
    for (int32_t e = 0; e < E; e++) most = row->noisy[e] > most ? row->noisy[e] : most;
    const bool none = most == -(REAL)INFINITY;
    for (int32_t e = 0; e < E; e++) {
        const bool usable = row->noisy[e] > -(REAL)INFINITY;
        expert[e] = usable ? e : -1;
        weight[e] = usable ? FN(exp)(row->noisy[e] - most) : 0;
        sum += weight[e];
    }
    for (int32_t e = 0; e < E; e++) weight[e] = none ? (row->unusable ? NAN : 0) : weight[e] / sum;
}

/* The K largest of softmax(c) as they are. */
static void FN(write_shares)(const cumoe_config_t *c, const REAL *clean, const FN(gate_row_t) * row,
                             int32_t *expert, REAL *weight)
{
    FN(write_topk)(c->top_k, row, expert, weight);
    if (row->found == 0) return;
    const REAL sum = FN(spread_row)(c, clean, row).sum;
    for (int32_t j = 0; j < row->found; j++) weight[j] = FN(exp)(row->value[j] - row->value[0]) / sum;
}

/* The K largest of sigmoid(c) + bias, without the bias. 1e-20: DeepSeek-V3's, for a sum that underflows. */
static void FN(write_sigmoids)(const cumoe_config_t *c, const REAL *clean, const FN(gate_row_t) * row,
                               int32_t *expert, REAL *weight)
{
    FN(write_topk)(c->top_k, row, expert, weight);
    REAL sum = 0;
    for (int32_t j = 0; j < row->found; j++) sum += weight[j] = FN(sigmoid)(clean[row->best[j]]);
    if (!c->renormalize) return;
    for (int32_t j = 0; j < row->found; j++) weight[j] /= sum + (REAL)1e-20;
}

static void FN(write_choices)(const cumoe_config_t *c, const REAL *clean, const FN(gate_row_t) * row,
                              int32_t *expert, REAL *weight)
{
    if (c->gate == CUMOE_GATE_SOFTMAX)
        FN(write_softmax)(c, row, expert, weight);
    else if (c->gate == CUMOE_GATE_SIGMOID_TOPK)
        FN(write_sigmoids)(c, clean, row, expert, weight);
    else if (c->gate == CUMOE_GATE_SOFTMAX_TOPK && !c->renormalize)
        FN(write_shares)(c, clean, row, expert, weight);
    else
        FN(write_topk)(c->top_k, row, expert, weight);
}

/* A row's part of the Switch loss, its probabilities; and of the z-loss, which is the result. */
CUMOE_CPU_CLONES static REAL FN(add_spread)(const cumoe_config_t *c, const REAL *clean, const FN(gate_row_t) * row,
                                            double scale, int64_t *probabilities)
{
    if (row->found == 0) return 0;
    const FN(spread_t) spread = FN(spread_row)(c, clean, row);
    for (int64_t e = 0; spread.total > 0 && e < c->num_experts; e++) spread.share[e] /= spread.total;
    FN(add_fixed)(probabilities, spread.share, c->num_experts, scale);
    return spread.lse * spread.lse;
}

/* One token: choices, weights, and its part of the sums. */
static void FN(forward_token)(const cumoe_config_t *c, const cumoe_gate_args_t *args,
                              const cumoe_cpu_level_t *level, int64_t t, const REAL *clean, FN(gate_row_t) * row,
                              REAL *square, int64_t *sums, int64_t *counters)
{
    const int64_t E = c->num_experts, K = c->top_k;
    const double scale = 1 / cumoe__cpu_fixed_unit(c);
    int32_t *expert = args->routing.expert + t * K;
    REAL *weight = (REAL *)args->routing.weight + t * K;

    FN(decide_row)(c, level, args->routing.call, t, 0, args->weights->gate_bias, clean, row);
    FN(write_choices)(c, clean, row, expert, weight);
    if (level->smooth) FN(add_loads)(level, clean, row, scale, sums + E);
    if (square) square[t] = FN(add_spread)(c, clean, row, scale, sums + E);
    bool routed = false;
    for (int64_t j = 0; j < K; j++) {
        if (expert[j] < 0) continue;
        routed = true;
        sums[expert[j]] += (int64_t)((double)weight[j] * scale + 0.5);
    }
    counters[COUNT_NAN_LOGITS] += row->unusable;
    counters[COUNT_NAN_TOKENS] += !routed && row->unusable;
}

static void FN(forward_block)(const cumoe_config_t *c, const cumoe_gate_args_t *args,
                              const cumoe_cpu_level_t *level, int64_t first, int64_t tokens,
                              const cumoe_cpu_gate_scratch_t *scratch)
{
    REAL *square = args->losses && cumoe__has_shares(c->gate) ? scratch->square : NULL;
#pragma omp parallel num_threads(c->max_threads)
    {
        const int thread = omp_get_thread_num();
        FN(gate_row_t) row = FN(thread_row)(level, scratch, thread);
        int64_t *sums = scratch->sums + thread * 2 * (int64_t)c->num_experts;
        int64_t *counters = scratch->counters + thread * CUMOE_CPU_GATE_COUNTERS;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < tokens; i++)
            if (cumoe__cpu_token_counts(args->token_mask, first + i)) FN(forward_token)
        (c, args, level, first + i, (const REAL *)scratch->logits + i * level->columns, &row, square, sums,
         counters);
    }
}

/* External choices: what is outside 0..E-1 is not routed, and its weight not looked at. */
static void FN(external_token)(const cumoe_config_t *c, const cumoe_gate_args_t *args, int64_t t, int64_t *counters)
{
    const int64_t K = c->top_k;
    for (int64_t slot = t * K; slot < (t + 1) * K; slot++) {
        const int64_t e = args->index_dtype == CUMOE_I64 ? ((const int64_t *)args->index)[slot]
                                                         : ((const int32_t *)args->index)[slot];
        const bool routed = e >= 0 && e < c->num_experts;
        counters[COUNT_BAD_INDICES] += e < -1 || e > c->num_experts;
        args->routing.expert[slot] = routed ? (int32_t)e : -1;
        REAL weight = 0;
        if (routed) FN(load)(args->index_weight, args->index_weight_dtype, slot, 1, &weight);
        ((REAL *)args->routing.weight)[slot] = weight;
    }
}
