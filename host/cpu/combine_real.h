/* One token of combine.c, in REAL. Choices are added in ascending order, one row after the other. */

CUMOE_CPU_CLONES static void FN(add_row)(REAL *restrict sum, const REAL *restrict row, REAL factor, int64_t H)
{
    for (int64_t h = 0; h < H; h++) sum[h] += factor * row[h];
}

/* y[t] = sum over j of weight[t, j] * output[row of (t, j)]; NaN for a token without a usable logit. */
static void FN(combine_token)(const cumoe_combine_args_t *args, int64_t t, int64_t K, int64_t H)
{
    const REAL *weight = (const REAL *)args->routing.weight + t * K;
    const int32_t *row = args->rows.slot_row + t * K;
    REAL *y = (REAL *)args->y + t * args->y_stride;
    const bool unusable = row[0] < 0 && isnan(weight[0]);
    for (int64_t h = 0; h < H; h++) y[h] = unusable ? weight[0] : 0;
    for (int64_t j = 0; j < K; j++)
        if (row[j] >= 0) FN(add_row)(y, (const REAL *)args->output + row[j] * H, weight[j], H);
}

/* dx[t] = dx_gate[t] + sum over j of drows[row of (t, j)]. */
static void FN(sum_token)(const cumoe_permute_backward_args_t *args, int64_t t, int64_t K, int64_t H)
{
    const REAL *dx_gate = args->dx_gate ? (const REAL *)args->dx_gate + t * H : NULL;
    const int32_t *row = args->rows.slot_row + t * K;
    REAL *dx = (REAL *)args->dx + t * args->dx_stride;
    for (int64_t h = 0; h < H; h++) dx[h] = dx_gate ? dx_gate[h] : 0;
    for (int64_t j = 0; j < K; j++)
        if (row[j] >= 0) FN(add_row)(dx, (const REAL *)args->drows + row[j] * H, 1, H);
}
