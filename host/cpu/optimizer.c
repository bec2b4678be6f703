/* The optimizer step, bound by memory: F32 values and gradients move 28 bytes a value with Adam (value, gradient
 * and moments are read; value and moments written); factored 12 where an expert's gradient stays in the cache from
 * the means to the update, else 16.
 *
 * An array [experts, rows, cols] is walked in tiles, and tiles in parts: in place where the values stand as the
 * arithmetic wants them, else through a buffer. Sums have one order, whatever the layout and the threads. */
#include "host/cpu/cpu.h"
#include "host/cpu/float16.h"

#include <math.h>
#include <string.h>

#define ALWAYS_INLINE static inline __attribute__((always_inline))

enum {
    TILE_ROWS = 32,           /* a cache line of 16-bit values where rows stand side by side */
    TILE_COLS = 4096,         /* most rows in one piece, and sums of columns that fit into the first cache */
    SHARED_COLS = 1024,       /* a thread's columns where threads share an expert */
    BUFFER = 4096,            /* values that are not worked on in place */
    LANES = 16,               /* a row's sum is made of so many: vector code in one order */
    AHEAD = 16,               /* runs of a transposed matrix between prefetch and use */
    SERIAL_VALUES = 32 * 1024 /* below, waking threads costs more than it brings */
};

/* The numbers of one step, by which the kernels multiply. */
typedef struct step {
    double gradient_scale;
    double beta1, rest1, beta2, rest2; /* rest = 1 - beta */
    double rate, root;                 /* learning_rate / (1 - beta1^t), 1 / sqrt(1 - beta2^t) */
    double epsilon, decay;
    double factored_rate; /* learning_rate * sqrt(1 - beta2^t) */
} step_t;

static step_t step_of(const cumoe_optimizer_args_t *args, const cumoe_optimizer_call_t *call)
{
    const double beta1 = (double)args->beta1, beta2 = (double)args->beta2;
    const double t = call->step > 1 ? (double)call->step : 1;
    const double root = sqrt(1 - pow(beta2, t));
    return (step_t){
        .gradient_scale = call->gradient_scale == 0 ? 1 : call->gradient_scale,
        .beta1 = beta1,
        .rest1 = 1 - beta1,
        .beta2 = beta2,
        .rest2 = 1 - beta2,
        .rate = call->learning_rate / (1 - pow(beta1, t)),
        .root = 1 / root,
        .epsilon = (double)args->epsilon,
        .decay = call->learning_rate * (double)args->weight_decay,
        .factored_rate = call->learning_rate * root,
    };
}

/* Rows from first_row and columns from first_col on, of an expert. */
typedef struct block {
    int64_t expert, first_row, rows, first_col, cols;
} block_t;

static block_t whole(const cumoe_parameter_t *p, int64_t expert)
{
    return (block_t){.expert = expert, .rows = p->rows, .cols = p->cols};
}

/* The part of a block that begins at (row, col) and has rows and cols at most. */
static block_t part_of(block_t block, int64_t row, int64_t rows, int64_t col, int64_t cols)
{
    return (block_t){block.expert, block.first_row + row, block.rows - row < rows ? block.rows - row : rows,
                     block.first_col + col, block.cols - col < cols ? block.cols - col : cols};
}

static block_t tile_of(block_t block, int64_t row, int64_t col)
{
    return part_of(block, row, TILE_ROWS, col, TILE_COLS);
}

/* Where a block begins: in a matrix of any layout, and in the state. */
static inline int64_t element_at(const cumoe_matrix_t *m, block_t block)
{
    return block.expert * m->expert_stride + block.first_row * m->row_stride + block.first_col * m->col_stride;
}

static inline int64_t state_at(const cumoe_parameter_t *p, block_t block)
{
    return (block.expert * p->rows + block.first_row) * p->cols + block.first_col;
}

static inline bool is_transposed(const cumoe_matrix_t *m)
{
    return m->row_stride > 0 && m->row_stride < m->col_stride;
}

/* The values can be worked on where they stand, row by row. */
static inline bool in_place(const cumoe_matrix_t *m, size_t size)
{
    return m->col_stride == 1 && cumoe__dtype_size(m->dtype) == size;
}

/* Rows and columns of a part: the whole tile in place; else what a buffer holds, a row, or, of transposed matrices,
 * enough rows for whole cache lines. */
typedef struct shape {
    int64_t rows, cols;
} shape_t;

