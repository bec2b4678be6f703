/* What a row of logits decides: choices, weights, and their part of the sums. */
#pragma once

#include "cuda/gate_sums.cuh"

namespace cumoe
{

constexpr int32_t kSharedSums = 2048; // experts at most whose sums a block collects before they go to memory

/* Sums over tokens, [E] each: fixed point, rows, and counters [kGateCounters]. Integers, so the order is free. */
struct GateSums {
    uint64_t *importance;
    uint64_t *every; // to which every expert of a token adds: load, or shares, or importance once more; may be NULL
    uint32_t *count;
    uint64_t *counter;
    uint64_t *tokens; // [1]
};

/* The rows and importance of a block, kept in shared memory where experts are few; else those of the device
 * themselves. */
struct SharedSums {
    uint64_t *importance; // [E]
    uint32_t *count;      // [E]
    bool kept;
    __host__ __device__ SharedSums(SharedArena &arena, int32_t num_experts)
        : importance(arena.take<uint64_t>(size(num_experts))), count(arena.take<uint32_t>(size(num_experts))),
          kept(num_experts <= kSharedSums)
    {
    }
    static __host__ __device__ size_t size(int32_t num_experts)
    {
        return num_experts <= kSharedSums ? static_cast<size_t>(num_experts) : 0;
    }

    /* Both are called by the whole block, end() behind a barrier. */
    __device__ __forceinline__ GateSums begin(const GateSums &device, int32_t num_experts) const
    {
        if (!kept) return device;
        for (int32_t e = threadIdx.x; e < num_experts; e += blockDim.x) importance[e] = count[e] = 0;
        sync_threads();
        return {importance, device.every, count, device.counter, device.tokens};
    }
    __device__ __forceinline__ void end(const GateSums &device, int32_t num_experts) const
    {
        if (!kept) return;
        for (int32_t e = threadIdx.x; e < num_experts; e += blockDim.x) {
            if (importance[e]) atomic_add(&device.importance[e], importance[e]);
            if (count[e]) atomic_add(&device.count[e], count[e]);
        }
    }
};

template <typename Real>
__device__ __forceinline__ uint64_t fixed_point(Real value)
{
    return static_cast<uint64_t>(static_cast<int64_t>(static_cast<double>(value) * kFixedPoint<Real> + 0.5));
}

/* The sum to which every expert of every token adds: the smooth load, the importance of the dense gate, or p. One
 * thread of a team adds for an expert, so where experts are few a team has sums of its own, and needs no atomics:
 * in shared memory those of 64 bits are a loop of others. */
template <typename Real, int kTeamWarps>
struct OwnSums {
    using Threads = Team<Real, kTeamWarps>;
    uint64_t *units; // [kTeams, 4, quads]
    __host__ __device__ OwnSums(SharedArena &arena, int32_t num_experts, int32_t quads)
        : units(arena.take<uint64_t>(4 * Threads::kTeams * (SharedSums::size(num_experts) ? quads : 0)))
    {
    }
    __device__ __forceinline__ uint64_t &at(const GateFacts &gate, int team, int32_t expert) const
    {
        return units[team * 4 * gate.quads + place(gate, expert)];
    }

