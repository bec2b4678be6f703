/* A flat gate of any kind: logits, noise, choice, weights, and their parts of the sums. Backward logits are
 * computed again, block by block, with the same noise; their gradients give those of w_gate, w_noise and x. Sums
 * over tokens run in the order of tokens, whatever the block and the threads. */
#include "host/cpu/float16.h"
#include "host/cpu/gate.h"
#include "host/elementary.h"

#include <omp.h>

#define REAL  float
#define FN(x) x##_f32
#include "host/cpu/gate_row_real.h"

#include "host/cpu/gate_choose_real.h"

#include "host/cpu/gate_spread_real.h"

#include "host/cpu/gate_gradient_real.h"

#include "host/cpu/rows_real.h"

#include "host/cpu/gate_flat_real.h"

#include "host/cpu/gate_flat_backward_real.h"
#undef REAL
#undef FN
#define REAL  double
#define FN(x) x##_f64
#include "host/cpu/gate_row_real.h"

#include "host/cpu/gate_choose_real.h"

#include "host/cpu/gate_spread_real.h"

#include "host/cpu/gate_gradient_real.h"

#include "host/cpu/rows_real.h"

#include "host/cpu/gate_flat_real.h"

#include "host/cpu/gate_flat_backward_real.h"
#undef REAL
#undef FN

CUMOE_CPU_CLONES static void row_normals(float *restrict normal, int64_t n, uint64_t seed, uint32_t stream,
                                         uint64_t offset, int64_t token, uint32_t level, uint32_t quad)
{
    enum { Q = 16 }; /* quads at a time: one vector register of words */
    for (int64_t q0 = 0; q0 * 4 < n; q0 += Q) {
        float four[4][Q];
        for (int q = 0; q < Q; q++) {
            float next[4];
            cumoe_noise_normals(cumoe_noise_words(seed, stream, offset, token, level, quad + (uint32_t)(q0 + q)),
                                next);
            four[0][q] = next[0], four[1][q] = next[1], four[2][q] = next[2], four[3][q] = next[3];
        }
        for (int q = 0; q < Q; q++)
            for (int j = 0; j < 4; j++) normal[4 * (q0 + q) + j] = four[j][q];
    }
}

/* Clones are static: the symbol that picks one ignores visibility. */
void cumoe__cpu_row_normals(float *restrict normal, int64_t n, const cumoe_call_t *call, uint32_t stream,
                            int64_t row, uint32_t noise_level, uint32_t quad)
{
    row_normals(normal, n, call->seed, stream, call->offset, call->first_token + row, noise_level, quad);
}

void cumoe__cpu_gate_logits(const cumoe_config_t *c, const cumoe_cpu_level_t *level, const cumoe_weights_t *weights,
                            const void *x, int64_t x_stride, int64_t first, int64_t tokens,
                            const cumoe_cpu_gate_scratch_t *scratch)
{
    const int64_t E = level->experts, H = c->hidden_size;
    const size_t real = cumoe__dtype_size(cumoe__gate_dtype(c));
    const cumoe_cpu_gemm_t gemm = {
        .groups = 1,
        .m = tokens,
        .n = E,
        .k = H,
        .parts = level->noise ? 2 : 1,
        .terms = 1,
        .a = {{.data = (const char *)x + (size_t)(first * x_stride) * cumoe__dtype_size(c->dtype),
               .dtype = c->dtype,
               .line_stride = x_stride,
               .depth_stride = 1}},
        .b = {{.data = weights->w_gate, .dtype = weights->gate_dtype, .line_stride = H, .depth_stride = 1},
              {.data = weights->w_noise, .dtype = weights->gate_dtype, .line_stride = H, .depth_stride = 1}},
        .c = {scratch->logits, (char *)scratch->logits + (size_t)E * real},
        .c_dtype = cumoe__gate_dtype(c),
        .c_row_stride = level->columns,
        .c_col_stride = 1,
    };
    cumoe__cpu_gemm(&gemm, c->max_threads, scratch->gemm);
}

