/* What one would write without a library for mixtures: the experts one after the other, rows gathered and scattered
 * by hand, products by OpenBLAS. */
#include "perf.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* hidden = act(up, glu), count elements. */
static void activate_rows(bool glu, int64_t count, const float *up, const float *z_glu, float *hidden)
{
    for (int64_t i = 0; i < count; i++) {
        hidden[i] = glu ? z_glu[i] / (1 + expf(-z_glu[i])) * up[i] : up[i] > 0 ? up[i] : 0;
    }
}

/* From d, the gradient of hidden, to those of up and glu; dup may be d. */
static void activate_rows_backward(bool glu, int64_t count, const float *up, const float *z_glu, const float *d,
                                   float *dup, float *dglu)
{
    for (int64_t i = 0; i < count; i++) {
        if (glu) {
            const float g = z_glu[i], s = 1 / (1 + expf(-g)), di = d[i];
            dup[i] = di * g * s;
            dglu[i] = di * up[i] * s * (1 + g * (1 - s));
        } else {
            dup[i] = up[i] > 0 ? d[i] : 0;
        }
    }
}

struct loop {
    blas_t *blas;
    int T, H, I, E, K;
    const float *w_up, *w_glu, *w_down;  /* borrowed; w_glu NULL without glu */
    int *offset;                         /* [E + 1] */
    int *slot;                           /* [R] slot t * K + j of a row, sorted by expert */
    float *x, *dy, *out;                 /* [R, H] gathered; out [R, H] of one expert at a time */
    float *up, *glu, *hidden, *weighted; /* [R, I] */
    float *d, *dglu;                     /* [R, I] */
    float *y, *dx, *dweight;             /* [T, H], [T, H], [T, K] */
    float *dw_up, *dw_glu, *dw_down;     /* [E, I, H], [E, I, H], [E, H, I] */
};

/* count numbers; ends the program if memory is exhausted. */
static void *new_array(int64_t count, size_t size)
{
    void *array = calloc((size_t)count + 1, size);
    if (!array) abort();
    return array;
}

loop_t *loop_create(blas_t *blas, const subject_t *s, const cumoe_weights_t *weights)
{
    const cumoe_config_t *c = &s->config;
    const bool known = c->activation == CUMOE_ACTIVATION_RELU || c->activation == CUMOE_ACTIVATION_SWIGLU;
    if (s->type != TYPE_F32 || !known || c->expert_bias || c->gate == CUMOE_GATE_BALANCED) return NULL;
    loop_t *l = new_array(1, sizeof *l);
    const int64_t T = s->num_tokens, E = c->num_experts, H = c->hidden_size, I = c->intermediate_size;
    const int64_t R = T * c->top_k, wide = R * H, inner = R * I, inner_glu = weights->w_glu ? inner : 0;
    const int64_t matrices = (s->parts & (1U << BACKWARD)) ? E * I * H : 0;
    *l = (loop_t){.blas = blas,
                  .T = (int)T,
                  .H = (int)H,
                  .I = (int)I,
                  .E = (int)E,
                  .K = c->top_k,
                  .w_up = weights->w_up,
                  .w_glu = weights->w_glu,
                  .w_down = weights->w_down};
    l->offset = new_array(E + 1, sizeof(int));
    l->slot = new_array(R, sizeof(int));
    float **const arrays[] = {&l->x,    &l->dy, &l->out, &l->up,      &l->hidden, &l->weighted, &l->d,     &l->glu,
                              &l->dglu, &l->y,  &l->dx,  &l->dweight, &l->dw_up,  &l->dw_down,  &l->dw_glu};
    const int64_t sizes[] = {wide,  wide,  wide,      inner,     inner,
                             inner, inner, inner_glu, inner_glu, T * H,
                             T * H, R,     matrices,  matrices,  inner_glu ? matrices : 0};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) *arrays[i] = new_array(sizes[i], sizeof(float));
    return l;
}

