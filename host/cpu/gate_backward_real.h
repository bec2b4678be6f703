/* Backward of one block of tokens, in REAL: the gradients of the logits take the place of the logits. */

/* sum of values, by sixteen interleaved sums in a fixed order: vector code without reordering by the compiler. */
CUMOE_CPU_CLONES static REAL REAL_NAME(sum_row)(const REAL *values, int64_t n)
{
    REAL lane[16] = {0}, total = 0;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++) lane[j] += values[i + j];
    for (; i < n; i++) lane[i % 16] += values[i];
    for (int j = 0; j < 16; j++) total += lane[j];
    return total;
}

/* Load loss: with z = (clean - threshold) / std and q = dload phi(z) / std, each expert gets dclean = q, dstd = -q
 * z. */
CUMOE_CPU_CLONES static void REAL_NAME(load_gradients)(const REAL *restrict clean, const REAL *restrict noisy,
                                                       const REAL *restrict std, const REAL *restrict dload,
                                                       REAL threshold, int64_t E, REAL *restrict dclean,
                                                       REAL *restrict dstd)
{
    for (int64_t e = 0; e < E; e++) {
        const REAL z = REAL_NAME(load_argument)(clean[e], threshold, std[e]);
        const REAL q = dload[e] * FN(normal_density)(z) / std[e];
        const bool active = noisy[e] > -(REAL)INFINITY && threshold > -(REAL)INFINITY;
        dclean[e] = active ? q : 0;
        dstd[e] = active ? -q * z : 0;
    }
}

/* What left through a threshold comes back to the logit that is the threshold: clean + eps std of that expert. */
static void REAL_NAME(pay_threshold)(const REAL_NAME(gate_row_t) * row, int32_t place, REAL paid, REAL *dclean,
                                     REAL *dstd)
{
    if (place >= row->found) return;
    const int32_t e = row->best[place];
    dclean[e] -= paid;
    dstd[e] -= paid * row->normal[e];
}

/* The load loss of one token into dclean and dstd, thresholds differentiated. */
static void REAL_NAME(load_backward)(const cumoe_config_t *c, const REAL *clean, const REAL *dload,
                                     REAL_NAME(gate_row_t) * row, REAL *dclean, REAL *dstd)
{
    const int32_t E = c->num_experts, K = c->top_k, chosen = row->found < K ? row->found : K;
    REAL_NAME(load_gradients)
    (clean, row->noisy, row->std, dload, REAL_NAME(threshold_of_others)(row, K), E, dclean, dstd);
    const REAL threshold = REAL_NAME(threshold_of_chosen)(row, K);
    for (int32_t j = 0; j < chosen; j++) dclean[row->best[j]] = dstd[row->best[j]] = 0;
    const REAL paid_by_others = REAL_NAME(sum_row)(dclean, E);
    REAL paid_by_chosen = 0;
    for (int32_t j = 0; j < chosen; j++) {
        const int32_t e = row->best[j];
        const REAL noisy = row->noisy[e], std = row->std[e];
        REAL_NAME(load_gradients)(clean + e, &noisy, &std, dload + e, threshold, 1, dclean + e, dstd + e);
        paid_by_chosen += dclean[e];
    }
    REAL_NAME(pay_threshold)(row, K - 1, paid_by_others, dclean, dstd);
    REAL_NAME(pay_threshold)(row, K, paid_by_chosen, dclean, dstd);
}

