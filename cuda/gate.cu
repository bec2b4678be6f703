/* Stage gate: logits, noise, choice, weights, and the sums and losses that balance the experts. */
#include "cuda/gate.cuh"

#include "cuda/gate_balanced.cuh"
#include "cuda/gate_decide.cuh"
#include "cuda/gate_finish.cuh"
#include "cuda/gate_slots.cuh"
#include "cuda/gemm_exact.cuh"
#include "cuda/launch.cuh"

namespace cumoe
{

size_t gate_workspace(const cumoe_context_t &context, int64_t num_tokens)
{
    return balanced_scratch(context, num_tokens, nullptr, gate_scratch(context, num_tokens, false, nullptr).size)
        .end;
}

cudaError_t gate_logits(const cumoe_context_t &context, const GateFacts &facts, const GateRows &rows,
                        const cumoe_weights_t &weights, const void *x, int64_t x_stride, void *logits,
                        cudaStream_t stream)
{
    const cumoe_config_t &c = context.config;
    const int64_t H = c.hidden_size, group = facts.num_experts * H;
    const size_t skip = static_cast<size_t>(rows.first * x_stride) * cumoe__dtype_size(c.dtype);
    RowsProduct product = {};
    product.parts = facts.noise ? 2 : 1;
    product.terms = 1;
    product.n = facts.num_experts;
    product.k = H;
    product.a[0] = {static_cast<const char *>(x) + skip, c.dtype, 0, x_stride, 1, rows.choices.row_token};
    product.b[0] = {weights.w_gate, weights.gate_dtype, group, H, 1, nullptr};
    product.b[1] = {weights.w_noise, weights.gate_dtype, group, H, 1, nullptr};
    walk_over(rows, &product);
    StoreRows store = {};
    store.c = logits;
    store.dtype = cumoe__gate_dtype(&c);
    store.row_stride = facts.columns;
    store.part_stride = facts.num_experts;
    return exact_rows_product(context, product, store, stream);
}

cudaError_t sort_choices(const cumoe_context_t &context, int64_t num_tokens, const cumoe_routing_t &routing,
                         const GroupScratch &scratch, GateRows *rows, cudaStream_t stream)
{
    *rows = {routing.call,
             nullptr,
             0,
             num_tokens * context.config.top_k_groups,
             context.config.num_groups,
             scratch.choices,
             routing.primary_group};
    cumoe_permute_args_t args = {};
    args.num_tokens = num_tokens;
    args.routing = cumoe__primary_routing(&routing);
    args.rows = scratch.choices;
    args.workspace = scratch.permute;
    return permute(gate_level(context, true), args, stream);
}

namespace
{

constexpr int kBeginThreads = 256;

/* The numbers of the call, for all later stages: the caller's, or those in device memory; and sums of nothing. */
__global__ void __launch_bounds__(kBeginThreads)
    gate_begin_kernel(cumoe_call_t given, const cumoe_call_t *call, int64_t num_tokens, cumoe_call_t *out,
                      int32_t num_experts, GateSums sums, int32_t num_groups, GateSums of_groups)
{
    const int32_t e = static_cast<int32_t>(blockIdx.x * kBeginThreads + threadIdx.x);
    const auto clear = [e](const GateSums &s) {
        s.importance[e] = 0;
        if (s.every) s.every[e] = 0;
        s.count[e] = 0;
    };
    if (e < num_experts) clear(sums);
    if (e < num_groups) clear(of_groups);
    if (e < kGateCounters) sums.counter[e] = 0;
    if (e > 0) return;
    *sums.tokens = 0;
    if (call) given = *call;
    if (given.live_tokens < 0) given.live_tokens = 0;
    if (given.live_tokens > num_tokens) given.live_tokens = num_tokens;
    *out = given;
}

template <typename Real, int kTeamWarps>
cudaError_t decide_by(const cumoe_context_t &context, const Decisions &rows, cudaStream_t stream)
{
    using Threads = Team<Real, kTeamWarps>;
    return launch(
        {gate_grid(context, rows.rows.count, false), dim3(Threads::kBlockThreads), stream,
         shared_bytes<DecideArrays<Real, kTeamWarps>>(rows.all_experts, rows.gate.num_experts, rows.gate.quads)},
        gate_decide_kernel<Real, kTeamWarps>, rows);
}

/* Logits and decisions of rows; the context is that of the level. */
template <typename Real>
cudaError_t decide(const cumoe_context_t &context, const cumoe_gate_args_t &args, const Decisions &rows,
                   void *logits, cudaStream_t stream)
{
    const cudaError_t error =
        gate_logits(context, rows.gate, rows.rows, *args.weights, args.x, args.x_stride, logits, stream);
    if (error != cudaSuccess) return error;
    return context.config.num_experts <= kGateWarpExperts ? decide_by<Real, 1>(context, rows, stream)
                                                          : decide_by<Real, kGateTeamWarps>(context, rows, stream);
}

/* A flat gate, or the first level of two as one. */
template <typename Real>
cudaError_t route_tokens(const cumoe_context_t &context, const cumoe_gate_args_t &args, const GateFacts &facts,
                         int64_t values, const GateScratch &scratch, const GateSums &sums, cudaStream_t stream)
{
    Decisions tokens = {};
    tokens.gate = facts;
    tokens.rows = {args.routing.call, args.token_mask, 0, 0, 1, {}, nullptr};
    tokens.logits = scratch.logits;
    tokens.scratch = scratch.rows;
    tokens.expert = args.routing.expert;
    tokens.weight = args.routing.weight;
    tokens.square = facts.shares && args.losses ? scratch.square : nullptr;
    tokens.all_experts = facts.num_experts;
    tokens.sums = sums;
    const int64_t block = gate_block(context.config, args.num_tokens, values);
    for (int64_t first = 0; first < args.num_tokens; first += block) {
        tokens.rows.first = first;
        tokens.rows.count = args.num_tokens - first < block ? args.num_tokens - first : block;
        const cudaError_t error = decide<Real>(context, args, tokens, scratch.logits, stream);
        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}

/* HIERARCHICAL: a flat gate of groups, then a gate of its own for every choice of a group. */
template <typename Real>
cudaError_t route_groups(const cumoe_context_t &context, const cumoe_gate_args_t &args, const GateFacts &facts,
                         const GateFacts &primary_facts, int64_t values, const GateScratch &scratch,
                         const GateSums &sums, const GateSums &primary_sums, cudaStream_t stream)
{
    const cumoe_config_t &c = context.config;
    const cumoe_weights_t weights = cumoe__primary_weights(args.weights);
    cumoe_gate_args_t primary = args;
    primary.weights = &weights;
    primary.routing = cumoe__primary_routing(&args.routing);
    cudaError_t error = route_tokens<Real>(gate_level(context, true), primary, primary_facts, values, scratch,
                                           primary_sums, stream);
    if (error != cudaSuccess) return error;

    Decisions choices = {};
    error = sort_choices(context, args.num_tokens, args.routing, scratch.groups, &choices.rows, stream);
    if (error != cudaSuccess) return error;
    choices.gate = facts;
    choices.logits = scratch.groups.logits;
    choices.scratch = scratch.groups.rows;
    choices.expert = args.routing.expert;
    choices.weight = args.routing.weight;
    choices.primary_weight = args.routing.primary_weight;
    choices.all_experts = c.num_experts;
    choices.sums = sums;
    error = decide<Real>(gate_level(context, false), args, choices, scratch.groups.logits, stream);
    if (error != cudaSuccess) return error;
    const ChoicesOfTokens tokens = {args.num_tokens,
                                    c.top_k_groups,
                                    c.top_k / c.top_k_groups,
                                    args.routing.primary_group,
                                    args.routing.primary_weight,
                                    args.routing.expert,
                                    args.routing.weight,
                                    &scratch.counter[kNanTokens]};
    const dim3 blocks =
        resident_blocks(context, (args.num_tokens + kSlotThreads - 1) / kSlotThreads, kSlotBlocksPerSm);
    return launch({blocks, dim3(kSlotThreads), stream}, gate_choices_kernel<Real>, tokens);
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

/* An array of fixed-point sums as atomics take it. */
uint64_t *units(int64_t *sums)
{
    return reinterpret_cast<uint64_t *>(sums);
}

/* What a call works with, in all its parts. */
struct GateParts {
    GateScratch scratch;
    GateFacts facts, primary_facts;
    GateSums sums, primary_sums;
    PrimarySums primary;
    bool shares; // and their losses
};

GateParts parts_of(const cumoe_context_t &context, const cumoe_gate_args_t &args, int64_t values)
{
    const cumoe_config_t &c = context.config;
    const cumoe_routing_t &routing = args.routing;
    const bool groups = c.gate == CUMOE_GATE_HIERARCHICAL;
    GateParts p = {};
    p.scratch = gate_scratch(context, args.num_tokens, false, args.workspace, values);
    p.facts = gate_facts(groups ? gate_level(context, false).config : c, args.weights, args.training);
    p.shares = p.facts.shares && args.losses;
    p.sums = {units(routing.importance), nullptr, p.scratch.count, p.scratch.counter, units(routing.tokens)};
    if (p.facts.dense) p.sums.every = p.sums.importance;
    if (p.facts.smooth) p.sums.every = units(routing.load);
    if (p.shares) p.sums.every = p.scratch.share;
    p.primary_sums = p.sums;
    if (!groups) return p;
    p.primary_facts =
        gate_facts(gate_level(context, true).config, args.weights, args.training, CUMOE_NOISE_PRIMARY);
    p.primary_sums.importance = p.scratch.groups.importance;
    p.primary_sums.every = p.primary_facts.smooth ? units(routing.primary_load) : nullptr;
    p.primary_sums.count = reinterpret_cast<uint32_t *>(routing.primary_count);
    p.primary = {c.num_groups, p.facts.num_experts, routing.primary_load, routing.primary_count};
    return p;
}

/* From the sums over the tokens of all ranks. threshold_loss: [E] of BALANCED, or NULL. */
template <typename Real>
cudaError_t finish(const cumoe_context_t &context, const cumoe_gate_args_t &args, const GateParts &parts,
                   const double *threshold_loss, cudaStream_t stream)
{
    const cumoe_config_t &c = context.config;
    const GateOutputs out = {args.expert_count,
                             args.importance,
                             args.load,
                             args.losses,
                             args.statistics,
                             args.routing.importance,
                             args.routing.load,
                             parts.shares ? reinterpret_cast<const int64_t *>(parts.scratch.share) : nullptr,
                             parts.scratch.square,
                             context.ranks.count > 1 ? parts.scratch.square_sum : nullptr,
                             args.num_tokens,
                             threshold_loss,
                             parts.primary,
                             parts.facts.smooth,
                             parts.primary_facts.smooth,
                             c.gate != CUMOE_GATE_EXTERNAL};
    return launch({dim3(1), dim3(kSumThreads), stream, shared_bytes<SumArrays>()}, gate_finish_kernel<Real>,
                  c.num_experts, parts.sums, out);
}

template <typename Real>
cudaError_t run_gate(const cumoe_context_t &context, const cumoe_gate_args_t &args, int64_t values,
                     cudaStream_t stream)
{
    const cumoe_config_t &c = context.config;
    const GateParts parts = parts_of(context, args, values);
    const cumoe_call_t given = {args.seed, args.offset, args.first_token, args.num_tokens};
    const unsigned blocks = static_cast<unsigned>((c.num_experts + kBeginThreads - 1) / kBeginThreads);
    cudaError_t error =
        launch({dim3(blocks), dim3(kBeginThreads), stream}, gate_begin_kernel, given, args.call, args.num_tokens,
               args.routing.call, c.num_experts, parts.sums, parts.primary.num_groups, parts.primary_sums);
    if (error != cudaSuccess) return error;
    double *threshold_loss = nullptr;
    if (c.gate == CUMOE_GATE_EXTERNAL)
        error = route_external<Real>(context, args, parts.sums, stream);
    else if (c.gate == CUMOE_GATE_BALANCED)
        error = route_balanced<Real>(context, args, values, parts.scratch, parts.sums, &threshold_loss, stream);
    else if (c.gate == CUMOE_GATE_HIERARCHICAL)
        error = route_groups<Real>(context, args, parts.facts, parts.primary_facts, values, parts.scratch,
                                   parts.sums, parts.primary_sums, stream);
    else
        error = route_tokens<Real>(context, args, parts.facts, values, parts.scratch, parts.sums, stream);
    if (error != cudaSuccess) return error;
    if (context.ranks.count == 1) return finish<Real>(context, args, parts, threshold_loss, stream);
    if (!parts.shares) return cudaSuccess;
    return launch({dim3(1), dim3(kSumThreads), stream, shared_bytes<SumArrays>()}, gate_squares_kernel<Real>,
                  static_cast<const Real *>(parts.scratch.square), args.num_tokens, parts.scratch.square_sum);
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

int gate_sums(const cumoe_context_t &context, const cumoe_gate_args_t &args,
              cumoe_sum_t (&sums)[CUMOE_GATE_MAX_SUMS])
{
    const cumoe_config_t &c = context.config;
    const GateParts parts = parts_of(context, args, kGateValues);
    const cumoe_routing_t &routing = args.routing;
    const int64_t E = c.num_experts, G = c.num_groups;
    const cumoe_sum_t list[] = {
        {routing.tokens, 1, CUMOE_I64},
        {routing.importance, E, CUMOE_I64},
        {parts.facts.smooth ? routing.load : nullptr, E, CUMOE_I64},
        {parts.primary_facts.smooth ? routing.primary_load : nullptr, G, CUMOE_I64},
        {routing.primary_count, G, CUMOE_I32},
        {parts.scratch.count, E, CUMOE_I32},
        {parts.scratch.counter, kGateCounters, CUMOE_I64},
        {parts.shares ? parts.scratch.share : nullptr, E, CUMOE_I64},
        {parts.shares ? parts.scratch.square_sum : nullptr, 1, CUMOE_F64},
    };
    static_assert(sizeof list <= sizeof sums, "there is room");
    int count = 0;
    for (const cumoe_sum_t &sum : list) sums[count++] = sum;
    return count;
}

cudaError_t gate_finish(const cumoe_context_t &context, const cumoe_gate_args_t &args, cudaStream_t stream)
{
    const GateParts parts = parts_of(context, args, kGateValues);
    return context.config.dtype == CUMOE_F64 ? finish<double>(context, args, parts, nullptr, stream)
                                             : finish<float>(context, args, parts, nullptr, stream);
}

} // namespace cumoe
