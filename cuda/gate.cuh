/* What gate.cu and gate_backward.cu share: blocks of tokens, their logits, the scratch of a call. */
#pragma once

#include "cuda/gemm.cuh"
#include "cuda/stages.cuh"
#include "host/arena.h"

namespace cumoe
{

/* Logits are made for a block of tokens at a time, so that scratch does not grow with T * E, but only with E. No
 * bit of the forward pass and of dx_gate hangs on the size of a block. */
constexpr int64_t kGateValues = int64_t{1} << 24; // of a block's logits, but for at least kGateMinTokens
constexpr int64_t kGateMinTokens = 64, kGateMaxTokens = 65536;

constexpr int kGateWarps = 4;              // of a block whose warps decide a row each
constexpr int32_t kGateWarpExperts = 1024; // at most, where a warp decides a row; above, a block does
constexpr int kGateTeamWarps = 8;          // of that block

/* Blocks of an SM: the launch bounds of the kernels that decide rows, and their grid. More would spill. */
constexpr int gate_blocks_per_sm(int team_warps, size_t real_size, bool backward)
{
    if (team_warps > 1) return real_size == 8 ? 2 : 3;
    return real_size == 8 || backward ? 4 : 8;
}

/* The same as a question about the config, in the words of kernels. */
struct GateFacts {
    int32_t num_experts, top_k;
    int32_t quads;  // of experts, the last of them perhaps not full
    int32_t wanted; // K + 1 where smooth loads need the runner-up, else K
    bool noise;     // on, so that raw logits stand behind the clean ones
    bool smooth;    // loads are sums of probabilities; else they count rows and have no gradient
    bool dense;     // SOFTMAX: every expert is chosen
    float noise_epsilon;
    uint32_t noise_stream;
    int64_t columns; // of a row of logits: E, or 2E with noise
};

inline GateFacts gate_facts(const cumoe_config_t &config, bool training)
{
    GateFacts facts = {};
    facts.num_experts = config.num_experts;
    facts.top_k = config.top_k;
    facts.quads = (config.num_experts + 3) / 4;
    facts.noise = training && cumoe__is_noisy(config.gate);
    facts.smooth = facts.noise && config.top_k < config.num_experts;
    facts.dense = config.gate == CUMOE_GATE_SOFTMAX;
    facts.wanted = config.top_k + (facts.smooth ? 1 : 0);
    facts.noise_epsilon = config.noise_epsilon;
    facts.noise_stream = config.noise_stream;
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

/* The grid of a kernel that decides the rows of a block of tokens. */
inline dim3 gate_grid(const cumoe_context_t &context, int64_t tokens, bool backward)
{
    const cumoe_config_t &c = context.config;
    const bool warps = c.num_experts <= kGateWarpExperts; // decide a row each
    return resident_blocks(
        context, warps ? (tokens + kGateWarps - 1) / kGateWarps : tokens,
        gate_blocks_per_sm(warps ? 1 : kGateTeamWarps, cumoe__dtype_size(cumoe__gate_dtype(&c)), backward));
}

struct GateScratch {
    void *logits;      // [block, E or 2E] gate type; backward: their gradients, in place
    void *rows;        // [grid, 1 or 2, 4 quads] gate type, where a block decides a row
    uint32_t *count;   // [E] rows per expert; forward
    uint64_t *counter; // [kGateCounters] forward
    void *dimportance; // [E] gate type; backward
    void *dload;       // [E] gate type; backward
    int32_t *has_load; // [1] whether the load loss has gradients; backward
    int32_t *counted;  // [block] tokens that are not padding; backward
    int32_t *offset;   // [slices + 1] where slices of them begin; backward
    void *slice;       // [slices, E, H] gate type, their gradients, where there are several; backward
    size_t size;
};

enum GateCounter { kNanLogits, kNanTokens, kBadIndices, kDroppedRows, kGateCounters };

/* Placed in WORKSPACE, which may be NULL: then it is the size that counts. */
GateScratch gate_scratch(const cumoe_context_t &context, int64_t num_tokens, bool backward, void *workspace,
                         int64_t values = kGateValues);

/* logits of the tokens from FIRST on, at most TOKENS, as far as they are live: x w_gate^T, and x w_noise^T behind
 * them with noise. */
cudaError_t gate_logits(const cumoe_context_t &context, const GateFacts &facts, const cumoe_weights_t &weights,
                        const void *x, int64_t x_stride, const cumoe_call_t *call, int64_t first, int64_t tokens,
                        void *logits, cudaStream_t stream);

/* gate() and gate_backward() with blocks of at most VALUES logits; tests make them small. The workspace is that of
 * gate_scratch() with the same number. */
cudaError_t gate_by_blocks(const cumoe_context_t &context, const cumoe_gate_args_t &args, int64_t values,
                           cudaStream_t stream);
cudaError_t gate_backward_by_blocks(const cumoe_context_t &context, const cumoe_gate_backward_args_t &args,
                                    int64_t values, cudaStream_t stream);

} // namespace cumoe
