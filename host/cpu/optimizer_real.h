/* The passes of optimizer.c over one array, in REAL. */

/* The values of a tile: row i begins at data + i * stride. */
typedef struct FN(view) {
    REAL *data;
    int64_t stride;
} FN(view_t);

ALWAYS_INLINE void FN(load_walk)(const cumoe_matrix_t *m, const walk_t w, REAL *restrict buffer)
{
    const uint16_t *half = (const uint16_t *)m->data + w.first;
    const REAL *real = (const REAL *)m->data + w.first;
    for (int64_t o = 0; o < w.outer; o++) {
        REAL *restrict to = buffer + o * w.buffer_outer;
        const int64_t from = o * w.outer_stride;
        if (w.buffer_inner != 1) prefetch_run(m, w, o + AHEAD);
        if (m->dtype == CUMOE_BF16)
            for (int64_t i = 0; i < w.inner; i++)
                to[i * w.buffer_inner] = bf16_to_f32(half[from + i * w.inner_stride]);
        else if (m->dtype == CUMOE_F16)
            for (int64_t i = 0; i < w.inner; i++)
                to[i * w.buffer_inner] = f16_to_f32(half[from + i * w.inner_stride]);
        else
            for (int64_t i = 0; i < w.inner; i++) to[i * w.buffer_inner] = real[from + i * w.inner_stride];
    }
}

ALWAYS_INLINE void FN(load_tile)(const cumoe_matrix_t *m, walk_t w, REAL *restrict buffer)
{
    if (w.inner_stride == 1 && w.buffer_inner == 1)
        FN(load_walk)(m, straight(w), buffer);
    else
        FN(load_walk)(m, w, buffer);
}

/* Where the values stand if they stand there as REAL, else in buffer. */
ALWAYS_INLINE FN(view_t) FN(view_of)(const cumoe_matrix_t *m, block_t tile, REAL *buffer)
{
    if (in_place(m, sizeof(REAL))) return (FN(view_t)){(REAL *)m->data + element_at(m, tile), m->row_stride};
    FN(load_tile)(m, walk_of(m, tile, tile.cols), buffer);
    return (FN(view_t)){buffer, tile.cols};
}

/* What an update works on: the master, or the values themselves. */
ALWAYS_INLINE FN(view_t) FN(view_of_value)(const cumoe_parameter_t *p, block_t tile, REAL *buffer)
{
    if (p->master) return (FN(view_t)){(REAL *)p->master + state_at(p, tile), p->cols};
    return FN(view_of)(&p->value, tile, buffer);
}

ALWAYS_INLINE void FN(store_walk)(const cumoe_matrix_t *m, const walk_t w, const REAL *restrict buffer)
{
    uint16_t *half = (uint16_t *)m->data + w.first;
    REAL *real = (REAL *)m->data + w.first;
    for (int64_t o = 0; o < w.outer; o++) {
        const REAL *restrict values = buffer + o * w.buffer_outer;
        const int64_t to = o * w.outer_stride;
        if (m->dtype == CUMOE_BF16)
            for (int64_t i = 0; i < w.inner; i++)
                half[to + i * w.inner_stride] = f32_to_bf16((float)values[i * w.buffer_inner]);
        else if (m->dtype == CUMOE_F16)
            for (int64_t i = 0; i < w.inner; i++)
                half[to + i * w.inner_stride] = f32_to_f16((float)values[i * w.buffer_inner]);
        else
            for (int64_t i = 0; i < w.inner; i++) real[to + i * w.inner_stride] = values[i * w.buffer_inner];
    }
}

/* The way back, if the update was not in place. */
ALWAYS_INLINE void FN(store_tile)(const cumoe_matrix_t *m, block_t tile, FN(view_t) from)
{
    if (in_place(m, sizeof(REAL))) return;
    const walk_t w = walk_of(m, tile, from.stride);
    if (w.inner_stride == 1 && w.buffer_inner == 1)
        FN(store_walk)(m, straight(w), from.data);
    else
        FN(store_walk)(m, w, from.data);
}

