/* HIERARCHICAL (App. B): the primary gate is a flat gate over groups; a secondary gate sees the rows of its group
 * alone, as one grouped product. */
#include "host/cpu/gate.h"
#include "host/elementary.h"
#include "host/gate_levels.h"

#include <omp.h>

/* A call as the secondary gates see it. */
typedef struct groups_call {
    const cumoe_config_t *config;
    const cumoe_routing_t *routing;
    cumoe_cpu_level_t level; /* of B experts */
    const cumoe_cpu_gate_scratch_t *scratch;
    const void *dweight; /* [T, K] backward */
    bool has_load;       /* the load loss reaches this level; backward */
} groups_call_t;

/* The quad of a group's first expert in the name of the noise: groups begin with a quad of their own. */
static inline uint32_t first_quad(const cumoe_cpu_level_t *level, int32_t group)
{
    return (uint32_t)group * (((uint32_t)level->experts + 3) / 4);
}

#define REAL  float
#define FN(x) x##_f32
#include "host/cpu/gate_row_real.h"

#include "host/cpu/gate_choose_real.h"

#include "host/cpu/gate_gradient_real.h"

#include "host/cpu/gate_loss_real.h"

#include "host/cpu/gate_groups_real.h"
#undef REAL
#undef FN
#define REAL  double
#define FN(x) x##_f64
#include "host/cpu/gate_row_real.h"

#include "host/cpu/gate_choose_real.h"

#include "host/cpu/gate_gradient_real.h"

#include "host/cpu/gate_loss_real.h"

#include "host/cpu/gate_groups_real.h"
#undef REAL
#undef FN

static cumoe_cpu_level_t primary_level(const cumoe_config_t *c, bool training)
{
    return cumoe__cpu_level(c, training, c->num_groups, c->top_k_groups, CUMOE_NOISE_PRIMARY);
}

static cumoe_cpu_level_t secondary_level(const cumoe_config_t *c, bool training)
{
    return cumoe__cpu_level(c, training, c->num_experts / c->num_groups, c->top_k / c->top_k_groups,
                            CUMOE_NOISE_FLAT);
}

/* Choices as rows of their groups: a stable counting sort. */
static void sort_choices(const cumoe_config_t *c, const cumoe_routing_t *r, const cumoe_cpu_groups_t *g)
{
    const int32_t G = c->num_groups, K1 = c->top_k_groups;
    const int32_t choices = (int32_t)(r->call->live_tokens * K1);
    memset(g->offset, 0, (size_t)(G + 1) * sizeof *g->offset);
    for (int32_t i = 0; i < choices; i++)
        if (r->primary_group[i] >= 0) g->offset[r->primary_group[i] + 1]++;
    for (int32_t i = 0; i < G; i++) g->offset[i + 1] += g->offset[i];
    for (int32_t i = 0; i < choices; i++) {
        g->choice_row[i] = -1;
        if (r->primary_group[i] < 0) continue;
        const int32_t row = g->offset[r->primary_group[i]]++; /* moves on to the begin of the next group */
        g->row_choice[row] = i;
        g->row_token[row] = i / K1;
        g->choice_row[i] = row;
    }
    for (int32_t i = G; i > 0; i--) g->offset[i] = g->offset[i - 1];
    g->offset[0] = 0;
}

/* A secondary pair of matrices, [G] x [B, H]. */
static cumoe_cpu_factor_t gate_factor(const cumoe_config_t *c, const cumoe_cpu_level_t *level, const void *matrix,
                                      cumoe_dtype_t dtype)
{
    return (cumoe_cpu_factor_t){.data = matrix,
                                .dtype = dtype,
                                .group_stride = (int64_t)level->experts * c->hidden_size,
                                .line_stride = c->hidden_size,
                                .depth_stride = 1};
}

