/* A token's row of logits: noise and choice, by a team of threads. Forward and backward share it, so that both see
 * the same. Every bit is that of host/cpu/gate_row_real.h.
 *
 * Experts come in quads, as the noise does; a thread of a team has every kThreads-th quad, and nobody else touches
 * its elements until a barrier of the team. */
#pragma once

#include "cuda/gate.cuh"
#include "cuda/real.cuh"
#include "cuda/shared.cuh"

namespace cumoe
{

constexpr int kWarp = 32;
constexpr int kListSize = CUMOE_MAX_TOP_K + 1; // choices, and the runner-up
constexpr int kSumLanes = 16;                  // interleaved sums of a row, as on the CPU

static_assert(kSumLanes <= kListSize, "the interleaved sums stand in the list of shares");

template <typename Real>
__device__ __forceinline__ Real infinity()
{
    return static_cast<Real>(INFINITY);
}

/* A logit and whose it is; kNobody and -Inf: none. */
constexpr int32_t kNobody = INT32_MAX;
template <typename Real>
struct Best {
    Real value;
    int32_t expert;
};

/* What a team of several warps passes through shared memory. */
template <typename Real, int kTeamWarps>
struct TeamArrays {
    Real *value;     // [kTeamWarps]
    int32_t *expert; // [kTeamWarps]
    uint32_t *count; // [kTeamWarps]
    __host__ __device__ explicit TeamArrays(SharedArena &arena)
        : value(arena.take<Real>(kTeamWarps)), expert(arena.take<int32_t>(kTeamWarps)),
          count(arena.take<uint32_t>(kTeamWarps))
    {
    }
};

/* The threads that decide a row together: a warp of a block, or a block. */
template <typename Real, int kTeamWarps>
struct Team {
    static constexpr int kThreads = kTeamWarps * kWarp;
    static constexpr int kTeams = kTeamWarps == 1 ? kGateWarps : 1; // of a block
    static constexpr int kBlockThreads = kTeams * kThreads;

    TeamArrays<Real, kTeamWarps> shared;
    int rank;  // of the thread in its team
    int index; // of the team in its block

    __device__ explicit Team(const TeamArrays<Real, kTeamWarps> &arrays)
        : shared(arrays), rank(static_cast<int>(threadIdx.x) % kThreads),
          index(static_cast<int>(threadIdx.x) / kThreads)
    {
    }

    /* Orders the team's accesses to memory. */
    __device__ __forceinline__ void sync() const
    {
        if constexpr (kTeamWarps == 1)
            sync_warp();
        else
            sync_threads();
    }

    /* The largest; among equals, that of the lowest expert. */
    __device__ __forceinline__ Best<Real> best(Best<Real> mine) const
    {
        const auto take = [&mine](Real value, int32_t expert) {
            if (value > mine.value || (value == mine.value && expert < mine.expert)) mine = {value, expert};
        };
        for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
            const Real value = shuffle_xor(kFullMask, mine.value, lanes);
            const int32_t expert = shuffle_xor(kFullMask, mine.expert, lanes);
            take(value, expert);
        }
        if constexpr (kTeamWarps > 1) {
            if (rank % kWarp == 0) {
                shared.value[rank / kWarp] = mine.value;
                shared.expert[rank / kWarp] = mine.expert;
            }
            sync_threads();
            for (int warp = 0; warp < kTeamWarps; warp++) take(shared.value[warp], shared.expert[warp]);
            sync_threads(); // they are read; the next round may write them
        }
        return mine;
    }

    __device__ __forceinline__ uint32_t sum(uint32_t value) const
    {
        value = reduce_add(kFullMask, value);
        if constexpr (kTeamWarps > 1) {
            if (rank % kWarp == 0) shared.count[rank / kWarp] = value;
            sync_threads();
            value = 0;
            for (int warp = 0; warp < kTeamWarps; warp++) value += shared.count[warp];
            sync_threads(); // they are read; the next round may write them
        }
        return value;
    }
};

