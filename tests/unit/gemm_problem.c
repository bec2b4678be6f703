#include "gemm_problem.h"

#include "tests/support/compare.h"
#include "tests/support/random.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { GUARD = 64 }; /* elements, whole cache lines */

void *allocate(size_t size, int byte)
{
    void *p = aligned_alloc(64, (size + 64) / 64 * 64);
    if (!p) abort();
    memset(p, byte, size);
    return p;
}

static cumoe_dtype_t draw_type(random_state_t *r, cumoe_dtype_t dtype)
{
    static const cumoe_dtype_t types[] = {CUMOE_F32, CUMOE_BF16, CUMOE_F16};
    return dtype ? dtype : types[random_below(r, 3)];
}

/* Numbers of either sign: small integers, whose sums meet the ties of 16-bit types, or any below 1. */
static double draw_number(random_state_t *r, bool integers)
{
    return integers ? (double)(random_below(r, 9) - 4) : 2 * random_uniform(r) - 1;
}

static int64_t group_rows(const cumoe_cpu_gemm_t *g, int64_t i)
{
    return g->ragged == CUMOE_CPU_RAGGED_ROWS ? g->offset[i + 1] - g->offset[i] : g->m;
}

static int64_t group_depth(const cumoe_cpu_gemm_t *g, int64_t i)
{
    return g->ragged == CUMOE_CPU_RAGGED_DEPTH ? g->offset[i + 1] - g->offset[i] : g->k;
}

/* Now and then a gather from all over the dimension. */
static int32_t *draw_index(random_state_t *r, int64_t size)
{
    if (random_below(r, 3) != 0) return NULL;
    int32_t *index = allocate((size_t)size * sizeof *index, 0);
    for (int64_t i = 0; i < size; i++) index[i] = (int32_t)random_below(r, size);
    return index;
}

/* A factor with so many lines and depths: of one group (per_group), or of all together where that dimension is cut
 * by offset. */
static void make_factor(cumoe_cpu_factor_t *f, factor_data_t *d, random_state_t *r, int64_t groups, bool per_group,
                        int64_t lines, int64_t depths)
{
    const int64_t size[2] = {lines > 0 ? lines : 1, depths > 0 ? depths : 1};
    const int lines_outside = (int)random_below(r, 2);
    const int64_t inner = 1 + (random_below(r, 4) == 0);
    const int64_t outer = size[lines_outside] * inner + random_below(r, 9);
    const int64_t matrix = outer * size[1 - lines_outside];
    f->line_stride = lines_outside ? outer : inner;
    f->depth_stride = lines_outside ? inner : outer;
    f->group_stride = per_group ? matrix + random_below(r, 5) : random_below(r, 2) * 3;
    f->line_index = d->line_index = draw_index(r, size[0]);
    f->depth_index = d->depth_index = draw_index(r, size[1]);

    const int64_t count = f->group_stride * groups + matrix;
    const bool integers = random_below(r, 2);
    f->data = d->data = allocate((size_t)count * real_size(f->dtype), 0);
    d->value = allocate((size_t)count * sizeof *d->value, 0);
    for (int64_t i = 0; i < count; i++) {
        real_set(d->data, f->dtype, i, draw_number(r, integers));
        d->value[i] = real_get(d->data, f->dtype, i);
    }
}

static void make_offsets(problem_t *p, random_state_t *r, int64_t mean)
{
    p->offset = allocate((size_t)(p->gemm.groups + 1) * sizeof(int32_t), 0);
    for (int64_t g = 0; g < p->gemm.groups; g++) {
        const int64_t size = random_below(r, 4) == 0 || mean == 0 ? 0 : random_below(r, 2 * mean) + 1;
        p->offset[g + 1] = p->offset[g] + (int32_t)size;
    }
    p->gemm.offset = p->offset;
}

static int64_t round_up(int64_t elements, int64_t to)
{
    return (elements + to - 1) / to * to;
}

/* C row-major with gaps, or column-major, or with columns apart; guards before and behind. Half of those that are
 * streamed are on cache lines. */
