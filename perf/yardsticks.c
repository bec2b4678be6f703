#include "yardsticks.h"

#include <cblas.h>
#undef I /* of complex.h; here it is the width inside an expert */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

void let_threads_sleep(int threads)
{
    if (threads > 1) nanosleep(&(struct timespec){.tv_nsec = 60 * 1000 * 1000}, NULL);
}

void *new_array(int64_t count, int64_t size)
{
    void *array = calloc((size_t)(count > 0 ? count : 1), (size_t)size);
    if (!array) {
        fprintf(stderr, "cumoe-perf-cpu: out of memory (%lld bytes)\n", (long long)(count * size));
        exit(EXIT_FAILURE);
    }
    return array;
}

/* c [m, n] = a b, with a [m, k] (or its transpose, stored [k, m]) and b [k, n] (or stored [n, k]); add: c += a b.
 */
static void product(bool a_transposed, bool b_transposed, int m, int n, int k, const float *a, const float *b,
                    float *c, bool add)
{
    cblas_sgemm(CblasRowMajor, a_transposed ? CblasTrans : CblasNoTrans, b_transposed ? CblasTrans : CblasNoTrans,
                m, n, k, 1, a, a_transposed ? m : k, b, b_transposed ? k : n, add, c, n);
}

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

struct dense {
    shape_t s;
    int W;                               /* K * I */
    const float *w_up, *w_glu;           /* [W, H], borrowed */
    float *w_down;                       /* [H, W] */
    float *up, *glu, *hidden, *d, *dglu; /* [T, W] */
    float *dw_up, *dw_glu, *dw_down;     /* [W, H], [W, H], [H, W] */
};

dense_t *dense_create(const shape_t *shape, const matrices_t *weights)
{
    dense_t *d = new_array(1, sizeof *d);
    const int W = shape->K * shape->I, H = shape->H;
    const int64_t activations = (int64_t)shape->T * W, matrix = (int64_t)W * H, glu = shape->glu;
    *d = (dense_t){.s = *shape, .W = W, .w_up = weights->up, .w_glu = weights->glu};
    d->w_down = new_array(matrix, sizeof(float));
    for (int e = 0; e < shape->K; e++) {
        for (int h = 0; h < H; h++) {
            memcpy(d->w_down + (int64_t)h * W + e * shape->I, weights->down + ((int64_t)e * H + h) * shape->I,
                   (size_t)shape->I * sizeof(float));
        }
    }
    d->up = new_array(activations, sizeof(float));
    d->glu = new_array(activations * glu, sizeof(float));
    d->hidden = new_array(activations, sizeof(float));
    d->d = new_array(activations, sizeof(float));
    d->dglu = new_array(activations * glu, sizeof(float));
    d->dw_up = new_array(matrix, sizeof(float));
    d->dw_glu = new_array(matrix * glu, sizeof(float));
    d->dw_down = new_array(matrix, sizeof(float));
    return d;
}

void dense_destroy(dense_t *d)
{
    float *arrays[] = {d->w_down, d->up, d->glu, d->hidden, d->d, d->dglu, d->dw_up, d->dw_glu, d->dw_down};
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) free(arrays[i]);
    free(d);
}

void dense_forward(dense_t *d, const float *x, float *y, bool activate)
{
    const int T = d->s.T, H = d->s.H, W = d->W;
    product(false, true, T, W, H, x, d->w_up, d->up, false);
    if (d->s.glu) product(false, true, T, W, H, x, d->w_glu, d->glu, false);
    if (activate) activate_rows(d->s.glu, (int64_t)T * W, d->up, d->glu, d->hidden);
    product(false, true, T, H, W, activate ? d->hidden : d->up, d->w_down, y, false);
}

void dense_backward(dense_t *d, const float *x, const float *dy, float *dx, bool activate)
{
    const int T = d->s.T, H = d->s.H, W = d->W;
    product(false, false, T, W, H, dy, d->w_down, d->d, false);
    product(true, false, H, W, T, dy, activate ? d->hidden : d->up, d->dw_down, false);
    if (activate) activate_rows_backward(d->s.glu, (int64_t)T * W, d->up, d->glu, d->d, d->d, d->dglu);
    product(true, false, W, H, T, d->d, x, d->dw_up, false);
    product(false, false, T, H, W, d->d, d->w_up, dx, false);
    if (!d->s.glu) return;
    product(true, false, W, H, T, d->dglu, x, d->dw_glu, false);
    product(false, false, T, H, W, d->dglu, d->w_glu, dx, true);
}

void dense_gradients(const dense_t *d, const matrices_t *gradients)
{
    const int H = d->s.H, I = d->s.I;
    memcpy(gradients->up, d->dw_up, (size_t)d->W * (size_t)H * sizeof(float));
    if (d->s.glu) memcpy(gradients->glu, d->dw_glu, (size_t)d->W * (size_t)H * sizeof(float));
    for (int e = 0; e < d->s.K; e++) {
        for (int h = 0; h < H; h++) {
            memcpy(gradients->down + ((int64_t)e * H + h) * I, d->dw_down + (int64_t)h * d->W + e * I,
                   (size_t)I * sizeof(float));
        }
    }
}

struct loop {
    shape_t s;
    int *offset;              /* [E + 1] */
    int *slot;                /* [R] slot t * K + j of a row, sorted by expert */
    float *x, *dy, *out;      /* [R, H] gathered; out [R, H] of one expert at a time */
    float *up, *glu, *hidden; /* [R, I] */
    float *d, *dglu;          /* [R, I] */
};

