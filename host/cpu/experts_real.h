/* Activations and biases of experts.c, in REAL: epilogues of the grouped products. A row of a block is widened to
 * COLUMNS, zeros behind its end, so that every loop has a constant length. */

/* The activation of a row, see host/activation.h; the compiler drops the slopes where nobody has a use for them. */
static inline __attribute__((always_inline)) void FN(act)(const cumoe_config_t *c, const REAL *restrict up,
                                                          const REAL *restrict glu, REAL *restrict hidden,
                                                          REAL *restrict by_up, REAL *restrict by_glu)
{
    const cumoe_swiglu_t swiglu = {c->swiglu_limit, c->swiglu_alpha, c->swiglu_offset};
#define ACTIVATE(name)                                                                                             \
    case CUMOE_ACTIVATION_##name:                                                                                  \
        for (int i = 0; i < COLUMNS; i++) {                                                                        \
            const FN(cumoe_activated_t) a = FN(cumoe__activate)(CUMOE_ACTIVATION_##name, up[i], glu[i], swiglu);   \
            hidden[i] = a.hidden;                                                                                  \
            by_up[i] = a.by_up;                                                                                    \
            by_glu[i] = a.by_glu;                                                                                  \
        }                                                                                                          \
        break;
    switch (c->activation) {
        ACTIVATE(RELU)
        ACTIVATE(RELU2)
        ACTIVATE(GELU)
        ACTIVATE(GELU_TANH)
        ACTIVATE(SILU)
        ACTIVATE(SWIGLU)
        ACTIVATE(GEGLU)
        ACTIVATE(GEGLU_TANH)
        ACTIVATE(SWIGLU_CLAMPED)
        ACTIVATE(IDENTITY)
    }
#undef ACTIVATE
}

/* The part of a bias [E, 1, width] that a block needs; zeros without one. */
static void FN(load_bias)(cumoe_matrix_t bias, const cumoe_cpu_block_t *b, REAL to[COLUMNS])
{
    for (int i = 0; i < COLUMNS; i++) to[i] = 0;
    for (int64_t i = 0; bias.data && i < b->cols; i++)
        FN(load)(bias.data, bias.dtype, b->group * bias.expert_stride + (b->col + i) * bias.col_stride, 1, to + i);
}

/* sums += bias */
CUMOE_CPU_CLONES static void FN(add_bias)(cumoe_matrix_t bias, const cumoe_cpu_block_t *b, int part)
{
    REAL value[COLUMNS];
    if (!bias.data) return;
    FN(load_bias)(bias, b, value);
    for (int64_t r = 0; r < b->rows; r++) {
        REAL *sum = (REAL *)b->sum[part] + r * b->sum_stride;
        for (int64_t i = 0; i < b->cols; i++) sum[i] += value[i];
    }
}

/* The part of a row that a block has. */
static inline __attribute__((always_inline)) void FN(put)(const epilogue_t *e, const REAL from[COLUMNS],
                                                          const int64_t cols, cumoe_dtype_t dtype, void *to,
                                                          int64_t at)
{
    _Alignas(CUMOE_STREAM_LINE) unsigned char line[COLUMNS * sizeof(REAL)];
    const size_t element = cumoe__dtype_size(dtype);
    if (!e->stream || cols < COLUMNS) {
        FN(store)(from, cols, dtype, to, at);
        return;
    }
    FN(store)(from, COLUMNS, dtype, line, 0);
    cumoe__stream_copy((char *)to + (size_t)at * element, line, COLUMNS * element);
}

/* z in the sums, hidden = act(z as it will be stored). cols is a constant for whole blocks. */
static inline __attribute__((always_inline)) void FN(activate_row)(const epilogue_t *e, const cumoe_cpu_block_t *b,
                                                                   int64_t r, const int64_t cols)
{
    const cumoe_config_t *c = e->config;
    REAL *sum = (REAL *)b->sum[0] + r * b->sum_stride;
    REAL up[COLUMNS] = {0}, glu[COLUMNS] = {0}, hidden[COLUMNS], by_up[COLUMNS], by_glu[COLUMNS];
    for (int64_t i = 0; i < cols; i++) up[i] = sum[i];
    FN(round)(up, COLUMNS, c->dtype);
    if (cumoe__is_glu(c->activation)) {
        const REAL *half = (const REAL *)b->sum[1] + r * b->sum_stride;
        for (int64_t i = 0; i < cols; i++) glu[i] = half[i];
        FN(round)(glu, COLUMNS, c->dtype);
    }
    FN(act)(c, up, glu, hidden, by_up, by_glu);
    if (e->hidden == e->z)
        for (int64_t i = 0; i < cols; i++) sum[i] = hidden[i];
    else
        FN(put)(e, hidden, cols, c->dtype, e->hidden, (b->row + r) * e->I + b->col);
}

CUMOE_CPU_CLONES static void FN(activate_block)(const epilogue_t *e, const cumoe_cpu_block_t *b)
{
    if (b->cols == COLUMNS)
        for (int64_t r = 0; r < b->rows; r++) FN(activate_row)(e, b, r, COLUMNS);
    else
        for (int64_t r = 0; r < b->rows; r++) FN(activate_row)(e, b, r, b->cols);
}

static void FN(up_epilogue)(const void *context, const cumoe_cpu_block_t *b)
{
    const epilogue_t *e = context;
    FN(add_bias)(e->bias[0], b, 0);
    FN(add_bias)(e->bias[1], b, 1);
    if (e->hidden) FN(activate_block)(e, b);
}

static void FN(down_epilogue)(const void *context, const cumoe_cpu_block_t *b)
{
    FN(add_bias)(((const epilogue_t *)context)->bias[0], b, 0);
}

typedef REAL FN(four_t) __attribute__((vector_size(4 * sizeof(REAL))));

/* The halves of COLUMNS values added, then the halves of those, down to one: an order that is fixed. */
static inline __attribute__((always_inline)) REAL FN(sum_pairwise)(const REAL values[COLUMNS])
{
    FN(four_t) sum[COLUMNS / 4];
    memcpy(sum, values, sizeof sum);
    for (int span = COLUMNS / 8; span > 0; span /= 2)
        for (int i = 0; i < span; i++) sum[i] += sum[i + span];
    return (sum[0][0] + sum[0][2]) + (sum[0][1] + sum[0][3]);
}

/* The sums are d = dy w_down; in their place comes dz = g d act'(z), its glu half goes to dz. scaled = g hidden,
 * for dw_down; partial = <d, hidden> over the columns of the block, added pairwise: an order that is fixed. A slope
 * of 0 lets nothing through, not even an infinite d. */
static inline __attribute__((always_inline)) void
FN(activate_backward_row)(const epilogue_t *e, const cumoe_cpu_block_t *b, int64_t r, const int64_t cols)
{
    const cumoe_config_t *c = e->config;
    const bool glu = cumoe__is_glu(c->activation);
    const int64_t row = b->row + r, at = row * e->z_width + b->col;
    const REAL g = ((const REAL *)e->weight)[e->row_slot[row]];
    REAL *sum = (REAL *)b->sum[0] + r * b->sum_stride;
    REAL d[COLUMNS] = {0}, up[COLUMNS] = {0}, half[COLUMNS] = {0};
    REAL hidden[COLUMNS], by_up[COLUMNS], by_glu[COLUMNS], product[COLUMNS];
    for (int64_t i = 0; i < cols; i++) d[i] = sum[i];
    FN(load)(e->z, c->dtype, at, cols, up);
    if (glu) FN(load)(e->z, c->dtype, at + e->I, cols, half);

    FN(act)(c, up, half, hidden, by_up, by_glu);
    FN(round)(hidden, COLUMNS, c->dtype);
    for (int i = 0; i < COLUMNS; i++) {
        product[i] = d[i] * hidden[i];
        hidden[i] *= g;
        d[i] *= g;
        by_up[i] = by_up[i] == 0 ? 0 : d[i] * by_up[i];
    }
    for (int64_t i = 0; i < cols; i++) sum[i] = by_up[i];
    if (glu) {
        for (int i = 0; i < COLUMNS; i++) by_glu[i] = by_glu[i] == 0 ? 0 : d[i] * by_glu[i];
        FN(put)(e, by_glu, cols, c->dtype, e->dz, at + e->I);
    }
    FN(put)(e, hidden, cols, cumoe__gate_dtype(c), e->scaled, row * e->I + b->col);
    ((REAL *)e->partial)[row * e->panels + b->col / COLUMNS] = FN(sum_pairwise)(product);
}

CUMOE_CPU_CLONES static void FN(activate_backward_block)(const epilogue_t *e, const cumoe_cpu_block_t *b)
{
    if (b->cols == COLUMNS)
        for (int64_t r = 0; r < b->rows; r++) FN(activate_backward_row)(e, b, r, COLUMNS);
    else
        for (int64_t r = 0; r < b->rows; r++) FN(activate_backward_row)(e, b, r, b->cols);
}

static void FN(down_backward_epilogue)(const void *context, const cumoe_cpu_block_t *b)
{
    FN(activate_backward_block)(context, b);
}

/* <dy of a token, b_down of its expert>: sixteen interleaved sums in a fixed order. */
CUMOE_CPU_CLONES static REAL FN(bias_product)(const void *dy, cumoe_dtype_t dtype, int64_t at, cumoe_matrix_t bias,
                                              int64_t expert, int64_t H)
{
    REAL lane[16] = {0}, total = 0;
    for (int64_t h = 0; h < H; h += 16) {
        REAL a[16] = {0}, b[16] = {0};
        const int64_t n = H - h < 16 ? H - h : 16;
        FN(load)(dy, dtype, at + h, n, a);
        FN(load)(bias.data, bias.dtype, expert * bias.expert_stride + h, n, b);
        for (int i = 0; i < 16; i++) lane[i] += a[i] * b[i];
    }
    for (int i = 0; i < 16; i++) total += lane[i];
    return total;
}

/* dweight of a slot: the parts of its row, in the order of columns, and the share of the bias; 0 without a row. */
static void FN(write_dweight)(const cumoe_config_t *c, const cumoe_down_backward_args_t *args, const epilogue_t *e)
{
    const cumoe_matrix_t bias = cumoe__bias_down(args->weights, c);
    REAL *dweight = args->dweight;
#pragma omp parallel for schedule(static) num_threads(c->max_threads)
    for (int64_t slot = 0; slot < cumoe__max_slots(c, args->num_tokens); slot++) {
        const int64_t row = args->rows.slot_row[slot];
        REAL sum = 0;
        for (int64_t p = 0; row >= 0 && p < e->panels; p++) sum += ((const REAL *)e->partial)[row * e->panels + p];
        if (row >= 0 && bias.data)
            sum += FN(bias_product)(args->dy, c->dtype, args->rows.row_token[row] * args->dy_stride, bias,
                                    expert_of_row(&args->rows, c->num_experts, row), c->hidden_size);
        dweight[slot] = sum;
    }
}

/* Columns first .. first + cols - 1 of one expert's bias gradient: the sum over its rows, in their order. */
CUMOE_CPU_CLONES static void FN(sum_columns)(const bias_sum_t *s, int64_t expert, int64_t first, int64_t cols)
{
    REAL sum[BIAS_COLUMNS] = {0}, value[BIAS_COLUMNS] = {0};
    const cumoe_matrix_t m = s->gradient;
    const int64_t to = expert * m.expert_stride + first * m.col_stride;
    const int32_t begin = s->rows->offset[expert], end = s->rows->offset[expert + 1];
    if (s->mode == CUMOE_GRADIENT_ADD && begin == end) return;
    if (s->mode == CUMOE_GRADIENT_ADD)
        for (int64_t i = 0; i < cols; i++) FN(load)(m.data, m.dtype, to + i * m.col_stride, 1, sum + i);
    for (int64_t row = begin; row < end; row++) {
        const int64_t from = s->of_tokens ? s->rows->row_token[row] : row;
        const REAL g = s->weight ? ((const REAL *)s->weight)[s->rows->row_slot[row]] : 1;
        FN(load)(s->data, s->dtype, from * s->stride + first, cols, value);
        for (int i = 0; i < BIAS_COLUMNS; i++) sum[i] += g * value[i];
    }
    for (int64_t i = 0; i < cols; i++) FN(store)(sum + i, 1, m.dtype, m.data, to + i * m.col_stride);
}