static void make_c(problem_t *p, random_state_t *r, int64_t rows)
{
    cumoe_cpu_gemm_t *g = &p->gemm;
    const int form = g->epilogue ? 2 : (int)random_below(r, 4);
    const int64_t element = (int64_t)real_size(g->c_dtype), n = g->n > 0 ? g->n : 1, m = rows > 0 ? rows : 1;
    g->c_col_stride = form == 0 ? m + random_below(r, 3) : form == 1 ? 2 : 1;
    g->c_row_stride = form == 0 ? 1 : n * g->c_col_stride + random_below(r, 5);
    const int64_t line = g->stream && random_below(r, 2) ? 64 / element : 1; /* elements */
    if (form > 0) g->c_row_stride = round_up(g->c_row_stride, line);
    const int64_t matrix = form == 0 ? g->c_col_stride * n : g->c_row_stride * m;
    g->c_group_stride = g->ragged == CUMOE_CPU_RAGGED_ROWS ? 0 : round_up(matrix + random_below(r, 3), line);
    const int64_t part = round_up(g->c_group_stride * g->groups + matrix + GUARD, line);
    p->c_size = (size_t)((part * 2 + GUARD) * element);
    p->c = allocate(p->c_size, 0xFF);
    for (int i = 0; i < 2; i++) g->c[i] = (char *)p->c + (GUARD + i * part) * element;
    if (g->add) /* finite numbers where sums start; gaps stay as good as poison, since they are compared */
        for (int64_t i = 0; i < (int64_t)p->c_size / element; i++)
            real_set(p->c, g->c_dtype, i, (double)random_below(r, 1000) / 64);
    p->expected = allocate(p->c_size, 0);
    p->initial = allocate(p->c_size, 0);
    memcpy(p->initial, p->c, p->c_size);
}

static void describe(problem_t *p, uint64_t seed)
{
    const cumoe_cpu_gemm_t *g = &p->gemm;
    snprintf(
        p->text, sizeof p->text,
        "seed %#llx: ragged %d, groups %lld, m %lld, n %lld, k %lld, parts %d, terms %d%s%s%s; types a %d %d, b "
        "%d %d, c %d; strides c %lld %lld",
        (unsigned long long)seed, g->ragged, (long long)g->groups, (long long)g->m, (long long)g->n,
        (long long)g->k, g->parts, g->terms, g->add ? ", add" : "", g->epilogue ? ", epilogue" : "",
        g->stream ? ", stream" : "", g->a[0].dtype, g->a[1].dtype, g->b[0].dtype, g->b[1].dtype, g->c_dtype,
        (long long)g->c_row_stride, (long long)g->c_col_stride);
}

/* What the epilogue makes of the sums of an element, sum[1] only with two parts; exact products, so that a
 * compiler's choice of fma changes nothing. */
static double after_first(double sum0, int64_t group, int64_t row, int64_t col)
{
    return sum0 * 0.5 + (double)((group * 7 + row * 3 + col) % 11);
}
static double after_second(double sum0, double sum1, int64_t col)
{
    return sum1 * 0.25 - (col % 2 ? sum0 : 0);
}

/* Sums are F32 (F64 for F64). */
static cumoe_dtype_t sum_dtype(const cumoe_cpu_gemm_t *g)
{
    return g->c_dtype == CUMOE_F64 ? CUMOE_F64 : CUMOE_F32;
}

static void change_sums(const void *context, const cumoe_cpu_block_t *block)
{
    const cumoe_cpu_gemm_t *g = context;
    const cumoe_dtype_t dtype = sum_dtype(g);
    for (int64_t e = 0; e < block->rows * block->cols; e++) {
        const int64_t i = e / block->cols, j = e % block->cols, at = i * block->sum_stride + j;
        const double sum0 = real_get(block->sum[0], dtype, at);
        real_set(block->sum[0], dtype, at, after_first(sum0, block->group, block->row + i, block->col + j));
        if (g->parts < 2) continue;
        const double sum1 = real_get(block->sum[1], dtype, at);
        real_set(block->sum[1], dtype, at, after_second(sum0, sum1, block->col + j));
    }
}

void make_problem(problem_t *p, const shape_t *s, uint64_t seed)
{
    random_state_t r = random_start(seed);
    *p = (problem_t){.gemm = {.groups = s->groups,
                              .m = s->m,
                              .n = s->n,
                              .k = s->k,
                              .ragged = s->ragged,
                              .parts = s->parts ? s->parts : 1,
                              .terms = s->terms ? s->terms : 1,
                              .c_dtype = draw_type(&r, s->dtype),
                              .add = s->add,
                              .epilogue = s->epilogue ? change_sums : NULL,
                              .context = &p->gemm}};
    p->gemm.stream = random_below(&r, 2);
    int64_t rows = s->m, depths = s->k;
    if (s->ragged != CUMOE_CPU_RAGGED_NONE) {
        make_offsets(p, &r, s->ragged == CUMOE_CPU_RAGGED_ROWS ? s->m : s->k);
        *(s->ragged == CUMOE_CPU_RAGGED_ROWS ? &rows : &depths) = p->offset[s->groups];
    }
    for (int i = 0; i < 2; i++) { /* also those that are not asked for: they must not be looked at */
        p->gemm.a[i].dtype = draw_type(&r, s->dtype);
        p->gemm.b[i].dtype = draw_type(&r, s->dtype);
        make_factor(&p->gemm.a[i], &p->a[i], &r, s->groups, s->ragged == CUMOE_CPU_RAGGED_NONE, rows, depths);
        make_factor(&p->gemm.b[i], &p->b[i], &r, s->groups, s->ragged != CUMOE_CPU_RAGGED_DEPTH, s->n, depths);
    }
    make_c(p, &r, rows);
    describe(p, seed);
}