/* What a row decides. The arrays are memory of its team; the numbers each thread has for itself. */
template <typename Real>
struct GateRow {
    Real *noisy;       // [4, quads] shared, or global where experts are many
    Real *value;       // [kListSize] noisy logits, descending
    int32_t *best;     // [kListSize] their experts, ties to the lowest
    Real *share;       // [kListSize] for what is summed over choices
    int32_t found;     // <= wanted: usable logits among the best
    uint32_t unusable; // NaN or +Inf in the row; among this thread's experts alone until decide_row() sums them
};

/* Whose a row of logits is. */
struct RowOwner {
    int64_t token, choice; // choice: of T, or of [T, K1]
    int32_t group;         // whose experts it is about
};
__device__ __forceinline__ RowOwner owner_of(const GateRows &rows, int64_t row)
{
    if (!rows.choices.offset) return {rows.first + row, rows.first + row, 0};
    const int32_t choice = rows.choices.row_slot[row];
    return {rows.choices.row_token[row], choice, rows.group[choice]};
}

/* Whether a live token is no padding. */
__device__ __forceinline__ bool token_counts(const uint8_t *token_mask, int64_t token)
{
    return !token_mask || token_mask[token];
}

/* Where the element of an expert stands in a row of a team: lanes side by side use different banks. */
__device__ __forceinline__ int32_t place(const GateFacts &gate, int32_t expert)
{
    return expert % 4 * gate.quads + expert / 4;
}

/* Calls use(expert) for the experts of this thread, in ascending order. */
template <typename Team, typename Use>
__device__ __forceinline__ void for_own_experts(const GateFacts &gate, const Team &team, const Use &use)
{
    for (int32_t quad = team.rank; quad < gate.quads; quad += Team::kThreads)
        for (int32_t expert = 4 * quad; expert < 4 * quad + 4 && expert < gate.num_experts; expert++) use(expert);
}

/* Standard deviation of the noise (eq. 4). */
template <typename Real>
__device__ __forceinline__ Real noise_std(const GateFacts &gate, Real raw)
{
    const Real std = real::softplus(raw) + static_cast<Real>(gate.noise_epsilon);
    return std < FLT_MIN ? static_cast<Real>(FLT_MIN) : std;
}

/* eps of eq. 4 for one expert; groups begin with a quad of their own. */
__device__ __forceinline__ float noise_of(const GateFacts &gate, const cumoe_call_t &call, const RowOwner &owner,
                                          int32_t expert)
{
    return cumoe_noise_normal(call.seed, gate.noise_stream, call.offset, call.first_token + owner.token,
                              static_cast<int32_t>(gate.noise_level), 4 * owner.group * gate.quads + expert);
}

/* What an expert is chosen by, without noise: its logit, or the sigmoid of that and its bias. */
template <typename Real>
__device__ __forceinline__ Real score_of(const GateFacts &gate, int32_t expert, Real logit)
{
    if (!gate.sigmoid || !(logit < infinity<Real>() && logit > -infinity<Real>())) return logit;
    return real::sigmoid(logit) + (gate.bias ? static_cast<const Real *>(gate.bias)[expert] : 0);
}

/* NaN and +Inf never win: they become -Inf, like what is masked. */
template <typename Real>
__device__ __forceinline__ void put_noisy(const GateFacts &gate, int32_t expert, Real logit, GateRow<Real> &row)
{
    const bool bad = !(logit < infinity<Real>());
    row.unusable += bad;
    row.noisy[place(gate, expert)] = bad ? -infinity<Real>() : logit;
}

/* The best logit of this thread behind LAST in the order of choices. */
template <typename Real, typename Team>
__device__ __forceinline__ Best<Real> best_behind(const GateFacts &gate, const Team &team, const Real *noisy,
                                                  Best<Real> last)
{
    Best<Real> best = {-infinity<Real>(), kNobody};
    for_own_experts(gate, team, [&](int32_t expert) {
        const Real value = noisy[place(gate, expert)];
        const bool behind = value < last.value || (value == last.value && expert > last.expert);
        if (behind && value > best.value) best = {value, expert};
    });
    return best;
}

