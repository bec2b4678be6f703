/* Backward of gate_flat.c, in REAL. */

/* Weights that are shares of all experts: a logit moves every share. */
CUMOE_CPU_CLONES static void FN(shares_backward)(const FN(choices_t) * choices, const FN(spread_t) * spread,
                                                 int64_t E, REAL *restrict dclean)
{
    const REAL mean = FN(mean_gradient)(choices);
    for (int64_t j = 0; j < choices->count; j++)
        if (choices->expert[j] >= 0) dclean[choices->expert[j]] = FN(choice_gradient)(choices, j);
    for (int64_t e = 0; e < E; e++) dclean[e] = spread->power[e] / spread->sum * (dclean[e] - mean);
}

static void FN(sigmoids_backward)(const FN(choices_t) * choices, bool renormalize, const FN(spread_t) * spread,
                                  REAL *dclean)
{
    const REAL mean = renormalize ? FN(mean_gradient)(choices) : 0;
    for (int64_t j = 0; j < choices->count; j++) {
        const int32_t e = choices->expert[j];
        if (e < 0) continue;
        dclean[e] = choices->weight[j] * (1 - spread->share[e]) * (FN(choice_gradient)(choices, j) - mean);
    }
}

/* The Switch loss and the z-loss of one token. products [E] is scratch. */
CUMOE_CPU_CLONES static void FN(spread_backward)(const cumoe_config_t *c, const cumoe_cpu_batch_t *batch,
                                                 const FN(spread_t) * spread, const REAL *restrict dprobability,
                                                 REAL *restrict products, REAL *restrict dclean)
{
    const int64_t E = c->num_experts;
    const bool sigmoid = c->gate == CUMOE_GATE_SIGMOID_TOPK;
    if (batch->probabilities && spread->total > 0) {
        for (int64_t e = 0; e < E; e++) products[e] = spread->share[e] / spread->total * dprobability[e];
        const REAL mean = FN(sum_row)(products, E);
        for (int64_t e = 0; e < E; e++) {
            const REAL p = spread->share[e] / spread->total, slope = sigmoid ? p * (1 - spread->share[e]) : p;
            dclean[e] += slope * (dprobability[e] - mean);
        }
    }
    const REAL z = (REAL)batch->z * spread->lse;
    for (int64_t e = 0; z != 0 && e < E; e++) dclean[e] += z * (spread->power[e] / spread->sum);
}

/* SOFTMAX_TOPK and SIGMOID_TOPK. */
static void FN(backward_today)(const cumoe_config_t *c, const cumoe_gate_backward_args_t *args, int64_t t,
                               const cumoe_cpu_level_t *level, const FN(choices_t) * choices,
                               const cumoe_cpu_batch_t *batch, const REAL *dprobability, REAL *logits,
                               FN(gate_row_t) * row)
{
    const int64_t E = c->num_experts;
    REAL *dclean = row->std; /* free without noise */
    memset(dclean, 0, (size_t)E * sizeof(REAL));
    FN(decide_row)(c, level, args->routing.call, t, 0, args->weights->gate_bias, logits, row);
    if (row->found > 0) {
        const FN(spread_t) spread = FN(spread_row)(c, logits, row);
        if (c->gate == CUMOE_GATE_SIGMOID_TOPK)
            FN(sigmoids_backward)(choices, c->renormalize, &spread, dclean);
        else if (c->renormalize)
            FN(weights_backward)(choices, NULL, dclean, NULL);
        else
            FN(shares_backward)(choices, &spread, E, dclean);
        FN(spread_backward)(c, batch, &spread, dprobability, row->noisy, dclean);
    }
    memcpy(logits, dclean, (size_t)E * sizeof(REAL));
}

static void FN(backward_token)(const cumoe_config_t *c, const cumoe_gate_backward_args_t *args, int64_t t,
                               const cumoe_cpu_level_t *level, const cumoe_cpu_gate_scratch_t *scratch,
                               const cumoe_cpu_batch_t *batch, REAL *logits, FN(gate_row_t) * row)
{
    const cumoe_cpu_slots_t own = cumoe__cpu_slots_of(c, args->routing.token_slot, t);
    const FN(choices_t) choices = {.count = own.end - own.begin,
                                   .expert = args->routing.expert + own.begin,
                                   .weight = (const REAL *)args->routing.weight + own.begin,
                                   .dweight = (const REAL *)args->dweight + own.begin,
                                   .dimportance = scratch->dimportance};
    if (cumoe__has_shares(c->gate)) {
        FN(backward_today)(c, args, t, level, &choices, batch, scratch->dload, logits, row);
        return;
    }
    if (level->noise) FN(decide_row)(c, level, args->routing.call, t, 0, NULL, logits, row);
    FN(backward_row)(level, &choices, batch->load ? scratch->dload : NULL, logits, row);
}

static void FN(backward_block)(const cumoe_config_t *c, const cumoe_gate_backward_args_t *args,
                               const cumoe_cpu_level_t *level, const cumoe_cpu_batch_t *batch, int64_t first,
                               int64_t tokens, const cumoe_cpu_gate_scratch_t *scratch)
{
#pragma omp parallel num_threads(c->max_threads)
    {
        FN(gate_row_t) row = FN(thread_row)(level, scratch, omp_get_thread_num());
#pragma omp for schedule(static)
        for (int64_t i = 0; i < tokens; i++) {
            REAL *logits = (REAL *)scratch->logits + i * level->columns;
            if (cumoe__cpu_token_counts(args->token_mask, first + i))
                FN(backward_token)(c, args, first + i, level, scratch, batch, logits, &row);
            else
                memset(logits, 0, (size_t)level->columns * sizeof(REAL));
        }
    }
}
