/* Random problems for the packed products: types, layouts, data, and what must come out to the last bit. */
#ifndef CUMOE_TESTS_GEMM_PROBLEM_H
#define CUMOE_TESTS_GEMM_PROBLEM_H

#include "host/cpu/gemm.h"

/* Memory on a cache line, every byte set. */
void *allocate(size_t size, int byte);

typedef struct shape {
    int64_t groups, m, n, k; /* per group, the mean of it where ragged */
    cumoe_cpu_ragged_t ragged;
    int parts, terms;    /* 0 = 1 */
    cumoe_dtype_t dtype; /* F64, F32; DEFAULT: every array has its own of F32, BF16 and F16 */
    bool add, epilogue;
} shape_t;

/* The memory of a factor, and the same numbers in double precision. */
typedef struct factor_data {
    void *data;
    double *value;
    int32_t *line_index, *depth_index;
} factor_data_t;

/* The arguments and all that belongs to them. */
typedef struct problem {
    cumoe_cpu_gemm_t gemm;
    factor_data_t a[2], b[2];
    void *c, *initial, *expected; /* [c_size] bytes: both parts, gaps between rows, guards; all compared */
    size_t c_size;
    int32_t *offset;
    char text[256]; /* seed and shape, for messages */
} problem_t;

/* Types, strides, gathers, gaps and data by the seed. C is poisoned, or full of numbers with add. */
void make_problem(problem_t *p, const shape_t *shape, uint64_t seed);
void free_problem(problem_t *p);

/* Write to expected what the chains of fma (or of a product and a sum, where not fused) give. Returns false if such
 * a chain is further from the exact sum than rounding explains. */
bool fill_expected(problem_t *p, bool fused);

#endif
