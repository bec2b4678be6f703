/* Backward of one block of tokens, in REAL: the gradients of the logits take the place of the logits. */

/* sum of values, by sixteen interleaved sums in a fixed order: vector code without reordering by the compiler. */
CUMOE_CPU_CLONES static REAL FN(sum_row)(const REAL *values, int64_t n)
{
    REAL lane[16] = {0}, total = 0;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++) lane[j] += values[i + j];
    for (; i < n; i++) lane[i % 16] += values[i];
    for (int j = 0; j < 16; j++) total += lane[j];
    return total;
}

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
static void FN(load_backward)(const cumoe_config_t *c, const REAL *clean, const REAL *dload, FN(gate_row_t) * row,
                              REAL *dclean, REAL *dstd)
{
    const int32_t E = c->num_experts, K = c->top_k, chosen = row->found < K ? row->found : K;
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

/* Through the softmax of the chosen (eq. 3), importance included; noise takes its share of every chosen logit. */
static void FN(weights_backward)(const cumoe_gate_backward_args_t *args, int64_t t, int64_t K,
                                 const REAL *dimportance, const float *normal, REAL *dclean, REAL *dstd)
{
    const int32_t *expert = args->routing.expert + t * K;
    const REAL *weight = (const REAL *)args->routing.weight + t * K;
    const REAL *dweight = (const REAL *)args->dweight + t * K;
    REAL mean = 0;
    for (int64_t j = 0; j < K; j++)
        if (expert[j] >= 0) mean += weight[j] * (dweight[j] + dimportance[expert[j]]);
    for (int64_t j = 0; j < K; j++) {
        const int32_t e = expert[j];
        if (e < 0) continue;
        const REAL d = weight[j] * (dweight[j] + dimportance[e] - mean);
        dclean[e] += d;
        if (dstd) dstd[e] += d * normal[e];
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

static void FN(backward_token)(const cumoe_config_t *c, const cumoe_gate_backward_args_t *args, int64_t t,
                               const cumoe_cpu_gate_scratch_t *scratch, bool load, REAL *logits,
                               FN(gate_row_t) * row)
{
    const int64_t E = c->num_experts;
    const bool noise = args->training && cumoe__is_noisy(c->gate);
    REAL *dclean = row->first, *dstd = noise ? row->second : NULL;
    memset(dclean, 0, (size_t)E * sizeof(REAL));
    if (!noise) {
        FN(weights_backward)(args, t, c->top_k, scratch->dimportance, NULL, dclean, NULL);
        memcpy(logits, dclean, (size_t)E * sizeof(REAL));
        return;
    }
    memset(dstd, 0, (size_t)E * sizeof(REAL));
    FN(decide_row)(c, args->routing.call, true, t, logits, row);
    if (load) FN(load_backward)(c, logits, scratch->dload, row, dclean, dstd);
    FN(weights_backward)(args, t, c->top_k, scratch->dimportance, row->normal, dclean, dstd);
    FN(finish_noisy)(logits, row->std, dclean, dstd, E);
}

static void FN(backward_block)(const cumoe_context_t *context, const cumoe_gate_backward_args_t *args,
                               int64_t first, int64_t tokens, bool load, const cumoe_cpu_gate_scratch_t *scratch)
{
    const cumoe_config_t *c = &context->config;
    const int64_t columns = cumoe__cpu_gate_columns(c);
#pragma omp parallel num_threads(c->max_threads)
    {
        FN(gate_row_t)
        row = FN(thread_row)(c, scratch, omp_get_thread_num(), cumoe__cpu_smooth_load(c, args->training));
#pragma omp for schedule(static)
        for (int64_t i = 0; i < tokens; i++) {
            REAL *logits = (REAL *)scratch->logits + i * columns;
            if (cumoe__cpu_token_counts(args->token_mask, first + i))
                FN(backward_token)(c, args, first + i, scratch, load, logits, &row);
            else
                memset(logits, 0, (size_t)columns * sizeof(REAL));
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

/* Gradients of the sums over the batch. Whether the load loss has any. */
static bool FN(sum_gradients)(const cumoe_config_t *c, const cumoe_gate_backward_args_t *args,
                              const cumoe_cpu_gate_scratch_t *scratch)
{
    const double unit = 1.0 / (double)((int64_t)1 << CUMOE_FIXED_POINT_BITS(c->dtype));
    FN(cv2_gradient)
    (args->routing.importance, c->num_experts, unit, FN(upstream)(c, args, CUMOE_LOSS_IMPORTANCE),
     scratch->dimportance);
    const double upstream = FN(upstream)(c, args, CUMOE_LOSS_LOAD);
    FN(cv2_gradient)(args->routing.load, c->num_experts, unit, upstream, scratch->dload);
    return upstream != 0 && cumoe__cpu_smooth_load(c, args->training);
}
