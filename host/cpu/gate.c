/* The gate: logits, noise, choice, weights, and the sums and losses that balance the experts. */
#include "host/cpu/gate.h"
#include "host/cpu/float16.h"
#include "host/elementary.h"

#include <omp.h>

#define REAL  float
#define FN(x) x##_f32
#include "host/cpu/gate_row_real.h"

#include "host/cpu/gate_choose_real.h"

#include "host/cpu/gate_spread_real.h"

#include "host/cpu/rows_real.h"

#include "host/cpu/gate_real.h"
#undef REAL
#undef FN
#define REAL  double
#define FN(x) x##_f64
#include "host/cpu/gate_row_real.h"

#include "host/cpu/gate_choose_real.h"

#include "host/cpu/gate_spread_real.h"

#include "host/cpu/rows_real.h"

#include "host/cpu/gate_real.h"
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

static void place_groups(cumoe_arena_t *arena, const cumoe_config_t *c, int64_t num_tokens, bool backward,
                         cumoe_cpu_groups_t *groups)
{
    const int64_t G = c->num_groups, K1 = c->top_k_groups, B = c->num_experts / G, H = c->hidden_size;
    const size_t choices = (size_t)(num_tokens * K1), real = cumoe__dtype_size(cumoe__gate_dtype(c));
    groups->offset = cumoe__take(arena, (size_t)(G + 1) * sizeof(int32_t));
    groups->row_token = cumoe__take(arena, choices * sizeof(int32_t));
    groups->row_choice = cumoe__take(arena, choices * sizeof(int32_t));
    groups->choice_row = cumoe__take(arena, choices * sizeof(int32_t));
    groups->logits = cumoe__take(arena, choices * 2 * (size_t)B * real);
    if (!backward) return;
    /* No more than the logits take, for the rows' dx: H may be large beside G and B. */
    const int64_t fitting = 2 * (G + K1 * B) / K1, columns = fitting < 256 ? 256 : fitting;
    groups->piece_columns = columns < H ? columns : H;
    groups->piece = cumoe__take(arena, choices * (size_t)groups->piece_columns * real);
    groups->dprimary = cumoe__take(arena, choices * real);
    groups->dload = cumoe__take(arena, (size_t)G * real);
}

cumoe_cpu_gate_scratch_t cumoe__cpu_gate_scratch(const cumoe_context_t *context, int64_t num_tokens, bool backward,
                                                 void *workspace)
{
    const cumoe_config_t *c = &context->config;
    const size_t E = (size_t)c->num_experts, threads = (size_t)c->max_threads;
    const size_t real = cumoe__dtype_size(cumoe__gate_dtype(c));
    const int32_t first = cumoe__cpu_first_experts(c),
                  second = c->num_experts / (c->num_groups ? c->num_groups : 1);
    cumoe_arena_t arena = {(uintptr_t)workspace, 0};
    cumoe_cpu_gate_scratch_t s = {.row_experts = first > second ? first : second};
    s.numbers = cumoe__take(&arena, E * sizeof(double));
    s.counters = cumoe__take(&arena, backward ? 0 : threads * CUMOE_CPU_GATE_COUNTERS * sizeof(int64_t));
    s.count = cumoe__take(&arena, backward ? 0 : E * sizeof(int32_t));
    if (c->gate == CUMOE_GATE_EXTERNAL) {
        s.size = arena.used;
        return s;
    }
    const size_t block = (size_t)cumoe__cpu_gate_block(c, num_tokens), row = (size_t)s.row_experts;
    const int64_t columns = cumoe__cpu_level(c, true, first, c->top_k, CUMOE_NOISE_FLAT).columns;
    s.sums = cumoe__take(&arena, backward ? 0 : threads * 2 * E * sizeof(int64_t));
    s.dimportance = cumoe__take(&arena, backward ? E * real : 0);
    s.dload = cumoe__take(&arena, backward ? E * real : 0);
    s.counted = cumoe__take(&arena, backward ? block * sizeof(int32_t) : 0);
    s.logits = cumoe__take(&arena, block * (size_t)columns * real);
    s.rows = cumoe__take(&arena, threads * 4 * row * real);
    s.square = cumoe__take(&arena, !backward && cumoe__has_shares(c->gate) ? (size_t)num_tokens * real : 0);
    s.normals = cumoe__take(&arena, threads * (size_t)cumoe__cpu_normals_stride(s.row_experts) * sizeof(float));
    if (c->gate == CUMOE_GATE_HIERARCHICAL) place_groups(&arena, c, num_tokens, backward, &s.groups);
    if (!backward && c->gate == CUMOE_GATE_BALANCED) {
        s.gates = cumoe__take(&arena, E * (size_t)num_tokens * real);
        s.cut = cumoe__take(&arena, E * real);
        s.last = cumoe__take(&arena, E * sizeof(int32_t));
        s.is_nan = cumoe__take(&arena, (size_t)num_tokens);
    }
    s.gemm = cumoe__take(&arena, cumoe__cpu_gemm_workspace(c->max_threads));
    s.size = arena.used;
    return s;
}

