/* The gate: logits, noise, choice, weights, and the sums and losses that balance the experts. */
#include "host/cpu/gate.h"
#include "host/cpu/float16.h"
#include "host/elementary.h"
#include "host/philox.h"

#include <omp.h>

#define REAL  float
#define FN(x) x##_f32
#include "host/cpu/gate_row_real.h"

#include "host/cpu/rows_real.h"

#include "host/cpu/gate_real.h"
#undef REAL
#undef FN
#define REAL  double
#define FN(x) x##_f64
#include "host/cpu/gate_row_real.h"

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

cumoe_cpu_gate_scratch_t cumoe__cpu_gate_scratch(const cumoe_context_t *context, int64_t num_tokens, bool backward,
                                                 void *workspace)
{
    const cumoe_config_t *c = &context->config;
    const size_t E = (size_t)c->num_experts, threads = (size_t)c->max_threads;
    const size_t real = cumoe__dtype_size(cumoe__gate_dtype(c));
    const bool learned = c->gate != CUMOE_GATE_EXTERNAL;
    cumoe_arena_t arena = {(uintptr_t)workspace, 0};
    cumoe_cpu_gate_scratch_t s = {0};
    s.counters = cumoe__take(&arena, backward ? 0 : threads * CUMOE_CPU_GATE_COUNTERS * sizeof(int64_t));
    s.count = cumoe__take(&arena, backward ? 0 : E * sizeof(int32_t));
    if (learned) {
        const size_t block = (size_t)cumoe__cpu_gate_block(c, num_tokens);
        s.sums = cumoe__take(&arena, backward ? 0 : threads * 2 * E * sizeof(int64_t));
        s.dimportance = cumoe__take(&arena, backward ? E * real : 0);
        s.dload = cumoe__take(&arena, backward ? E * real : 0);
        s.counted = cumoe__take(&arena, backward ? block * sizeof(int32_t) : 0);
        s.logits = cumoe__take(&arena, block * (size_t)cumoe__cpu_flat_level(c, true).columns * real);
        s.rows = cumoe__take(&arena, threads * 4 * (size_t)cumoe__cpu_row_experts(c) * real);
        s.square = cumoe__take(&arena, !backward && cumoe__cpu_has_spread(c) ? (size_t)num_tokens * real : 0);
        s.normals = cumoe__take(&arena, threads * (size_t)cumoe__cpu_normals_stride(c) * sizeof(float));
        s.gemm = cumoe__take(&arena, cumoe__cpu_gemm_workspace(c->max_threads));
    }
    s.size = arena.used;
    return s;
}

size_t cumoe__cpu_gate_workspace(const cumoe_context_t *context, int64_t num_tokens)
{
    return cumoe__cpu_gate_scratch(context, num_tokens, false, NULL).size;
}

void cumoe__cpu_gate_logits(const cumoe_context_t *context, const cumoe_weights_t *weights, const void *x,
                            int64_t x_stride, int64_t first, int64_t tokens, bool noise,
                            const cumoe_cpu_gate_scratch_t *scratch)
{
    const cumoe_config_t *c = &context->config;
    const int64_t E = c->num_experts, H = c->hidden_size;
    const size_t real = cumoe__dtype_size(cumoe__gate_dtype(c));
    const cumoe_cpu_gemm_t gemm = {
        .groups = 1,
        .m = tokens,
        .n = E,
        .k = H,
        .parts = noise ? 2 : 1,
        .terms = 1,
        .a = {{.data = (const char *)x + (size_t)(first * x_stride) * cumoe__dtype_size(c->dtype),
               .dtype = c->dtype,
               .line_stride = x_stride,
               .depth_stride = 1}},
        .b = {{.data = weights->w_gate, .dtype = weights->gate_dtype, .line_stride = H, .depth_stride = 1},
              {.data = weights->w_noise, .dtype = weights->gate_dtype, .line_stride = H, .depth_stride = 1}},
        .c = {scratch->logits, (char *)scratch->logits + (size_t)E * real},
        .c_dtype = cumoe__gate_dtype(c),
        .c_row_stride = cumoe__cpu_flat_level(c, noise).columns,
        .c_col_stride = 1,
    };
    cumoe__cpu_gemm(&gemm, c->max_threads, scratch->gemm);
}

