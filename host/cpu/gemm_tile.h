/* Between the driver of the grouped products, gemm.c, and what an instruction set offers, gemm_tile.c: packing, and
 * a packed block of rows times a packed panel of columns. */
#ifndef CUMOE_CPU_GEMM_TILE_H
#define CUMOE_CPU_GEMM_TILE_H

#include "host/cpu/gemm.h"

enum { PANEL = CUMOE_CPU_GEMM_COLUMNS };

static inline int64_t min64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static inline int64_t max64(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

static inline int64_t ceil_div(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

typedef enum pack_form {
    FORM_TRANSPOSE, /* lines contiguous along the depth */
    FORM_COPY,      /* neighbouring lines contiguous at every depth */
    FORM_STRIDED,   /* anything else, element by element */
} pack_form_t;

typedef struct pack {
    const cumoe_cpu_factor_t *factor;
    pack_form_t form;
    int64_t group;
    int64_t line, lines;   /* before line_index */
    int64_t depth, depths; /* before depth_index */
    void *to;              /* [strips][depths, width] */
} pack_t;

typedef struct block {
    const void *a;                  /* packed */
    const void *b;                  /* packed */
    void *c;                        /* [rows, cols] */
    int64_t rows, cols, depth;      /* cols <= PANEL */
    int64_t row_stride, col_stride; /* of c */
    bool accumulate;
    bool stream; /* c, which is on cache lines then, goes past the caches */
} block_t;

enum { FEW_ROWS = 4 }; /* that are multiplied without packing B */

enum { SOURCES = 3 }; /* types in memory: that of the sums, BF16, F16 */

/* What an instruction set offers for a type of sums. */
typedef struct kernel {
    int64_t element; /* bytes */
    int64_t mr, lanes;
    void (*pack_a[SOURCES])(const pack_t *);
    void (*pack_b[SOURCES])(const pack_t *);
    void (*block)(const block_t *);
    void (*few[SOURCES])(const pack_t *, const block_t *); /* or NULL: see gemm_few.h */
} kernel_t;

/* The kernel of an instruction set for F64 sums, or for F32 sums; NULL if this machine lacks it. */
const kernel_t *cumoe__cpu_gemm_kernel(cumoe_cpu_isa_t isa, bool f64);

#endif
