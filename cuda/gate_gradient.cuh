/* One token's gradients: from those of its weights and of the sums over the batch to those of its logits. */
#pragma once

#include "cuda/gate_row.cuh"

namespace cumoe
{

constexpr int kSumLanes = 16;  // interleaved sums of a row, as on the CPU
constexpr int kRowsOfTeam = 2; // dclean, where the noisy logits were, and dstd

static_assert(kSumLanes <= kListSize, "the interleaved sums stand in the list of shares");

/* A block of tokens whose logits become their gradients. */
struct GradientTokens {
    GateFacts gate;
    const cumoe_call_t *call;
    const uint8_t *token_mask;       // [T] or NULL
    int64_t first, tokens;           // of T
    void *logits;                    // [tokens, columns]; without noise only written
    void *rows;                      // see GateScratch
    const int32_t *expert;           // [T, K]
    const void *weight;              // [T, K]
    const void *dweight;             // [T, K]
    const void *dimportance, *dload; // [E]
    const int32_t *has_load;         // [1]
};

/* One token's gradients of clean logits and of the noise's standard deviation, in memory of its team. */
template <typename Real>
struct Gradients {
    Real *clean, *std; // [4, quads]; std is free without noise
};

/* Load loss of one expert: z = (clean - threshold) / std, q = dload phi(z) / std; dclean = q and dstd = -q z. */
template <typename Real>
__device__ __forceinline__ void load_gradient(const GateFacts &gate, const Real *logits, Real threshold, Real dload,
                                              int32_t expert, const Gradients<Real> &out)
{
    const Real std = noise_std(gate, logits[gate.num_experts + expert]);
    const Real z = load_argument(logits[expert], threshold, std);
    const Real q = dload * real::normal_density(z) / std;
    const bool active = threshold > -infinity<Real>();
    out.clean[place(gate, expert)] = active ? q : 0;
    out.std[place(gate, expert)] = active ? -q * z : 0;
}

/* What left through a threshold comes back to the logit that is the threshold: clean + eps std of that expert. */
template <typename Real>
__device__ __forceinline__ void pay_threshold(const GradientTokens &tokens, const cumoe_call_t &call, int64_t token,
                                              const GateRow<Real> &row, int32_t at, Real paid,
                                              const Gradients<Real> &out)
{
    if (at >= row.found) return;
    const int32_t expert = row.best[at], to = place(tokens.gate, expert);
    out.clean[to] -= paid;
    out.std[to] -= paid * noise_of(tokens.gate, call, token, expert);
}

/* The load loss of one token into dclean and dstd, thresholds differentiated. */
template <typename Real, typename Team>
__device__ __forceinline__ void load_backward(const GradientTokens &tokens, const cumoe_call_t &call, int64_t token,
                                              const Real *logits, const Team &team, const GateRow<Real> &row,
                                              const Gradients<Real> &out)
{
    const GateFacts &gate = tokens.gate;
    const Real *dload = static_cast<const Real *>(tokens.dload);
    const int32_t chosen = row.found < gate.top_k ? row.found : gate.top_k;
    const Real of_chosen = threshold_of_chosen(gate, row), of_others = threshold_of_others(gate, row);

    // Experts that were not chosen, and zeros for the others.
    for_own_experts(gate, team, [&](int32_t expert) {
        const int32_t at = place(gate, expert);
        if (row.noisy[at] > -infinity<Real>())
            load_gradient(gate, logits, of_others, dload[expert], expert, out);
        else
            out.clean[at] = out.std[at] = 0;
    });
    team.sync();
    for (int32_t j = team.rank; j < chosen; j += Team::kThreads)
        out.clean[place(gate, row.best[j])] = out.std[place(gate, row.best[j])] = 0;
    team.sync();

    // Their sum: interleaved sums in a fixed order.
    if (team.rank < kSumLanes) {
        Real sum = 0;
        for (int32_t e = team.rank; e < gate.num_experts; e += kSumLanes) sum += out.clean[place(gate, e)];
        row.share[team.rank] = sum;
    }
    team.sync();
    Real paid_by_others = 0, paid_by_chosen = 0;
    for (int lane = 0; lane < kSumLanes; lane++) paid_by_others += row.share[lane];
    team.sync();

    // The chosen ones, and what all pay to the thresholds.
    for (int32_t j = team.rank; j < chosen; j += Team::kThreads) {
        const int32_t expert = row.best[j];
        load_gradient(gate, logits, of_chosen, dload[expert], expert, out);
        row.share[j] = out.clean[place(gate, expert)];
    }
    team.sync();
    for (int32_t j = 0; j < chosen; j++) paid_by_chosen += row.share[j];
    if (team.rank == 0) {
        pay_threshold(tokens, call, token, row, gate.top_k - 1, paid_by_others, out);
        pay_threshold(tokens, call, token, row, gate.top_k, paid_by_chosen, out);
    }
    team.sync();
}

/* Through the softmax of the chosen (eq. 3), importance included; noise takes its share of every chosen logit.
 * TERMS [K] is memory of the team. */
template <typename Real, typename Team>
__device__ __forceinline__ void weights_backward(const GradientTokens &tokens, const cumoe_call_t &call,
                                                 int64_t token, const Team &team, Real *terms,
                                                 const Gradients<Real> &out)
{
    const GateFacts &gate = tokens.gate;
    const int64_t slot = token * gate.top_k;
    const int32_t *expert = tokens.expert + slot;
    const Real *weight = static_cast<const Real *>(tokens.weight) + slot;
    const Real *dweight = static_cast<const Real *>(tokens.dweight) + slot;
    const Real *dimportance = static_cast<const Real *>(tokens.dimportance);
    for (int32_t j = team.rank; j < gate.top_k; j += Team::kThreads)
        terms[j] = expert[j] >= 0 ? weight[j] * (dweight[j] + dimportance[expert[j]]) : 0;
    team.sync();
    if (team.rank == 0) { // one chain in the order of slots, as everywhere
        Real sum = terms[0];
        for (int32_t j = 1; j < gate.top_k; j++) sum += terms[j];
        terms[0] = sum;
    }
    team.sync();
    const Real mean = terms[0];
    for (int32_t j = team.rank; j < gate.top_k; j += Team::kThreads) {
        const int32_t e = expert[j];
        if (e < 0) continue;
        const Real d = weight[j] * (dweight[j] + dimportance[e] - mean);
        out.clean[place(gate, e)] += d;
        if (gate.noise) out.std[place(gate, e)] += d * noise_of(gate, call, token, e);
    }
    team.sync();
}

/* std = softplus(raw) + epsilon, unless it was clamped; then both halves go where the logits were. */
template <typename Real, typename Team>
__device__ __forceinline__ void finish_row(const GateFacts &gate, const Team &team, const Gradients<Real> &in,
                                           Real *logits)
{
    for_own_experts(gate, team, [&](int32_t expert) {
        logits[expert] = in.clean[place(gate, expert)];
        if (!gate.noise) return;
        const Real raw = logits[gate.num_experts + expert], dstd = in.std[place(gate, expert)];
        const Real slope = noise_std(gate, raw) > FLT_MIN ? real::sigmoid(raw) : 0;
        // 0 * NaN: an expert with a raw NaN took no part
        logits[gate.num_experts + expert] = dstd == 0 ? 0 : dstd * slope;
    });
}

/* A team for each token: the gradients of its logits. Masked tokens get zeros. */
template <typename Real, int kTeamWarps>
__global__ void __launch_bounds__(Team<Real, kTeamWarps>::kBlockThreads,
                                  gate_blocks_per_sm(kTeamWarps, sizeof(Real), true))
    gate_gradient_kernel(GradientTokens tokens)
{
    using Threads = Team<Real, kTeamWarps>;
    const GateFacts &gate = tokens.gate;
    SharedArena arena;
    const RowArrays<Real, kTeamWarps> shared(arena, kRowsOfTeam, gate.quads);
    const Threads team(shared.team);
    GateRow<Real> row = shared.of(team, kRowsOfTeam, gate.quads, static_cast<Real *>(tokens.rows));
    const Gradients<Real> gradients = {row.noisy, row.noisy + 4 * gate.quads};
    const cumoe_call_t call = *tokens.call;
    const bool has_load = *tokens.has_load;
    const int64_t live = live_rows(tokens.call, tokens.first, tokens.tokens);

    for (int64_t i = static_cast<int64_t>(blockIdx.x) * Threads::kTeams + team.index; i < live;
         i += static_cast<int64_t>(gridDim.x) * Threads::kTeams) {
        const int64_t token = tokens.first + i;
        Real *logits = static_cast<Real *>(tokens.logits) + i * gate.columns;
        if (!token_counts(tokens.token_mask, token)) {
            for (int64_t e = team.rank; e < gate.columns; e += Threads::kThreads) logits[e] = 0;
            continue;
        }

        // The load loss, where there is one.
        if (gate.noise) decide_row(gate, call, token, logits, team, row);
        if (has_load)
            load_backward(tokens, call, token, logits, team, row, gradients);
        else
            for_own_experts(gate, team, [&](int32_t expert) {
                gradients.clean[place(gate, expert)] = 0;
                if (gate.noise) gradients.std[place(gate, expert)] = 0;
            });
        team.sync();

        // The weights of the chosen, and the way to the logits.
        weights_backward(tokens, call, token, team, gate.noise ? row.share : gradients.std, gradients);
        finish_row(gate, team, gradients, logits);
        team.sync(); // the rows and the lists are read; the next token writes them
    }
}

} // namespace cumoe