/* Slots that are not routed: masked tokens, and rows beyond the live ones. */
static void clear_slots(const cumoe_config_t *c, const cumoe_gate_args_t *args, int32_t K)
{
    const size_t real = cumoe__dtype_size(cumoe__gate_dtype(c));
    const int64_t live = args->routing.call->live_tokens;
#pragma omp parallel for schedule(static) num_threads(c->max_threads)
    for (int64_t t = 0; t < args->num_tokens; t++) {
        if (t < live && cumoe__cpu_token_counts(args->token_mask, t)) continue;
        for (int64_t slot = t * K; slot < (t + 1) * K; slot++) args->routing.expert[slot] = -1;
        memset((char *)args->routing.weight + (size_t)(t * K) * real, 0, (size_t)K * real);
    }
}

void cumoe__cpu_flat_forward(const cumoe_config_t *c, const cumoe_gate_args_t *args, const cumoe_cpu_level_t *level,
                             const cumoe_cpu_gate_scratch_t *scratch)
{
    const bool wide = c->dtype == CUMOE_F64;
    const int64_t live = args->routing.call->live_tokens, block = cumoe__cpu_gate_block(c, args->num_tokens);
    clear_slots(c, args, level->top_k);
    for (int64_t t = 0; c->gate == CUMOE_GATE_EXTERNAL && t < live; t++)
        if (cumoe__cpu_token_counts(args->token_mask, t))
            (wide ? external_token_f64 : external_token_f32)(c, args, t, scratch->counters);
    for (int64_t first = 0; c->gate != CUMOE_GATE_EXTERNAL && first < live; first += block) {
        const int64_t tokens = live - first < block ? live - first : block;
        cumoe__cpu_gate_logits(c, level, args->weights, args->x, args->x_stride, first, tokens, scratch);
        (wide ? forward_block_f64 : forward_block_f32)(c, args, level, first, tokens, scratch);
    }
}

/* The block's dlogits, half 0 = clean, 1 = raw, as [token, expert] or transposed. */
static cumoe_cpu_factor_t dlogits_factor(const cumoe_config_t *c, const cumoe_cpu_level_t *level,
                                         const cumoe_cpu_gate_scratch_t *scratch, int half, bool transposed)
{
    const cumoe_dtype_t dtype = cumoe__gate_dtype(c);
    const size_t skip = (size_t)half * (size_t)level->experts * cumoe__dtype_size(dtype);
    return (cumoe_cpu_factor_t){.data = (const char *)scratch->logits + skip,
                                .dtype = dtype,
                                .line_stride = transposed ? 1 : level->columns,
                                .depth_stride = transposed ? level->columns : 1};
}

/* dx_gate of the block = dclean w_gate, + draw w_noise. */
static void input_gradient(const cumoe_config_t *c, const cumoe_gate_backward_args_t *args,
                           const cumoe_cpu_level_t *level, int64_t first, int64_t tokens,
                           const cumoe_cpu_gate_scratch_t *scratch)
{
    const int64_t H = c->hidden_size;
    const cumoe_dtype_t dtype = args->weights->gate_dtype;
    const cumoe_cpu_gemm_t gemm = {
        .groups = 1,
        .m = tokens,
        .n = H,
        .k = level->experts,
        .parts = 1,
        .terms = level->noise ? 2 : 1,
        .a = {dlogits_factor(c, level, scratch, 0, false), dlogits_factor(c, level, scratch, 1, false)},
        .b = {{.data = args->weights->w_gate, .dtype = dtype, .line_stride = 1, .depth_stride = H},
              {.data = args->weights->w_noise, .dtype = dtype, .line_stride = 1, .depth_stride = H}},
        .c = {(char *)args->dx_gate + (size_t)(first * H) * cumoe__dtype_size(cumoe__gate_dtype(c))},
        .c_dtype = cumoe__gate_dtype(c),
        .c_row_stride = H,
        .c_col_stride = 1,
    };
    cumoe__cpu_gemm(&gemm, c->max_threads, scratch->gemm);
}