ALWAYS_INLINE void FN(adam_row)(const step_t *s, int64_t n, const REAL *restrict gradient, REAL *restrict value,
                                REAL *restrict moment1, REAL *restrict moment2)
{
    const REAL scale = (REAL)s->gradient_scale, beta1 = (REAL)s->beta1, rest1 = (REAL)s->rest1;
    const REAL beta2 = (REAL)s->beta2, rest2 = (REAL)s->rest2, rate = (REAL)s->rate, root = (REAL)s->root;
    const REAL epsilon = (REAL)s->epsilon, decay = (REAL)s->decay;
    for (int64_t j = 0; j < n; j++) {
        const REAL g = scale * gradient[j];
        const REAL m = beta1 * moment1[j] + rest1 * g, v = beta2 * moment2[j] + rest2 * (g * g);
        moment1[j] = m;
        moment2[j] = v;
        value[j] -= rate * m / (FN(sqrt)(v) * root + epsilon) + decay * value[j];
    }
}

ALWAYS_INLINE void FN(adam_part)(const cumoe_parameter_t *p, const step_t *s, block_t part)
{
    REAL gradients[BUFFER], values[BUFFER];
    const FN(view_t) gradient = FN(view_of)(&p->gradient, part, gradients);
    const FN(view_t) value = FN(view_of_value)(p, part, values);
    REAL *moment1 = (REAL *)p->moment1 + state_at(p, part), *moment2 = (REAL *)p->moment2 + state_at(p, part);
    for (int64_t i = 0; i < part.rows; i++) {
        const REAL *gradient_row = gradient.data + i * gradient.stride;
        REAL *value_row = value.data + i * value.stride;
        FN(adam_row)(s, part.cols, gradient_row, value_row, moment1 + i * p->cols, moment2 + i * p->cols);
    }
    FN(store_tile)(&p->value, part, value);
}

CUMOE_CPU_CLONES static void FN(adam_tile)(const cumoe_parameter_t *p, const step_t *s, block_t tile)
{
    const shape_t shape = shape_of(p, sizeof(REAL));
    for (int64_t row = 0; row < tile.rows; row += shape.rows)
        for (int64_t col = 0; col < tile.cols; col += shape.cols)
            FN(adam_part)(p, s, part_of(tile, row, shape.rows, col, shape.cols));
}

/* The squares of a row are added to col, and lane by lane to lane: vector code in one order. */
ALWAYS_INLINE void FN(add_squares)(const REAL *restrict gradient, int64_t n, REAL scale, REAL *restrict lane,
                                   REAL *restrict col)
{
    REAL sum[LANES];
    for (int l = 0; l < LANES; l++) sum[l] = lane[l];
    int64_t first = 0;
    for (; first + LANES <= n; first += LANES)
        for (int l = 0; l < LANES; l++) {
            const REAL g = scale * gradient[first + l];
            sum[l] += g * g;
            col[first + l] += g * g;
        }
    for (int l = 0; first + l < n; l++) {
        const REAL g = scale * gradient[first + l];
        sum[l] += g * g;
        col[first + l] += g * g;
    }
    for (int l = 0; l < LANES; l++) lane[l] = sum[l];
}

/* Sums of the squares of a tile.
 *
 * row  [TILE_ROWS] out     col  [TILE_COLS] out */