void loop_destroy(loop_t *l)
{
    if (!l) return;
    float *const arrays[] = {l->x,    l->dy, l->out, l->up,      l->hidden, l->weighted, l->d,     l->glu,
                             l->dglu, l->y,  l->dx,  l->dweight, l->dw_up,  l->dw_down,  l->dw_glu};
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) free(arrays[i]);
    free(l->offset);
    free(l->slot);
    free(l);
}

/* One expert's part of a call: its rows, and where its matrices begin. */
typedef struct part {
    int64_t first, matrix; /* element of a matrix [., .] per row, of the matrices */
    int rows;
} part_t;

static part_t part_of(const loop_t *l, int e)
{
    return (part_t){l->offset[e], (int64_t)e * l->I * l->H, l->offset[e + 1] - l->offset[e]};
}

/* Rows by expert: a counting sort. */
static void sort_rows(loop_t *l, const int32_t *expert)
{
    const int R = l->T * l->K, E = l->E;
    memset(l->offset, 0, (size_t)(E + 1) * sizeof(int));
    for (int i = 0; i < R; i++) l->offset[expert[i] + 1]++;
    for (int e = 0; e < E; e++) l->offset[e + 1] += l->offset[e];
    for (int i = 0; i < R; i++) l->slot[l->offset[expert[i]]++] = i;
    for (int e = E; e > 0; e--) l->offset[e] = l->offset[e - 1];
    l->offset[0] = 0;
}

static void gather(const loop_t *l, int expert, const float *from, float *to)
{
    const int H = l->H;
    for (int64_t r = l->offset[expert]; r < l->offset[expert + 1]; r++) {
        memcpy(to + r * H, from + (int64_t)(l->slot[r] / l->K) * H, (size_t)H * sizeof(float));
    }
}

/* to[token] += weight * from[row]; weight NULL = 1. */
static void scatter(const loop_t *l, int expert, const float *weight, const float *from, float *to)
{
    const int H = l->H;
    for (int64_t r = l->offset[expert]; r < l->offset[expert + 1]; r++) {
        float *row = to + (int64_t)(l->slot[r] / l->K) * H;
        const float w = weight ? weight[l->slot[r]] : 1;
        for (int h = 0; h < H; h++) row[h] += w * from[r * H + h];
    }
}

/* a [m, k], b [n, k]: c = a b^T, as matrices of weights are stored. */
static void times_transposed(const loop_t *l, int m, int n, int k, const float *a, const float *b, float *c)
{
    blas_product(l->blas, TYPE_F32, &(product_t){.b_transposed = true, .m = m, .n = n, .k = k}, a, b, c);
}

void loop_forward(loop_t *l, const float *x, const int32_t *expert, const float *weight)
{
    const int H = l->H, I = l->I;
    sort_rows(l, expert);
    memset(l->y, 0, (size_t)l->T * (size_t)H * sizeof(float));
    for (int e = 0; e < l->E; e++) {
        const part_t p = part_of(l, e);
        if (p.rows == 0) continue;
        const float *rows = l->x + p.first * H;
        float *up = l->up + p.first * I, *glu = l->w_glu ? l->glu + p.first * I : NULL;
        float *hidden = l->hidden + p.first * I;
        gather(l, e, x, l->x);
        times_transposed(l, p.rows, I, H, rows, l->w_up + p.matrix, up);
        if (glu) times_transposed(l, p.rows, I, H, rows, l->w_glu + p.matrix, glu);
        activate_rows(glu != NULL, (int64_t)p.rows * I, up, glu, hidden);
        times_transposed(l, p.rows, H, I, hidden, l->w_down + p.matrix, l->out + p.first * H);
        scatter(l, e, weight, l->out, l->y);
    }
}

