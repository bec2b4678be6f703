/* The gate stage: what a kind of gate decides, and the sums and losses that balance the experts. */
#include "host/cpu/gate.h"

#define REAL  float
#define FN(x) x##_f32
#include "host/cpu/gate_real.h"
#undef REAL
#undef FN
#define REAL  double
#define FN(x) x##_f64
#include "host/cpu/gate_real.h"
#undef REAL
#undef FN

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
                            .nan_logits = scratch->counters[COUNT_NAN_LOGITS],
                            .nan_tokens = scratch->counters[COUNT_NAN_TOKENS],
                            .bad_indices = scratch->counters[COUNT_BAD_INDICES],
                            .dropped_rows = dropped_rows,
                            .cv_importance = sqrt(cv2_importance),
                            .cv_load = sqrt(cv2_load)};
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

/* What counts over tokens is in one place. */
static void gather_counts(const cumoe_config_t *c, const cumoe_gate_args_t *args,
                          const cumoe_cpu_gate_scratch_t *scratch)
{
    for (int thread = 1; thread < c->max_threads; thread++)
        for (int i = 0; i < CUMOE_CPU_GATE_COUNTERS; i++)
            scratch->counters[i] += scratch->counters[thread * CUMOE_CPU_GATE_COUNTERS + i];
    if (args->losses && cumoe__has_shares(c->gate))
        *scratch->square_sum =
            c->dtype == CUMOE_F64 ? sum_squares_f64(args, scratch->square) : sum_squares_f32(args, scratch->square);
}

/* Everything that is asked for beside the routing, from the sums over the tokens of all ranks. */
static void finish(const cumoe_config_t *c, const cumoe_gate_args_t *args, const cumoe_cpu_batch_result_t *batch,
                   const cumoe_cpu_gate_scratch_t *scratch)
{
    const double tokens = (double)*args->routing.tokens;
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
        losses[CUMOE_LOSS_Z] = tokens > 0 ? *scratch->square_sum / tokens : 0;
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
    gather_counts(c, args, &scratch);
    if (context->ranks.count == 1) finish(c, args, &batch, &scratch);
    return CUMOE_SUCCESS;
}

int cumoe__cpu_gate_sums(const cumoe_context_t *context, const cumoe_gate_args_t *args,
                         cumoe_sum_t sums[CUMOE_GATE_MAX_SUMS])
{
    const cumoe_config_t *c = &context->config;
    const cumoe_cpu_gate_scratch_t scratch =
        cumoe__cpu_gate_scratch(context, args->num_tokens, false, args->workspace);
    const int64_t E = c->num_experts, G = c->num_groups;
    const bool shares = args->losses && cumoe__has_shares(c->gate);
    const cumoe_sum_t list[] = {{args->routing.tokens, 1, CUMOE_I64},
                                {args->routing.importance, E, CUMOE_I64},
                                {args->routing.load, E, CUMOE_I64},
                                {args->routing.primary_load, G, CUMOE_I64},
                                {args->routing.primary_count, G, CUMOE_I32},
                                {scratch.count, E, CUMOE_I32},
                                {scratch.counters, CUMOE_CPU_GATE_COUNTERS, CUMOE_I64},
                                {shares ? scratch.sums + E : NULL, E, CUMOE_I64},
                                {shares ? scratch.square_sum : NULL, 1, CUMOE_F64}};
    _Static_assert(sizeof list <= CUMOE_GATE_MAX_SUMS * sizeof *list, "there is room");
    memcpy(sums, list, sizeof list);
    return (int)(sizeof list / sizeof *list);
}

cumoe_status_t cumoe__cpu_gate_finish(const cumoe_context_t *context, const cumoe_gate_args_t *args,
                                      cumoe_stream_t stream)
{
    (void)stream;
    const cumoe_cpu_gate_scratch_t scratch =
        cumoe__cpu_gate_scratch(context, args->num_tokens, false, args->workspace);
    const cumoe_cpu_batch_result_t batch = {0}; /* BALANCED has no ranks */
    finish(&context->config, args, &batch, &scratch);
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
