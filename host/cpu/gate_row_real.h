/* One token's row of logits, in REAL: noise, selection, sums. Shared by forward and backward, so that both see the
 * same. */

/* What a row decides, and the scratch of a thread. */
typedef struct FN(gate_row) {
    REAL *std, *noisy, *first, *second; /* [E] free: probabilities; dclean and dstd */
    float *normal;                      /* [E rounded up to 64] eps of eq. 4 */
    int32_t wanted;                     /* K + 1 where smooth loads need the runner-up, else K */
    int32_t found;                      /* <= wanted: usable logits among the best */
    int32_t best[CUMOE_MAX_TOP_K + 1];  /* by descending noisy logit, ties to the lowest index */
    REAL value[CUMOE_MAX_TOP_K + 1];
    int64_t unusable; /* NaN or +Inf in the row */
} FN(gate_row_t);

/* noisy = clean + eps std, std = softplus(raw) + noise_epsilon (eq. 4). */
CUMOE_CPU_CLONES static void FN(add_noise)(const REAL *restrict clean, const REAL *restrict raw,
                                           const float *restrict normal, REAL epsilon, int64_t E,
                                           REAL *restrict std, REAL *restrict noisy)
{
    for (int64_t e = 0; e < E; e++) {
        const REAL s = FN(softplus)(raw[e]) + epsilon;
        std[e] = s < FLT_MIN ? FLT_MIN : s;
        noisy[e] = clean[e] + normal[e] * std[e];
    }
}

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

/* NaN and +Inf never win: they become -Inf, like what is masked. The number of them. */
CUMOE_CPU_CLONES static int64_t FN(drop_unusable)(REAL *restrict logits, int64_t E)
{
    int64_t unusable = 0;
    for (int64_t e = 0; e < E; e++) {
        const bool bad = !(logits[e] < (REAL)INFINITY);
        unusable += bad;
        logits[e] = bad ? -(REAL)INFINITY : logits[e];
    }
    return unusable;
}

/* The best logits by insertion into a short list; > keeps the lowest index first among equals, and -Inf out. */
static void FN(select_best)(const REAL *logits, int64_t E, FN(gate_row_t) * row)
{
    row->found = 0;
    REAL least = -(REAL)INFINITY;
    for (int64_t e = 0; e < E; e++) {
        if (!(logits[e] > least)) continue;
        int32_t place = row->found < row->wanted ? row->found++ : row->wanted - 1;
        for (; place > 0 && logits[e] > row->value[place - 1]; place--) {
            row->value[place] = row->value[place - 1];
            row->best[place] = row->best[place - 1];
        }
        row->value[place] = logits[e];
        row->best[place] = (int32_t)e;
        if (row->found == row->wanted) least = row->value[row->wanted - 1];
    }
}

/* Usable logits become sigmoid(c) + bias; bias may be NULL. */
CUMOE_CPU_CLONES static void FN(score)(REAL *restrict logits, const REAL *restrict bias, int64_t E)
{
    for (int64_t e = 0; e < E; e++) {
        const REAL score = FN(sigmoid)(logits[e]) + (bias ? bias[e] : 0);
        logits[e] = logits[e] > -(REAL)INFINITY ? score : logits[e];
    }
}

/* From a row of logits to the noisy logits (SIGMOID_TOPK: to the scores) and the best of them. quad is that of the
 * level's first expert in the name of the noise. */
static void FN(decide_row)(const cumoe_config_t *c, const cumoe_cpu_level_t *level, const cumoe_call_t *call,
                           int64_t t, uint32_t quad, const REAL *bias, const REAL *clean, FN(gate_row_t) * row)
{
    const int64_t E = level->experts;
    if (level->noise) {
        cumoe__cpu_row_normals(row->normal, E, call, c->noise_stream, t, level->noise_level, quad);
        FN(add_noise)(clean, clean + E, row->normal, (REAL)c->noise_epsilon, E, row->std, row->noisy);
    } else {
        memcpy(row->noisy, clean, (size_t)E * sizeof(REAL));
    }
    row->unusable = FN(drop_unusable)(row->noisy, E);
    if (c->gate == CUMOE_GATE_SIGMOID_TOPK) {
        FN(score)(row->noisy, bias, E);
        row->unusable += FN(drop_unusable)(row->noisy, E);
    }
    if (c->gate != CUMOE_GATE_SOFTMAX) FN(select_best)(row->noisy, E, row);
}

/* kth_excluding (eq. 9): a chosen expert must stay above the runner-up, the others above the last chosen one. */
static inline REAL FN(threshold_of_chosen)(const FN(gate_row_t) * row, int32_t K)
{
    return row->found > K ? row->value[K] : -(REAL)INFINITY;
}

static inline REAL FN(threshold_of_others)(const FN(gate_row_t) * row, int32_t K)
{
    return row->found >= K ? row->value[K - 1] : -(REAL)INFINITY;
}

/* z of eq. 9, kept where Phi is neither 0 nor 1 and products with it stay finite. */
static inline __attribute__((always_inline)) REAL FN(load_argument)(REAL clean, REAL threshold, REAL std)
{
    const REAL z = (clean - threshold) / std;
    return z < -40 ? -40 : z > 40 ? 40 : z;
}

static FN(gate_row_t)
    FN(thread_row)(const cumoe_cpu_level_t *level, const cumoe_cpu_gate_scratch_t *scratch, int thread)
{
    const int64_t E = scratch->row_experts;
    REAL *rows = (REAL *)scratch->rows + thread * 4 * E;
    return (FN(gate_row_t)){.std = rows,
                            .noisy = rows + E,
                            .first = rows + 2 * E,
                            .second = rows + 3 * E,
                            .normal = scratch->normals + thread * cumoe__cpu_normals_stride(E),
                            .wanted = level->top_k + (level->smooth ? 1 : 0)};
}
