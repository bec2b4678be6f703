/* Activations of experts.c, in REAL: epilogues of the grouped products. */

/* hidden = act(z) for one row of a block of columns. */
CUMOE_CPU_CLONES static void FN(relu_row)(const REAL *up, REAL *hidden, int64_t n)
{
    for (int64_t i = 0; i < n; i++) hidden[i] = up[i] > 0 ? up[i] : up[i] != up[i] ? up[i] : 0;
}

CUMOE_CPU_CLONES static void FN(swiglu_row)(const REAL *restrict up, const REAL *restrict glu,
                                            REAL *restrict hidden, int64_t n)
{
    for (int64_t i = 0; i < n; i++) hidden[i] = glu[i] * FN(sigmoid)(glu[i]) * up[i];
}

static void FN(activate)(const void *context, int64_t group, int64_t row, int64_t rows, int64_t col, int64_t cols)
{
    const epilogue_t *e = context;
    (void)group;
    for (int64_t r = row; r < row + rows; r++) {
        const REAL *up = (const REAL *)e->z + r * e->z_width + col;
        REAL *hidden = (REAL *)e->hidden + r * e->I + col;
        if (e->activation == CUMOE_ACTIVATION_SWIGLU)
            FN(swiglu_row)(up, up + e->I, hidden, cols);
        else
            FN(relu_row)(up, hidden, cols);
    }
}

/* One row of a block: d = dy w_down comes in through dup; out go dz = g d act'(z), scaled = g act(z), and
 * <d, act(z)>, added pairwise over the 32 columns of a block: an order that is fixed. */
CUMOE_CPU_CLONES static REAL FN(relu_backward_row)(const REAL *restrict up, REAL g, REAL *restrict dup,
                                                   REAL *restrict scaled, int64_t n)
{
    REAL product[CUMOE_CPU_GEMM_COLUMNS] = {0};
    for (int64_t i = 0; i < n; i++) {
        const REAL hidden = up[i] > 0 ? up[i] : up[i] != up[i] ? up[i] : 0;
        product[i] = dup[i] * hidden;
        scaled[i] = g * hidden;
        dup[i] = up[i] > 0 ? g * dup[i] : up[i] != up[i] ? up[i] : 0;
    }
    for (int half = CUMOE_CPU_GEMM_COLUMNS / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) product[i] += product[i + half];
    return product[0];
}

CUMOE_CPU_CLONES static REAL FN(swiglu_backward_row)(const REAL *restrict up, const REAL *restrict glu, REAL g,
                                                     REAL *restrict dup, REAL *restrict dglu, REAL *restrict scaled,
                                                     int64_t n)
{
    REAL product[CUMOE_CPU_GEMM_COLUMNS] = {0};
    for (int64_t i = 0; i < n; i++) {
        const REAL s = FN(sigmoid)(glu[i]), silu = glu[i] * s, d = dup[i];
        product[i] = d * (silu * up[i]);
        scaled[i] = g * (silu * up[i]);
        dup[i] = g * d * silu;
        dglu[i] = g * d * up[i] * (s + silu * (1 - s));
    }
    for (int half = CUMOE_CPU_GEMM_COLUMNS / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) product[i] += product[i + half];
    return product[0];
}

static void FN(activate_backward)(const void *context, int64_t group, int64_t row, int64_t rows, int64_t col,
                                  int64_t cols)
{
    const epilogue_t *e = context;
    (void)group;
    for (int64_t r = row; r < row + rows; r++) {
        const REAL *up = (const REAL *)e->z + r * e->z_width + col;
        const REAL g = ((const REAL *)e->weight)[e->row_slot[r]];
        REAL *dup = (REAL *)e->dz + r * e->z_width + col;
        REAL *scaled = (REAL *)e->scaled + r * e->I + col;
        REAL *partial = (REAL *)e->partial + r * e->panels + col / CUMOE_CPU_GEMM_COLUMNS;
        *partial = e->activation == CUMOE_ACTIVATION_SWIGLU
                       ? FN(swiglu_backward_row)(up, up + e->I, g, dup, dup + e->I, scaled, cols)
                       : FN(relu_backward_row)(up, g, dup, scaled, cols);
    }
}

/* dweight of a slot: the parts of its row, in the order of columns; 0 without a row. */
static void FN(write_dweight)(const cumoe_config_t *c, const cumoe_down_backward_args_t *args, const epilogue_t *e)
{
    REAL *dweight = args->dweight;
#pragma omp parallel for schedule(static) num_threads(c->max_threads)
    for (int64_t slot = 0; slot < args->num_tokens * c->top_k; slot++) {
        const int64_t row = args->rows.slot_row[slot];
        REAL sum = 0;
        for (int64_t p = 0; row >= 0 && p < e->panels; p++) sum += ((const REAL *)e->partial)[row * e->panels + p];
        dweight[slot] = sum;
    }
}
