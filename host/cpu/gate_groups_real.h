/* The secondary gates, in REAL. */

/* One row: the choices of a token inside a group that it chose, and their part of the sums. */
static void FN(forward_row)(const groups_call_t *call, int64_t r, FN(gate_row_t) * row, int64_t *sums,
                            int64_t *counters)
{
    const cumoe_config_t *c = call->config;
    const cumoe_cpu_groups_t *g = &call->scratch->groups;
    const int32_t K2 = call->level.top_k, B = call->level.experts, choice = g->row_choice[r];
    const int32_t group = call->routing->primary_group[choice];
    const double scale = 1 / cumoe__cpu_fixed_unit(c);
    const REAL *logits = (const REAL *)g->logits + r * call->level.columns;
    const REAL primary = ((const REAL *)call->routing->primary_weight)[choice];
    int32_t *expert = call->routing->expert + (int64_t)choice * K2;
    REAL *weight = (REAL *)call->routing->weight + (int64_t)choice * K2;

    FN(decide_row)
    (c, &call->level, call->routing->call, g->row_token[r], first_quad(&call->level, group), NULL, logits, row);
    FN(write_topk)(K2, row, expert, weight);
    if (call->level.smooth) FN(add_loads)(&call->level, logits, row, scale, sums + c->num_experts + group * B);
    for (int32_t j = 0; j < K2; j++) {
        if (expert[j] < 0) continue;
        expert[j] += group * B;
        weight[j] *= primary;
        sums[expert[j]] += (int64_t)((double)weight[j] * scale + 0.5);
    }
    counters[COUNT_NAN_LOGITS] += row->unusable;
}

/* Choices that no group has: nothing, or NaN where the primary gate had no usable logit. */
static void FN(clear_choice)(const groups_call_t *call, int64_t choice)
{
    const int32_t K2 = call->level.top_k;
    const REAL primary = ((const REAL *)call->routing->primary_weight)[choice];
    for (int64_t slot = choice * K2; slot < (choice + 1) * K2; slot++) {
        call->routing->expert[slot] = -1;
        ((REAL *)call->routing->weight)[slot] = isnan(primary) ? primary : 0;
    }
}

static bool FN(is_nan_token)(const groups_call_t *call, int64_t t)
{
    const int32_t K = call->config->top_k;
    for (int64_t slot = t * K; slot < (t + 1) * K; slot++)
        if (call->routing->expert[slot] < 0 && isnan(((const REAL *)call->routing->weight)[slot])) return true;
    return false;
}

static void FN(forward_rows)(const groups_call_t *call, int64_t num_tokens)
{
    const cumoe_config_t *c = call->config;
    const cumoe_cpu_groups_t *g = &call->scratch->groups;
    const int64_t rows = g->offset[c->num_groups], choices = num_tokens * c->top_k_groups;
    for (int thread = 0; thread < c->max_threads; thread++) /* of the primary gate alone so far */
        call->scratch->counters[thread * CUMOE_CPU_GATE_COUNTERS + COUNT_NAN_TOKENS] = 0;
#pragma omp parallel num_threads(c->max_threads)
    {
        const int thread = omp_get_thread_num();
        FN(gate_row_t) row = FN(thread_row)(&call->level, call->scratch, thread);
        int64_t *sums = call->scratch->sums + thread * 2 * (int64_t)c->num_experts;
        int64_t *counters = call->scratch->counters + thread * CUMOE_CPU_GATE_COUNTERS;
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) FN(forward_row)(call, r, &row, sums, counters);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < choices; i++)
            if (call->routing->primary_group[i] < 0) FN(clear_choice)(call, i);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < call->routing->call->live_tokens; t++)
            counters[COUNT_NAN_TOKENS] += FN(is_nan_token)(call, t);
    }
}

/* Gradients of the sums over the batch: those of importance, and of the loads of both levels (eq. 14). Whether the
 * load loss has any. */
