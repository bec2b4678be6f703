/* Sums over the batch that every kind of gate makes, and what is derived from them. */
#include "host/cpu/gate.h"

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