CUMOE_CPU_CLONES static void FN(sum_squares)(const cumoe_parameter_t *p, const step_t *s, block_t tile,
                                             REAL *restrict row, REAL *restrict col)
{
    REAL gradients[BUFFER], lane[TILE_ROWS][LANES] = {0};
    const REAL scale = (REAL)s->gradient_scale;
    const shape_t shape = shape_of(p, sizeof(REAL));
    for (int64_t j = 0; j < tile.cols; j++) col[j] = 0;
    for (int64_t i = 0; i < tile.rows; i += shape.rows)
        for (int64_t j = 0; j < tile.cols; j += shape.cols) {
            const block_t part = part_of(tile, i, shape.rows, j, shape.cols);
            const FN(view_t) gradient = FN(view_of)(&p->gradient, part, gradients);
            for (int64_t k = 0; k < part.rows; k++) {
                const REAL *gradient_row = gradient.data + k * gradient.stride;
                FN(add_squares)(gradient_row, part.cols, scale, lane[i + k], col + j);
            }
        }
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int64_t i = 0; i < tile.rows; i++)
            for (int l = 0; l < half; l++) lane[i][l] += lane[i][l + half];
    for (int64_t i = 0; i < tile.rows; i++) row[i] = lane[i][0];
}

/* r of a block that has all columns, or c of one that has all rows, or both. Sums of tiles are summed: short sums
 * lose less. */
static void FN(update_means)(const cumoe_parameter_t *p, const step_t *s, block_t block, bool rows, bool cols)
{
    const REAL beta2 = (REAL)s->beta2, least = (REAL)(s->rest2 * 1e-30);
    const REAL row_part = (REAL)(s->rest2 / (double)p->cols), col_part = (REAL)(s->rest2 / (double)p->rows);
    REAL *row_mean = (REAL *)p->row_mean + block.expert * p->rows + block.first_row;
    REAL *col_mean = (REAL *)p->col_mean + block.expert * p->cols + block.first_col;
    for (int64_t i = 0; rows && i < block.rows; i++) row_mean[i] = beta2 * row_mean[i] + least;
    for (int64_t col = 0; col < block.cols; col += TILE_COLS) {
        REAL row_sum[TILE_ROWS], tile_sum[TILE_COLS], col_sum[TILE_COLS] = {0};
        const int64_t width = tile_of(block, 0, col).cols;
        for (int64_t row = 0; row < block.rows; row += TILE_ROWS) {
            const block_t tile = tile_of(block, row, col);
            FN(sum_squares)(p, s, tile, row_sum, tile_sum);
            for (int64_t i = 0; rows && i < tile.rows; i++) row_mean[row + i] += row_part * row_sum[i];
            for (int64_t j = 0; j < width; j++) col_sum[j] += tile_sum[j];
        }
        for (int64_t j = 0; cols && j < width; j++)
            col_mean[col + j] = beta2 * col_mean[col + j] + (least + col_part * col_sum[j]);
    }
}

static void FN(update_average)(const cumoe_parameter_t *p, int64_t expert)
{
    const REAL *row_mean = (const REAL *)p->row_mean + expert * p->rows;
    double sum = 0;
    for (int64_t i = 0; i < p->rows; i++) sum += (double)row_mean[i];
    ((REAL *)p->average)[expert] = (REAL)(sum / (double)p->rows);
}

ALWAYS_INLINE void FN(factored_row)(int64_t n, const REAL *restrict gradient, REAL row_factor,
                                    const REAL *restrict col_factor, REAL decay, REAL *restrict value)
{
    for (int64_t j = 0; j < n; j++) value[j] -= gradient[j] * row_factor * col_factor[j] + decay * value[j];
}

/* w -= learning_rate * g / sqrt(r c / mean(r) / (1 - beta2^t)). The roots are taken one by one: r c may be too
 * small for F32 where g is 0. */
ALWAYS_INLINE void FN(factored_part)(const cumoe_parameter_t *p, const step_t *s, block_t part,
                                     const REAL *restrict col_factor)
{
    const REAL *row_mean = (const REAL *)p->row_mean + part.expert * p->rows + part.first_row;
    const REAL average = ((const REAL *)p->average)[part.expert];
    const REAL scale = (REAL)s->gradient_scale * FN(sqrt)(average), decay = (REAL)s->decay;
    REAL gradients[BUFFER], values[BUFFER];
    const FN(view_t) gradient = FN(view_of)(&p->gradient, part, gradients);
    const FN(view_t) value = FN(view_of_value)(p, part, values);
    for (int64_t i = 0; i < part.rows; i++) {
        const REAL *gradient_row = gradient.data + i * gradient.stride;
        const REAL row_factor = scale / FN(sqrt)(row_mean[i]);
        FN(factored_row)(part.cols, gradient_row, row_factor, col_factor, decay, value.data + i * value.stride);
    }
    FN(store_tile)(&p->value, part, value);
}

