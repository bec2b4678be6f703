/* One token of combine.c, in REAL. Choices are added in ascending order, one row after the other. cols is a
 * constant for whole pieces. */

/* A piece of columns of y[t] = sum over j of weight[t, j] * output[row of (t, j)]; NaN where a choice
 * had no usable logit. */
static inline __attribute__((always_inline)) void FN(combine_piece)(const cumoe_config_t *c,
                                                                    const cumoe_combine_args_t *args, int64_t t,
                                                                    int64_t first, const int64_t cols)
{
    const int64_t H = c->hidden_size;
    const cumoe_cpu_slots_t own = cumoe__cpu_slots_of(c, args->routing.token_slot, t);
    const REAL *weight = (const REAL *)args->routing.weight;
    const int32_t *row = args->rows.slot_row;
    REAL sum[PIECE] = {0}, output[PIECE] = {0};
    for (int64_t j = own.begin; j < own.end; j++) {
        if (row[j] < 0) {
            for (int i = 0; isnan(weight[j]) && i < PIECE; i++) sum[i] = weight[j];
            continue;
        }
        FN(load)(args->output, c->dtype, row[j] * H + first, cols, output);
        for (int i = 0; i < PIECE; i++) sum[i] += weight[j] * output[i];
    }
    FN(store)(sum, cols, c->dtype, args->y, t * args->y_stride + first);
}

/* A piece of columns of dx[t] = dx_gate[t] + sum over j of drows[row of (t, j)]. */
static inline __attribute__((always_inline)) void FN(sum_piece)(const cumoe_config_t *c,
                                                                const cumoe_permute_backward_args_t *args,
                                                                int64_t t, int64_t first, const int64_t cols)
{
    const int64_t H = c->hidden_size;
    const cumoe_cpu_slots_t own = cumoe__cpu_slots_of(c, args->routing.token_slot, t);
    const int32_t *row = args->rows.slot_row;
    REAL sum[PIECE] = {0}, drow[PIECE] = {0};
    for (int64_t i = 0; args->dx_gate && i < cols; i++) sum[i] = ((const REAL *)args->dx_gate)[t * H + first + i];
    for (int64_t j = own.begin; j < own.end; j++) {
        if (row[j] < 0) continue;
        FN(load)(args->drows, c->dtype, row[j] * H + first, cols, drow);
        for (int i = 0; i < PIECE; i++) sum[i] += drow[i];
    }
    FN(store)(sum, cols, c->dtype, args->dx, t * args->dx_stride + first);
}

CUMOE_CPU_CLONES static void FN(combine_token)(const cumoe_config_t *c, const cumoe_combine_args_t *args, int64_t t)
{
    int64_t first = 0;
    for (; first + PIECE <= c->hidden_size; first += PIECE) FN(combine_piece)(c, args, t, first, PIECE);
    if (first < c->hidden_size) FN(combine_piece)(c, args, t, first, c->hidden_size - first);
}

CUMOE_CPU_CLONES static void FN(sum_token)(const cumoe_config_t *c, const cumoe_permute_backward_args_t *args,
                                           int64_t t)
{
    int64_t first = 0;
    for (; first + PIECE <= c->hidden_size; first += PIECE) FN(sum_piece)(c, args, t, first, PIECE);
    if (first < c->hidden_size) FN(sum_piece)(c, args, t, first, c->hidden_size - first);
}
