/* Random problems for the packed products: layouts, data, and what must come out to the last bit. */
#ifndef CUMOE_TESTS_GEMM_PROBLEM_H
#define CUMOE_TESTS_GEMM_PROBLEM_H

#include "host/cpu/gemm.h"

typedef struct random_state {
    uint64_t state;
} random_state_t;

/* A number below bound. */
int64_t draw_below(random_state_t *random, int64_t bound);

/* Memory on a cache line, every byte set. */
void *allocate(size_t size, int byte);

typedef struct shape {
    int64_t groups, m, n, k; /* per group, the mean of it where ragged */
    cumoe_cpu_ragged_t ragged;
    int parts;
    bool f64, add;
} shape_t;

/* The arguments and all that belongs to them. */
typedef struct problem {
    cumoe_cpu_gemm_t gemm;
    bool f64;
    void *a, *b;
    void *c, *initial, *expected; /* [c_size] bytes: both parts, gaps between rows, guards; all compared */
    size_t c_size;
    int32_t *offset, *index[3][2]; /* of a, b[0], b[1]: line and depth */
    char text[320];                /* seed and shape, for messages */
} problem_t;

/* Strides, gathers, gaps and data by the seed. C is poisoned, or full of numbers with add. */
void make_problem(problem_t *p, const shape_t *shape, uint64_t seed);
void free_problem(problem_t *p);

/* Write to expected what the chains of fma (or of a product and a sum, where not fused) give. Returns false if such
 * a chain is further from the exact sum than rounding explains. */
bool fill_expected(problem_t *p, bool fused);

#endif
