/* Grouped matrix products for the CPU: C_g = A_g B_g^T for every expert g, by one packed micro-kernel.
 *
 * Promise: an element of C is  fma(a_k, b_k, ... fma(a_1, b_1, fma(a_0, b_0, c)))  in ascending k, c = 0 or the old
 * value; products and sums in F32 (F64 for F64), rounded to the type of C once, at the end. So its bits depend on
 * its own row, column and k range alone: not on the other rows, the position, the tiles, the number of threads.
 * (Where the machine has no fma, a product and a sum.) Packing does everything else: gathered rows, foreign
 * strides, conversion of 16-bit types panel by panel, the rim of odd sizes. */
#ifndef CUMOE_CPU_GEMM_H
#define CUMOE_CPU_GEMM_H

#include <cumoe/types.h>

#include <stdbool.h>

/* A factor: element (i, k) of group g stands at data + g * group_stride + line(i) * line_stride + depth(k) *
 * depth_stride, with line(i) = line_index ? line_index[i] : i, and depth likewise. For A, i is a row of C, for B a
 * column. F32, BF16 and F16 may meet in a product; F64 stays with F64. Where offset cuts a dimension, i (or k) of
 * group g starts at offset[g] for the factors that have that dimension, before the index is applied. */
typedef struct cumoe_cpu_factor {
    const void *data;
    cumoe_dtype_t dtype;
    int64_t group_stride, line_stride, depth_stride; /* elements */
    const int32_t *line_index, *depth_index;         /* NULL = as it stands */
} cumoe_cpu_factor_t;

typedef enum cumoe_cpu_ragged {
    CUMOE_CPU_RAGGED_NONE,  /* every group is m x n x k */
    CUMOE_CPU_RAGGED_ROWS,  /* group g has rows offset[g] .. offset[g+1]-1 of A and C; m is ignored */
    CUMOE_CPU_RAGGED_DEPTH, /* group g sums over k = offset[g] .. offset[g+1]-1; k is ignored */
} cumoe_cpu_ragged_t;

/* A finished block of sums: rows row..row+rows-1 (counted like row(i) of C), columns col..col+cols-1, cols <=
 * CUMOE_CPU_GEMM_COLUMNS, col a multiple of it. */
typedef struct cumoe_cpu_block {
    int64_t group, row, rows, col, cols;
    void *sum[2];       /* [rows, cols] of each part, F32 (F64 for F64) */
    int64_t sum_stride; /* elements from row to row */
} cumoe_cpu_block_t;

typedef struct cumoe_cpu_gemm {
    int64_t groups, m, n, k;
    cumoe_cpu_ragged_t ragged;
    const int32_t *offset; /* [groups + 1]; NULL with NONE */

    /* parts = 2: C[p] = A[0] B[p]^T, two products with the same A. terms = 2: C[0] = A[0] B[0]^T + A[1] B[1]^T, one
     * sum over both depths in this order. At least one of them is 1. */
    int parts, terms;
    cumoe_cpu_factor_t a[2]; /* [m, k] each */
    cumoe_cpu_factor_t b[2]; /* [n, k] each */

    /* Part p of element (i, j): c[p] + g * c_group_stride + row(i) * c_row_stride + j * c_col_stride, where row(i)
     * counts from offset[g] with RAGGED_ROWS. */
    void *c[2];
    cumoe_dtype_t c_dtype;                              /* F64 if the factors are F64, else F32, BF16 or F16 */
    int64_t c_group_stride, c_row_stride, c_col_stride; /* elements; any, but fastest with c_col_stride = 1 */
    bool add; /* start from the old C, not touched by an empty k range; else from 0, which that writes */

    /* C is so large that it is written past the caches, its sums only where it is on lines of 64 bytes, each group
     * and row. Ignored with add, and for F64 with an epilogue. */
    bool stream;

    /* Called once for every finished block of columns, all parts done and still in cache; what it leaves in the
     * sums goes to C. Blocks come in any order from any thread. Needs c_col_stride = 1. NULL = none. */
    void (*epilogue)(const void *context, const cumoe_cpu_block_t *block);
    const void *context;
} cumoe_cpu_gemm_t;

enum { CUMOE_CPU_GEMM_COLUMNS = 32 };

/* Scratch bytes for any product with so many threads: a constant per thread. */
size_t cumoe__cpu_gemm_workspace(int threads);

/* Compute. workspace is 64-byte aligned. Opens its own OpenMP region of at most so many threads. */
void cumoe__cpu_gemm(const cumoe_cpu_gemm_t *gemm, int threads, void *workspace);

/* The instruction set that was chosen for this machine: "avx512", "avx2" or "portable". */
const char *cumoe__cpu_gemm_isa(void);

typedef enum cumoe_cpu_isa { CUMOE_CPU_ISA_PORTABLE, CUMOE_CPU_ISA_AVX2, CUMOE_CPU_ISA_AVX512 } cumoe_cpu_isa_t;

/* The same with a given instruction set; false if this machine lacks it. For tests, which compare them all. */
bool cumoe__cpu_gemm_with(cumoe_cpu_isa_t isa, const cumoe_cpu_gemm_t *gemm, int threads, void *workspace);

#endif
