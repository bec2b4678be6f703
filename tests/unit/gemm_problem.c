#include "gemm_problem.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { GUARD = 64 };

static uint64_t draw(random_state_t *r) /* splitmix64 */
{
    uint64_t z = r->state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

int64_t draw_below(random_state_t *r, int64_t bound)
{
    return (int64_t)(draw(r) % (uint64_t)bound);
}

static double get(const void *data, int64_t i, bool f64)
{
    return f64 ? ((const double *)data)[i] : (double)((const float *)data)[i];
}

static void put(void *data, int64_t i, double value, bool f64)
{
    if (f64) {
        ((double *)data)[i] = value;
    } else {
        ((float *)data)[i] = (float)value;
    }
}

static double step(double a, double b, double c, bool f64, bool fused)
{
    if (f64) return fused ? fma(a, b, c) : a * b + c;
    return fused ? fmaf((float)a, (float)b, (float)c) : (float)((float)((float)a * (float)b) + (float)c);
}

void *allocate(size_t size, int byte)
{
    void *p = aligned_alloc(64, (size + 64) / 64 * 64);
    if (!p) abort();
    memset(p, byte, size);
    return p;
}

static int64_t group_rows(const cumoe_cpu_gemm_t *g, int64_t i)
{
    return g->ragged == CUMOE_CPU_RAGGED_ROWS ? g->offset[i + 1] - g->offset[i] : g->m;
}

static int64_t group_depth(const cumoe_cpu_gemm_t *g, int64_t i)
{
    return g->ragged == CUMOE_CPU_RAGGED_DEPTH ? g->offset[i + 1] - g->offset[i] : g->k;
}

/* A factor with so many lines and depths, of one group, or of all together where that dimension is cut by offset.
 */
static void make_factor(problem_t *p, random_state_t *r, cumoe_cpu_factor_t *f, void **data, int which,
                        int64_t lines, int64_t depths)
{
    const int64_t size[2] = {lines > 0 ? lines : 1, depths > 0 ? depths : 1};
    const bool lines_outside = draw(r) & 1;
    const int64_t inner = 1 + (draw_below(r, 4) == 0), inner_size = (lines_outside ? size[1] : size[0]) * inner;
    const int64_t outer = inner_size + draw_below(r, 9);
    const bool per_group =
        p->gemm.ragged == CUMOE_CPU_RAGGED_NONE || (which > 0 && p->gemm.ragged == CUMOE_CPU_RAGGED_ROWS);
    f->dtype = p->f64 ? CUMOE_F64 : CUMOE_F32;
    f->line_stride = lines_outside ? outer : inner;
    f->depth_stride = lines_outside ? inner : outer;
    f->group_stride =
        per_group ? outer * (lines_outside ? size[0] : size[1]) + draw_below(r, 5) : draw_below(r, 2) * 3;
    for (int d = 0; d < 2; d++) {
        if (draw_below(r, 3) != 0) continue;
        int32_t *index = p->index[which][d] = allocate((size_t)size[d] * sizeof *index, 0);
        for (int64_t i = 0; i < size[d]; i++) index[i] = (int32_t)draw_below(r, size[d]);
    }
    f->line_index = p->index[which][0];
    f->depth_index = p->index[which][1];

    const int64_t count = f->group_stride * p->gemm.groups + outer * (lines_outside ? size[0] : size[1]);
    *data = allocate((size_t)count * (p->f64 ? 8 : 4), 0);
    for (int64_t i = 0; i < count; i++) {
        put(*data, i, (double)(int64_t)draw(r) * 0x1p-63, p->f64);
    }
    f->data = *data;
}

static void make_offsets(problem_t *p, random_state_t *r, int64_t mean)
{
    p->offset = allocate((size_t)(p->gemm.groups + 1) * sizeof(int32_t), 0);
    for (int64_t g = 0; g < p->gemm.groups; g++) {
        const int64_t size = draw_below(r, 4) == 0 ? 0 : mean == 0 ? 0 : draw_below(r, 2 * mean) + 1;
        p->offset[g + 1] = p->offset[g] + (int32_t)size;
    }
    p->gemm.offset = p->offset;
}

/* C row-major with gaps, or column-major, or with columns apart; guards before and behind. */
static void make_c(problem_t *p, random_state_t *r, int64_t rows)
{
    cumoe_cpu_gemm_t *g = &p->gemm;
    const int form = (int)draw_below(r, 4);
    const int64_t element = p->f64 ? 8 : 4, n = g->n > 0 ? g->n : 1, m = rows > 0 ? rows : 1;
    g->c_col_stride = form == 0 ? m + draw_below(r, 3) : form == 1 ? 2 : 1;
    g->c_row_stride = form == 0 ? 1 : n * g->c_col_stride + draw_below(r, 5);
    const int64_t matrix = form == 0 ? g->c_col_stride * n : g->c_row_stride * m;
    g->c_group_stride = g->ragged == CUMOE_CPU_RAGGED_ROWS ? 0 : matrix + draw_below(r, 3);
    const int64_t part = g->c_group_stride * g->groups + matrix + GUARD;
    p->c_size = (size_t)((part * 2 + GUARD) * element);
    p->c = allocate(p->c_size, 0xFF);
    for (int i = 0; i < 2; i++) g->c[i] = (char *)p->c + (GUARD + i * part) * element;
    if (g->add) { /* finite numbers where sums start; gaps stay as good as poison, since they are compared */
        for (size_t i = 0; i < p->c_size / (size_t)element; i++) {
            put(p->c, (int64_t)i, (double)draw_below(r, 1000) / 64, p->f64);
        }
    }
    p->expected = allocate(p->c_size, 0);
    p->initial = allocate(p->c_size, 0);
    memcpy(p->initial, p->c, p->c_size);
}

void make_problem(problem_t *p, const shape_t *s, uint64_t seed)
{
    random_state_t r = {seed};
    *p = (problem_t){.f64 = s->f64};
    p->gemm = (cumoe_cpu_gemm_t){.groups = s->groups,
                                 .m = s->m,
                                 .n = s->n,
                                 .k = s->k,
                                 .ragged = s->ragged,
                                 .parts = s->parts,
                                 .add = s->add};
    int64_t rows = s->m, depths = s->k;
    if (s->ragged != CUMOE_CPU_RAGGED_NONE) {
        make_offsets(p, &r, s->ragged == CUMOE_CPU_RAGGED_ROWS ? s->m : s->k);
        *(s->ragged == CUMOE_CPU_RAGGED_ROWS ? &rows : &depths) = p->offset[s->groups];
    }
    make_factor(p, &r, &p->gemm.a, &p->a, 0, rows, depths);
    /* The parts of B share a buffer: the second is the first with lines and depths of its own choice. */
    make_factor(p, &r, &p->gemm.b[0], &p->b, 1, s->n, depths);
    p->gemm.b[1] = p->gemm.b[0];
    const int64_t lines = s->n > 0 ? s->n : 1;
    int32_t *index = p->index[2][0] = allocate((size_t)lines * sizeof *index, 0);
    for (int64_t i = 0; i < lines; i++) index[i] = (int32_t)draw_below(&r, lines);
    p->gemm.b[1].line_index = index;
    make_c(p, &r, rows);
    snprintf(p->text, sizeof p->text,
             "seed %#llx: ragged %d, groups %lld, m %lld, n %lld, k %lld, parts %d, %s, %s; strides a %lld %lld, b "
             "%lld %lld, "
             "c %lld %lld",
             (unsigned long long)seed, s->ragged, (long long)s->groups, (long long)s->m, (long long)s->n,
             (long long)s->k, s->parts, s->f64 ? "f64" : "f32", s->add ? "add" : "write",
             (long long)p->gemm.a.line_stride, (long long)p->gemm.a.depth_stride,
             (long long)p->gemm.b[0].line_stride, (long long)p->gemm.b[0].depth_stride,
             (long long)p->gemm.c_row_stride, (long long)p->gemm.c_col_stride);
}

void free_problem(problem_t *p)
{
    for (int i = 0; i < 3; i++) {
        for (int d = 0; d < 2; d++) free(p->index[i][d]);
    }
    free(p->offset);
    free(p->a);
    free(p->b);
    free(p->c);
    free(p->initial);
    free(p->expected);
}

static int64_t address(const cumoe_cpu_factor_t *f, int64_t group, int64_t line, int64_t depth)
{
    return group * f->group_stride + (f->line_index ? f->line_index[line] : line) * f->line_stride +
           (f->depth_index ? f->depth_index[depth] : depth) * f->depth_stride;
}

/* One element as promised: c + a_0 b_0 + a_1 b_1 + ... Clears *good if the exact sum is elsewhere. */
static double chain(const problem_t *p, int part, int64_t group, int64_t i, int64_t j, double c, bool fused,
                    bool *good)
{
    const cumoe_cpu_gemm_t *g = &p->gemm;
    const int64_t line = i + (g->ragged == CUMOE_CPU_RAGGED_ROWS ? g->offset[group] : 0);
    const int64_t first = g->ragged == CUMOE_CPU_RAGGED_DEPTH ? g->offset[group] : 0, depth = group_depth(g, group);
    double exact = c, size = fabs(c);
    for (int64_t k = 0; k < depth; k++) {
        const double a = get(p->a, address(&g->a, group, line, first + k), p->f64);
        const double b = get(p->b, address(&g->b[part], group, j, first + k), p->f64);
        c = step(a, b, c, p->f64, fused);
        exact += a * b;
        size += fabs(a * b);
    }
    if (!(fabs(c - exact) <= (double)(2 * depth + 1) * (p->f64 ? 0x1p-53 : 0x1p-24) * size)) *good = false;
    return c;
}

bool fill_expected(problem_t *p, bool fused)
{
    const cumoe_cpu_gemm_t *g = &p->gemm;
    bool good = true;
    memcpy(p->expected, p->initial, p->c_size);
    for (int part = 0; part < g->parts; part++) {
        const int64_t base = ((char *)g->c[part] - (char *)p->c) / (p->f64 ? 8 : 4);
        for (int64_t group = 0; group < g->groups; group++) {
            const int64_t first = g->ragged == CUMOE_CPU_RAGGED_ROWS ? g->offset[group] : 0;
            const int64_t elements = group_rows(g, group) * g->n;
            for (int64_t e = 0; e < elements; e++) {
                const int64_t i = e / g->n, j = e % g->n;
                const int64_t at =
                    base + group * g->c_group_stride + (first + i) * g->c_row_stride + j * g->c_col_stride;
                const double old = g->add ? get(p->initial, at, p->f64) : 0;
                put(p->expected, at, chain(p, part, group, i, j, old, fused, &good), p->f64);
            }
        }
    }
    return good;
}