/* logits of all rows = gather(x) w_gate^T of the row's group, and raw beside them with noise. */
static void secondary_logits(const groups_call_t *call, const cumoe_weights_t *weights, const void *x,
                             int64_t x_stride)
{
    const cumoe_config_t *c = call->config;
    const cumoe_cpu_level_t *level = &call->level;
    const cumoe_cpu_groups_t *g = &call->scratch->groups;
    const size_t real = cumoe__dtype_size(cumoe__gate_dtype(c));
    const cumoe_cpu_gemm_t gemm = {
        .groups = c->num_groups,
        .n = level->experts,
        .k = c->hidden_size,
        .ragged = CUMOE_CPU_RAGGED_ROWS,
        .offset = g->offset,
        .parts = level->noise ? 2 : 1,
        .terms = 1,
        .a = {{.data = x,
               .dtype = c->dtype,
               .line_stride = x_stride,
               .depth_stride = 1,
               .line_index = g->row_token}},
        .b = {gate_factor(c, level, weights->w_gate, weights->gate_dtype),
              gate_factor(c, level, weights->w_noise, weights->gate_dtype)},
        .c = {g->logits, (char *)g->logits + (size_t)level->experts * real},
        .c_dtype = cumoe__gate_dtype(c),
        .c_row_stride = level->columns,
        .c_col_stride = 1,
    };
    cumoe__cpu_gemm(&gemm, c->max_threads, call->scratch->gemm);
}

void cumoe__cpu_groups_forward(const cumoe_config_t *c, const cumoe_gate_args_t *args,
                               const cumoe_cpu_gate_scratch_t *scratch)
{
    const bool wide = c->dtype == CUMOE_F64;
    const cumoe_config_t first = cumoe__level_config(c, true);
    const cumoe_weights_t first_weights = cumoe__primary_weights(args->weights);
    const cumoe_cpu_level_t level = primary_level(c, args->training);
    cumoe_gate_args_t first_args = *args;
    first_args.weights = &first_weights;
    first_args.routing = cumoe__primary_routing(&args->routing);
    cumoe__cpu_flat_forward(&first, &first_args, &level, scratch);
    cumoe__cpu_reduce_sums(&first, &first_args, level.smooth, scratch);
    memcpy(args->routing.primary_count, scratch->count, (size_t)c->num_groups * sizeof *scratch->count);

    const groups_call_t call = {
        .config = c, .routing = &args->routing, .level = secondary_level(c, args->training), .scratch = scratch};
    sort_choices(c, &args->routing, &scratch->groups);
    secondary_logits(&call, args->weights, args->x, args->x_stride);
    cumoe__cpu_clear_sums(c, scratch);
    (wide ? forward_rows_f64 : forward_rows_f32)(&call, args->num_tokens);
    cumoe__cpu_reduce_sums(c, args, call.level.smooth, scratch);
}

/* The rows' dlogits, half 0 = clean, 1 = raw, as [row, expert] or transposed. */
static cumoe_cpu_factor_t dlogits_factor(const groups_call_t *call, int half, bool transposed)
{
    const cumoe_dtype_t dtype = cumoe__gate_dtype(call->config);
    const size_t skip = (size_t)half * (size_t)call->level.experts * cumoe__dtype_size(dtype);
    return (cumoe_cpu_factor_t){.data = (const char *)call->scratch->groups.logits + skip,
                                .dtype = dtype,
                                .line_stride = transposed ? 1 : call->level.columns,
                                .depth_stride = transposed ? call->level.columns : 1};
}

/* dw_gate and dw_noise of every group: sums over its rows, in the order of tokens. */
static void secondary_weight_gradients(const groups_call_t *call, const cumoe_gate_backward_args_t *args)
{
    const cumoe_config_t *c = call->config;
    const cumoe_cpu_groups_t *g = &call->scratch->groups;
    const int64_t H = c->hidden_size, B = call->level.experts;
    void *const gradients[2] = {args->gradients->w_gate, args->gradients->w_noise};
    for (int half = 0; half < 2; half++) {
        if (!gradients[half]) continue;
        if (half == 1 && !call->level.noise) {
            if (args->gradient_mode == CUMOE_GRADIENT_WRITE)
                memset(gradients[1], 0,
                       (size_t)c->num_experts * (size_t)H * cumoe__dtype_size(args->gradients->gate_dtype));
            continue;
        }
        const cumoe_cpu_gemm_t gemm = {
            .groups = c->num_groups,
            .m = B,
            .n = H,
            .ragged = CUMOE_CPU_RAGGED_DEPTH,
            .offset = g->offset,
            .parts = 1,
            .terms = 1,
            .a = {dlogits_factor(call, half, true)},
            .b = {{.data = args->x,
                   .dtype = c->dtype,
                   .line_stride = 1,
                   .depth_stride = args->x_stride,
                   .depth_index = g->row_token}},
            .c = {gradients[half]},
            .c_dtype = args->gradients->gate_dtype,
            .c_group_stride = B * H,
            .c_row_stride = H,
            .c_col_stride = 1,
            .add = args->gradient_mode == CUMOE_GRADIENT_ADD,
        };
        cumoe__cpu_gemm(&gemm, c->max_threads, call->scratch->gemm);
    }
}