/* From d = dy w_down of an expert: the gradients of its rows' weights, then d and hidden times the weights. */
static void weigh_rows(loop_t *l, int expert, const float *weight)
{
    const int I = l->I;
    for (int64_t r = l->offset[expert]; r < l->offset[expert + 1]; r++) {
        const float w = weight[l->slot[r]];
        float sum = 0;
        for (int64_t i = r * I; i < (r + 1) * I; i++) {
            sum += l->d[i] * l->hidden[i];
            l->d[i] *= w;
            l->weighted[i] = w * l->hidden[i];
        }
        l->dweight[l->slot[r]] = sum;
    }
}

/* dw = d^T x, and the rows' own gradients out (+)= d w. */
static void backward_of_up(const loop_t *l, const part_t *p, const float *d, const float *w, float *dw, bool add)
{
    const int H = l->H, I = l->I;
    const product_t matrix = {.a_transposed = true, .m = I, .n = H, .k = p->rows};
    const product_t rows = {.m = p->rows, .n = H, .k = I, .add = add};
    blas_product(l->blas, TYPE_F32, &matrix, d, l->x + p->first * H, dw + p->matrix);
    blas_product(l->blas, TYPE_F32, &rows, d, w + p->matrix, l->out + p->first * H);
}

void loop_backward(loop_t *l, const float *dy, const float *weight)
{
    const int H = l->H, I = l->I;
    memset(l->dx, 0, (size_t)l->T * (size_t)H * sizeof(float));
    for (int e = 0; e < l->E; e++) {
        const part_t p = part_of(l, e);
        const product_t of_hidden = {.m = p.rows, .n = I, .k = H};
        const product_t matrix = {.a_transposed = true, .m = H, .n = I, .k = p.rows};
        const float *glu = l->w_glu ? l->glu + p.first * I : NULL;
        float *d = l->d + p.first * I, *dglu = glu ? l->dglu + p.first * I : NULL, *rows = l->dy + p.first * H;
        if (p.rows == 0) { /* there are no sums */
            memset(l->dw_up + p.matrix, 0, (size_t)I * (size_t)H * sizeof(float));
            if (glu) memset(l->dw_glu + p.matrix, 0, (size_t)I * (size_t)H * sizeof(float));
            memset(l->dw_down + p.matrix, 0, (size_t)I * (size_t)H * sizeof(float));
            continue;
        }
        gather(l, e, dy, l->dy);
        blas_product(l->blas, TYPE_F32, &of_hidden, rows, l->w_down + p.matrix, d);
        weigh_rows(l, e, weight);
        blas_product(l->blas, TYPE_F32, &matrix, rows, l->weighted + p.first * I, l->dw_down + p.matrix);
        activate_rows_backward(glu != NULL, (int64_t)p.rows * I, l->up + p.first * I, glu, d, d, dglu);
        backward_of_up(l, &p, d, l->w_up, l->dw_up, false);
        if (glu) backward_of_up(l, &p, dglu, l->w_glu, l->dw_glu, true);
        scatter(l, e, NULL, l->out, l->dx);
    }
}

/* || a - b || / || b || */
static double difference(const float *a, const float *b, int64_t count)
{
    double sum = 0, size = 0;
    for (int64_t i = 0; i < count; i++) {
        sum += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
        size += (double)b[i] * (double)b[i];
    }
    return sum == 0 ? 0 : sqrt(sum / size);
}

double loop_difference(const loop_t *l, const float *y, const cumoe_weights_t *g)
{
    const int64_t matrices = (int64_t)l->E * l->I * l->H;
    double largest = difference(y, l->y, (int64_t)l->T * l->H);
    if (!g) return largest;
    const double others[] = {difference(g->w_up, l->dw_up, matrices), difference(g->w_down, l->dw_down, matrices),
                             g->w_glu ? difference(g->w_glu, l->dw_glu, matrices) : 0};
    for (int i = 0; i < 3; i++) {
        if (!(others[i] <= largest)) largest = others[i]; /* NaN as well */
    }
    return largest;
}