static bool FN(batch_gradients)(const cumoe_gate_backward_args_t *args, const groups_call_t *call)
{
    const cumoe_config_t *c = call->config;
    const cumoe_cpu_gate_scratch_t *scratch = call->scratch;
    const double unit = cumoe__cpu_fixed_unit(c), upstream = FN(upstream)(c, args, CUMOE_LOSS_LOAD);
    const int32_t B = call->level.experts;
    double *d = scratch->numbers;
    FN(importance_gradient)(c, args, scratch);
    cumoe__cpu_loads(c, call->routing, d);
    FN(cv2_gradient)(d, c->num_experts, upstream);
    for (int32_t group = 0; group < c->num_groups; group++) {
        const double tokens = call->routing->primary_count[group];
        const double primary = (double)call->routing->primary_load[group] * unit;
        double sum = 0;
        for (int64_t e = (int64_t)group * B; e < (int64_t)(group + 1) * B; e++) {
            const double secondary = (double)call->routing->load[e] * unit;
            ((REAL *)scratch->dload)[e] = (REAL)(tokens > 0 ? d[e] * primary / tokens : 0);
            sum += tokens > 0 ? d[e] * secondary / tokens : 0;
        }
        ((REAL *)scratch->groups.dload)[group] = (REAL)sum;
    }
    return upstream != 0;
}

/* One row: gradients of its logits, and of the primary weight that all its weights have in them. */
static void FN(backward_group_row)(const groups_call_t *call, int64_t r, FN(gate_row_t) * row)
{
    const cumoe_cpu_groups_t *g = &call->scratch->groups;
    const cumoe_cpu_level_t *level = &call->level;
    const int32_t K2 = level->top_k, B = level->experts, choice = g->row_choice[r];
    const int32_t group = call->routing->primary_group[choice];
    const REAL *dload = (const REAL *)call->scratch->dload + (int64_t)group * B;
    const REAL *dimportance = (const REAL *)call->scratch->dimportance + (int64_t)group * B;
    const REAL *dweight = (const REAL *)call->dweight + (int64_t)choice * K2;
    const REAL primary = ((const REAL *)call->routing->primary_weight)[choice];
    REAL *logits = (REAL *)g->logits + r * level->columns;
    int32_t expert[CUMOE_MAX_TOP_K];
    REAL weight[CUMOE_MAX_TOP_K], d[CUMOE_MAX_TOP_K], dprimary = 0;

    FN(decide_row)
    (call->config, level, call->routing->call, g->row_token[r], first_quad(level, group), NULL, logits, row);
    FN(write_topk)(K2, row, expert, weight);
    for (int32_t j = 0; j < K2; j++) {
        if (expert[j] < 0) continue;
        d[j] = dweight[j] + dimportance[expert[j]];
        dprimary += weight[j] * d[j];
        d[j] *= primary;
    }
    ((REAL *)g->dprimary)[choice] = dprimary;
    const FN(choices_t) choices = {.count = K2, .expert = expert, .weight = weight, .dweight = d};
    FN(backward_row)(level, &choices, call->has_load ? dload : NULL, logits, row);
}

static void FN(backward_rows)(const groups_call_t *call)
{
    const cumoe_config_t *c = call->config;
    const cumoe_cpu_groups_t *g = &call->scratch->groups;
    const int64_t rows = g->offset[c->num_groups], choices = call->routing->call->live_tokens * c->top_k_groups;
#pragma omp parallel num_threads(c->max_threads)
    {
        FN(gate_row_t) row = FN(thread_row)(&call->level, call->scratch, omp_get_thread_num());
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) FN(backward_group_row)(call, r, &row);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < choices; i++)
            if (g->choice_row[i] < 0) ((REAL *)g->dprimary)[i] = 0;
    }
}

/* Columns column .. column + columns - 1 of dx_gate: the rows of a token are added in the order of its choices. */
static void FN(add_piece)(const groups_call_t *call, void *dx_gate, int64_t column, int64_t columns)
{
    const cumoe_config_t *c = call->config;
    const cumoe_cpu_groups_t *g = &call->scratch->groups;
    const int64_t K1 = c->top_k_groups;
#pragma omp parallel for schedule(static) num_threads(c->max_threads)
    for (int64_t t = 0; t < call->routing->call->live_tokens; t++) {
        REAL *to = (REAL *)dx_gate + t * c->hidden_size + column;
        for (int64_t choice = t * K1; choice < (t + 1) * K1; choice++) {
            if (g->choice_row[choice] < 0) continue;
            const REAL *from = (const REAL *)g->piece + g->choice_row[choice] * columns;
            for (int64_t i = 0; i < columns; i++) to[i] += from[i];
        }
    }
}
