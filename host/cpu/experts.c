/* The experts: two grouped products forward, and their adjoints. Rows of an expert are gathered while they are
 * packed, activations are applied to a block of columns while it is in cache. */
#include "host/activation.h"
#include "host/cpu/cpu.h"
#include "host/cpu/float16.h"
#include "host/cpu/stream.h"
#include "host/weights_layout.h"

#include <string.h>

enum { COLUMNS = CUMOE_CPU_GEMM_COLUMNS, BIAS_COLUMNS = 128 };

/* What the epilogues know. */
typedef struct {
    const cumoe_config_t *config;
    int64_t I, z_width;
    cumoe_matrix_t bias[2];  /* up or down, and glu; data NULL = none */
    const int32_t *row_slot; /* [R] */
    const void *z;           /* [R, z_width] */
    void *hidden;            /* [R, I]; z itself: hidden alone is wanted */
    const void *weight;      /* [T, K] gate type */
    void *dz;                /* [R, z_width] */
    void *scaled;            /* [R, I] gate type: g * hidden, for dw_down. Not rounded to 16 bits: a small g would
                                leave nothing of it in F16, where scaling dy does not help */
    bool stream;             /* hidden, dz and scaled are large, and on cache lines */
    void *partial;           /* [R, panels] gate type: <d, hidden> over the columns of a block */
    int64_t panels;
} epilogue_t;

/* The gradient of a bias: its expert's rows summed. */
typedef struct {
    cumoe_matrix_t gradient; /* [E, 1, width] */
    cumoe_gradient_mode_t mode;
    const cumoe_rows_t *rows;
    const void *data; /* [R, width], or [T, width] */
    cumoe_dtype_t dtype;
    int64_t stride;
    bool of_tokens;     /* data has a row for a token */
    const void *weight; /* [T, K] gate type: rows count so much; NULL = 1 */
} bias_sum_t;

