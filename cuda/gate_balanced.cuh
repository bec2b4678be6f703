/* Gate BALANCED (App. F): what its files share. g = softmax(x w_gate^T) stands transposed, [E, T], in scratch, so
 * that an expert's tokens stand side by side; every choice is a question about an element of it, and no mask is
 * kept. */
#pragma once

#include "cuda/gate_decide.cuh"

namespace cumoe
{

/* The bits of a g are in its order, as it is no less than 0. An element that is not to be taken, of padding or of a
 * logit that is not usable, is -1: a sign bit. */
template <typename Real>
using bits_of = std::conditional_t<sizeof(Real) == 8, uint64_t, uint32_t>;

template <typename Bits>
__device__ __forceinline__ bool is_candidate(Bits bits)
{
    return bits >> (8 * sizeof(Bits) - 1) == 0;
}

/* Radix selection, digit by digit from the top: of all that it is asked about, those larger than LOWEST are taken,
 * and of those that are equal to it the first WANTED; kAll: each of them, and no further digit is needed. */
constexpr int kDigitBits = 10, kDigits = 1 << kDigitBits;
constexpr uint64_t kAll = UINT64_MAX;
struct Cut {
    uint64_t lowest, wanted;
};

/* g is at most 1. */
template <typename Real>
constexpr int kDigitsOfReal = sizeof(Real) == 8 ? 7 : 3;
static_assert(kDigitsOfReal<float> * kDigitBits >= 30, "1.0f is 0x3f800000");
static_assert(kDigitsOfReal<double> * kDigitBits >= 62, "1.0 is 0x3ff0000000000000");

constexpr int kGroupTokens = kWarp; // that a block routes at a time, a lane for each

/* In workspace of the forward pass. */
struct BalancedScratch {
    void *g;             // [E, T] gate type
    uint32_t *nan_token; // [T] 1: all its logits are unusable, and not all of them -Inf
    void *lowest;        // [E] bits of the smallest g that an expert took; training
    int32_t *last;       // [E] the last token that it took of those with that g; training
    double *loss;        // [E] terms of L_batchwise; training
    Cut *cut;            // [kDigitsOfReal + 1] after so many digits; inference
    uint64_t *histogram; // [kDigitsOfReal, kDigits] of candidates; inference
    uint64_t *sure;      // [groups + 1] slots of tokens; then, of lower groups
    uint64_t *ties;      // [groups + 1] candidates of which only the first are slots; likewise
    int64_t groups;      // of tokens 0 .. T, the last of which is none, but ends the slots
    size_t end;          // bytes of workspace up to here
};
/* Placed in WORKSPACE behind what is USED of it; NULL only counts. Other gates have none. */
BalancedScratch balanced_scratch(const cumoe_context_t &context, int64_t num_tokens, void *workspace, size_t used);

/* What the kernels ask. */
struct BalancedTokens {
    int32_t num_experts, top_k;
    int64_t num_tokens; // T
    bool training;
    const cumoe_call_t *call;
    int64_t most_rows;      // that thresholds may give
    const void *thresholds; // [E]
    BalancedScratch scratch;
    cumoe_routing_t routing;
    int64_t num_slots; // S
    GateSums sums;
};

/* Whether the cut takes an expert's element: surely, or if it is among the first of equal ones. */
struct Taken {
    uint32_t sure, tie;
};
template <typename Real>
__device__ __forceinline__ Taken taken(const BalancedTokens &b, const Cut &cut, int64_t expert, int64_t token,
                                       Real &g)
{
    using Bits = bits_of<Real>;
    const int64_t at = expert * b.num_tokens + token;
    const Bits bits = static_cast<const Bits *>(b.scratch.g)[at];
    g = static_cast<const Real *>(b.scratch.g)[at];
    if (b.training) {
        const Bits lowest = static_cast<const Bits *>(b.scratch.lowest)[expert];
        const bool first = token <= b.scratch.last[expert];
        return {is_candidate(bits) && (bits > lowest || (bits == lowest && first)), 0};
    }
    const bool above = is_candidate(bits) && g > static_cast<const Real *>(b.thresholds)[expert];
    const Bits lowest = static_cast<Bits>(cut.lowest);
    return {above && bits > lowest, above && bits == lowest};
}

/* g of all tokens, by blocks of at most VALUES logits, which are scratch. */
template <typename Real>
cudaError_t balanced_rows(const cumoe_context_t &context, const cumoe_gate_args_t &args, int64_t values,
                          const BalancedTokens &balanced, void *logits, cudaStream_t stream);

/* Which tokens the experts take: in training, and by their thresholds. */
template <typename Real>
cudaError_t balanced_take(const cumoe_context_t &context, const BalancedTokens &balanced, void *batch_threshold,
                          cudaStream_t stream);
template <typename Real>
cudaError_t balanced_cut(const cumoe_context_t &context, const BalancedTokens &balanced, cudaStream_t stream);

/* The gate between gate_begin_kernel and gate_finish_kernel; the terms of L_batchwise are in THRESHOLD_LOSS in
 * training. */
template <typename Real>
cudaError_t route_balanced(const cumoe_context_t &context, const cumoe_gate_args_t &args, int64_t values,
                           const GateScratch &scratch, const GateSums &sums, double **threshold_loss,
                           cudaStream_t stream);

} // namespace cumoe
