/* Backward of one row, in REAL: the gradients of the logits take the place of the logits. */

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
