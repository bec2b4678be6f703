#include "dense.h"

#include <math.h>
#include <string.h>

/* The innermost loops are compiled for several instruction sets, and the machine takes its best. They stand in
 * functions without OpenMP, whose bodies would be compiled only once. */
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))

enum { LANES = 16, ROWS = 8 };
typedef float lanes_t __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float)), may_alias));

/* c = a b for a few rows. Element (i, k) of a stands at a[i * row_stride + k * depth_stride].
 *
 * b  [depth, columns]     c  [rows, columns] */
typedef struct product {
    const float *a, *b;
    float *c;
    int64_t row_stride, depth_stride, depth, columns;
} product_t;

INLINE void product_rows(const product_t *p, int64_t first, int rows)
{
    for (int64_t column = 0; column < p->columns; column += LANES) {
        lanes_t sum[ROWS] = {0};
        const float *a = p->a + first * p->row_stride, *b = p->b + column;
        for (int64_t k = 0; k < p->depth; k++) {
            const lanes_t right = *(const lanes_t *)b;
            for (int i = 0; i < rows; i++) sum[i] += a[i * p->row_stride] * right;
            a += p->depth_stride;
            b += p->columns;
        }
        for (int i = 0; i < rows; i++) *(lanes_t *)(p->c + (first + i) * p->columns + column) = sum[i];
    }
}

CLONES static void product_block(const product_t *p, int64_t first, int64_t rows)
{
    if (rows == ROWS)
        product_rows(p, first, ROWS);
    else
        for (int64_t i = 0; i < rows; i++) product_rows(p, first + i, 1);
}

static void product(const product_t *p, int64_t rows)
{
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < rows; first += ROWS)
        product_block(p, first, rows - first < ROWS ? rows - first : ROWS);
}

static void add_row(float *sum, const float *row)
{
    for (int i = 0; i < WIDTH; i++) sum[i] += row[i];
}

void embedding_forward(const batch_t *batch, int symbols, const float *table, float *x)
{
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < batch->size; t++) {
        memset(x + t * WIDTH, 0, WIDTH * sizeof *x);
        for (int64_t j = 0; j < WINDOW; j++)
            add_row(x + t * WIDTH, table + (j * symbols + batch->context[t * WINDOW + j]) * WIDTH);
    }
}

void embedding_backward(const batch_t *batch, int symbols, float *gradient, const float *dx)
{
#pragma omp parallel for schedule(static)
    for (int64_t j = 0; j < WINDOW; j++) {
        float *table = gradient + j * symbols * WIDTH;
        memset(table, 0, (size_t)symbols * WIDTH * sizeof *table);
        for (int64_t t = 0; t < batch->size; t++)
            add_row(table + batch->context[t * WINDOW + j] * WIDTH, dx + t * WIDTH);
    }
}

/* Logits become probabilities, in place; padding becomes 0. Returns -ln(probability of the target). */
static double softmax_row(const softmax_t *softmax, float *row, int target)
{
    float largest = row[0], sum = 0;
    for (int c = 1; c < softmax->symbols; c++) largest = row[c] > largest ? row[c] : largest;
    const double logit = row[target] - largest;
    for (int c = 0; c < softmax->symbols; c++) sum += row[c] = expf(row[c] - largest);
    for (int c = 0; c < softmax->symbols; c++) row[c] /= sum;
    memset(row + softmax->symbols, 0, (size_t)(softmax->columns - softmax->symbols) * sizeof *row);
    return log(sum) - logit;
}

double softmax_forward(const softmax_t *softmax, const batch_t *batch, const float *hidden)
{
    const int64_t columns = softmax->columns;
    product(&(product_t){.a = hidden,
                         .row_stride = WIDTH,
                         .depth_stride = 1,
                         .b = softmax->matrix,
                         .c = softmax->probability,
                         .depth = WIDTH,
                         .columns = columns},
            batch->size);
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < batch->size; t++)
        softmax->loss[t] = softmax_row(softmax, softmax->probability + t * columns, batch->target[t]);
    double sum = 0;
    for (int64_t t = 0; t < batch->size; t++) sum += softmax->loss[t];
    return sum;
}

void softmax_backward(const softmax_t *softmax, const batch_t *batch, const float *hidden, float *dhidden)
{
    const int64_t columns = softmax->columns;
    float *dlogit = softmax->probability;
    const float scale = 1 / (float)batch->all;
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < batch->size; t++) {
        dlogit[t * columns + batch->target[t]] -= 1;
        for (int64_t c = 0; c < columns; c++) dlogit[t * columns + c] *= scale;
    }
    for (int64_t k = 0; k < WIDTH; k++)
        for (int64_t c = 0; c < columns; c++) softmax->transposed[c * WIDTH + k] = softmax->matrix[k * columns + c];
    product(&(product_t){.a = dlogit,
                         .row_stride = columns,
                         .depth_stride = 1,
                         .b = softmax->transposed,
                         .c = dhidden,
                         .depth = columns,
                         .columns = WIDTH},
            batch->size);
    product(&(product_t){.a = hidden,
                         .row_stride = 1,
                         .depth_stride = WIDTH,
                         .b = dlogit,
                         .c = softmax->gradient,
                         .depth = batch->size,
                         .columns = columns},
            WIDTH);
}

typedef struct adam {
    float rate, epsilon; /* with the bias corrections */
} adam_t;

/* One pass over the four arrays: the step is bound by memory. */
CLONES static void adam_block(const parameter_t *p, int64_t first, int64_t last, adam_t adam)
{
    float *restrict value = p->value, *restrict first_moment = p->first_moment;
    float *restrict second_moment = p->second_moment;
    const float *restrict gradient = p->gradient;
    for (int64_t i = first; i < last; i++) {
        const float g = gradient[i];
        first_moment[i] += 0.1F * (g - first_moment[i]);
        second_moment[i] += 0.001F * (g * g - second_moment[i]);
        value[i] -= adam.rate * first_moment[i] / (sqrtf(second_moment[i]) + adam.epsilon);
    }
}

void adam_step(const parameter_t *parameter, int64_t step, double learning_rate)
{
    const double root = sqrt(1 - pow(0.999, (double)step)), correction = 1 - pow(0.9, (double)step);
    const adam_t adam = {.rate = (float)(learning_rate * root / correction), .epsilon = (float)(1e-8 * root)};
    const int64_t block = 16384;
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < parameter->count; first += block)
        adam_block(parameter, first, first + block < parameter->count ? first + block : parameter->count, adam);
}

void random_normal(float *value, int64_t count, double std, uint64_t seed)
{
    const double pi = 3.14159265358979323846, unit = 0x1p-53;
    for (int64_t i = 0; i < count; i++) {
        const double u = ((double)(random_next(&seed) >> 11) + 1) * unit,
                     v = (double)(random_next(&seed) >> 11) * unit;
        value[i] = (float)(std * sqrt(-2 * log(u)) * cos(2 * pi * v));
    }
}