/* The best logits by repeated maximum; only the winner's thread looks again. */
template <typename Real, typename Team>
__device__ __forceinline__ void select_best(const GateFacts &gate, const Team &team, GateRow<Real> &row)
{
    Best<Real> mine = best_behind<Real>(gate, team, row.noisy, {infinity<Real>(), -1});
    for (row.found = 0; row.found < gate.wanted; row.found++) {
        const Best<Real> winner = team.best(mine);
        if (winner.expert == kNobody) break;
        if (team.rank == 0) {
            row.value[row.found] = winner.value;
            row.best[row.found] = winner.expert;
        }
        if (mine.expert == winner.expert) mine = best_behind(gate, team, row.noisy, winner);
    }
    team.sync(); // the lists are there, and so is the row
}

/* From a row of logits, [E] clean and with noise [E] raw behind it, to the noisy logits and the best of them. */
template <typename Real, typename Team>
__device__ __forceinline__ void decide_row(const GateFacts &gate, const cumoe_call_t &call, const RowOwner &owner,
                                           const Real *logits, const Team &team, GateRow<Real> &row)
{
    row.unusable = 0;
    row.found = 0;
    for (int32_t quad = team.rank; quad < gate.quads; quad += Team::kThreads) {
        float normal[4] = {};
        if (gate.noise)
            cumoe_noise_normals(cumoe_noise_words(call.seed, gate.noise_stream, call.offset,
                                                  call.first_token + owner.token, gate.noise_level,
                                                  static_cast<uint32_t>(owner.group * gate.quads + quad)),
                                normal);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int32_t expert = 4 * quad + i;
            if (expert >= gate.num_experts) continue;
            Real logit = logits[expert];
            if (gate.noise) logit = logit + normal[i] * noise_std(gate, logits[gate.num_experts + expert]);
            put_noisy(gate, expert, score_of(gate, expert, logit), row);
        }
    }
    row.unusable = team.sum(row.unusable);
    if (gate.dense)
        team.sync();
    else
        select_best(gate, team, row);
}

/* The sum of a row, by all of the team: interleaved sums in a fixed order, as on the CPU. ROW was written before a
 * barrier; LANES [kSumLanes] is memory of the team, and free again behind. */
template <typename Real, typename Team>
__device__ __forceinline__ Real row_sum(const GateFacts &gate, const Team &team, const Real *row, Real *lanes)
{
    if (team.rank < kSumLanes) {
        Real sum = 0;
        for (int32_t e = team.rank; e < gate.num_experts; e += kSumLanes) sum += row[place(gate, e)];
        lanes[team.rank] = sum;
    }
    team.sync();
    Real total = 0;
    for (int lane = 0; lane < kSumLanes; lane++) total += lanes[lane];
    team.sync(); // the lanes are read
    return total;
}

/* What the weights of the first CHOSEN are shares of, before they are divided: exponentials, or sigmoids; they
 * stand in row.share behind a barrier. Their sum, one chain in the order of slots. */
template <typename Real, typename Team>
__device__ __forceinline__ Real sum_chosen(const GateFacts &gate, const Team &team, const GateRow<Real> &row,
                                           const Real *logits, int32_t chosen)
{
    for (int32_t j = team.rank; j < chosen; j += Team::kThreads)
        row.share[j] = gate.sigmoid ? real::sigmoid(logits[row.best[j]]) : real::exp(row.value[j] - row.value[0]);
    team.sync();
    Real sum = 0;
    for (int32_t j = 0; j < chosen; j++) sum += row.share[j];
    return sum;
}

/* kth_excluding (eq. 9): a chosen expert must stay above the runner-up, the others above the last chosen one. */
template <typename Real>
__device__ __forceinline__ Real threshold_of_chosen(const GateFacts &gate, const GateRow<Real> &row)
{
    return row.found > gate.top_k ? row.value[gate.top_k] : -infinity<Real>();
}

template <typename Real>
__device__ __forceinline__ Real threshold_of_others(const GateFacts &gate, const GateRow<Real> &row)
{
    return row.found >= gate.top_k ? row.value[gate.top_k - 1] : -infinity<Real>();
}

