/* The parts of the model around the layer, on the host's threads: embedding sum, softmax over the characters, Adam.
 * Every sum has one order, so that the figures do not depend on the number of threads. */
#ifndef DENSE_H
#define DENSE_H

#include "text.h"

enum {
    WIDTH = 64,       /* H: of the model */
    SYMBOL_ALIGN = 16 /* columns of the softmax matrix are padded to a multiple of it */
};

/* One trained array, and what Adam keeps for it. */
typedef struct parameter {
    float *value, *gradient, *first_moment, *second_moment; /* [count] */
    int64_t count;
} parameter_t;

/* x[t] = sum over j of table[j][context[t][j]]
 *
 * table  [WINDOW, V, WIDTH]     x  [size, WIDTH] */
void embedding_forward(const batch_t *batch, int symbols, const float *table, float *x);

/* gradient  [WINDOW, V, WIDTH], overwritten     dx  [size, WIDTH] */
void embedding_backward(const batch_t *batch, int symbols, float *gradient, const float *dx);

typedef struct softmax {
    int symbols, columns; /* V, and V padded */
    const float *matrix;  /* [WIDTH, columns] */
    float *gradient;      /* [WIDTH, columns] */
    float *transposed;    /* [columns, WIDTH] scratch */
    float *probability;   /* [size, columns] scratch from forward to backward */
    double *loss;         /* [size] scratch */
} softmax_t;

/* The sum over the batch of -ln(probability of the target).
 *
 * hidden  [size, WIDTH] */
double softmax_forward(const softmax_t *softmax, const batch_t *batch, const float *hidden);

/* Gradients of the mean of the above over the characters of all parts of the batch.
 *
 * dhidden  [size, WIDTH], overwritten */
void softmax_backward(const softmax_t *softmax, const batch_t *batch, const float *hidden, float *dhidden);

/* One step of Adam (0.9, 0.999, 1e-8); step counts from 1. */
void adam_step(const parameter_t *parameter, int64_t step, double learning_rate);

/* value[i] = N(0, std^2) for i < count. */
void random_normal(float *value, int64_t count, double std, uint64_t seed);

#endif
