/* What gate.cu and gate_backward.cu share: blocks of tokens, their logits, the scratch of a call. */
#pragma once

#include "cuda/gemm.cuh"
#include "cuda/stages.cuh"
#include "host/arena.h"
#include "host/gate_levels.h"
#include "host/philox.h"

namespace cumoe
{

/* Logits are made for a block of tokens at a time, so that scratch does not grow with T * E, but only with E. No
 * bit of the forward pass and of dx_gate hangs on the size of a block. */
constexpr int64_t kGateValues = int64_t{1} << 24; // of a block's logits, but for at least kGateMinTokens
constexpr int64_t kGateMinTokens = 64, kGateMaxTokens = 65536;

constexpr int64_t kPieceColumns = 128; // pieces of gradients of x are whole tiles of so many, and two at least

constexpr int kGateWarps = 4;              // of a block whose warps decide a row each
constexpr int32_t kGateWarpExperts = 1024; // at most, where a warp decides a row; above, a block does
constexpr int kGateTeamWarps = 8;          // of that block

/* Blocks of an SM: the launch bounds of the kernels that decide rows, and their grid. More would spill. */
constexpr int gate_blocks_per_sm(int team_warps, size_t real_size, bool backward)
{
    if (team_warps > 1) return real_size == 8 ? 2 : 3;
    return real_size == 8 || backward ? 4 : 8;
}

/* What decides a row of logits, in the words of kernels: a flat gate, or a level of HIERARCHICAL, E and K its own.
 */
struct GateFacts {
    int32_t num_experts, top_k;
    int32_t quads;  // of experts, the last of them perhaps not full
    int32_t wanted; // K + 1 where smooth loads need the runner-up, else K
    bool noise;     // on, so that raw logits stand behind the clean ones
    bool smooth;    // loads are sums of probabilities; else they count rows and have no gradient
    bool dense;     // SOFTMAX: every expert is chosen
    bool shares;    // SOFTMAX_TOPK, SIGMOID_TOPK: what all experts have a share in
    bool sigmoid;   // SIGMOID_TOPK: chosen by sigmoid + bias
    bool renormalize;
    const void *bias; // [E] gate type, of SIGMOID_TOPK, or NULL
    float noise_epsilon;
    uint32_t noise_stream, noise_level;
    int64_t columns; // of a row of logits: E, or 2E with noise
};

inline cumoe_context_t gate_level(const cumoe_context_t &context, bool primary)
{
    cumoe_context_t level = context;
    level.config = cumoe__level_config(&context.config, primary);
    return level;
}

inline GateFacts gate_facts(const cumoe_config_t &config, const cumoe_weights_t *weights, bool training,
                            uint32_t noise_level = CUMOE_NOISE_FLAT)
{
    GateFacts facts = {};
    facts.num_experts = config.num_experts;
    facts.top_k = config.top_k;
    facts.quads = (config.num_experts + 3) / 4;
    facts.noise = training && cumoe__is_noisy(config.gate);
    facts.smooth = facts.noise && config.top_k < config.num_experts;
    facts.dense = config.gate == CUMOE_GATE_SOFTMAX;
    facts.sigmoid = config.gate == CUMOE_GATE_SIGMOID_TOPK;
    facts.shares = cumoe__has_shares(config.gate);
    facts.renormalize = !facts.shares || config.renormalize;
    facts.bias = facts.sigmoid ? weights->gate_bias : nullptr;
    facts.wanted = config.top_k + (facts.smooth ? 1 : 0);
    facts.noise_epsilon = config.noise_epsilon;
    facts.noise_stream = config.noise_stream;
    facts.noise_level = noise_level;
    facts.columns = static_cast<int64_t>(config.num_experts) * (facts.noise ? 2 : 1);
    return facts;
}

/* Tokens of a block of logits: of at most VALUES, but for kGateMinTokens, which a block has whatever E is. It hangs
 * on host facts alone, and so does the number of launches. */
inline int64_t gate_block(const cumoe_config_t &config, int64_t num_tokens, int64_t values)
{
    const int64_t fitting = values / config.num_experts / (cumoe__is_noisy(config.gate) ? 2 : 1);
    const int64_t bounded = fitting < kGateMaxTokens ? fitting : kGateMaxTokens;
    const int64_t block = bounded < kGateMinTokens ? kGateMinTokens : bounded;
    return num_tokens < block ? num_tokens : block;
}

/* Slices of tokens whose gradients of w_gate and w_noise are summed apart, so that few experts keep a device busy.
 * They hang on host facts alone: the sums are repeatable. */
inline int32_t gate_slices(const cumoe_config_t &config, int64_t block)
{
    constexpr int64_t kTile = 64, kTiles = 256, kMinTokens = 1024;
    const int64_t tiles = ((config.num_experts + kTile - 1) / kTile) * ((config.hidden_size + kTile - 1) / kTile);
    const int64_t fitting = block / kMinTokens, wanted = kTiles / tiles;
    const int64_t slices = fitting < wanted ? fitting : wanted;
    return static_cast<int32_t>(slices < 1 ? 1 : slices);
}

/* Rows of logits: tokens, or, for the second level of HIERARCHICAL, their choices of groups, sorted by group. */
struct GateRows {
    const cumoe_call_t *call;
    const uint8_t *token_mask; // [T] or NULL; what is masked has made no choice
    int64_t first, count;      // tokens, of T; of choices: 0, and the most that there can be
    int32_t groups;            // 1, or G
    cumoe_rows_t choices;      // row_slot says which [T, K1] a row is; offset NULL: rows are tokens
    const int32_t *group;      // [T, K1] of a choice
};

/* The grid of a kernel that decides rows; the context is that of the level. */
inline dim3 gate_grid(const cumoe_context_t &context, int64_t rows, bool backward)
{
    const cumoe_config_t &c = context.config;
    const bool warps = c.num_experts <= kGateWarpExperts; // decide a row each
    return resident_blocks(
        context, warps ? (rows + kGateWarps - 1) / kGateWarps : rows,
        gate_blocks_per_sm(warps ? 1 : kGateTeamWarps, cumoe__dtype_size(cumoe__gate_dtype(&c)), backward));
}

/* Of the second level of HIERARCHICAL. */
struct GroupScratch {
    cumoe_rows_t choices; // sorted by group
    void *permute;        // workspace of that
    void *logits;         // [T K1, B or 2B] gate type; backward: their gradients, in place
    void *rows;           // as below
    uint64_t *importance; // [G] of groups, which nobody asks for; forward
    void *dprimary;       // [T, K1] gate type, of primary weights; backward
    void *dload;          // [G] gate type, of primary loads; backward
    void *piece;          // [T K1, columns] gate type, of the rows' gradients of x; backward
    int64_t columns;      // of H
};

struct GateScratch {
    void *logits;       // [block, E or 2E] gate type; backward: their gradients, in place. HIERARCHICAL: G for E
    void *rows;         // [grid, 1 or 2, 4 quads] gate type, where a block decides a row
    uint32_t *count;    // [E] rows per expert; forward
    uint64_t *counter;  // [kGateCounters] forward
    uint64_t *share;    // [E] sums of p, fixed point, where there are shares; forward
    void *square;       // [T] gate type, of the z loss, where there are shares; forward
    double *square_sum; // [1] their sum, with several ranks; forward
    void *dimportance;  // [E] gate type; backward
    void *dload;        // [E] gate type; backward
    int32_t *has_load;  // [2] whether the load loss has gradients, and by primary loads; backward
    void *dz;           // [1] gate type, of the z loss; backward
    int32_t *counted;   // [block] tokens that are not padding; backward
    int32_t *offset;    // [slices + 1] where slices of them begin; backward
    void *slice;        // [slices, E, H] gate type, their gradients, where there are several; backward
    GroupScratch groups;
    size_t size;
};

enum GateCounter { kNanLogits, kNanTokens, kBadIndices, kDroppedRows, kGateCounters };

/* Placed in WORKSPACE, which may be NULL: then it is the size that counts. */
GateScratch gate_scratch(const cumoe_context_t &context, int64_t num_tokens, bool backward, void *workspace,
                         int64_t values = kGateValues);

/* The rows of a product are those. */
inline void walk_over(const GateRows &rows, RowsProduct *product)
{
    product->tile = rows.choices.tile;
    product->offset = rows.choices.offset;
    product->call = rows.call;
    product->first_token = rows.first;
    product->max_rows = rows.count;
    product->groups = rows.groups;
}

/* The logits of rows, as far as their tokens are live: x w_gate^T of the row's group, and x w_noise^T behind them
 * with noise. */
cudaError_t gate_logits(const cumoe_context_t &context, const GateFacts &facts, const GateRows &rows,
                        const cumoe_weights_t &weights, const void *x, int64_t x_stride, void *logits,
                        cudaStream_t stream);

/* The choices of groups, sorted; ROUTING has been decided by the primary gate. */
cudaError_t sort_choices(const cumoe_context_t &context, int64_t num_tokens, const cumoe_routing_t &routing,
                         const GroupScratch &scratch, GateRows *rows, cudaStream_t stream);

/* gate() and gate_backward() with blocks of at most VALUES logits; tests make them small. The workspace is that of
 * gate_scratch() with the same number. */
cudaError_t gate_by_blocks(const cumoe_context_t &context, const cumoe_gate_args_t &args, int64_t values,
                           cudaStream_t stream);
cudaError_t gate_backward_by_blocks(const cumoe_context_t &context, const cumoe_gate_backward_args_t &args,
                                    int64_t values, cudaStream_t stream);

} // namespace cumoe