/* z of eq. 9, kept where Phi is neither 0 nor 1 and products with it stay finite. */
template <typename Real>
__device__ __forceinline__ Real load_argument(Real clean, Real threshold, Real std)
{
    const Real z = (clean - threshold) / std;
    return z < -40 ? -40 : z > 40 ? 40 : z;
}

/* Sums over all usable experts of a token, which each has a share in: p of the Switch loss, and that of the z loss.
 */
template <typename Real>
struct Shares {
    Real largest; // logit, -Inf: none is usable, and the other numbers are 0
    Real exps;    // sum of e^(logit - largest)
    Real sum;     // of what p is a share of: the same, or of sigmoids
    Real log_sum; // log of the sum of e^logit
};

/* The logit, or -Inf where the expert cannot be chosen. */
template <typename Real>
__device__ __forceinline__ Real usable_logit(const GateFacts &gate, int32_t expert, Real logit)
{
    const Real score = score_of(gate, expert, logit);
    return score < infinity<Real>() && score > -infinity<Real>() ? logit : -infinity<Real>();
}

/* ROW [4, quads] and LANES are memory of the team. ROW becomes what p is a share of. */
template <typename Real, typename Team>
__device__ __forceinline__ Shares<Real> sum_shares(const GateFacts &gate, const Team &team, const Real *logits,
                                                   Real *row, Real *lanes)
{
    Best<Real> mine = {-infinity<Real>(), kNobody};
    for_own_experts(gate, team, [&](int32_t e) {
        const Real logit = usable_logit(gate, e, logits[e]);
        if (logit > mine.value) mine = {logit, e};
    });
    Shares<Real> shares = {team.best(mine).value, 0, 0, 0};
    if (!(shares.largest > -infinity<Real>())) return shares; // the whole team
    const auto sum_parts = [&](bool sigmoid) {
        for_own_experts(gate, team, [&](int32_t e) {
            const Real logit = usable_logit(gate, e, logits[e]);
            Real value = 0;
            if (logit > -infinity<Real>())
                value = sigmoid ? real::sigmoid(logit) : real::exp(logit - shares.largest);
            row[place(gate, e)] = value;
        });
        team.sync();
        return row_sum(gate, team, row, lanes);
    };
    shares.sum = shares.exps = sum_parts(false);
    if (gate.sigmoid) shares.sum = sum_parts(true);
    shares.log_sum = shares.largest + static_cast<Real>(log(static_cast<double>(shares.exps)));
    return shares;
}

template <typename Real>
__device__ __forceinline__ Real share_of(Real part, const Shares<Real> &shares)
{
    return shares.sum > 0 ? part / shares.sum : 0;
}

/* Shared memory of a block that decides rows; ROWS of a team, in shared memory for teams of a warp alone. */
template <typename Real, int kTeamWarps>
struct RowArrays {
    TeamArrays<Real, kTeamWarps> team;
    Real *row;           // [kTeams, rows, 4 quads]
    Real *value, *share; // [kTeams, kListSize]
    int32_t *best;       // [kTeams, kListSize]
    __host__ __device__ RowArrays(SharedArena &arena, int32_t rows, int32_t quads)
        : team(arena),
          row(arena.take<Real>(kTeamWarps == 1 ? static_cast<size_t>(kGateWarps) * rows * 4 * quads : 0)),
          value(arena.take<Real>(Team<Real, kTeamWarps>::kTeams * kListSize)),
          share(arena.take<Real>(Team<Real, kTeamWarps>::kTeams * kListSize)),
          best(arena.take<int32_t>(Team<Real, kTeamWarps>::kTeams * kListSize))
    {
    }

    /* A team's part; GLOBAL [teams of the grid, rows, 4 quads] for teams of a block. */
    __device__ __forceinline__ GateRow<Real> of(const Team<Real, kTeamWarps> &own, int32_t rows, int32_t quads,
                                                Real *global) const
    {
        const int64_t size = static_cast<int64_t>(rows) * 4 * quads;
        const int list = own.index * kListSize;
        Real *const begin = kTeamWarps == 1 ? row + own.index * size : global + blockIdx.x * size;
        return {begin, value + list, best + list, share + list, 0, 0};
    }
};

} // namespace cumoe