/* Through the softmax of the chosen (eq. 3), importance included; noise takes its share of every chosen logit. */
static void REAL_NAME(weights_backward)(const cumoe_gate_backward_args_t *args, int64_t t, int64_t K,
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
CUMOE_CPU_CLONES static void REAL_NAME(finish_noisy)(REAL *restrict logits, const REAL *restrict std,
                                                     const REAL *restrict dclean, const REAL *restrict dstd,
                                                     int64_t E)
{
    for (int64_t e = 0; e < E; e++) {
        const REAL slope = std[e] > FLT_MIN ? FN(sigmoid)(logits[E + e]) : 0;
        logits[E + e] = dstd[e] == 0 ? 0 : dstd[e] * slope; /* a raw NaN of an expert that took no part stays out */
        logits[e] = dclean[e];
    }
}

static void REAL_NAME(backward_token)(const cumoe_config_t *c, const cumoe_gate_backward_args_t *args, int64_t t,
                                      const cumoe_cpu_gate_scratch_t *scratch, bool load, REAL *logits,
                                      REAL_NAME(gate_row_t) * row)
{
    const int64_t E = c->num_experts;
    const bool noise = args->training && cumoe__is_noisy(c->gate);
    REAL *dclean = row->free1, *dstd = noise ? row->free2 : NULL;
    memset(dclean, 0, (size_t)E * sizeof(REAL));
    if (!noise) {
        REAL_NAME(weights_backward)(args, t, c->top_k, scratch->dimportance, NULL, dclean, NULL);
        memcpy(logits, dclean, (size_t)E * sizeof(REAL));
        return;
    }
    memset(dstd, 0, (size_t)E * sizeof(REAL));
    REAL_NAME(decide_row)(c, args->routing.call, true, t, logits, row);
    if (load) REAL_NAME(load_backward)(c, logits, scratch->dload, row, dclean, dstd);
    REAL_NAME(weights_backward)(args, t, c->top_k, scratch->dimportance, row->normal, dclean, dstd);
    REAL_NAME(finish_noisy)(logits, row->std, dclean, dstd, E);
}

static void REAL_NAME(backward_block)(const cumoe_context_t *context, const cumoe_gate_backward_args_t *args,
                                      int64_t first, int64_t tokens, bool load,
                                      const cumoe_cpu_gate_scratch_t *scratch)
{
    const cumoe_config_t *c = &context->config;
    const int64_t columns = cumoe__cpu_gate_columns(c);
#pragma omp parallel num_threads(c->max_threads)
    {
        REAL_NAME(gate_row_t)
        row = REAL_NAME(thread_row)(c, scratch, omp_get_thread_num(), cumoe__cpu_smooth_load(c, args->training));
#pragma omp for schedule(static)
        for (int64_t i = 0; i < tokens; i++) {
            REAL *logits = (REAL *)scratch->logits + i * columns;
            if (cumoe__cpu_token_counts(args->token_mask, first + i))
                REAL_NAME(backward_token)(c, args, first + i, scratch, load, logits, &row);
            else
                memset(logits, 0, (size_t)columns * sizeof(REAL));
        }
    }
}

/* dCV^2 / dv_i = (2 n / S^2) ((v_i - mean) - mean CV^2), times the upstream gradient; 0 for a zero vector. */
static void REAL_NAME(cv2_gradient)(const int64_t *sums, int64_t E, double unit, double upstream, REAL *gradient)
{
    double mean;
    const double cv2 = cumoe__cpu_cv2(sums, E, unit, &mean);
    const double factor = mean > 0 ? upstream * 2 / ((double)E * mean * mean) : 0;
    for (int64_t e = 0; e < E; e++) gradient[e] = (REAL)(factor * (((double)sums[e] * unit - mean) - mean * cv2));
}

/* Upstream gradient of a loss: the caller's, or the config's weight. */
static double REAL_NAME(upstream)(const cumoe_config_t *c, const cumoe_gate_backward_args_t *args,
                                  cumoe_loss_t loss)
{
    return args->loss_gradient ? (double)((const REAL *)args->loss_gradient)[loss] : (double)c->loss_weight[loss];
}

/* Gradients of the sums over the batch. Whether the load loss has any. */
static bool REAL_NAME(sum_gradients)(const cumoe_config_t *c, const cumoe_gate_backward_args_t *args,
                                     const cumoe_cpu_gate_scratch_t *scratch)
{
    const double unit = 1.0 / (double)((int64_t)1 << CUMOE_FIXED_POINT_BITS(c->dtype));
    REAL_NAME(cv2_gradient)
    (args->routing.importance, c->num_experts, unit, REAL_NAME(upstream)(c, args, CUMOE_LOSS_IMPORTANCE),
     scratch->dimportance);
    const double upstream = REAL_NAME(upstream)(c, args, CUMOE_LOSS_LOAD);
    REAL_NAME(cv2_gradient)(args->routing.load, c->num_experts, unit, upstream, scratch->dload);
    return upstream != 0 && cumoe__cpu_smooth_load(c, args->training);
}