static inline shape_t shape_of(const cumoe_parameter_t *p, size_t size)
{
    if (is_transposed(&p->value) || is_transposed(&p->gradient)) return (shape_t){TILE_ROWS, BUFFER / TILE_ROWS};
    if (in_place(&p->value, size) && in_place(&p->gradient, size)) return (shape_t){TILE_ROWS, TILE_COLS};
    return (shape_t){1, TILE_COLS};
}

/* How a block is copied between a matrix and a buffer with so many columns: the inner loop goes along the shorter
 * stride of the matrix, so that every cache line is used up at once. */
typedef struct walk {
    int64_t first, outer, outer_stride, buffer_outer, inner, inner_stride, buffer_inner;
} walk_t;

static inline walk_t walk_of(const cumoe_matrix_t *m, block_t block, int64_t buffer_cols)
{
    const int64_t first = element_at(m, block);
    if (is_transposed(m))
        return (walk_t){first, block.cols, m->col_stride, 1, block.rows, m->row_stride, buffer_cols};
    return (walk_t){first, block.rows, m->row_stride, buffer_cols, block.cols, m->col_stride, 1};
}

/* Runs of a transposed matrix are too short and too far apart for the machine to foresee. */
static inline void prefetch_run(const cumoe_matrix_t *m, walk_t w, int64_t outer)
{
    if (w.inner_stride != 1) return;
    const uintptr_t size = cumoe__dtype_size(m->dtype);
    const uintptr_t begin = (uintptr_t)m->data + (uintptr_t)(w.first + outer * w.outer_stride) * size;
    for (uintptr_t at = begin / 64 * 64; at < begin + (uintptr_t)w.inner * size; at += 64)
        __builtin_prefetch((const void *)at);
}

/* The same walk, with what a compiler needs to know for vector code. */
static inline walk_t straight(walk_t w)
{
    w.inner_stride = w.buffer_inner = 1;
    return w;
}

static inline float sqrt_f32(float x)
{
    return sqrtf(x);
}

static inline double sqrt_f64(double x)
{
    return sqrt(x);
}

#define REAL  float
#define FN(x) x##_f32
#include "host/cpu/optimizer_real.h"
#undef REAL
#undef FN
#define REAL  double
#define FN(x) x##_f64
#include "host/cpu/optimizer_real.h"
#undef REAL
#undef FN

/* In step 1 masters begin as the parameters. */
static void fill_master(const cumoe_parameter_t *p, int threads)
{
#pragma omp parallel for collapse(3) schedule(static) num_threads(threads)
    for (int64_t e = 0; e < p->experts; e++)
        for (int64_t row = 0; row < p->rows; row += TILE_ROWS)
            for (int64_t col = 0; col < p->cols; col += TILE_COLS) {
                const block_t part = part_of(whole(p, e), row, TILE_ROWS, col, TILE_COLS);
                load_tile_f32(&p->value, walk_of(&p->value, part, p->cols), (float *)p->master + state_at(p, part));
            }
}

static bool is_contiguous(const cumoe_matrix_t *m, const cumoe_parameter_t *p)
{
    return m->col_stride == 1 && (p->rows == 1 || m->row_stride == p->cols) &&
           m->expert_stride == p->rows * p->cols;
}

/* The same array as one row, for what is done element by element. */
static cumoe_parameter_t one_row(const cumoe_parameter_t *p)
{
    cumoe_parameter_t row = *p;
    row.cols = p->experts * p->rows * p->cols;
    row.experts = row.rows = 1;
    return row;
}

cumoe_status_t cumoe__cpu_optimizer_step(const cumoe_context_t *context, const cumoe_optimizer_args_t *args,
                                         const cumoe_parameter_t *parameters, int count, cumoe_stream_t stream)
{
    (void)stream;
    const cumoe_optimizer_call_t *call = args->call ? args->call : &args->values;
    if (call->skip) return CUMOE_SUCCESS;
    const step_t step = step_of(args, call);
    const bool first = call->step <= 1, f64 = context->config.dtype == CUMOE_F64;
    if (first) memset(args->state, 0, args->state_size);
    for (int i = 0; i < count; i++) {
        cumoe_parameter_t p = parameters[i];
        if (!p.row_mean && is_contiguous(&p.value, &p) && is_contiguous(&p.gradient, &p)) p = one_row(&p);
        const int threads = p.experts * p.rows * p.cols < SERIAL_VALUES ? 1 : context->config.max_threads;
        if (first && p.master) fill_master(&p, threads);
        if (!p.gradient.data) continue;
        if (f64)
            update_array_f64(&p, &step, threads);
        else
            update_array_f32(&p, &step, threads);
    }
    return CUMOE_SUCCESS;
}