    __device__ __forceinline__ void begin(const GateFacts &gate, const Threads &team) const
    {
        if (gate.num_experts > kSharedSums) return;
        for_own_experts(gate, team, [&](int32_t e) { at(gate, team.index, e) = 0; });
    }
    /* By the thread that owns the expert; DEVICE [E] is the sum of the device. */
    __device__ __forceinline__ void add(const GateFacts &gate, const Threads &team, int32_t expert, Real value,
                                        uint64_t *device) const
    {
        const uint64_t added = fixed_point(value);
        if (gate.num_experts <= kSharedSums)
            at(gate, team.index, expert) += added;
        else if (added)
            atomic_add(&device[expert], added);
    }
    /* By a team whose next row is another group's; DEVICE [B] is that of the last. */
    __device__ __forceinline__ void leave(const GateFacts &gate, const Threads &team, uint64_t *device) const
    {
        if (gate.num_experts > kSharedSums) return;
        for_own_experts(gate, team, [&](int32_t e) {
            uint64_t &sum = at(gate, team.index, e);
            if (sum) atomic_add(&device[e], sum);
            sum = 0;
        });
    }
    /* By the whole block, behind a barrier. */
    __device__ __forceinline__ void end(const GateFacts &gate, uint64_t *device) const
    {
        if (gate.num_experts > kSharedSums) return;
        for (int32_t e = threadIdx.x; e < gate.num_experts; e += Threads::kBlockThreads) {
            uint64_t sum = 0;
            for (int team = 0; team < Threads::kTeams; team++) sum += at(gate, team, e);
            if (sum) atomic_add(&device[e], sum);
        }
    }
};

/* Rows to decide. */
struct Decisions {
    GateFacts gate;
    GateRows rows;
    const void *logits;         // [rows, columns]
    void *scratch;              // rows of GateScratch
    int32_t *expert;            // [T, K], of choices [T, K1, K2]
    void *weight;               // the same
    const void *primary_weight; // [T, K1], where rows are choices
    void *square;               // [T] gate type: of the z loss; NULL: the losses of shares are not wanted
    int32_t all_experts;        // of all groups, as the sums have
    GateSums sums;
};

/* Softmax over the chosen logits (eq. 3), or their sigmoids: weights of one row, in the order of slots. ALL is what
 * they are a part of, but for renormalized ones, where it is the sum of the chosen; FACTOR the weight of the row
 * itself, FIRST its first expert. */
template <typename Real, typename Team>
__device__ __forceinline__ void write_topk(const GateFacts &gate, const Team &team, const GateRow<Real> &row,
                                           const Real *logits, Real all, Real factor, int32_t first,
                                           int32_t *expert, Real *weight, const GateSums &sums)
{
    const int32_t chosen = row.found < gate.top_k ? row.found : gate.top_k;
    Real sum = sum_chosen(gate, team, row, logits, chosen);
    if (gate.sigmoid) sum += static_cast<Real>(1e-20); // DeepSeek-V3's, for a sum that underflows
    if (!gate.renormalize) sum = all;
    const Real none = chosen == 0 && row.unusable ? static_cast<Real>(NAN) : static_cast<Real>(0);
    for (int32_t j = team.rank; j < gate.top_k; j += Team::kThreads) {
        const Real share = j < chosen ? row.share[j] / sum * factor : none;
        const int32_t e = j < chosen ? first + row.best[j] : -1;
        expert[j] = e;
        weight[j] = share;
        if (e < 0) continue;
        atomic_add(&sums.importance[e], fixed_point(share));
        atomic_add(&sums.count[e], 1u);
    }
}

/* P(x, i) (eq. 9) for every expert, added to the loads. */
template <typename Real, int kTeamWarps>
__device__ __forceinline__ void add_loads(const GateFacts &gate, const Team<Real, kTeamWarps> &team,
                                          const GateRow<Real> &row, const Real *logits,
                                          const OwnSums<Real, kTeamWarps> &own, uint64_t *load)
{
    const Real of_chosen = threshold_of_chosen(gate, row), of_others = threshold_of_others(gate, row);
    for (int32_t j = team.rank; j < gate.top_k && j < row.found; j += team.kThreads)
        row.noisy[place(gate, row.best[j])] = infinity<Real>(); // which no logit is: chosen
    team.sync();
    for_own_experts(gate, team, [&](int32_t expert) {
        const Real noisy = row.noisy[place(gate, expert)];
        if (noisy == -infinity<Real>()) return;
        const Real threshold = noisy == infinity<Real>() ? of_chosen : of_others;
        Real p = 1; // with fewer than K others: certain
        if (threshold > -infinity<Real>())
            p = real::normal_cdf(
                load_argument(logits[expert], threshold, noise_std(gate, logits[gate.num_experts + expert])));
        own.add(gate, team, expert, p, load);
    });
}

/* The Switch loss and the z loss: a token's shares are added to their sums, its square is the result. */
template <typename Real, int kTeamWarps>
__device__ __forceinline__ Real add_shares(const GateFacts &gate, const Team<Real, kTeamWarps> &team,
                                           const GateRow<Real> &row, const Shares<Real> &shares,
                                           const OwnSums<Real, kTeamWarps> &own, uint64_t *sums)
{
    if (row.found > 0)
        for_own_experts(gate, team, [&](int32_t e) {
            own.add(gate, team, e, share_of(row.noisy[place(gate, e)], shares), sums);
        });
    return shares.log_sum * shares.log_sum;
}

/* Softmax over all experts (eq. 2); expert e in slot e. The noisy row becomes that of the shares. */
template <typename Real, int kTeamWarps>
__device__ __forceinline__ bool write_softmax(const GateFacts &gate, const Team<Real, kTeamWarps> &team,
                                              const GateRow<Real> &row, int32_t *expert, Real *weight,
                                              const OwnSums<Real, kTeamWarps> &own, const GateSums &sums)
{
    Best<Real> mine = best_behind<Real>(gate, team, row.noisy, {infinity<Real>(), -1});
    const Best<Real> most = team.best(mine);
    const bool none = most.expert == kNobody;
    for_own_experts(gate, team, [&](int32_t e) {
        Real &at = row.noisy[place(gate, e)];
        const bool usable = at > -infinity<Real>();
        expert[e] = usable ? e : -1;
        at = usable ? real::exp(at - most.value) : 0;
        if (usable) atomic_add(&sums.count[e], 1u);
    });
    team.sync();
    if (team.rank == 0) { // one chain in the order of experts, as everywhere
        Real sum = 0;
        for (int32_t e = 0; e < gate.num_experts; e++) sum += row.noisy[place(gate, e)];
        row.value[0] = sum;
    }
    team.sync();
    const Real sum = row.value[0], nothing = row.unusable ? static_cast<Real>(NAN) : static_cast<Real>(0);
    for_own_experts(gate, team, [&](int32_t e) {
        const Real share = none ? nothing : row.noisy[place(gate, e)] / sum;
        weight[e] = share;
        if (!none) own.add(gate, team, e, share, sums.every);
    });
    return !none;
}

template <typename Real, int kTeamWarps>
struct DecideArrays {
    RowArrays<Real, kTeamWarps> row;
    SharedSums sums;
    OwnSums<Real, kTeamWarps> own;
    __host__ __device__ DecideArrays(SharedArena &arena, int32_t all_experts, int32_t num_experts, int32_t quads)
        : row(arena, 1, quads), sums(arena, all_experts), own(arena, num_experts, quads)
    {
    }
};

/* A team for each row: choices, weights, and its part of the sums. */
template <typename Real, int kTeamWarps>
__global__ void __launch_bounds__(Team<Real, kTeamWarps>::kBlockThreads,
                                  gate_blocks_per_sm(kTeamWarps, sizeof(Real), false))
    gate_decide_kernel(Decisions in)
{
    using Threads = Team<Real, kTeamWarps>;
    const GateFacts &gate = in.gate;
    SharedArena arena;
    const DecideArrays<Real, kTeamWarps> shared(arena, in.all_experts, gate.num_experts, gate.quads);
    const Threads team(shared.row.team);
    GateRow<Real> row = shared.row.of(team, 1, gate.quads, static_cast<Real *>(in.scratch));
    const GateSums sums = shared.sums.begin(in.sums, in.all_experts);
    shared.own.begin(gate, team);
    const cumoe_call_t call = *in.rows.call;
    Real *const square = static_cast<Real *>(in.square);
    const bool of_tokens = !in.rows.choices.offset;
    uint32_t counted = 0, nan_tokens = 0;
    uint64_t nan_logits = 0;

    // Neighbouring rows, below 2^31, are a team's: few of them change the group.
    const uint32_t rows = static_cast<uint32_t>(of_tokens ? in.rows.count : in.rows.choices.offset[in.rows.groups]);
    const uint32_t teams = gridDim.x * Threads::kTeams, share = (rows + teams - 1) / teams;
    const uint32_t begin = (blockIdx.x * Threads::kTeams + static_cast<uint32_t>(team.index)) * share;
    int32_t first = 0; // expert of the group
    for (uint32_t i = begin; i < rows && i < begin + share; i++) {
        const RowOwner owner = owner_of(in.rows, i);
        int32_t *expert = in.expert + owner.choice * gate.top_k;
        Real *weight = static_cast<Real *>(in.weight) + owner.choice * gate.top_k;

        // Slots that are not routed: masked tokens, and rows beyond the live ones.
        if (owner.token >= call.live_tokens || !token_counts(in.rows.token_mask, owner.token)) {
            for (int32_t j = team.rank; j < gate.top_k; j += Threads::kThreads) {
                expert[j] = -1;
                weight[j] = 0;
            }
            if (square && team.rank == 0) square[owner.token] = 0;
            continue;
        }
        if (owner.group * gate.num_experts != first) {
            if (gate.smooth) shared.own.leave(gate, team, in.sums.every + first);
            first = owner.group * gate.num_experts;
        }

        // The choice, its weights, and the chance that every expert had.
        const Real *logits = static_cast<const Real *>(in.logits) + static_cast<int64_t>(i) * gate.columns;
        decide_row(gate, call, owner, logits, team, row);
        bool routed = row.found > 0;
        if (gate.dense) {
            routed = write_softmax(gate, team, row, expert, weight, shared.own, sums);
        } else {
            Shares<Real> shares = {};
            if (square || !gate.renormalize) shares = sum_shares(gate, team, logits, row.noisy, row.share);
            const Real factor = of_tokens ? 1 : static_cast<const Real *>(in.primary_weight)[owner.choice];
            write_topk(gate, team, row, logits, gate.sigmoid ? 1 : shares.exps, factor, first, expert, weight,
                       sums);
            if (square) {
                const Real z = add_shares(gate, team, row, shares, shared.own, sums.every);
                if (team.rank == 0) square[owner.token] = z;
            }
        }
        if (gate.smooth) add_loads(gate, team, row, logits, shared.own, sums.every + first);
        counted++;
        nan_logits += row.unusable;
        nan_tokens += !routed && row.unusable;
        team.sync(); // the row and the lists are read; the next token writes them
    }

    // From the block to the device.
    if (team.rank == 0) {
        atomic_add(&in.sums.counter[kNanLogits], nan_logits);
        if (of_tokens) {
            atomic_add(in.sums.tokens, uint64_t{counted});
            atomic_add(&in.sums.counter[kNanTokens], uint64_t{nan_tokens});
        }
    }
    if (gate.smooth && !of_tokens) shared.own.leave(gate, team, in.sums.every + first);
    sync_threads(); // the sums of all teams are there
    shared.sums.end(in.sums, in.all_experts);
    if (in.sums.every && of_tokens) shared.own.end(gate, in.sums.every);
}

} // namespace cumoe
