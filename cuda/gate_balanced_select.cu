/* Gate BALANCED: which tokens an expert takes, and, by thresholds, which of all candidates there is room for. */
#include "cuda/gate_balanced.cuh"

#include "cuda/launch.cuh"
#include "cuda/scan.cuh"

namespace cumoe
{

namespace
{

constexpr int kBlocksPerSm = 4;
constexpr int kDigitsOfThread = kDigits / kSumThreads;
constexpr int64_t kChunk = 4096;        // tokens of an expert that a block looks at before it looks for others
constexpr int64_t kMostCounted = 16384; // candidates of a block before they go to memory: 32 bits do not overflow
static_assert(kDigits % kSumThreads == 0, "every thread has as many digits");

struct SelectArrays {
    SumArrays sums;
    uint32_t *histogram; // [kDigits]
    Cut *cut;            // [1]
    __host__ __device__ explicit SelectArrays(SharedArena &arena)
        : sums(arena), histogram(arena.take<uint32_t>(kDigits)), cut(arena.take<Cut>(1))
    {
    }

    /* Both are called by the whole block. */
    __device__ __forceinline__ void clear() const
    {
        for (int digit = threadIdx.x; digit < kDigits; digit += kSumThreads) histogram[digit] = 0;
        sync_threads();
    }
    template <typename Bits>
    __device__ __forceinline__ void add(Bits value, const Cut &so_far, int shift) const
    {
        if (((value ^ static_cast<Bits>(so_far.lowest)) >> shift) >> kDigitBits == 0)
            atomic_add(&histogram[value >> shift & (kDigits - 1)], 1u);
    }
};

/* One more digit, the bits from SHIFT on, by the whole block. count_of(digit) is what there is of those that begin
 * with the digits so far; their sum goes to ALL. */
template <typename CountOf>
__device__ __forceinline__ Cut narrow_cut(const Cut &so_far, int shift, const CountOf &count_of,
                                          const SelectArrays &shared, uint64_t &all)
{
    // Digits descend from thread to thread.
    const int highest = kDigits - 1 - static_cast<int>(threadIdx.x) * kDigitsOfThread;
    uint64_t mine = 0;
    for (int i = 0; i < kDigitsOfThread; i++) mine += count_of(highest - i);
    const BlockSum<uint64_t> sums = block_inclusive_sum(mine, shared.sums.integer);
    all = sums.total;
    if (all <= so_far.wanted) return {so_far.lowest, kAll}; // the whole block

    // Where the sum passes what is wanted.
    uint64_t above = sums.inclusive - mine;
    if (above < so_far.wanted && sums.inclusive >= so_far.wanted)
        for (int digit = highest;; digit--) {
            const uint64_t count = count_of(digit), wanted = so_far.wanted - above;
            above += count;
            if (count < wanted) continue;
            *shared.cut = {so_far.lowest | static_cast<uint64_t>(digit) << shift, count == wanted ? kAll : wanted};
            break;
        }
    sync_threads(); // the cut is there
    return *shared.cut;
}

/* use(token, bits) of a row by the whole block: a thread asks for several before it looks at the first. */
template <typename Bits, typename Use>
__device__ __forceinline__ void for_each_token(const Bits *row, int64_t tokens, const Use &use)
{
    constexpr int kInFlight = 8;
    for (int64_t first = threadIdx.x; first < tokens; first += kInFlight * kSumThreads) {
        Bits bits[kInFlight];
#pragma unroll
        for (int i = 0; i < kInFlight; i++)
            bits[i] = first + i * kSumThreads < tokens ? row[first + i * kSumThreads] : 0;
#pragma unroll
        for (int i = 0; i < kInFlight; i++)
            if (first + i * kSumThreads < tokens) use(first + i * kSumThreads, bits[i]);
    }
}

template <typename Real>
__device__ __forceinline__ Real value_of_bits(bits_of<Real> bits)
{
    return *reinterpret_cast<const Real *>(&bits);
}

/* Of the tokens of a row, the largest WANTED by value_of(token, bits, value), which says whether it counts at all.
 */
template <typename Bits, typename ValueOf>
__device__ __forceinline__ Cut select_largest(const Bits *row, int64_t tokens, int digits, uint64_t wanted,
                                              const ValueOf &value_of, const SelectArrays &shared)
{
    Cut cut = {0, wanted};
    for (int shift = (digits - 1) * kDigitBits; shift >= 0 && cut.wanted != kAll; shift -= kDigitBits) {
        shared.clear();
        for_each_token(row, tokens, [&](int64_t t, Bits bits) {
            Bits value;
            if (value_of(t, bits, value)) shared.add(value, cut, shift);
        });
        sync_threads(); // the histogram is there
        uint64_t all;
        cut = narrow_cut(
            cut, shift, [&](int digit) { return static_cast<uint64_t>(shared.histogram[digit]); }, shared, all);
        sync_threads(); // and read, as is the cut
    }
    return cut;
}

/* A block for each expert: the smallest g that it takes, and of the tokens with that g the last. */
template <typename Real>
__global__ void __launch_bounds__(kSumThreads, kBlocksPerSm)
    balanced_take_kernel(BalancedTokens b, Real *batch_threshold)
{
    using Bits = bits_of<Real>;
    SharedArena arena;
    const SelectArrays shared(arena);
    const int64_t live = b.call->live_tokens, counted = static_cast<int64_t>(*b.sums.tokens);
    const int64_t share = b.top_k * counted / b.num_experts;
    const uint64_t wanted = counted == 0 ? 0 : share > 1 ? static_cast<uint64_t>(share) : 1;
    for (int32_t e = blockIdx.x; e < b.num_experts; e += gridDim.x) {
        const Bits *row = static_cast<const Bits *>(b.scratch.g) + e * b.num_tokens;

        // The smallest g, and, where it is that of too many, the last of them: a selection of low tokens.
        const auto g_of = [&](int64_t, Bits bits, Bits &value) { return is_candidate(value = bits); };
        const Cut cut = select_largest(row, live, kDigitsOfReal<Real>, wanted, g_of, shared);
        const Bits lowest = static_cast<Bits>(cut.lowest);
        int64_t last = live;
        if (cut.wanted != kAll) {
            int digits = 1;
            while (live >> digits * kDigitBits) digits++;
            const auto token_of = [&](int64_t t, Bits bits, Bits &value) {
                value = static_cast<Bits>(live - 1 - t);
                return bits == lowest;
            };
            const Cut of_tokens = select_largest(row, live, digits, cut.wanted, token_of, shared);
            last = live - 1 - static_cast<int64_t>(of_tokens.lowest);
        }

        // What it took, against what is above the threshold.
        const Real threshold = static_cast<const Real *>(b.thresholds)[e];
        uint64_t least = UINT64_MAX, difference = 0, excess = 0; // the last two are signed, and may wrap
        for_each_token(row, live, [&](int64_t t, Bits bits) {
            const Real g = value_of_bits<Real>(bits);
            const bool candidate = is_candidate(bits), above = candidate && g > threshold;
            const bool takes = candidate && (bits > lowest || (bits == lowest && t <= last));
            if (takes && bits < least) least = bits;
            const uint64_t sign = static_cast<uint64_t>(above) - static_cast<uint64_t>(takes);
            difference += sign * fixed_point(g);
            excess += sign;
        });
        least = block_reduce(least, shared.sums.integer, [](uint64_t x, uint64_t y) { return x < y ? x : y; });
        difference = block_sum(difference, shared.sums.integer);
        excess = block_sum(excess, shared.sums.integer);
        if (threadIdx.x > 0) continue;
        static_cast<Bits *>(b.scratch.lowest)[e] = lowest;
        b.scratch.last[e] = static_cast<int32_t>(last);
        b.routing.excess[e] = static_cast<int32_t>(excess);
        constexpr double unit = 1 / kFixedPoint<Real>;
        const double moved = excess ? static_cast<double>(threshold) * static_cast<int32_t>(excess) : 0;
        b.scratch.loss[e] = static_cast<double>(static_cast<int64_t>(difference)) * unit - moved;
        const Bits smallest = least == UINT64_MAX ? 0 : static_cast<Bits>(least);
        if (batch_threshold) reinterpret_cast<Bits *>(batch_threshold)[e] = smallest;
    }
}

/* The histogram of one digit of all candidates, DIGIT 0 the highest, behind the choice of the digit before; after
 * the last that is all. Where there are no more candidates than rows, the first histogram tells. */
template <typename Real>
__global__ void __launch_bounds__(kSumThreads, kBlocksPerSm) balanced_cut_kernel(BalancedTokens b, int digit)
{
    using Bits = bits_of<Real>;
    SharedArena arena;
    const SelectArrays shared(arena);
    Cut *const cuts = b.scratch.cut;
    const bool first_thread = blockIdx.x == 0 && threadIdx.x == 0;
    const int shift = (kDigitsOfReal<Real> - 1 - digit) * kDigitBits;

    // The digit before. Every block finds it for itself.
    Cut cut = {0, static_cast<uint64_t>(b.most_rows)};
    if (digit > 0) cut = cuts[digit - 1];
    if (digit > 0 && cut.wanted != kAll) {
        const uint64_t *counted = b.scratch.histogram + (digit - 1) * kDigits;
        uint64_t all;
        cut = narrow_cut(
            cut, shift + kDigitBits, [&](int value) { return counted[value]; }, shared, all);
        if (digit == 1 && first_thread && all > static_cast<uint64_t>(b.most_rows))
            b.sums.counter[kDroppedRows] = all - static_cast<uint64_t>(b.most_rows);
    }
    if (first_thread) cuts[digit] = cut;
    if (digit == 0)
        for (int32_t e = blockIdx.x * kSumThreads + threadIdx.x; e < b.num_experts; e += gridDim.x * kSumThreads)
            b.routing.excess[e] = 0;
    if (digit == kDigitsOfReal<Real> || cut.wanted == kAll) return; // the whole grid

    // This one, of chunks of experts' tokens.
    const auto flush = [&] {
        sync_threads();
        for (int value = threadIdx.x; value < kDigits; value += kSumThreads)
            if (shared.histogram[value])
                atomic_add(&b.scratch.histogram[digit * kDigits + value], uint64_t{shared.histogram[value]});
    };
    const int64_t live = b.call->live_tokens, chunks = (live + kChunk - 1) / kChunk;
    int64_t counted = 0;
    shared.clear();
    for (int64_t work = blockIdx.x; work < chunks * b.num_experts; work += gridDim.x) {
        const int64_t e = work / chunks, begin = work % chunks * kChunk;
        const int64_t end = begin + kChunk < live ? begin + kChunk : live;
        const Bits *row = static_cast<const Bits *>(b.scratch.g) + e * b.num_tokens + begin;
        const Real threshold = static_cast<const Real *>(b.thresholds)[e];
        for_each_token(row, end - begin, [&](int64_t, Bits bits) {
            if (is_candidate(bits) && value_of_bits<Real>(bits) > threshold) shared.add(bits, cut, shift);
        });
        counted += end - begin;
        if (counted < kMostCounted) continue;
        flush();
        shared.clear();
        counted = 0;
    }
    flush();
}

} // namespace

template <typename Real>
cudaError_t balanced_take(const cumoe_context_t &context, const BalancedTokens &balanced, void *batch_threshold,
                          cudaStream_t stream)
{
    return launch({resident_blocks(context, balanced.num_experts, kBlocksPerSm), dim3(kSumThreads), stream,
                   shared_bytes<SelectArrays>()},
                  balanced_take_kernel<Real>, balanced, static_cast<Real *>(batch_threshold));
}

template <typename Real>
cudaError_t balanced_cut(const cumoe_context_t &context, const BalancedTokens &balanced, cudaStream_t stream)
{
    const int64_t work = (balanced.num_tokens + kChunk - 1) / kChunk * balanced.num_experts;
    const dim3 blocks = resident_blocks(context, work > 0 ? work : 1, kBlocksPerSm);
    cudaError_t error =
        cudaMemsetAsync(balanced.scratch.histogram, 0, kDigitsOfReal<Real> * kDigits * sizeof(uint64_t), stream);
    for (int digit = 0; error == cudaSuccess && digit <= kDigitsOfReal<Real>; digit++)
        error = launch({digit < kDigitsOfReal<Real> ? blocks : dim3(1), dim3(kSumThreads), stream,
                        shared_bytes<SelectArrays>()},
                       balanced_cut_kernel<Real>, balanced, digit);
    return error;
}

template cudaError_t balanced_take<float>(const cumoe_context_t &, const BalancedTokens &, void *, cudaStream_t);
template cudaError_t balanced_take<double>(const cumoe_context_t &, const BalancedTokens &, void *, cudaStream_t);
template cudaError_t balanced_cut<float>(const cumoe_context_t &, const BalancedTokens &, cudaStream_t);
template cudaError_t balanced_cut<double>(const cumoe_context_t &, const BalancedTokens &, cudaStream_t);

} // namespace cumoe