size_t cumoe__cpu_gate_workspace(const cumoe_context_t *context, int64_t num_tokens)
{
    return cumoe__cpu_gate_scratch(context, num_tokens, false, NULL).size;
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

double cumoe__cpu_cv2(const double *values, int64_t n, double *mean)
{
    double total = 0, squares = 0;
    for (int64_t i = 0; i < n; i++) total += values[i];
    const double average = total / (double)n;
    for (int64_t i = 0; i < n; i++) squares += (values[i] - average) * (values[i] - average);
    if (mean) *mean = average;
    return average > 0 ? squares / (double)n / (average * average) : 0;
}

void cumoe__cpu_loads(const cumoe_config_t *c, const cumoe_routing_t *routing, double *loads)
{
    const double unit = cumoe__cpu_fixed_unit(c);
    for (int64_t e = 0; e < c->num_experts; e++) loads[e] = (double)routing->load[e] * unit;
    if (c->gate != CUMOE_GATE_HIERARCHICAL) return;
    const int32_t B = c->num_experts / c->num_groups;
    for (int32_t e = 0; e < c->num_experts; e++) { /* eq. 14 */
        const double tokens = routing->primary_count[e / B], primary = (double)routing->primary_load[e / B] * unit;
        loads[e] = tokens > 0 ? primary * loads[e] / tokens : 0;
    }
}

/* The numbers of the call, for all later stages: the caller's, or those in device memory. */
static void write_call(const cumoe_gate_args_t *args)
{
    cumoe_call_t call = {args->seed, args->offset, args->first_token, args->num_tokens};
    if (args->call) call = *args->call;
    if (call.live_tokens < 0) call.live_tokens = 0;
    if (call.live_tokens > args->num_tokens) call.live_tokens = args->num_tokens;
    *args->routing.call = call;
    *args->routing.tokens = 0;
    for (int64_t t = 0; t < call.live_tokens; t++)
        *args->routing.tokens += cumoe__cpu_token_counts(args->token_mask, t);
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

void cumoe__cpu_clear_sums(const cumoe_config_t *c, const cumoe_cpu_gate_scratch_t *scratch)
{
    if (scratch->sums)
        memset(scratch->sums, 0, (size_t)c->max_threads * 2 * (size_t)c->num_experts * sizeof(int64_t));
}

/* Rows per expert, over all slots in use. */
static void count_rows(const cumoe_config_t *c, const cumoe_gate_args_t *args, int32_t *count)
{
    const int64_t live = args->routing.call->live_tokens;
    const int64_t slots = live > 0 ? cumoe__cpu_slots_of(c, args->routing.token_slot, live - 1).end : 0;
    memset(count, 0, (size_t)c->num_experts * sizeof *count);
    for (int64_t slot = 0; slot < slots; slot++)
        if (args->routing.expert[slot] >= 0) count[args->routing.expert[slot]]++;
}

/* Integers, so the order is free. What is no load stays in the first thread's sums. */
void cumoe__cpu_reduce_sums(const cumoe_config_t *c, const cumoe_gate_args_t *args, bool smooth,
                            const cumoe_cpu_gate_scratch_t *scratch)
{
    const int64_t E = c->num_experts;
    count_rows(c, args, scratch->count);
    for (int64_t e = 0; e < E; e++) {
        int64_t importance = 0, load = 0;
        for (int thread = 0; scratch->sums && thread < c->max_threads; thread++) {
            importance += scratch->sums[thread * 2 * E + e];
            load += scratch->sums[thread * 2 * E + E + e];
        }
        if (scratch->sums) scratch->sums[E + e] = load;
        args->routing.importance[e] = importance;
        args->routing.load[e] = smooth ? load : (int64_t)scratch->count[e] << CUMOE_FIXED_POINT_BITS(c->dtype);
    }
}

/* E sum_e f_e p_e, from the sums of probabilities. */
static double switch_loss(const cumoe_config_t *c, const cumoe_gate_args_t *args, const cumoe_cpu_gate_scratch_t *s)
{
    const double tokens = (double)*args->routing.tokens, unit = cumoe__cpu_fixed_unit(c);
    double sum = 0;
    for (int64_t e = 0; tokens > 0 && e < c->num_experts; e++)
        sum += (double)s->count[e] / tokens * ((double)s->sums[c->num_experts + e] * unit / tokens);
    return (double)c->num_experts * sum;
}

static double importance_loss(const cumoe_config_t *c, const cumoe_routing_t *routing, double *numbers)
{
    const double unit = cumoe__cpu_fixed_unit(c);
    for (int64_t e = 0; e < c->num_experts; e++) numbers[e] = (double)routing->importance[e] * unit;
    return cumoe__cpu_cv2(numbers, c->num_experts, NULL);
}

static void write_statistics(const cumoe_config_t *c, const cumoe_gate_args_t *args,
                             const cumoe_cpu_gate_scratch_t *scratch, double cv2_importance, double cv2_load,
                             int64_t dropped_rows)
{
    cumoe_statistics_t s = {.tokens = *args->routing.tokens,
                            .dropped_rows = dropped_rows,
                            .cv_importance = sqrt(cv2_importance),
                            .cv_load = sqrt(cv2_load)};
    for (int thread = 0; thread < c->max_threads; thread++) {
        const int64_t *counters = scratch->counters + thread * CUMOE_CPU_GATE_COUNTERS;
        s.nan_logits += counters[COUNT_NAN_LOGITS];
        s.nan_tokens += counters[COUNT_NAN_TOKENS];
        s.bad_indices += counters[COUNT_BAD_INDICES];
    }
    double total_load = 0, max_load = 0;
    for (int64_t e = 0; e < c->num_experts; e++) {
        const double load = scratch->numbers[e];
        s.rows += scratch->count[e];
        if (scratch->count[e] > s.max_count) s.max_count = scratch->count[e];
        if (load > max_load) max_load = load;
        total_load += load;
    }
    if (total_load > 0) s.max_over_mean_load = max_load * c->num_experts / total_load;
    if (s.rows > 0) s.max_over_mean_count = (double)s.max_count * c->num_experts / (double)s.rows;
    *args->statistics = s;
}

/* Everything that is asked for beside the routing. */
static void finish(const cumoe_config_t *c, const cumoe_gate_args_t *args, const cumoe_cpu_batch_result_t *batch,
                   const cumoe_cpu_gate_scratch_t *scratch)
{
    const double cv2_importance = importance_loss(c, &args->routing, scratch->numbers);
    cumoe__cpu_loads(c, &args->routing, scratch->numbers);
    const double cv2_load = cumoe__cpu_cv2(scratch->numbers, c->num_experts, NULL);
    double losses[CUMOE_NUM_LOSSES] = {[CUMOE_LOSS_THRESHOLD] = batch->threshold_loss};
    if (c->gate != CUMOE_GATE_EXTERNAL) {
        losses[CUMOE_LOSS_IMPORTANCE] = cv2_importance;
        losses[CUMOE_LOSS_LOAD] = cv2_load;
    }
    if (args->losses && cumoe__has_shares(c->gate)) {
        losses[CUMOE_LOSS_SWITCH] = switch_loss(c, args, scratch);
        losses[CUMOE_LOSS_Z] =
            c->dtype == CUMOE_F64 ? z_loss_f64(args, scratch->square) : z_loss_f32(args, scratch->square);
    }
    (c->dtype == CUMOE_F64 ? write_sums_f64 : write_sums_f32)(c, args, scratch->numbers, losses);
    if (args->expert_count)
        memcpy(args->expert_count, scratch->count, (size_t)c->num_experts * sizeof *scratch->count);
    if (args->statistics) write_statistics(c, args, scratch, cv2_importance, cv2_load, batch->dropped_rows);
}

cumoe_status_t cumoe__cpu_gate(const cumoe_context_t *context, const cumoe_gate_args_t *args, cumoe_stream_t stream)
{
    (void)stream;
    const cumoe_config_t *c = &context->config;
    const cumoe_cpu_gate_scratch_t scratch =
        cumoe__cpu_gate_scratch(context, args->num_tokens, false, args->workspace);
    const cumoe_cpu_level_t level = cumoe__cpu_flat_level(c, args->training);
    cumoe_cpu_batch_result_t batch = {0};
    write_call(args);
    memset(scratch.counters, 0, (size_t)c->max_threads * CUMOE_CPU_GATE_COUNTERS * sizeof(int64_t));
    cumoe__cpu_clear_sums(c, &scratch);
    if (c->gate == CUMOE_GATE_HIERARCHICAL) {
        cumoe__cpu_groups_forward(c, args, &scratch);
    } else {
        if (c->gate == CUMOE_GATE_BALANCED)
            batch = cumoe__cpu_balanced_forward(c, args, &scratch);
        else
            cumoe__cpu_flat_forward(c, args, &level, &scratch);
        cumoe__cpu_reduce_sums(c, args, level.smooth, &scratch);
    }
    finish(c, args, &batch, &scratch);
    return CUMOE_SUCCESS;
}

cumoe_status_t cumoe__cpu_gate_bias_update(const cumoe_context_t *context, void *gate_bias,
                                           const int32_t *expert_count, float rate, cumoe_stream_t stream)
{
    (void)stream;
    const int64_t E = context->config.num_experts;
    int64_t total = 0;
    for (int64_t e = 0; e < E; e++) total += expert_count[e];
    for (int64_t e = 0; e < E; e++) {
        const int64_t above = expert_count[e] * E - total; /* the mean, times E */
        const float step = above > 0 ? -rate : above < 0 ? rate : 0;
        if (context->config.dtype == CUMOE_F64)
            ((double *)gate_bias)[e] += (double)step;
        else
            ((float *)gate_bias)[e] += step;
    }
    return CUMOE_SUCCESS;
}
