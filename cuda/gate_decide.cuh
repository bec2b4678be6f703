/* What a token's row of logits, or the caller, decides: choices, weights, and their part of the sums. */
#pragma once

#include "cuda/gate_sums.cuh"

namespace cumoe
{

constexpr int kSlotThreads = 256, kSlotBlocksPerSm = 6;
constexpr int32_t kSharedSums = 2048; // experts at most whose sums a block collects before they go to memory

/* Sums over tokens, [E] each: fixed point, rows, and counters [kGateCounters]. Integers, so the order is free. */
struct GateSums {
    uint64_t *importance, *load;
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
        return {importance, device.load, count, device.counter, device.tokens};
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

/* The sum to which every expert of every token adds: the smooth load, or the importance of the dense gate. One
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

/* A block of tokens to decide. */
struct GateTokens {
    GateFacts gate;
    const cumoe_call_t *call;
    const uint8_t *token_mask; // [T] or NULL
    int64_t first, tokens;     // of T
    const void *logits;        // [tokens, columns]
    void *rows;                // see GateScratch
    int32_t *expert;           // [T, K]
    void *weight;              // [T, K]
    GateSums sums;
};

/* Softmax over the chosen logits (eq. 3): weights of one token, in the order of slots. */
template <typename Real, typename Team>
__device__ __forceinline__ void write_topk(const GateFacts &gate, const Team &team, const GateRow<Real> &row,
                                           int32_t *expert, Real *weight, const GateSums &sums)
{
    const int32_t chosen = row.found < gate.top_k ? row.found : gate.top_k;
    for (int32_t j = team.rank; j < chosen; j += Team::kThreads)
        row.share[j] = real::exp(row.value[j] - row.value[0]);
    team.sync();
    Real sum = 0;
    for (int32_t j = 0; j < chosen; j++) sum += row.share[j];
    const Real none = chosen == 0 && row.unusable ? static_cast<Real>(NAN) : static_cast<Real>(0);
    for (int32_t j = team.rank; j < gate.top_k; j += Team::kThreads) {
        const Real share = j < chosen ? row.share[j] / sum : none;
        expert[j] = j < chosen ? row.best[j] : -1;
        weight[j] = share;
        if (j >= chosen) continue;
        atomic_add(&sums.importance[row.best[j]], fixed_point(share));
        atomic_add(&sums.count[row.best[j]], 1u);
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
        if (!none) own.add(gate, team, e, share, sums.importance);
    });
    return !none;
}

template <typename Real, int kTeamWarps>
struct DecideArrays {
    RowArrays<Real, kTeamWarps> row;
    SharedSums sums;
    OwnSums<Real, kTeamWarps> own;
    __host__ __device__ DecideArrays(SharedArena &arena, int32_t num_experts, int32_t quads)
        : row(arena, 1, quads), sums(arena, num_experts), own(arena, num_experts, quads)
    {
    }
};

/* A team for each token: choices, weights, and its part of the sums. */
template <typename Real, int kTeamWarps>
__global__ void __launch_bounds__(Team<Real, kTeamWarps>::kBlockThreads,
                                  gate_blocks_per_sm(kTeamWarps, sizeof(Real), false))
    gate_decide_kernel(GateTokens tokens)
{
    using Threads = Team<Real, kTeamWarps>;
    const GateFacts &gate = tokens.gate;
    SharedArena arena;
    const DecideArrays<Real, kTeamWarps> shared(arena, gate.num_experts, gate.quads);
    const Threads team(shared.row.team);
    GateRow<Real> row = shared.row.of(team, 1, gate.quads, static_cast<Real *>(tokens.rows));
    const GateSums sums = shared.sums.begin(tokens.sums, gate.num_experts);
    shared.own.begin(gate, team);
    const cumoe_call_t call = *tokens.call;
    uint64_t counted = 0, nan_logits = 0, nan_tokens = 0;

    for (int64_t i = static_cast<int64_t>(blockIdx.x) * Threads::kTeams + team.index; i < tokens.tokens;
         i += static_cast<int64_t>(gridDim.x) * Threads::kTeams) {
        const int64_t token = tokens.first + i;
        int32_t *expert = tokens.expert + token * gate.top_k;
        Real *weight = static_cast<Real *>(tokens.weight) + token * gate.top_k;

        // Slots that are not routed: masked tokens, and rows beyond the live ones.
        if (token >= call.live_tokens || !token_counts(tokens.token_mask, token)) {
            for (int32_t j = team.rank; j < gate.top_k; j += Threads::kThreads) {
                expert[j] = -1;
                weight[j] = 0;
            }
            continue;
        }

        // The choice, its weights, and the chance that every expert had.
        const Real *logits = static_cast<const Real *>(tokens.logits) + i * gate.columns;
        decide_row(gate, call, token, logits, team, row);
        bool routed = row.found > 0;
        if (gate.dense)
            routed = write_softmax(gate, team, row, expert, weight, shared.own, sums);
        else
            write_topk(gate, team, row, expert, weight, sums);
        if (gate.smooth) add_loads(gate, team, row, logits, shared.own, sums.load);
        counted++;
        nan_logits += row.unusable;
        nan_tokens += !routed && row.unusable;
        team.sync(); // the row and the lists are read; the next token writes them
    }

    // From the block to the device.
    if (team.rank == 0) {
        atomic_add(tokens.sums.tokens, counted);
        atomic_add(&tokens.sums.counter[kNanLogits], nan_logits);
        atomic_add(&tokens.sums.counter[kNanTokens], nan_tokens);
    }
    sync_threads(); // the sums of all teams are there
    shared.sums.end(tokens.sums, gate.num_experts);
    if (gate.dense || gate.smooth) shared.own.end(gate, gate.dense ? tokens.sums.importance : tokens.sums.load);
}

/* EXTERNAL: the caller's choices. */
struct ExternalSlots {
    int32_t num_experts;
    uint32_t top_k;
    const cumoe_call_t *call;
    const uint8_t *token_mask; // [T] or NULL
    uint32_t slots;            // T * K, below 2^31
    const void *index;         // [T, K]
    cumoe_dtype_t index_dtype;
    const void *index_weight; // [T, K]
    cumoe_dtype_t index_weight_dtype;
    int32_t *expert; // [T, K]
    void *weight;    // [T, K]
    GateSums sums;
};

/* What is outside 0..E-1 is not routed, and its weight not looked at. */
template <typename Real>
__global__ void __launch_bounds__(kSlotThreads, kSlotBlocksPerSm) gate_external_kernel(ExternalSlots in)
{
    SharedArena arena;
    const SharedSums shared(arena, in.num_experts);
    const GateSums sums = shared.begin(in.sums, in.num_experts);
    const int64_t live = in.call->live_tokens;
    uint32_t tokens = 0, bad_indices = 0;
    for (uint32_t slot = blockIdx.x * kSlotThreads + threadIdx.x; slot < in.slots;
         slot += gridDim.x * kSlotThreads) {
        const uint32_t token = slot / in.top_k;
        int64_t e = -1;
        if (token < live && token_counts(in.token_mask, token)) {
            e = in.index_dtype == CUMOE_I64 ? static_cast<const int64_t *>(in.index)[slot]
                                            : static_cast<const int32_t *>(in.index)[slot];
            tokens += slot % in.top_k == 0;
        }
        const bool routed = e >= 0 && e < in.num_experts;
        bad_indices += e < -1 || e > in.num_experts;
        in.expert[slot] = routed ? static_cast<int32_t>(e) : -1;
        static_cast<Real *>(in.weight)[slot] =
            routed ? load<Real>(in.index_weight, in.index_weight_dtype, slot) : static_cast<Real>(0);
        if (routed) atomic_add(&sums.count[e], 1u);
    }
    tokens = reduce_add(kFullMask, tokens);
    bad_indices = reduce_add(kFullMask, bad_indices);
    if (threadIdx.x % kWarp == 0) {
        atomic_add(in.sums.tokens, static_cast<uint64_t>(tokens));
        atomic_add(&in.sums.counter[kBadIndices], static_cast<uint64_t>(bad_indices));
    }
    sync_threads(); // the sums of all warps are there
    shared.end(in.sums, in.num_experts);
}

} // namespace cumoe
