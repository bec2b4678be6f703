/* One token's gradients: from those of its weights and of the sums over the batch to those of its logits. */
#pragma once

#include "cuda/gate_row.cuh"

namespace cumoe
{

constexpr int kRowsOfTeam = 2; // dclean, where the noisy logits were, and dstd

/* Rows whose logits become their gradients. */
struct RowGradients {
    GateFacts gate;
    GateRows rows;
    void *logits;                    // [rows, columns]; of tokens with neither noise nor shares only written
    void *scratch;                   // rows of GateScratch
    const int32_t *expert;           // [T, K], where rows are tokens
    const void *weight;              // [T, K], where rows are tokens; else primary weights [T, K1]
    const void *dweight;             // [T, K]
    void *dprimary;                  // [T, K1] gradients of those, where rows are choices
    const void *dimportance, *dload; // [E] or NULL = 0; with shares dload is of the sums of p
    const int32_t *has_load;         // [1]
    const void *dz;                  // [1] of the z loss, by half of a token's square; with shares
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
__device__ __forceinline__ void pay_threshold(const GateFacts &gate, const cumoe_call_t &call,
                                              const RowOwner &owner, const GateRow<Real> &row, int32_t at,
                                              Real paid, const Gradients<Real> &out)
{
    if (at >= row.found) return;
    const int32_t expert = row.best[at], to = place(gate, expert);
    out.clean[to] -= paid;
    out.std[to] -= paid * noise_of(gate, call, owner, expert);
}

/* The load loss of one row into dclean and dstd, thresholds differentiated. */
template <typename Real, typename Team>
__device__ __forceinline__ void
load_backward(const GateFacts &gate, const cumoe_call_t &call, const RowOwner &owner, const Real *logits,
              const Real *dload, const Team &team, const GateRow<Real> &row, const Gradients<Real> &out)
{
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

    const Real paid_by_others = row_sum(gate, team, out.clean, row.share);
    Real paid_by_chosen = 0;

    // The chosen ones, and what all pay to the thresholds.
    for (int32_t j = team.rank; j < chosen; j += Team::kThreads) {
        const int32_t expert = row.best[j];
        load_gradient(gate, logits, of_chosen, dload[expert], expert, out);
        row.share[j] = out.clean[place(gate, expert)];
    }
    team.sync();
    for (int32_t j = 0; j < chosen; j++) paid_by_chosen += row.share[j];
    if (team.rank == 0) {
        pay_threshold(gate, call, owner, row, gate.top_k - 1, paid_by_others, out);
        pay_threshold(gate, call, owner, row, gate.top_k, paid_by_chosen, out);
    }
    team.sync();
}

/* The choices of a row, and the gradients of their weights: FACTOR times those of slots and of sums over tokens. */
template <typename Real>
struct Choices {
    const int32_t *expert;   // [K] of the row, -1 = none
    const Real *weight;      // [K]
    const Real *dweight;     // [K]
    const Real *dimportance; // [E] or NULL = 0
    Real factor;
    __device__ __forceinline__ Real of_slot(int32_t j) const
    {
        return dweight[j] + (dimportance ? dimportance[expert[j]] : 0);
    }
    __device__ __forceinline__ Real gradient(int32_t j) const
    {
        return factor * of_slot(j);
    }
};

/* A choice of a group: its weights inside the group, in row.value, and the gradient of its own weight, which they
 * are multiplied with. Slots of none get expert -1. */
template <typename Real, typename Team>
__device__ __forceinline__ void primary_backward(const GateFacts &gate, const Team &team, const GateRow<Real> &row,
                                                 const Real *logits, const Choices<Real> &choices, Real *dprimary)
{
    const int32_t chosen = row.found < gate.top_k ? row.found : gate.top_k;
    const Real sum = sum_chosen(gate, team, row, logits, chosen);
    for (int32_t j = team.rank; j < gate.top_k; j += Team::kThreads) {
        if (j < chosen)
            row.value[j] = row.share[j] / sum;
        else
            row.best[j] = -1;
    }
    team.sync(); // the weights are there
    if (team.rank == 0) {
        Real total = 0;
        for (int32_t j = 0; j < chosen; j++) total += choices.weight[j] * choices.of_slot(j);
        *dprimary = total;
    }
}

/* Through the softmax of the chosen (eq. 3), importance included, or through their sigmoids; noise takes its share
 * of every chosen logit. Softmax over all: what is left behind is the gradient of each chosen weight, and the
 * result their mean. TERMS [K] is memory of the team. */
template <typename Real, typename Team>
__device__ __forceinline__ Real weights_backward(const GateFacts &gate, const cumoe_call_t &call,
                                                 const RowOwner &owner, const Real *logits,
                                                 const Choices<Real> &choices, const Team &team, Real *terms,
                                                 const Gradients<Real> &out)
{
    for (int32_t j = team.rank; j < gate.top_k; j += Team::kThreads)
        terms[j] = choices.expert[j] >= 0 ? choices.weight[j] * choices.gradient(j) : 0;
    team.sync();
    if (team.rank == 0) { // one chain in the order of slots, as everywhere
        Real sum = terms[0];
        for (int32_t j = 1; j < gate.top_k; j++) sum += terms[j];
        terms[0] = sum;
    }
    team.sync();
    const Real mean = terms[0];
    for (int32_t j = team.rank; j < gate.top_k; j += Team::kThreads) {
        const int32_t e = choices.expert[j];
        if (e < 0) continue;
        const Real dchosen = choices.gradient(j);
        Real d = choices.weight[j];
        if (gate.sigmoid) d *= 1 - real::sigmoid(logits[e]);
        d *= gate.renormalize ? dchosen - mean : dchosen;
        if (!gate.renormalize && !gate.sigmoid) d = dchosen;
        out.clean[place(gate, e)] += d;
        if (gate.noise) out.std[place(gate, e)] += d * noise_of(gate, call, owner, e);
    }
    team.sync();
    return mean;
}

/* What moves every usable logit where there are shares: weights that are shares themselves, MEAN their mean
 * gradient; the Switch loss; and the z loss. LANES is memory of the team. */
template <typename Real, typename Team>
__device__ __forceinline__ void shares_backward(const RowGradients &in, bool has_load, const Real *logits,
                                                Real mean, const Team &team, Real *lanes,
                                                const Gradients<Real> &out)
{
    const GateFacts &gate = in.gate;
    const Real *dshare = static_cast<const Real *>(in.dload);
    const Shares<Real> shares = sum_shares(gate, team, logits, out.std, lanes);
    if (!(shares.largest > -infinity<Real>())) return; // the whole team
    const bool has_switch = has_load && shares.sum > 0;
    Real mean_share = 0;
    if (has_switch) {
        for_own_experts(gate, team, [&](int32_t e) {
            Real &at = out.std[place(gate, e)];
            at = share_of(at, shares) * dshare[e];
        });
        team.sync();
        mean_share = row_sum(gate, team, out.std, lanes);
    }
    const Real z = *static_cast<const Real *>(in.dz) * shares.log_sum;
    for_own_experts(gate, team, [&](int32_t e) {
        Real &to = out.clean[place(gate, e)];
        const Real logit = usable_logit(gate, e, logits[e]);
        const bool usable = logit > -infinity<Real>();
        const Real power = usable ? real::exp(logit - shares.largest) / shares.exps : 0;
        if (!gate.renormalize && !gate.sigmoid) to = power * (to - mean);
        if (has_switch) {
            Real slope = power;
            if (gate.sigmoid) {
                const Real part = usable ? real::sigmoid(logit) : 0;
                slope = share_of(part, shares) * (1 - part);
            }
            to += slope * (dshare[e] - mean_share);
        }
        if (z != 0) to += z * power;
    });
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

/* A team for each row: the gradients of its logits. Masked tokens get zeros. */
template <typename Real, int kTeamWarps>
__global__ void __launch_bounds__(Team<Real, kTeamWarps>::kBlockThreads,
                                  gate_blocks_per_sm(kTeamWarps, sizeof(Real), true))
    gate_gradient_kernel(RowGradients in)
{
    using Threads = Team<Real, kTeamWarps>;
    const GateFacts &gate = in.gate;
    SharedArena arena;
    const RowArrays<Real, kTeamWarps> shared(arena, kRowsOfTeam, gate.quads);
    const Threads team(shared.team);
    GateRow<Real> row = shared.of(team, kRowsOfTeam, gate.quads, static_cast<Real *>(in.scratch));
    const Gradients<Real> gradients = {row.noisy, row.noisy + 4 * gate.quads};
    const cumoe_call_t call = *in.rows.call;
    const bool has_load = *in.has_load, of_tokens = !in.rows.choices.offset;
    const int64_t rows =
        of_tokens ? live_rows(in.rows.call, in.rows.first, in.rows.count) : in.rows.choices.offset[in.rows.groups];

    for (int64_t i = static_cast<int64_t>(blockIdx.x) * Threads::kTeams + team.index; i < rows;
         i += static_cast<int64_t>(gridDim.x) * Threads::kTeams) {
        const RowOwner owner = owner_of(in.rows, i);
        Real *logits = static_cast<Real *>(in.logits) + i * gate.columns;
        if (!token_counts(in.rows.token_mask, owner.token)) {
            for (int64_t e = team.rank; e < gate.columns; e += Threads::kThreads) logits[e] = 0;
            continue;
        }

        // The choices, as they were; those inside a group are not saved.
        const int64_t slot = owner.choice * gate.top_k, first = owner.group * gate.num_experts;
        const Real *const weight = static_cast<const Real *>(in.weight);
        Choices<Real> choices = {row.best, row.value, static_cast<const Real *>(in.dweight) + slot, nullptr, 1};
        if (in.dimportance) choices.dimportance = static_cast<const Real *>(in.dimportance) + first;
        if (of_tokens) {
            choices.expert = in.expert + slot;
            choices.weight = weight + slot;
        } else {
            choices.factor = weight[owner.choice];
        }
        if (gate.noise || !of_tokens) decide_row(gate, call, owner, logits, team, row);

        // The load loss, where there is one.
        if (has_load && gate.noise)
            load_backward(gate, call, owner, logits, static_cast<const Real *>(in.dload) + first, team, row,
                          gradients);
        else
            for_own_experts(gate, team, [&](int32_t expert) {
                gradients.clean[place(gate, expert)] = 0;
                if (gate.noise) gradients.std[place(gate, expert)] = 0;
            });
        team.sync();

        // The weights of the chosen, and the way to the logits.
        if (!of_tokens)
            primary_backward(gate, team, row, logits, choices, static_cast<Real *>(in.dprimary) + owner.choice);
        const Real mean = weights_backward(gate, call, owner, logits, choices, team,
                                           gate.dense ? gradients.std : row.share, gradients);
        if (gate.shares) shares_backward(in, has_load, logits, mean, team, row.share, gradients);
        finish_row(gate, team, gradients, logits);
        team.sync(); // the rows and the lists are read; the next token writes them
    }
}

} // namespace cumoe