loop_t *loop_create(const shape_t *shape)
{
    loop_t *l = new_array(1, sizeof *l);
    const int64_t R = (int64_t)shape->T * shape->K, wide = R * shape->H, inner = R * shape->I;
    *l = (loop_t){.s = *shape};
    l->offset = new_array(shape->E + 1, sizeof(int));
    l->slot = new_array(R, sizeof(int));
    l->x = new_array(wide, sizeof(float));
    l->dy = new_array(wide, sizeof(float));
    l->out = new_array(wide, sizeof(float));
    l->up = new_array(inner, sizeof(float));
    l->glu = new_array(shape->glu ? inner : 0, sizeof(float));
    l->hidden = new_array(inner, sizeof(float));
    l->d = new_array(inner, sizeof(float));
    l->dglu = new_array(shape->glu ? inner : 0, sizeof(float));
    return l;
}

void loop_destroy(loop_t *l)
{
    float *arrays[] = {l->x, l->dy, l->out, l->up, l->glu, l->hidden, l->d, l->dglu};
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) free(arrays[i]);
    free(l->offset);
    free(l->slot);
    free(l);
}

/* Rows by expert: a counting sort. */
static void sort_rows(loop_t *l, const int32_t *expert)
{
    const int R = l->s.T * l->s.K, E = l->s.E;
    memset(l->offset, 0, (size_t)(E + 1) * sizeof(int));
    for (int i = 0; i < R; i++) l->offset[expert[i] + 1]++;
    for (int e = 0; e < E; e++) l->offset[e + 1] += l->offset[e];
    for (int i = 0; i < R; i++) l->slot[l->offset[expert[i]]++] = i;
    for (int e = E; e > 0; e--) l->offset[e] = l->offset[e - 1];
    l->offset[0] = 0;
}

static void gather(const loop_t *l, int expert, const float *from, float *to)
{
    const int H = l->s.H;
    for (int64_t r = l->offset[expert]; r < l->offset[expert + 1]; r++) {
        memcpy(to + r * H, from + (int64_t)(l->slot[r] / l->s.K) * H, (size_t)H * sizeof(float));
    }
}

/* to[token] += weight * from[row]; weight NULL = 1. */
static void scatter(const loop_t *l, int expert, const float *weight, const float *from, float *to)
{
    const int H = l->s.H;
    for (int64_t r = l->offset[expert]; r < l->offset[expert + 1]; r++) {
        float *row = to + (int64_t)(l->slot[r] / l->s.K) * H;
        const float w = weight ? weight[l->slot[r]] : 1;
        for (int h = 0; h < H; h++) row[h] += w * from[r * H + h];
    }
}

void loop_forward(loop_t *l, const matrices_t *w, const float *x, const int32_t *expert, const float *weight,
                  float *y)
{
    const int H = l->s.H, I = l->s.I;
    sort_rows(l, expert);
    memset(y, 0, (size_t)l->s.T * (size_t)H * sizeof(float));
    for (int e = 0; e < l->s.E; e++) {
        const int64_t first = l->offset[e], matrix = (int64_t)e * I * H;
        const int rows = l->offset[e + 1] - l->offset[e];
        gather(l, e, x, l->x);
        product(false, true, rows, I, H, l->x + first * H, w->up + matrix, l->up + first * I, false);
        if (w->glu) product(false, true, rows, I, H, l->x + first * H, w->glu + matrix, l->glu + first * I, false);
        activate_rows(w->glu, (int64_t)rows * I, l->up + first * I, w->glu ? l->glu + first * I : NULL,
                      l->hidden + first * I);
        product(false, true, rows, H, I, l->hidden + first * I, w->down + matrix, l->out + first * H, false);
        scatter(l, e, weight, l->out, y);
    }
}

/* From d = dy w_down of an expert: the gradients of its rows' weights, then d and hidden times the weights. */
static void weigh_rows(loop_t *l, int expert, const float *weight, float *dweight)
{
    const int I = l->s.I;
    for (int64_t r = l->offset[expert]; r < l->offset[expert + 1]; r++) {
        const float w = weight[l->slot[r]];
        float sum = 0;
        for (int64_t i = r * I; i < (r + 1) * I; i++) {
            sum += l->d[i] * l->hidden[i];
            l->d[i] *= w;
            l->hidden[i] *= w;
        }
        dweight[l->slot[r]] = sum;
    }
}

void loop_backward(loop_t *l, const matrices_t *w, const float *dy, const float *weight, float *dx, float *dweight,
                   const matrices_t *gradients)
{
    const int H = l->s.H, I = l->s.I;
    memset(dx, 0, (size_t)l->s.T * (size_t)H * sizeof(float));
    for (int e = 0; e < l->s.E; e++) {
        const int64_t first = l->offset[e], matrix = (int64_t)e * I * H;
        const int rows = l->offset[e + 1] - l->offset[e];
        const float *x = l->x + first * H, *up = l->up + first * I, *glu = w->glu ? l->glu + first * I : NULL;
        float *d = l->d + first * I, *dglu = w->glu ? l->dglu + first * I : NULL, *out = l->out + first * H;
        gather(l, e, dy, l->dy);
        product(false, false, rows, I, H, l->dy + first * H, w->down + matrix, d, false);
        weigh_rows(l, e, weight, dweight);
        product(true, false, H, I, rows, l->dy + first * H, l->hidden + first * I, gradients->down + matrix, false);
        activate_rows_backward(w->glu, (int64_t)rows * I, up, glu, d, d, dglu);
        product(true, false, I, H, rows, d, x, gradients->up + matrix, false);
        product(false, false, rows, H, I, d, w->up + matrix, out, false);
        if (w->glu) {
            product(true, false, I, H, rows, dglu, x, gradients->glu + matrix, false);
            product(false, false, rows, H, I, dglu, w->glu + matrix, out, true);
        }
        scatter(l, e, NULL, l->out, dx);
    }
}
