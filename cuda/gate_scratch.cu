/* Where everything stands in the scratch of a gate stage. */
#include "cuda/gate.cuh"

namespace cumoe
{

namespace
{

/* Hands out arrays of a workspace. */
struct Taker {
    cumoe_arena_t arena;
    template <typename T>
    void operator()(T *&array, size_t count, size_t size)
    {
        array = static_cast<T *>(cumoe__take(&arena, count * size));
    }
    template <typename T>
    void operator()(T *&array, size_t count)
    {
        (*this)(array, count, sizeof(T));
    }
};

/* Rows of teams, where a block is one; the context is that of the level. */
void take_rows(const cumoe_context_t &context, int64_t rows, bool backward, Taker &take, void *&to)
{
    const cumoe_config_t &c = context.config;
    const size_t quads = (static_cast<size_t>(c.num_experts) + 3) / 4;
    const size_t teams = c.num_experts <= kGateWarpExperts ? 0 : gate_grid(context, rows, backward).x;
    take(to, teams * (backward ? 2 : 1) * 4 * quads, cumoe__dtype_size(cumoe__gate_dtype(&c)));
}

/* The second level: all rows at once, and their gradients of x by pieces of columns, of about as much memory.
 * SLICES are the elements of those of the first level, which are added up before. */
void take_groups(const cumoe_context_t &context, int64_t num_tokens, bool backward, size_t slices, Taker &take,
                 GateScratch *s)
{
    const cumoe_config_t &c = context.config;
    const cumoe_context_t primary = gate_level(context, true), secondary = gate_level(context, false);
    const int64_t G = c.num_groups, K1 = c.top_k_groups, B = secondary.config.num_experts, H = c.hidden_size;
    const size_t real = cumoe__dtype_size(cumoe__gate_dtype(&c)), rows = static_cast<size_t>(num_tokens * K1);
    GroupScratch &g = s->groups;
    take(g.choices.offset, static_cast<size_t>(G) + 1);
    take(g.choices.row_token, rows);
    take(g.choices.row_slot, rows);
    take(g.choices.slot_row, rows);
    take(g.choices.tile, static_cast<size_t>(cumoe_tile_size(num_tokens * K1, c.num_groups)));
    take(g.permute, permute_workspace(primary, num_tokens), 1);
    take(g.logits, rows * static_cast<size_t>(2 * B), real);
    take_rows(secondary, num_tokens * K1, backward, take, g.rows);
    if (!backward) return take(g.importance, static_cast<size_t>(G));
    const int64_t fitting = 2 * (G + K1 * B) / K1 / kPieceColumns * kPieceColumns;
    g.columns = fitting < 2 * kPieceColumns ? 2 * kPieceColumns : fitting;
    if (g.columns > H) g.columns = H;
    const size_t piece = rows * static_cast<size_t>(g.columns);
    take(g.dprimary, rows, real);
    take(g.dload, static_cast<size_t>(G), real);
    take(g.piece, piece > slices ? piece : slices, real);
    s->slice = g.piece;
}

} // namespace

GateScratch gate_scratch(const cumoe_context_t &context, int64_t num_tokens, bool backward, void *workspace,
                         int64_t values)
{
    const cumoe_config_t &c = context.config;
    const bool groups = c.gate == CUMOE_GATE_HIERARCHICAL;
    const cumoe_context_t level = groups ? gate_level(context, true) : context; // of tokens
    const size_t E = static_cast<size_t>(c.num_experts), real = cumoe__dtype_size(cumoe__gate_dtype(&c));
    Taker take = {{reinterpret_cast<uintptr_t>(workspace), 0}};
    GateScratch s = {};
    if (!backward) {
        take(s.count, E);
        take(s.counter, kGateCounters);
        take(s.share, cumoe__has_shares(c.gate) ? E : 0);
        take(s.square, cumoe__has_shares(c.gate) ? static_cast<size_t>(num_tokens) : 0, real);
        take(s.square_sum, 1);
    }
    if (c.gate != CUMOE_GATE_EXTERNAL) {
        const int64_t block = gate_block(level.config, num_tokens, values);
        const size_t n = static_cast<size_t>(level.config.num_experts), tokens = static_cast<size_t>(block);
        const size_t slices = static_cast<size_t>(gate_slices(level.config, block));
        const size_t sliced = slices > 1 && backward ? slices * n * static_cast<size_t>(c.hidden_size) : 0;
        take(s.logits, tokens * n * (cumoe__is_noisy(c.gate) ? 2 : 1), real);
        take_rows(level, block, backward, take, s.rows);
        if (backward) {
            take(s.dimportance, E, real);
            take(s.dload, E, real);
            take(s.has_load, 2);
            take(s.dz, 1, real);
            take(s.counted, tokens);
            take(s.offset, slices + 1);
        }
        if (groups)
            take_groups(context, num_tokens, backward, sliced, take, &s);
        else
            take(s.slice, sliced, real);
    }
    s.size = take.arena.used;
    return s;
}

} // namespace cumoe
