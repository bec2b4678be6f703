/* Backward of one block of tokens, in REAL: the gradients of the logits take the place of the logits. */

/* Load loss: z = (clean - threshold) / std, q = dload phi(z) / std. Each expert gets dclean = q and dstd = -q z. */
CUMOE_CPU_CLONES static void FN(load_gradients)(const REAL *restrict clean, const REAL *restrict noisy,
                                                const REAL *restrict std, const REAL *restrict dload,
                                                REAL threshold, int64_t E, REAL *restrict dclean,
                                                REAL *restrict dstd)
{
    for (int64_t e = 0; e < E; e++) {
        const REAL z = FN(load_argument)(clean[e], threshold, std[e]);
        const REAL q = dload[e] * FN(normal_density)(z) / std[e];
        const bool active = noisy[e] > -(REAL)INFINITY && threshold > -(REAL)INFINITY;
        dclean[e] = active ? q : 0;
        dstd[e] = active ? -q * z : 0;
    }
}

/* What left through a threshold comes back to the logit that is the threshold: clean + eps std of that expert. */
static void FN(pay_threshold)(const FN(gate_row_t) * row, int32_t place, REAL paid, REAL *dclean, REAL *dstd)
{
    if (place >= row->found) return;
    const int32_t e = row->best[place];
    dclean[e] -= paid;
    dstd[e] -= paid * row->normal[e];
}

/* The load loss of one token into dclean and dstd, thresholds differentiated. */
static void FN(load_backward)(const cumoe_cpu_level_t *level, const REAL *clean, const REAL *dload,
                              FN(gate_row_t) * row, REAL *dclean, REAL *dstd)
{
    const int32_t E = level->experts, K = level->top_k, chosen = row->found < K ? row->found : K;
    FN(load_gradients)(clean, row->noisy, row->std, dload, FN(threshold_of_others)(row, K), E, dclean, dstd);
    const REAL threshold = FN(threshold_of_chosen)(row, K);
    for (int32_t j = 0; j < chosen; j++) dclean[row->best[j]] = dstd[row->best[j]] = 0;
    const REAL paid_by_others = FN(sum_row)(dclean, E);
    REAL paid_by_chosen = 0;
    for (int32_t j = 0; j < chosen; j++) {
        const int32_t e = row->best[j];
        const REAL noisy = row->noisy[e], std = row->std[e];
        FN(load_gradients)(clean + e, &noisy, &std, dload + e, threshold, 1, dclean + e, dstd + e);
        paid_by_chosen += dclean[e];
    }
    FN(pay_threshold)(row, K - 1, paid_by_others, dclean, dstd);
    FN(pay_threshold)(row, K, paid_by_chosen, dclean, dstd);
}

/* The choices of a row, and the gradients of their weights: those of slots, and of sums over the batch. */
typedef struct FN(choices) {
    int64_t count;
    const int32_t *expert; /* [count] column of the row, -1 = none */
    const REAL *weight, *dweight;
    const REAL *dimportance; /* [columns], or NULL = 0 */
} FN(choices_t);

static inline REAL FN(choice_gradient)(const FN(choices_t) * choices, int64_t j)
{
    return choices->dweight[j] + (choices->dimportance ? choices->dimportance[choices->expert[j]] : 0);
}

/* sum over the choices of weight times gradient. */
static REAL FN(mean_gradient)(const FN(choices_t) * choices)
{
    REAL mean = 0;
    for (int64_t j = 0; j < choices->count; j++)
        if (choices->expert[j] >= 0) mean += choices->weight[j] * FN(choice_gradient)(choices, j);
    return mean;
}

/* Through the softmax of the chosen (eq. 3); noise takes its share of every chosen logit. */
static void FN(weights_backward)(const FN(choices_t) * choices, const float *normal, REAL *dclean, REAL *dstd)
{
    const REAL mean = FN(mean_gradient)(choices);
    for (int64_t j = 0; j < choices->count; j++) {
        const int32_t e = choices->expert[j];
        if (e < 0) continue;
        const REAL d = choices->weight[j] * (FN(choice_gradient)(choices, j) - mean);
        dclean[e] += d;
        if (dstd) dstd[e] += d * normal[e];
    }
}

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