/* The tokens of a block that are not padding, whose rows of x may hold anything: 0 * NaN is not 0. */
static int64_t list_counted(const uint8_t *token_mask, int64_t first, int64_t tokens, int32_t *counted)
{
    int64_t n = 0;
    for (int64_t i = 0; i < tokens; i++)
        if (cumoe__cpu_token_counts(token_mask, first + i)) counted[n++] = (int32_t)i;
    return n;
}

/* dw_gate += dclean^T x of the block, dw_noise likewise; the first block of a WRITE begins from 0. */
static void weight_gradients(const cumoe_config_t *c, const cumoe_gate_backward_args_t *args,
                             const cumoe_cpu_level_t *level, int64_t first, int64_t tokens,
                             const cumoe_cpu_gate_scratch_t *scratch)
{
    const int64_t H = c->hidden_size, counted = list_counted(args->token_mask, first, tokens, scratch->counted);
    void *gradients[2] = {args->gradients->w_gate, args->gradients->w_noise};
    const size_t skip = (size_t)(first * args->x_stride) * cumoe__dtype_size(c->dtype);
    for (int half = 0; half < (level->noise ? 2 : 1); half++) {
        if (!gradients[half]) continue;
        cumoe_cpu_gemm_t gemm = {
            .groups = 1,
            .m = level->experts,
            .n = H,
            .k = counted,
            .parts = 1,
            .terms = 1,
            .a = {dlogits_factor(c, level, scratch, half, true)},
            .b = {{.data = (const char *)args->x + skip,
                   .dtype = c->dtype,
                   .line_stride = 1,
                   .depth_stride = args->x_stride}},
            .c = {gradients[half]},
            .c_dtype = args->gradients->gate_dtype,
            .c_row_stride = H,
            .c_col_stride = 1,
            .add = first > 0 || args->gradient_mode == CUMOE_GRADIENT_ADD,
        };
        if (counted < tokens) gemm.a[0].depth_index = gemm.b[0].depth_index = scratch->counted;
        cumoe__cpu_gemm(&gemm, c->max_threads, scratch->gemm);
    }
}

/* WRITE leaves zeros in what no block writes: everything when there is no token, w_noise without noise. */
static void clear_unwritten(const cumoe_config_t *c, const cumoe_gate_backward_args_t *args,
                            const cumoe_cpu_level_t *level, bool any)
{
    if (args->gradient_mode != CUMOE_GRADIENT_WRITE) return;
    const cumoe_weights_t *g = args->gradients;
    const size_t size = (size_t)level->experts * (size_t)c->hidden_size * cumoe__dtype_size(g->gate_dtype);
    if (g->w_gate && !any) memset(g->w_gate, 0, size);
    if (g->w_noise && !(any && level->noise)) memset(g->w_noise, 0, size);
}

void cumoe__cpu_flat_backward(const cumoe_config_t *c, const cumoe_gate_backward_args_t *args,
                              const cumoe_cpu_level_t *level, const cumoe_cpu_batch_t *batch,
                              const cumoe_cpu_gate_scratch_t *scratch)
{
    const int64_t live = args->routing.call->live_tokens, block = cumoe__cpu_gate_block(c, args->num_tokens);
    clear_unwritten(c, args, level, live > 0);
    for (int64_t first = 0; first < live; first += block) {
        const int64_t tokens = live - first < block ? live - first : block;
        if (level->noise || cumoe__has_shares(c->gate))
            cumoe__cpu_gate_logits(c, level, args->weights, args->x, args->x_stride, first, tokens, scratch);
        (c->dtype == CUMOE_F64 ? backward_block_f64 : backward_block_f32)(c, args, level, batch, first, tokens,
                                                                          scratch);
        if (args->dx_gate) input_gradient(c, args, level, first, tokens, scratch);
        weight_gradients(c, args, level, first, tokens, scratch);
    }
}