double cumoe__cpu_cv2(const int64_t *sums, int64_t E, double unit, double *mean)
{
    double total = 0, squares = 0;
    for (int64_t e = 0; e < E; e++) total += (double)sums[e] * unit;
    const double average = total / (double)E;
    for (int64_t e = 0; e < E; e++) {
        const double deviation = (double)sums[e] * unit - average;
        squares += deviation * deviation;
    }
    if (mean) *mean = average;
    return average > 0 ? squares / (double)E / (average * average) : 0;
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
static void clear_slots(const cumoe_config_t *c, const cumoe_gate_args_t *args, int64_t live)
{
    const int64_t K = c->top_k;
    const size_t real = cumoe__dtype_size(cumoe__gate_dtype(c));
#pragma omp parallel for schedule(static) num_threads(c->max_threads)
    for (int64_t t = 0; t < args->num_tokens; t++) {
        if (t < live && cumoe__cpu_token_counts(args->token_mask, t)) continue;
        for (int64_t slot = t * K; slot < (t + 1) * K; slot++) args->routing.expert[slot] = -1;
        memset((char *)args->routing.weight + (size_t)(t * K) * real, 0, (size_t)K * real);
    }
}

static void route(const cumoe_context_t *context, const cumoe_gate_args_t *args, int64_t live,
                  const cumoe_cpu_gate_scratch_t *scratch)
{
    const cumoe_config_t *c = &context->config;
    const bool wide = c->dtype == CUMOE_F64;
    if (c->gate == CUMOE_GATE_EXTERNAL) {
        for (int64_t t = 0; t < live; t++) {
            if (!cumoe__cpu_token_counts(args->token_mask, t)) continue;
            (wide ? external_token_f64 : external_token_f32)(c, args, t, scratch->counters);
        }
        return;
    }
    const int64_t block = cumoe__cpu_gate_block(c, args->num_tokens);
    const bool noise = args->training && cumoe__is_noisy(c->gate);
    for (int64_t first = 0; first < live; first += block) {
        const int64_t tokens = live - first < block ? live - first : block;
        cumoe__cpu_gate_logits(context, args->weights, args->x, args->x_stride, first, tokens, noise, scratch);
        (wide ? forward_block_f64 : forward_block_f32)(context, args, first, tokens, scratch);
    }
}

/* Add up what the threads counted: integers, so the order is free. What is no load stays in the first thread's
 * sums.
 */
static void reduce_sums(const cumoe_config_t *c, const cumoe_gate_args_t *args,
                        const cumoe_cpu_gate_scratch_t *scratch)
{
    const int64_t E = c->num_experts;
    const bool smooth = cumoe__cpu_flat_level(c, args->training).smooth;
    for (int64_t e = 0; e < E; e++) {
        int64_t importance = 0, load = 0;
        for (int thread = 0; scratch->sums && thread < c->max_threads; thread++) {
            importance += scratch->sums[thread * 2 * E + e];
            load += scratch->sums[thread * 2 * E + E + e];
        }
        args->routing.importance[e] = importance;
        if (scratch->sums) scratch->sums[E + e] = load;
        args->routing.load[e] = smooth ? load : (int64_t)scratch->count[e] << CUMOE_FIXED_POINT_BITS(c->dtype);
    }
}

static void count_rows(const cumoe_config_t *c, const cumoe_gate_args_t *args, int64_t live, int32_t *count)
{
    memset(count, 0, (size_t)c->num_experts * sizeof *count);
    for (int64_t slot = 0; slot < live * c->top_k; slot++)
        if (args->routing.expert[slot] >= 0) count[args->routing.expert[slot]]++;
    if (args->expert_count) memcpy(args->expert_count, count, (size_t)c->num_experts * sizeof *count);
}

/* E sum_e f_e p_e, from the sums of probabilities. */
static double switch_loss(const cumoe_config_t *c, const cumoe_gate_args_t *args, const cumoe_cpu_gate_scratch_t *s,
                          double unit)
{
    const double tokens = (double)*args->routing.tokens;
    double sum = 0;
    for (int64_t e = 0; tokens > 0 && e < c->num_experts; e++)
        sum += (double)s->count[e] / tokens * ((double)s->sums[c->num_experts + e] * unit / tokens);
    return (double)c->num_experts * sum;
}

static void write_statistics(const cumoe_config_t *c, const cumoe_gate_args_t *args,
                             const cumoe_cpu_gate_scratch_t *scratch, double cv2_importance, double cv2_load)
{
    cumoe_statistics_t s = {
        .tokens = *args->routing.tokens, .cv_importance = sqrt(cv2_importance), .cv_load = sqrt(cv2_load)};
    for (int thread = 0; thread < c->max_threads; thread++) {
        s.nan_logits += scratch->counters[thread * CUMOE_CPU_GATE_COUNTERS + COUNT_NAN_LOGITS];
        s.nan_tokens += scratch->counters[thread * CUMOE_CPU_GATE_COUNTERS + COUNT_NAN_TOKENS];
        s.bad_indices += scratch->counters[thread * CUMOE_CPU_GATE_COUNTERS + COUNT_BAD_INDICES];
    }
    double total_load = 0, max_load = 0;
    for (int64_t e = 0; e < c->num_experts; e++) {
        const double load = (double)args->routing.load[e];
        s.rows += scratch->count[e];
        if (scratch->count[e] > s.max_count) s.max_count = scratch->count[e];
        if (load > max_load) max_load = load;
        total_load += load;
    }
    if (total_load > 0) s.max_over_mean_load = max_load * c->num_experts / total_load;
    if (s.rows > 0) s.max_over_mean_count = (double)s.max_count * c->num_experts / (double)s.rows;
    *args->statistics = s;
}

cumoe_status_t cumoe__cpu_gate(const cumoe_context_t *context, const cumoe_gate_args_t *args, cumoe_stream_t stream)
{
    (void)stream;
    const cumoe_config_t *c = &context->config;
    const cumoe_cpu_gate_scratch_t scratch =
        cumoe__cpu_gate_scratch(context, args->num_tokens, false, args->workspace);
    write_call(args);
    const int64_t live = args->routing.call->live_tokens;
    memset(scratch.counters, 0, (size_t)c->max_threads * CUMOE_CPU_GATE_COUNTERS * sizeof(int64_t));
    if (scratch.sums)
        memset(scratch.sums, 0, (size_t)c->max_threads * 2 * (size_t)c->num_experts * sizeof(int64_t));
    clear_slots(c, args, live);
    route(context, args, live, &scratch);
    count_rows(c, args, live, scratch.count);
    reduce_sums(c, args, &scratch);

    const double unit = 1.0 / (double)((int64_t)1 << CUMOE_FIXED_POINT_BITS(c->dtype));
    const double cv2_importance = cumoe__cpu_cv2(args->routing.importance, c->num_experts, unit, NULL);
    const double cv2_load = cumoe__cpu_cv2(args->routing.load, c->num_experts, unit, NULL);
    double losses[CUMOE_NUM_LOSSES] = {0};
    if (c->gate != CUMOE_GATE_EXTERNAL) {
        losses[CUMOE_LOSS_IMPORTANCE] = cv2_importance;
        losses[CUMOE_LOSS_LOAD] = cv2_load;
    }
    if (args->losses && cumoe__cpu_has_spread(c)) {
        losses[CUMOE_LOSS_SWITCH] = switch_loss(c, args, &scratch, unit);
        losses[CUMOE_LOSS_Z] =
            c->dtype == CUMOE_F64 ? z_loss_f64(args, scratch.square) : z_loss_f32(args, scratch.square);
    }
    (c->dtype == CUMOE_F64 ? write_sums_f64 : write_sums_f32)(c, args, losses);
    if (args->statistics) write_statistics(c, args, &scratch, cv2_importance, cv2_load);
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
