/* Stage gate: logits, noise, choice, weights, and the sums and losses that balance the experts. */
#include "cuda/gate.cuh"

#include "cuda/gate_balanced.cuh"
#include "cuda/gate_decide.cuh"
#include "cuda/gemm_exact.cuh"
#include "cuda/launch.cuh"

namespace cumoe
{

GateScratch gate_scratch(const cumoe_context_t &context, int64_t num_tokens, bool backward, void *workspace,
                         int64_t values)
{
    const cumoe_config_t &c = context.config;
    const size_t E = static_cast<size_t>(c.num_experts), real = cumoe__dtype_size(cumoe__gate_dtype(&c));
    cumoe_arena_t arena = {reinterpret_cast<uintptr_t>(workspace), 0};
    const auto take = [&arena](size_t count, size_t size) { return cumoe__take(&arena, count * size); };
    GateScratch s = {};
    if (!backward) {
        s.count = static_cast<uint32_t *>(take(E, sizeof(uint32_t)));
        s.counter = static_cast<uint64_t *>(take(kGateCounters, sizeof(uint64_t)));
    }
    if (c.gate != CUMOE_GATE_EXTERNAL) {
        const int64_t block = gate_block(c, num_tokens, values);
        const size_t tokens = static_cast<size_t>(block);
        const size_t rows = c.num_experts <= kGateWarpExperts ? 0 : gate_grid(context, block, backward).x;
        s.logits = take(tokens * E * (cumoe__is_noisy(c.gate) ? 2 : 1), real);
        s.rows = take(rows * (backward ? 2 : 1) * ((E + 3) / 4 * 4), real);
        if (backward) {
            s.dimportance = take(E, real);
            s.dload = take(E, real);
            s.has_load = static_cast<int32_t *>(take(1, sizeof(int32_t)));
            s.counted = static_cast<int32_t *>(take(tokens, sizeof(int32_t)));
            const size_t slices = static_cast<size_t>(gate_slices(c, block));
            s.offset = static_cast<int32_t *>(take(slices + 1, sizeof(int32_t)));
            s.slice = take(slices > 1 ? slices * E * static_cast<size_t>(c.hidden_size) : 0, real);
        }
    }
    s.size = arena.used;
    return s;
}

size_t gate_workspace(const cumoe_context_t &context, int64_t num_tokens)
{
    return balanced_scratch(context, num_tokens, nullptr, gate_scratch(context, num_tokens, false, nullptr).size)
        .end;
}

cudaError_t gate_logits(const cumoe_context_t &context, const GateFacts &facts, const cumoe_weights_t &weights,
                        const void *x, int64_t x_stride, const cumoe_call_t *call, int64_t first, int64_t tokens,
                        void *logits, cudaStream_t stream)
{
    const cumoe_config_t &c = context.config;
    RowsProduct product = {};
    product.parts = facts.noise ? 2 : 1;
    product.terms = 1;
    product.n = c.num_experts;
    product.k = c.hidden_size;
    const size_t skip = static_cast<size_t>(first * x_stride) * cumoe__dtype_size(c.dtype);
    product.a[0] = {static_cast<const char *>(x) + skip, c.dtype, 0, x_stride, 1, nullptr};
    product.b[0] = {weights.w_gate, weights.gate_dtype, 0, c.hidden_size, 1, nullptr};
    product.b[1] = {weights.w_noise, weights.gate_dtype, 0, c.hidden_size, 1, nullptr};
    product.call = call;
    product.first_token = first;
    product.max_rows = tokens;
    product.groups = 1;
    StoreRows store = {};
    store.c = logits;
    store.dtype = cumoe__gate_dtype(&c);
    store.row_stride = facts.columns;
    store.part_stride = c.num_experts;
    return exact_rows_product(context, product, store, stream);
}

namespace
{

constexpr int kBeginThreads = 256;

/* The numbers of the call, for all later stages: the caller's, or those in device memory; and sums of nothing. */
__global__ void __launch_bounds__(kBeginThreads)
    gate_begin_kernel(cumoe_call_t given, const cumoe_call_t *call, int64_t num_tokens, cumoe_call_t *out,
                      int32_t num_experts, GateSums sums)
{
    const int32_t e = static_cast<int32_t>(blockIdx.x * kBeginThreads + threadIdx.x);
    if (e < num_experts) {
        sums.importance[e] = 0;
        sums.load[e] = 0;
        sums.count[e] = 0;
    }
    if (e < kGateCounters) sums.counter[e] = 0;
    if (e > 0) return;
    *sums.tokens = 0;
    if (call) given = *call;
    if (given.live_tokens < 0) given.live_tokens = 0;
    if (given.live_tokens > num_tokens) given.live_tokens = num_tokens;
    *out = given;
}

/* What the caller asked for beside the routing; any of it may be NULL. */
struct GateOutputs {
    int32_t *expert_count;                  // [E]
    void *importance, *load;                // [E]
    void *losses;                           // [CUMOE_NUM_LOSSES]
    cumoe_statistics_t *statistics;         // [1]
    int64_t *fixed_importance, *fixed_load; // [E] of the routing, never NULL
    const double *threshold_loss;           // [E] terms of L_batchwise; NULL = 0
};

/* Rows and loads over the experts, and what the teams counted. */
template <typename Real>
__device__ __forceinline__ void
write_statistics(const GateSums &sums, const int64_t *fixed_load, int32_t num_experts, const Balance &importance,
                 const Balance &load, const SumArrays &shared, cumoe_statistics_t *statistics)
{
    constexpr double unit = 1 / kFixedPoint<Real>;
    uint64_t rows = 0, max_count = 0, max_load = 0;
    for (int32_t e = threadIdx.x; e < num_experts; e += kSumThreads) {
        const uint64_t count = sums.count[e], units = static_cast<uint64_t>(fixed_load[e]);
        rows += count;
        max_count = count > max_count ? count : max_count;
        max_load = units > max_load ? units : max_load;
    }
    rows = block_sum(rows, shared.integer);
    max_count = block_max(max_count, shared.integer);
    max_load = block_max(max_load, shared.integer);
    if (threadIdx.x > 0) return;
    cumoe_statistics_t s = {};
    s.tokens = static_cast<int64_t>(*sums.tokens);
    s.rows = static_cast<int64_t>(rows);
    s.nan_logits = static_cast<int64_t>(sums.counter[kNanLogits]);
    s.nan_tokens = static_cast<int64_t>(sums.counter[kNanTokens]);
    s.bad_indices = static_cast<int64_t>(sums.counter[kBadIndices]);
    s.dropped_rows = static_cast<int64_t>(sums.counter[kDroppedRows]);
    s.max_count = static_cast<int64_t>(max_count);
    s.cv_importance = sqrt(importance.cv2);
    s.cv_load = sqrt(load.cv2);
    if (load.mean > 0) s.max_over_mean_load = static_cast<double>(max_load) * unit / load.mean;
    if (rows > 0) s.max_over_mean_count = static_cast<double>(max_count) * num_experts / static_cast<double>(rows);
    *statistics = s;
}

/* One block: the vectors, losses and statistics. */
template <typename Real>
__global__ void __launch_bounds__(kSumThreads, 1)
    gate_finish_kernel(int32_t num_experts, bool smooth, bool learned, GateSums sums, GateOutputs out)
{
    SharedArena arena;
    const SumArrays shared(arena);
    constexpr double unit = 1 / kFixedPoint<Real>;

    // The vectors. A load that is not smooth counts rows.
    for (int32_t e = threadIdx.x; e < num_experts; e += kSumThreads) {
        if (!smooth)
            out.fixed_load[e] = static_cast<int64_t>(sums.count[e])
                                << CUMOE_FIXED_POINT_BITS(sizeof(Real) == 8 ? CUMOE_F64 : CUMOE_F32);
        if (out.expert_count) out.expert_count[e] = static_cast<int32_t>(sums.count[e]);
        if (out.importance)
            static_cast<Real *>(out.importance)[e] =
                static_cast<Real>(static_cast<double>(out.fixed_importance[e]) * unit);
        if (out.load)
            static_cast<Real *>(out.load)[e] = static_cast<Real>(static_cast<double>(out.fixed_load[e]) * unit);
    }
    if (!out.losses && !out.statistics) return; // the whole block

    // The losses: every thread reads the sums that it wrote.
    const Balance importance = balance_of<Real>(out.fixed_importance, num_experts, shared);
    const Balance load = balance_of<Real>(out.fixed_load, num_experts, shared);
    double threshold = 0;
    for (int32_t e = threadIdx.x; out.threshold_loss && e < num_experts; e += kSumThreads)
        threshold += out.threshold_loss[e];
    if (out.threshold_loss) threshold = block_sum(threshold, shared.real);
    if (out.losses && threadIdx.x < CUMOE_NUM_LOSSES) {
        double loss = 0;
        if (learned && threadIdx.x == CUMOE_LOSS_IMPORTANCE) loss = importance.cv2;
        if (learned && threadIdx.x == CUMOE_LOSS_LOAD) loss = load.cv2;
        if (threadIdx.x == CUMOE_LOSS_THRESHOLD) loss = threshold;
        static_cast<Real *>(out.losses)[threadIdx.x] = static_cast<Real>(loss);
    }
    if (out.statistics)
        write_statistics<Real>(sums, out.fixed_load, num_experts, importance, load, shared, out.statistics);
}

template <typename Real, int kTeamWarps>
cudaError_t decide(const cumoe_context_t &context, const GateTokens &tokens, cudaStream_t stream)
{
    using Threads = Team<Real, kTeamWarps>;
    return launch({gate_grid(context, tokens.tokens, false), dim3(Threads::kBlockThreads), stream,
                   shared_bytes<DecideArrays<Real, kTeamWarps>>(tokens.gate.num_experts, tokens.gate.quads)},
                  gate_decide_kernel<Real, kTeamWarps>, tokens);
}

template <typename Real>
cudaError_t route_learned(const cumoe_context_t &context, const cumoe_gate_args_t &args, int64_t values,
                          const GateScratch &scratch, const GateSums &sums, cudaStream_t stream)
{
    GateTokens tokens = {};
    tokens.gate = gate_facts(context.config, args.training);
    tokens.call = args.routing.call;
    tokens.token_mask = args.token_mask;
    tokens.logits = scratch.logits;
    tokens.rows = scratch.rows;
    tokens.expert = args.routing.expert;
    tokens.weight = args.routing.weight;
    tokens.sums = sums;
    const int64_t block = gate_block(context.config, args.num_tokens, values);
    for (int64_t first = 0; first < args.num_tokens; first += block) {
        tokens.first = first;
        tokens.tokens = args.num_tokens - first < block ? args.num_tokens - first : block;
        cudaError_t error = gate_logits(context, tokens.gate, *args.weights, args.x, args.x_stride, tokens.call,
                                        first, tokens.tokens, scratch.logits, stream);
        if (error != cudaSuccess) return error;
        error = context.config.num_experts <= kGateWarpExperts
                    ? decide<Real, 1>(context, tokens, stream)
                    : decide<Real, kGateTeamWarps>(context, tokens, stream);
        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}

template <typename Real>
cudaError_t route_external(const cumoe_context_t &context, const cumoe_gate_args_t &args, const GateSums &sums,
                           cudaStream_t stream)
{
    ExternalSlots in = {};
    in.num_experts = context.config.num_experts;
    in.top_k = static_cast<uint32_t>(context.config.top_k);
    in.call = args.routing.call;
    in.token_mask = args.token_mask;
    in.slots = static_cast<uint32_t>(args.num_tokens * in.top_k);
    in.index = args.index;
    in.index_dtype = args.index_dtype;
    in.index_weight = args.index_weight;
    in.index_weight_dtype = args.index_weight_dtype;
    in.expert = args.routing.expert;
    in.weight = args.routing.weight;
    in.sums = sums;
    const dim3 grid = resident_blocks(context, (in.slots + kSlotThreads - 1) / kSlotThreads, kSlotBlocksPerSm);
    return launch({grid, dim3(kSlotThreads), stream, shared_bytes<SharedSums>(in.num_experts)},
                  gate_external_kernel<Real>, in);
}

template <typename Real>
cudaError_t run_gate(const cumoe_context_t &context, const cumoe_gate_args_t &args, int64_t values,
                     cudaStream_t stream)
{
    const cumoe_config_t &c = context.config;
    const GateScratch scratch = gate_scratch(context, args.num_tokens, false, args.workspace, values);
    const GateSums sums = {reinterpret_cast<uint64_t *>(args.routing.importance),
                           reinterpret_cast<uint64_t *>(args.routing.load), scratch.count, scratch.counter,
                           reinterpret_cast<uint64_t *>(args.routing.tokens)};
    const cumoe_call_t given = {args.seed, args.offset, args.first_token, args.num_tokens};
    const unsigned blocks = static_cast<unsigned>((c.num_experts + kBeginThreads - 1) / kBeginThreads);
    cudaError_t error = launch({dim3(blocks), dim3(kBeginThreads), stream}, gate_begin_kernel, given, args.call,
                               args.num_tokens, args.routing.call, c.num_experts, sums);
    if (error != cudaSuccess) return error;
    double *threshold_loss = nullptr;
    if (c.gate == CUMOE_GATE_BALANCED)
        error = route_balanced<Real>(context, args, values, scratch, sums, &threshold_loss, stream);
    else
        error = c.gate == CUMOE_GATE_EXTERNAL ? route_external<Real>(context, args, sums, stream)
                                              : route_learned<Real>(context, args, values, scratch, sums, stream);
    if (error != cudaSuccess) return error;
    const GateOutputs out = {args.expert_count, args.importance,         args.load,         args.losses,
                             args.statistics,   args.routing.importance, args.routing.load, threshold_loss};
    return launch({dim3(1), dim3(kSumThreads), stream, shared_bytes<SumArrays>()}, gate_finish_kernel<Real>,
                  c.num_experts, gate_facts(c, args.training).smooth, c.gate != CUMOE_GATE_EXTERNAL, sums, out);
}

} // namespace

cudaError_t gate_by_blocks(const cumoe_context_t &context, const cumoe_gate_args_t &args, int64_t values,
                           cudaStream_t stream)
{
    return context.config.dtype == CUMOE_F64 ? run_gate<double>(context, args, values, stream)
                                             : run_gate<float>(context, args, values, stream);
}

cudaError_t gate(const cumoe_context_t &context, const cumoe_gate_args_t &args, cudaStream_t stream)
{
    return gate_by_blocks(context, args, kGateValues, stream);
}

} // namespace cumoe