/* std = softplus(raw) + epsilon, unless it was clamped; then both halves go where the logits were. */
CUMOE_CPU_CLONES static void FN(finish_noisy)(REAL *restrict logits, const REAL *restrict std,
                                              const REAL *restrict dclean, const REAL *restrict dstd, int64_t E)
{
    for (int64_t e = 0; e < E; e++) {
        const REAL slope = std[e] > FLT_MIN ? FN(sigmoid)(logits[E + e]) : 0;
        logits[E + e] = dstd[e] == 0 ? 0 : dstd[e] * slope; /* 0 * NaN: an expert with a raw NaN took no part */
        logits[e] = dclean[e];
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

/* A row of a level with noise, or of a flat gate without: the gradients of its logits take their place. The row has
 * been decided where there is noise. */
static void FN(backward_row)(const cumoe_cpu_level_t *level, const FN(choices_t) * choices, const REAL *dload,
                             REAL *logits, FN(gate_row_t) * row)
{
    const int64_t E = level->experts;
    REAL *dclean = row->first, *dstd = level->noise ? row->second : NULL;
    memset(dclean, 0, (size_t)E * sizeof(REAL));
    if (dstd) memset(dstd, 0, (size_t)E * sizeof(REAL));
    if (dload) FN(load_backward)(level, logits, dload, row, dclean, dstd);
    FN(weights_backward)(choices, row->normal, dclean, dstd);
    if (dstd)
        FN(finish_noisy)(logits, row->std, dclean, dstd, E);
    else
        memcpy(logits, dclean, (size_t)E * sizeof(REAL));
}

static void FN(backward_token)(const cumoe_config_t *c, const cumoe_gate_backward_args_t *args, int64_t t,
                               const cumoe_cpu_level_t *level, const cumoe_cpu_gate_scratch_t *scratch,
                               const cumoe_cpu_batch_t *batch, REAL *logits, FN(gate_row_t) * row)
{
    const int64_t slot = t * c->top_k;
    const FN(choices_t) choices = {.count = c->top_k,
                                   .expert = args->routing.expert + slot,
                                   .weight = (const REAL *)args->routing.weight + slot,
                                   .dweight = (const REAL *)args->dweight + slot,
                                   .dimportance = scratch->dimportance};
    if (cumoe__cpu_has_spread(c)) {
        FN(backward_today)(c, args, t, level, &choices, batch, scratch->dload, logits, row);
        return;
    }
    if (level->noise) FN(decide_row)(c, level, args->routing.call, t, 0, NULL, logits, row);
    FN(backward_row)(level, &choices, batch->load ? scratch->dload : NULL, logits, row);
}

static void FN(backward_block)(const cumoe_context_t *context, const cumoe_gate_backward_args_t *args,
                               int64_t first, int64_t tokens, const cumoe_cpu_batch_t *batch,
                               const cumoe_cpu_gate_scratch_t *scratch)
{
    const cumoe_config_t *c = &context->config;
    const cumoe_cpu_level_t level = cumoe__cpu_flat_level(c, args->training);
#pragma omp parallel num_threads(c->max_threads)
    {
        FN(gate_row_t) row = FN(thread_row)(c, &level, scratch, omp_get_thread_num());
#pragma omp for schedule(static)
        for (int64_t i = 0; i < tokens; i++) {
            REAL *logits = (REAL *)scratch->logits + i * level.columns;
            if (cumoe__cpu_token_counts(args->token_mask, first + i))
                FN(backward_token)(c, args, first + i, &level, scratch, batch, logits, &row);
            else
                memset(logits, 0, (size_t)level.columns * sizeof(REAL));
        }
    }
}

/* dCV^2 / dv_i = (2 n / S^2) ((v_i - mean) - mean CV^2), times the upstream gradient; 0 for a zero vector. */
static void FN(cv2_gradient)(const int64_t *sums, int64_t E, double unit, double upstream, REAL *gradient)
{
    double mean;
    const double cv2 = cumoe__cpu_cv2(sums, E, unit, &mean);
    const double factor = mean > 0 ? upstream * 2 / ((double)E * mean * mean) : 0;
    for (int64_t e = 0; e < E; e++) gradient[e] = (REAL)(factor * (((double)sums[e] * unit - mean) - mean * cv2));
}

/* Upstream gradient of a loss: the caller's, or the config's weight. */
static double FN(upstream)(const cumoe_config_t *c, const cumoe_gate_backward_args_t *args, cumoe_loss_t loss)
{
    return args->loss_gradient ? (double)((const REAL *)args->loss_gradient)[loss] : (double)c->loss_weight[loss];
}

/* Of SWITCH by the sum of an expert's probabilities: upstream E count / tokens^2. */
static void FN(switch_gradient)(const cumoe_config_t *c, const cumoe_routing_t *routing, double upstream,
                                double unit, REAL *gradient)
{
    const double tokens = (double)*routing->tokens, factor = tokens > 0 ? upstream * c->num_experts / tokens : 0;
    for (int64_t e = 0; e < c->num_experts; e++)
        gradient[e] = (REAL)(tokens > 0 ? factor * ((double)routing->load[e] * unit) / tokens : 0);
}

static cumoe_cpu_batch_t FN(sum_gradients)(const cumoe_config_t *c, const cumoe_gate_backward_args_t *args,
                                           const cumoe_cpu_level_t *level, const cumoe_cpu_gate_scratch_t *scratch)
{
    const double unit = 1.0 / (double)((int64_t)1 << CUMOE_FIXED_POINT_BITS(c->dtype));
    const cumoe_routing_t *routing = &args->routing;
    FN(cv2_gradient)
    (routing->importance, c->num_experts, unit, FN(upstream)(c, args, CUMOE_LOSS_IMPORTANCE), scratch->dimportance);
    if (cumoe__cpu_has_spread(c)) {
        const double upstream = FN(upstream)(c, args, CUMOE_LOSS_SWITCH);
        const double z = 2 * FN(upstream)(c, args, CUMOE_LOSS_Z);
        FN(switch_gradient)(c, routing, upstream, unit, scratch->dload);
        return (cumoe_cpu_batch_t){.probabilities = upstream != 0,
                                   .z = *routing->tokens > 0 ? z / (double)*routing->tokens : 0};
    }
    const double upstream = FN(upstream)(c, args, CUMOE_LOSS_LOAD);
    FN(cv2_gradient)(routing->load, c->num_experts, unit, upstream, scratch->dload);
    return (cumoe_cpu_batch_t){.load = upstream != 0 && level->smooth};
}
