/* Where everything stands in the scratch of a gate stage. */
#include "host/cpu/gate.h"

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
    s.square_sum = cumoe__take(&arena, sizeof(double));
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

size_t cumoe__cpu_gate_backward_workspace(const cumoe_context_t *context, int64_t num_tokens)
{
    return cumoe__cpu_gate_scratch(context, num_tokens, true, NULL).size;
}