/* The expert e with offset[e] <= row < offset[e + 1]. */
static int64_t expert_of_row(const cumoe_rows_t *rows, int64_t E, int64_t row)
{
    int64_t low = 0, high = E - 1;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (row < rows->offset[middle + 1])
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

#define REAL  float
#define FN(x) x##_f32
#include "host/cpu/rows_real.h"

#include "host/cpu/experts_real.h"
#undef REAL
#undef FN
#define REAL  double
#define FN(x) x##_f64
#include "host/cpu/rows_real.h"

#include "host/cpu/experts_real.h"
#undef REAL
#undef FN

/* An expert matrix [E, rows, cols] as the B of a product: its rows (or columns) are the columns of C. */
static cumoe_cpu_factor_t matrix_factor(cumoe_matrix_t m, bool by_column)
{
    return (cumoe_cpu_factor_t){.data = m.data,
                                .dtype = m.dtype,
                                .group_stride = m.expert_stride,
                                .line_stride = by_column ? m.col_stride : m.row_stride,
                                .depth_stride = by_column ? m.row_stride : m.col_stride};
}

/* Rows [R, width] in order as lines, or as depth. */
static cumoe_cpu_factor_t rows_factor(const void *data, cumoe_dtype_t dtype, int64_t stride, bool as_depth)
{
    return (cumoe_cpu_factor_t){
        .data = data, .dtype = dtype, .line_stride = as_depth ? 1 : stride, .depth_stride = as_depth ? stride : 1};
}

/* Rows of tokens [T, width], gathered. */
static cumoe_cpu_factor_t tokens_factor(const void *data, cumoe_dtype_t dtype, int64_t stride,
                                        const cumoe_rows_t *rows, bool as_depth)
{
    cumoe_cpu_factor_t factor = rows_factor(data, dtype, stride, as_depth);
    *(as_depth ? &factor.depth_index : &factor.line_index) = rows->row_token;
    return factor;
}

/* IDENTITY: z is x, gathered. */
static void gather_rows(const cumoe_config_t *c, const cumoe_up_args_t *args)
{
    const size_t size = cumoe__dtype_size(c->dtype), width = (size_t)c->hidden_size * size;
#pragma omp parallel for schedule(static) num_threads(c->max_threads)
    for (int64_t row = 0; row < args->rows.offset[c->num_experts]; row++) {
        const char *x = (const char *)args->x + (size_t)(args->rows.row_token[row] * args->x_stride) * size;
        memcpy((char *)args->z + (size_t)row * width, x, width);
        if (args->hidden && args->hidden != args->z) memcpy((char *)args->hidden + (size_t)row * width, x, width);
    }
}

/* Whether rows [R, z_width] go past the caches, and those that are written beside them. F64 is for comparisons, not
 * for speed. */
static bool rows_are_large(const cumoe_config_t *c, const cumoe_rows_t *rows)
{
    const int64_t row = cumoe__z_width(c) * (int64_t)cumoe__dtype_size(c->dtype);
    return c->dtype != CUMOE_F64 && rows->offset[c->num_experts] * row >= CUMOE_STREAM_SIZE;
}

cumoe_status_t cumoe__cpu_up(const cumoe_context_t *context, const cumoe_up_args_t *args, cumoe_stream_t stream)
{
    (void)stream;
    const cumoe_config_t *c = &context->config;
    const bool glu = cumoe__is_glu(c->activation);
    const int64_t I = c->intermediate_size, z_width = cumoe__z_width(c);
    const size_t size = cumoe__dtype_size(c->dtype);
    if (cumoe__is_linear(c->activation)) {
        gather_rows(c, args);
        return CUMOE_SUCCESS;
    }
    const bool large = rows_are_large(c, &args->rows);
    const epilogue_t epilogue = {.config = c,
                                 .stream = large && cumoe__on_lines(args->hidden, (size_t)I * size),
                                 .I = I,
                                 .z_width = z_width,
                                 .bias = {cumoe__bias_up(args->weights, c, false),
                                          glu ? cumoe__bias_up(args->weights, c, true) : (cumoe_matrix_t){0}},
                                 .z = args->z,
                                 .hidden = args->hidden};
    const cumoe_cpu_gemm_t gemm = {
        .groups = c->num_experts,
        .n = I,
        .k = c->hidden_size,
        .ragged = CUMOE_CPU_RAGGED_ROWS,
        .offset = args->rows.offset,
        .parts = glu ? 2 : 1,
        .terms = 1,
        .a = {tokens_factor(args->x, c->dtype, args->x_stride, &args->rows, false)},
        .b = {matrix_factor(cumoe__matrix_up(args->weights, c, false), false),
              matrix_factor(cumoe__matrix_up(args->weights, c, true), false)},
        .c = {args->z, (char *)args->z + (size_t)I * size},
        .c_dtype = c->dtype,
        .stream = large,
        .c_row_stride = z_width,
        .c_col_stride = 1,
        .epilogue = !args->hidden && !c->expert_bias ? NULL
                    : c->dtype == CUMOE_F64          ? up_epilogue_f64
                                                     : up_epilogue_f32,
        .context = &epilogue,
    };
    cumoe__cpu_gemm(&gemm, c->max_threads, args->workspace);
    return CUMOE_SUCCESS;
}

cumoe_status_t cumoe__cpu_down(const cumoe_context_t *context, const cumoe_down_args_t *args, cumoe_stream_t stream)
{
    (void)stream;
    const cumoe_config_t *c = &context->config;
    const epilogue_t epilogue = {.config = c, .bias = {cumoe__bias_down(args->weights, c)}};
    const cumoe_cpu_gemm_t gemm = {
        .groups = c->num_experts,
        .n = c->hidden_size,
        .k = c->intermediate_size,
        .ragged = CUMOE_CPU_RAGGED_ROWS,
        .offset = args->rows.offset,
        .parts = 1,
        .terms = 1,
        .a = {rows_factor(args->hidden, c->dtype, c->intermediate_size, false)},
        .b = {matrix_factor(cumoe__matrix_down(args->weights), false)},
        .c = {args->output},
        .c_dtype = c->dtype,
        .c_row_stride = c->hidden_size,
        .c_col_stride = 1,
        .epilogue = !c->expert_bias         ? NULL
                    : c->dtype == CUMOE_F64 ? down_epilogue_f64
                                            : down_epilogue_f32,
        .context = &epilogue,
    };
    cumoe__cpu_gemm(&gemm, c->max_threads, args->workspace);
    return CUMOE_SUCCESS;
}

/* Scratch of down_backward. */
typedef struct {
    void *scaled;  /* [R, I] gate type */
    void *partial; /* [R, panels] */
    int64_t panels;
    void *gemm;
    size_t size;
} down_scratch_t;

static down_scratch_t down_scratch(const cumoe_config_t *c, int64_t num_tokens, void *workspace)
{
    const size_t R = (size_t)cumoe__max_rows(c, num_tokens), size = cumoe__dtype_size(cumoe__gate_dtype(c));
    cumoe_arena_t arena = {(uintptr_t)workspace, 0};
    down_scratch_t s = {.panels = (c->intermediate_size + CUMOE_CPU_GEMM_COLUMNS - 1) / CUMOE_CPU_GEMM_COLUMNS};
    s.scaled = cumoe__take(&arena, R * (size_t)c->intermediate_size * size);
    s.partial = cumoe__take(&arena, R * (size_t)s.panels * size);
    s.gemm = cumoe__take(&arena, cumoe__cpu_gemm_workspace(c->max_threads));
    s.size = arena.used;
    return s;
}

size_t cumoe__cpu_down_backward_workspace(const cumoe_context_t *context, int64_t num_tokens)
{
    return down_scratch(&context->config, num_tokens, NULL).size;
}

/* A gradient [E, rows, cols] of experts: C_e = A_e B_e^T summed over the expert's rows. */
static void weight_gradient(const cumoe_config_t *c, cumoe_matrix_t gradient, int64_t rows, int64_t cols,
                            cumoe_cpu_factor_t a, cumoe_cpu_factor_t b, const int32_t *offset,
                            cumoe_gradient_mode_t mode, void *workspace)
{
    if (!gradient.data) return;
    const cumoe_cpu_gemm_t gemm = {
        .groups = c->num_experts,
        .m = rows,
        .n = cols,
        .ragged = CUMOE_CPU_RAGGED_DEPTH,
        .offset = offset,
        .parts = 1,
        .terms = 1,
        .a = {a},
        .b = {b},
        .c = {gradient.data},
        .c_dtype = gradient.dtype,
        .c_group_stride = gradient.expert_stride,
        .c_row_stride = gradient.row_stride,
        .c_col_stride = gradient.col_stride,
        .add = mode == CUMOE_GRADIENT_ADD,
        .stream = c->num_experts * rows * cols * (int64_t)cumoe__dtype_size(gradient.dtype) >= CUMOE_STREAM_SIZE,
    };
    cumoe__cpu_gemm(&gemm, c->max_threads, workspace);
}

static void bias_gradient(const cumoe_config_t *c, const bias_sum_t *s, int64_t width)
{
    if (!s->gradient.data) return;
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(c->max_threads)
    for (int64_t e = 0; e < c->num_experts; e++)
        for (int64_t first = 0; first < width; first += BIAS_COLUMNS) {
            const int64_t cols = width - first < BIAS_COLUMNS ? width - first : BIAS_COLUMNS;
            (c->dtype == CUMOE_F64 ? sum_columns_f64 : sum_columns_f32)(s, e, first, cols);
        }
}

cumoe_status_t cumoe__cpu_down_backward(const cumoe_context_t *context, const cumoe_down_backward_args_t *args,
                                        cumoe_stream_t stream)
{
    (void)stream;
    const cumoe_config_t *c = &context->config;
    const bool wide = c->dtype == CUMOE_F64;
    const int64_t H = c->hidden_size, I = c->intermediate_size, z_width = cumoe__z_width(c);
    const down_scratch_t scratch = down_scratch(c, args->num_tokens, args->workspace);
    const size_t size = cumoe__dtype_size(c->dtype);
    const bool large = rows_are_large(c, &args->rows);
    const epilogue_t epilogue = {.config = c,
                                 .stream = large && cumoe__on_lines(args->dz, (size_t)I * size) &&
                                           cumoe__on_lines(scratch.scaled, (size_t)I * size),
                                 .I = I,
                                 .z_width = z_width,
                                 .row_slot = args->rows.row_slot,
                                 .z = args->z,
                                 .weight = args->routing.weight,
                                 .dz = args->dz,
                                 .scaled = scratch.scaled,
                                 .partial = scratch.partial,
                                 .panels = scratch.panels};

    /* d = gather(dy) w_down, and from it dz, g hidden and the parts of dweight. */
    const cumoe_cpu_gemm_t gemm = {
        .groups = c->num_experts,
        .n = I,
        .k = H,
        .ragged = CUMOE_CPU_RAGGED_ROWS,
        .offset = args->rows.offset,
        .parts = 1,
        .terms = 1,
        .a = {tokens_factor(args->dy, c->dtype, args->dy_stride, &args->rows, false)},
        .b = {matrix_factor(cumoe__matrix_down(args->weights), true)},
        .c = {args->dz},
        .c_dtype = c->dtype,
        .stream = large,
        .c_row_stride = z_width,
        .c_col_stride = 1,
        .epilogue = wide ? down_backward_epilogue_f64 : down_backward_epilogue_f32,
        .context = &epilogue,
    };
    cumoe__cpu_gemm(&gemm, c->max_threads, scratch.gemm);
    (wide ? write_dweight_f64 : write_dweight_f32)(c, args, &epilogue);

    weight_gradient(c, cumoe__matrix_down(args->gradients), H, I,
                    tokens_factor(args->dy, c->dtype, args->dy_stride, &args->rows, true),
                    rows_factor(scratch.scaled, cumoe__gate_dtype(c), I, true), args->rows.offset,
                    args->gradient_mode, scratch.gemm);
    const bias_sum_t bias = {.gradient = cumoe__bias_down(args->gradients, c),
                             .mode = args->gradient_mode,
                             .rows = &args->rows,
                             .data = args->dy,
                             .dtype = c->dtype,
                             .stride = args->dy_stride,
                             .of_tokens = true,
                             .weight = args->routing.weight};
    bias_gradient(c, &bias, H);
    return CUMOE_SUCCESS;
}

/* drows = dz_up w_up + dz_glu w_glu: one sum, rounded once. */
static void rows_gradient(const cumoe_config_t *c, const cumoe_up_backward_args_t *args)
{
    const bool glu = cumoe__is_glu(c->activation);
    const int64_t I = c->intermediate_size, z_width = cumoe__z_width(c);
    const char *dz_glu = (const char *)args->dz + (size_t)I * cumoe__dtype_size(c->dtype);
    const cumoe_cpu_gemm_t gemm = {
        .groups = c->num_experts,
        .n = c->hidden_size,
        .k = I,
        .ragged = CUMOE_CPU_RAGGED_ROWS,
        .offset = args->rows.offset,
        .parts = 1,
        .terms = glu ? 2 : 1,
        .a = {rows_factor(args->dz, c->dtype, z_width, false), rows_factor(dz_glu, c->dtype, z_width, false)},
        .b = {matrix_factor(cumoe__matrix_up(args->weights, c, false), true),
              matrix_factor(cumoe__matrix_up(args->weights, c, true), true)},
        .c = {args->drows},
        .c_dtype = c->dtype,
        .c_row_stride = c->hidden_size,
        .c_col_stride = 1,
    };
    cumoe__cpu_gemm(&gemm, c->max_threads, args->workspace);
}

cumoe_status_t cumoe__cpu_up_backward(const cumoe_context_t *context, const cumoe_up_backward_args_t *args,
                                      cumoe_stream_t stream)
{
    (void)stream;
    const cumoe_config_t *c = &context->config;
    const int halves = cumoe__is_glu(c->activation) ? 2 : 1;
    const int64_t I = c->intermediate_size, z_width = cumoe__z_width(c);
    const size_t size = cumoe__dtype_size(c->dtype);
    if (cumoe__is_linear(c->activation)) { /* z is x: dz is drows */
        const size_t bytes = (size_t)args->rows.offset[c->num_experts] * (size_t)I * size;
        if (bytes && args->drows && args->drows != args->dz) memcpy(args->drows, args->dz, bytes);
        return CUMOE_SUCCESS;
    }
    if (args->drows) rows_gradient(c, args);
    for (int half = 0; half < halves; half++) {
        const char *dz = (const char *)args->dz + (size_t)(half * I) * size;
        weight_gradient(c, cumoe__matrix_up(args->gradients, c, half == 1), I, c->hidden_size,
                        rows_factor(dz, c->dtype, z_width, true),
                        tokens_factor(args->x, c->dtype, args->x_stride, &args->rows, true), args->rows.offset,
                        args->gradient_mode, args->workspace);
        const bias_sum_t bias = {.gradient = cumoe__bias_up(args->gradients, c, half == 1),
                                 .mode = args->gradient_mode,
                                 .rows = &args->rows,
                                 .data = dz,
                                 .dtype = c->dtype,
                                 .stride = z_width};
        bias_gradient(c, &bias, I);
    }
    return CUMOE_SUCCESS;
}