/* dx_gate += dclean w_gate, + draw w_noise, of a token's rows: some columns at a time. */
static void secondary_input_gradient(const groups_call_t *call, const cumoe_gate_backward_args_t *args)
{
    const cumoe_config_t *c = call->config;
    const cumoe_cpu_groups_t *g = &call->scratch->groups;
    const int64_t H = c->hidden_size;
    const cumoe_dtype_t dtype = args->weights->gate_dtype;
    const size_t size = cumoe__dtype_size(dtype);
    for (int64_t column = 0; column < H; column += g->piece_columns) {
        const int64_t columns = H - column < g->piece_columns ? H - column : g->piece_columns;
        cumoe_cpu_factor_t b[2] = {gate_factor(c, &call->level, args->weights->w_gate, dtype),
                                   gate_factor(c, &call->level, args->weights->w_noise, dtype)};
        for (int half = 0; half < 2; half++) { /* transposed, from this column on */
            b[half].data = (const char *)b[half].data + (size_t)column * size;
            b[half].line_stride = 1;
            b[half].depth_stride = H;
        }
        const cumoe_cpu_gemm_t gemm = {
            .groups = c->num_groups,
            .n = columns,
            .k = call->level.experts,
            .ragged = CUMOE_CPU_RAGGED_ROWS,
            .offset = g->offset,
            .parts = 1,
            .terms = call->level.noise ? 2 : 1,
            .a = {dlogits_factor(call, 0, false), dlogits_factor(call, 1, false)},
            .b = {b[0], b[1]},
            .c = {g->piece},
            .c_dtype = cumoe__gate_dtype(c),
            .c_row_stride = columns,
            .c_col_stride = 1,
        };
        cumoe__cpu_gemm(&gemm, c->max_threads, call->scratch->gemm);
        (c->dtype == CUMOE_F64 ? add_piece_f64 : add_piece_f32)(call, args->dx_gate, column, columns);
    }
}

void cumoe__cpu_groups_backward(const cumoe_config_t *c, const cumoe_gate_backward_args_t *args,
                                const cumoe_cpu_gate_scratch_t *scratch)
{
    const bool wide = c->dtype == CUMOE_F64;
    const cumoe_cpu_level_t level = primary_level(c, args->training);
    groups_call_t call = {.config = c,
                          .routing = &args->routing,
                          .level = secondary_level(c, args->training),
                          .scratch = scratch,
                          .dweight = args->dweight};
    const bool load = (wide ? batch_gradients_f64 : batch_gradients_f32)(args, &call);
    call.has_load = load && call.level.smooth;

    /* The rows' logits give the gradients of the primary weights as well. */
    sort_choices(c, &args->routing, &scratch->groups);
    secondary_logits(&call, args->weights, args->x, args->x_stride);
    (wide ? backward_rows_f64 : backward_rows_f32)(&call);
    secondary_weight_gradients(&call, args);

    const cumoe_config_t first = cumoe__level_config(c, true);
    const cumoe_weights_t first_weights = cumoe__primary_weights(args->weights);
    const cumoe_weights_t first_gradients = cumoe__primary_weights(args->gradients);
    const cumoe_cpu_batch_t batch = {.load = load && level.smooth};
    cumoe_cpu_gate_scratch_t first_scratch = *scratch;
    first_scratch.dimportance = NULL; /* its weights reach the loss through the products alone */
    first_scratch.dload = scratch->groups.dload;
    cumoe_gate_backward_args_t first_args = *args;
    first_args.weights = &first_weights;
    first_args.gradients = &first_gradients;
    first_args.routing = cumoe__primary_routing(&args->routing);
    first_args.dweight = scratch->groups.dprimary;
    cumoe__cpu_flat_backward(&first, &first_args, &level, &batch, &first_scratch);
    if (args->dx_gate) secondary_input_gradient(&call, args);
}
