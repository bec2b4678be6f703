/* From a decided row to weights and loads, in REAL: flat gates, and both levels of the hierarchy. */

/* P(x, i) (eq. 9) for every expert, added to the loads. */
CUMOE_CPU_CLONES static void FN(all_probabilities)(const REAL *restrict clean, const REAL *restrict noisy,
                                                   const REAL *restrict std, REAL threshold, int64_t E,
                                                   REAL *restrict probability)
{
    if (threshold == -(REAL)INFINITY) { /* fewer than K others: certain */
        for (int64_t e = 0; e < E; e++) probability[e] = noisy[e] > -(REAL)INFINITY;
        return;
    }
    for (int64_t e = 0; e < E; e++) {
        const REAL p = FN(normal_cdf)(FN(load_argument)(clean[e], threshold, std[e]));
        probability[e] = noisy[e] > -(REAL)INFINITY ? p : 0;
    }
}

CUMOE_CPU_CLONES static void FN(add_fixed)(int64_t *restrict sums, const REAL *restrict values, int64_t n,
                                           double scale)
{
    for (int64_t i = 0; i < n; i++) sums[i] += (int64_t)((double)values[i] * scale + 0.5);
}

CUMOE_CPU_CLONES static void FN(add_loads)(const cumoe_cpu_level_t *level, const REAL *clean, FN(gate_row_t) * row,
                                           double scale, int64_t *loads)
{
    const int32_t K = level->top_k;
    REAL *p = row->first;
    FN(all_probabilities)(clean, row->noisy, row->std, FN(threshold_of_others)(row, K), level->experts, p);
    const REAL threshold = FN(threshold_of_chosen)(row, K);
    for (int32_t j = 0; j < K && j < row->found; j++) {
        const int32_t e = row->best[j];
        p[e] =
            threshold == -(REAL)INFINITY ? 1 : FN(normal_cdf)(FN(load_argument)(clean[e], threshold, row->std[e]));
    }
    FN(add_fixed)(loads, p, level->experts, scale);
}

/* Softmax over the chosen logits (eq. 3): weights of one row, in the order of slots. */
CUMOE_CPU_CLONES static void FN(write_topk)(int32_t K, const FN(gate_row_t) * row, int32_t *expert, REAL *weight)
{
    const int32_t chosen = row->found < K ? row->found : K;
    REAL sum = 0;
    for (int32_t j = 0; j < K; j++) {
        expert[j] = j < chosen ? row->best[j] : -1;
        weight[j] = j < chosen ? FN(exp)(row->value[j] - row->value[0]) : 0;
        sum += weight[j];
    }
    for (int32_t j = 0; j < chosen; j++) weight[j] /= sum;
    if (chosen == 0 && row->unusable)
        for (int32_t j = 0; j < K; j++) weight[j] = NAN;
}