CUMOE_CPU_CLONES static void FN(factored_tile)(const cumoe_parameter_t *p, const step_t *s, block_t tile)
{
    const REAL *col_mean = (const REAL *)p->col_mean + tile.expert * p->cols + tile.first_col;
    const REAL rate = (REAL)s->factored_rate;
    REAL col_factor[TILE_COLS];
    for (int64_t j = 0; j < tile.cols; j++) col_factor[j] = rate / FN(sqrt)(col_mean[j]);
    const shape_t shape = shape_of(p, sizeof(REAL));
    for (int64_t row = 0; row < tile.rows; row += shape.rows)
        for (int64_t col = 0; col < tile.cols; col += shape.cols)
            FN(factored_part)(p, s, part_of(tile, row, shape.rows, col, shape.cols), col_factor + col);
}

static void FN(update_by_adam)(const cumoe_parameter_t *p, const step_t *s, int threads)
{
#pragma omp parallel for collapse(3) schedule(static) num_threads(threads)
    for (int64_t e = 0; e < p->experts; e++)
        for (int64_t row = 0; row < p->rows; row += TILE_ROWS)
            for (int64_t col = 0; col < p->cols; col += TILE_COLS)
                FN(adam_tile)(p, s, tile_of(whole(p, e), row, col));
}

/* One thread an expert, whose gradient may stay in the cache from the means to the update. */
static void FN(update_experts)(const cumoe_parameter_t *p, const step_t *s, int threads)
{
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t e = 0; e < p->experts; e++) {
        const block_t expert = whole(p, e);
        FN(update_means)(p, s, expert, true, true);
        FN(update_average)(p, e);
        for (int64_t row = 0; row < p->rows; row += TILE_ROWS)
            for (int64_t col = 0; col < p->cols; col += TILE_COLS)
                FN(factored_tile)(p, s, tile_of(expert, row, col));
    }
}

/* The same for few experts: threads share an expert, and every sum keeps its order. */
static void FN(update_shared)(const cumoe_parameter_t *p, const step_t *s, int threads)
{
#pragma omp parallel num_threads(threads)
    {
#pragma omp for collapse(2) schedule(static) nowait
        for (int64_t e = 0; e < p->experts; e++)
            for (int64_t row = 0; row < p->rows; row += TILE_ROWS)
                FN(update_means)(p, s, part_of(whole(p, e), row, TILE_ROWS, 0, p->cols), true, false);
#pragma omp for collapse(2) schedule(static)
        for (int64_t e = 0; e < p->experts; e++)
            for (int64_t col = 0; col < p->cols; col += SHARED_COLS)
                FN(update_means)(p, s, part_of(whole(p, e), 0, p->rows, col, SHARED_COLS), false, true);
#pragma omp for schedule(static)
        for (int64_t e = 0; e < p->experts; e++) FN(update_average)(p, e);
#pragma omp for collapse(3) schedule(static)
        for (int64_t e = 0; e < p->experts; e++)
            for (int64_t row = 0; row < p->rows; row += TILE_ROWS)
                for (int64_t col = 0; col < p->cols; col += TILE_COLS)
                    FN(factored_tile)(p, s, tile_of(whole(p, e), row, col));
    }
}

static void FN(update_array)(const cumoe_parameter_t *p, const step_t *s, int threads)
{
    if (!p->row_mean)
        FN(update_by_adam)(p, s, threads);
    else if (p->experts % threads == 0 || p->experts >= 4 * threads)
        FN(update_experts)(p, s, threads);
    else
        FN(update_shared)(p, s, threads);
}