static void free_factor(factor_data_t *d)
{
    free(d->data);
    free(d->value);
    free(d->line_index);
    free(d->depth_index);
}

void free_problem(problem_t *p)
{
    for (int i = 0; i < 2; i++) {
        free_factor(&p->a[i]);
        free_factor(&p->b[i]);
    }
    free(p->offset);
    free(p->c);
    free(p->initial);
    free(p->expected);
}

static double at_factor(const cumoe_cpu_factor_t *f, const factor_data_t *d, int64_t group, int64_t line,
                        int64_t depth)
{
    return d->value[group * f->group_stride + (f->line_index ? f->line_index[line] : line) * f->line_stride +
                    (f->depth_index ? f->depth_index[depth] : depth) * f->depth_stride];
}

static double step(double a, double b, double c, bool f64, bool fused)
{
    if (f64) return fused ? fma(a, b, c) : a * b + c;
    return (double)(fused ? fmaf((float)a, (float)b, (float)c) : (float)((float)a * (float)b) + (float)c);
}

/* One element as promised: c + a_0 b_0 + a_1 b_1 + ... Clears *good if the exact sum is elsewhere. */
static double chain(const problem_t *p, int part, int64_t group, int64_t i, int64_t j, double c, bool fused,
                    bool *good)
{
    const cumoe_cpu_gemm_t *g = &p->gemm;
    const bool f64 = g->c_dtype == CUMOE_F64;
    const int64_t line = i + (g->ragged == CUMOE_CPU_RAGGED_ROWS ? g->offset[group] : 0);
    const int64_t first = g->ragged == CUMOE_CPU_RAGGED_DEPTH ? g->offset[group] : 0, depth = group_depth(g, group);
    double exact = c, size = fabs(c);
    for (int t = 0; t < g->terms; t++)
        for (int64_t k = first; k < first + depth; k++) {
            const int of_b = g->terms == 2 ? t : part;
            const double a = at_factor(&g->a[t], &p->a[t], group, line, k);
            const double b = at_factor(&g->b[of_b], &p->b[of_b], group, j, k);
            c = step(a, b, c, f64, fused);
            exact += a * b;
            size += fabs(a * b);
        }
    const double unit = real_rounding_unit(sum_dtype(g));
    if (!(fabs(c - exact) <= (double)(2 * depth * g->terms + 1) * unit * size)) *good = false;
    return c;
}

/* Element (i, j) of a group in all parts. */
static void fill_element(problem_t *p, int64_t group, int64_t i, int64_t j, bool fused, bool *good)
{
    const cumoe_cpu_gemm_t *g = &p->gemm;
    const int64_t row = i + (g->ragged == CUMOE_CPU_RAGGED_ROWS ? g->offset[group] : 0);
    const int64_t in_part = group * g->c_group_stride + row * g->c_row_stride + j * g->c_col_stride;
    double sum[2] = {0};
    int64_t at[2];
    for (int part = 0; part < g->parts; part++) {
        at[part] = ((char *)g->c[part] - (char *)p->c) / (int64_t)real_size(g->c_dtype) + in_part;
        const double old = g->add ? real_get(p->initial, g->c_dtype, at[part]) : 0;
        sum[part] = chain(p, part, group, i, j, old, fused, good);
    }
    if (g->epilogue) {
        sum[1] = real_round(sum_dtype(g), after_second(sum[0], sum[1], j));
        sum[0] = real_round(sum_dtype(g), after_first(sum[0], group, row, j));
    }
    for (int part = 0; part < g->parts; part++) real_set(p->expected, g->c_dtype, at[part], sum[part]);
}

bool fill_expected(problem_t *p, bool fused)
{
    const cumoe_cpu_gemm_t *g = &p->gemm;
    bool good = true;
    memcpy(p->expected, p->initial, p->c_size);
    for (int64_t group = 0; group < g->groups; group++)
        for (int64_t i = 0; i < group_rows(g, group); i++)
            for (int64_t j = 0; j < g->n; j++) fill_element(p, group, i, j, fused, &good);
    return good;
}
