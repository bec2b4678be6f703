/* Backward of the gate: logits are computed again, block by block, with the same noise; their gradients take their
 * place and give those of w_gate, w_noise and x. */
#include "cuda/gate.cuh"

#include "cuda/gate_balanced_backward.cuh"
#include "cuda/gate_gradient.cuh"
#include "cuda/gate_sums.cuh"
#include "cuda/gemm_exact.cuh"
#include "cuda/launch.cuh"

namespace cumoe
{

namespace
{

constexpr int kListWarps = 32, kListThreads = kListWarps * kWarp;
constexpr int kAddThreads = 256, kAddBlocksPerSm = 6;

/* dCV^2 / dv_i = (2 n / S^2) ((v_i - mean) - mean CV^2), times the upstream gradient; 0 for a zero vector. */
template <typename Real>
__device__ __forceinline__ void cv2_gradient(const int64_t *sums, int32_t num_experts, double upstream,
                                             const SumArrays &shared, Real *gradient)
{
    constexpr double unit = 1 / kFixedPoint<Real>;
    const Balance balance = balance_of<Real>(sums, num_experts, shared);
    const double mean = balance.mean, factor = mean > 0 ? upstream * 2 / (num_experts * mean * mean) : 0;
    for (int32_t e = threadIdx.x; e < num_experts; e += kSumThreads)
        gradient[e] =
            static_cast<Real>(factor * ((static_cast<double>(sums[e]) * unit - mean) - mean * balance.cv2));
}

struct SumGradients {
    int32_t num_experts;
    const int64_t *importance, *load; // [E] fixed point
    const void *loss_gradient;        // [CUMOE_NUM_LOSSES] gate type, or NULL: the next two
    float importance_weight, load_weight;
    bool smooth;
    void *dimportance, *dload; // [E] gate type
    int32_t *has_load;         // [1]
};

/* One block: gradients of the sums over the batch, and whether the load loss has any. */
template <typename Real>
__global__ void __launch_bounds__(kSumThreads, 1) gate_sum_gradients_kernel(SumGradients in)
{
    SharedArena arena;
    const SumArrays shared(arena);
    const Real *given = static_cast<const Real *>(in.loss_gradient);
    const double importance = given ? static_cast<double>(given[CUMOE_LOSS_IMPORTANCE]) : in.importance_weight;
    const double load = given ? static_cast<double>(given[CUMOE_LOSS_LOAD]) : in.load_weight;
    cv2_gradient(in.importance, in.num_experts, importance, shared, static_cast<Real *>(in.dimportance));
    cv2_gradient(in.load, in.num_experts, load, shared, static_cast<Real *>(in.dload));
    if (threadIdx.x == 0) *in.has_load = load != 0 && in.smooth;
}

struct ListArrays {
    uint32_t *warp_count; // [kListWarps]
    __host__ __device__ explicit ListArrays(SharedArena &arena) : warp_count(arena.take<uint32_t>(kListWarps)) {}
};

/* One block: the tokens of a block that are not padding, whose rows of x may hold anything: 0 * NaN is not 0. In
 * the order of tokens, and cut into slices. Without a mask it is all live ones, and counted is not written. */
__global__ void __launch_bounds__(kListThreads, 1)
    gate_list_kernel(const uint8_t *token_mask, const cumoe_call_t *call, int64_t first, int64_t tokens,
                     int32_t slices, int32_t *counted, int32_t *offset)
{
    SharedArena arena;
    const ListArrays shared(arena);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int64_t live = live_rows(call, first, tokens);
    int64_t number = token_mask ? 0 : live;
    for (int64_t begin = 0; token_mask && begin < live; begin += kListThreads) {
        const int64_t i = begin + threadIdx.x;
        const bool counts = i < live && token_counts(token_mask, first + i);
        const uint32_t lanes = ballot(kFullMask, counts);
        if (lane == 0) shared.warp_count[warp] = static_cast<uint32_t>(popcount(lanes));
        sync_threads();
        int64_t at = number + popcount(lanes & ((1u << lane) - 1));
        for (int w = 0; w < kListWarps; w++) {
            if (w < warp) at += shared.warp_count[w];
            number += shared.warp_count[w];
        }
        if (counts) counted[at] = static_cast<int32_t>(i);
        sync_threads(); // warp_count is read; the next round may write it
    }
    for (int32_t slice = threadIdx.x; slice <= slices; slice += kListThreads)
        offset[slice] = static_cast<int32_t>(number * slice / slices);
}

/* Gradients [elements] from those of the slices, in their order; what is added to stays where no token counts. */
template <typename Real>
__global__ void __launch_bounds__(kAddThreads, kAddBlocksPerSm)
    gate_add_slices_kernel(const Real *slice, const int32_t *offset, int32_t slices, int64_t elements, bool add,
                           void *gradient, cumoe_dtype_t dtype)
{
    if (add && offset[slices] == 0) return;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kAddThreads + threadIdx.x; i < elements;
         i += static_cast<int64_t>(gridDim.x) * kAddThreads) {
        Real sum = add ? load<Real>(gradient, dtype, i) : 0;
        for (int32_t s = 0; s < slices; s++) sum += slice[s * elements + i];
        store<Real>(gradient, dtype, i, sum);
    }
}

/* The gradients of a block's logits as a factor: half 0 = clean, 1 = raw, lines are tokens or experts. */
Operand dlogits(const cumoe_config_t &c, const GateFacts &facts, const GateScratch &scratch, int half,
                bool lines_are_tokens)
{
    const cumoe_dtype_t dtype = cumoe__gate_dtype(&c);
    const size_t skip = static_cast<size_t>(half) * static_cast<size_t>(c.num_experts) * cumoe__dtype_size(dtype);
    const void *data = static_cast<const char *>(scratch.logits) + skip;
    return {data, dtype, 0, lines_are_tokens ? facts.columns : 1, lines_are_tokens ? 1 : facts.columns, nullptr};
}

/* dx_gate of the block = dclean w_gate, + draw w_noise. */
cudaError_t input_gradient(const cumoe_context_t &context, const cumoe_gate_backward_args_t &args,
                           const GradientTokens &tokens, const GateScratch &scratch, cudaStream_t stream)
{
    const cumoe_config_t &c = context.config;
    const int64_t H = c.hidden_size;
    const cumoe_dtype_t dtype = args.weights->gate_dtype, real = cumoe__gate_dtype(&c);
    RowsProduct product = {};
    product.parts = 1;
    product.terms = tokens.gate.noise ? 2 : 1;
    product.n = H;
    product.k = c.num_experts;
    product.a[0] = dlogits(c, tokens.gate, scratch, 0, true);
    product.a[1] = dlogits(c, tokens.gate, scratch, 1, true);
    product.b[0] = {args.weights->w_gate, dtype, 0, 1, H, nullptr};
    product.b[1] = {args.weights->w_noise, dtype, 0, 1, H, nullptr};
    product.call = tokens.call;
    product.first_token = tokens.first;
    product.max_rows = tokens.tokens;
    product.groups = 1;
    StoreRows store = {};
    store.c = static_cast<char *>(args.dx_gate) + static_cast<size_t>(tokens.first * H) * cumoe__dtype_size(real);
    store.dtype = real;
    store.row_stride = H;
    return exact_rows_product(context, product, store, stream);
}

/* One of them: dw += dlogits^T x of the block; the first block of a WRITE begins from 0. */
template <typename Real>
cudaError_t weight_gradient(const cumoe_context_t &context, const cumoe_gate_backward_args_t &args,
                            const GradientTokens &tokens, const GateScratch &scratch, int32_t slices, int half,
                            void *gradient, cudaStream_t stream)
{
    const cumoe_config_t &c = context.config;
    const size_t skip = static_cast<size_t>(tokens.first * args.x_stride) * cumoe__dtype_size(c.dtype);
    const bool add = tokens.first > 0 || args.gradient_mode == CUMOE_GRADIENT_ADD;
    const int64_t elements = static_cast<int64_t>(c.num_experts) * c.hidden_size;
    DepthProduct product = {};
    product.m = c.num_experts;
    product.n = c.hidden_size;
    product.a = dlogits(c, tokens.gate, scratch, half, false);
    product.b = {static_cast<const char *>(args.x) + skip, c.dtype, 0, 1, args.x_stride, nullptr};
    if (tokens.token_mask) product.a.index = product.b.index = scratch.counted;
    product.groups = slices;
    product.c = slices > 1 ? scratch.slice : gradient;
    product.c_dtype = slices > 1 ? cumoe__gate_dtype(&c) : args.gradients->gate_dtype;
    product.c_group_stride = elements;
    product.c_row_stride = c.hidden_size;
    product.c_col_stride = 1;
    product.add = slices == 1 && add;
    if (slices > 1 || tokens.token_mask) {
        product.offset = scratch.offset;
    } else {
        product.call = tokens.call;
        product.first_token = tokens.first;
        product.max_rows = tokens.tokens;
    }
    const cudaError_t error = exact_depth_product(context, product, stream);
    if (error != cudaSuccess || slices == 1) return error;
    return launch({resident_blocks(context, (elements + kAddThreads - 1) / kAddThreads, kAddBlocksPerSm),
                   dim3(kAddThreads), stream},
                  gate_add_slices_kernel<Real>, static_cast<const Real *>(scratch.slice),
                  static_cast<const int32_t *>(scratch.offset), slices, elements, add, gradient,
                  args.gradients->gate_dtype);
}

/* dw_gate from the clean half, dw_noise from the raw one. */
template <typename Real>
cudaError_t weight_gradients(const cumoe_context_t &context, const cumoe_gate_backward_args_t &args,
                             const GradientTokens &tokens, const GateScratch &scratch, cudaStream_t stream)
{
    void *const gradients[2] = {args.gradients->w_gate, tokens.gate.noise ? args.gradients->w_noise : nullptr};
    if (!gradients[0] && !gradients[1]) return cudaSuccess;
    const int32_t slices = gate_slices(context.config, tokens.tokens);
    if (slices > 1 || tokens.token_mask) {
        const cudaError_t error = launch({dim3(1), dim3(kListThreads), stream, shared_bytes<ListArrays>()},
                                         gate_list_kernel, tokens.token_mask, tokens.call, tokens.first,
                                         tokens.tokens, slices, scratch.counted, scratch.offset);
        if (error != cudaSuccess) return error;
    }
    for (int half = 0; half < 2; half++) {
        if (!gradients[half]) continue;
        const cudaError_t error =
            weight_gradient<Real>(context, args, tokens, scratch, slices, half, gradients[half], stream);
        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}

/* WRITE leaves zeros in what no block writes: everything when there is no token, w_noise without noise. */
cudaError_t clear_unwritten(const cumoe_config_t &c, const cumoe_gate_backward_args_t &args, int halves_written,
                            cudaStream_t stream)
{
    if (args.gradient_mode != CUMOE_GRADIENT_WRITE) return cudaSuccess;
    void *const gradients[2] = {args.gradients->w_gate, args.gradients->w_noise};
    const size_t size = static_cast<size_t>(c.num_experts) * static_cast<size_t>(c.hidden_size) *
                        cumoe__dtype_size(args.gradients->gate_dtype);
    for (int half = halves_written; half < 2; half++) {
        if (!gradients[half]) continue;
        const cudaError_t error = cudaMemsetAsync(gradients[half], 0, size, stream);
        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}

template <typename Real, int kTeamWarps>
cudaError_t differentiate(const cumoe_context_t &context, const GradientTokens &tokens, cudaStream_t stream)
{
    using Threads = Team<Real, kTeamWarps>;
    return launch({gate_grid(context, tokens.tokens, true), dim3(Threads::kBlockThreads), stream,
                   shared_bytes<RowArrays<Real, kTeamWarps>>(kRowsOfTeam, tokens.gate.quads)},
                  gate_gradient_kernel<Real, kTeamWarps>, tokens);
}

/* One block of tokens. */
template <typename Real>
cudaError_t run_block(const cumoe_context_t &context, const cumoe_gate_backward_args_t &args,
                      const GradientTokens &tokens, const GateScratch &scratch, cudaStream_t stream)
{
    cudaError_t error = cudaSuccess;
    if (tokens.gate.noise)
        error = gate_logits(context, tokens.gate, *args.weights, args.x, args.x_stride, tokens.call, tokens.first,
                            tokens.tokens, scratch.logits, stream);
    if (error != cudaSuccess) return error;
    if (context.config.gate == CUMOE_GATE_BALANCED)
        error = balanced_gradient<Real>(context, tokens, args.routing.token_slot, stream);
    else
        error = context.config.num_experts <= kGateWarpExperts
                    ? differentiate<Real, 1>(context, tokens, stream)
                    : differentiate<Real, kGateTeamWarps>(context, tokens, stream);
    if (error == cudaSuccess && args.dx_gate) error = input_gradient(context, args, tokens, scratch, stream);
    if (error == cudaSuccess) error = weight_gradients<Real>(context, args, tokens, scratch, stream);
    return error;
}

template <typename Real>
cudaError_t run_gate_backward(const cumoe_context_t &context, const cumoe_gate_backward_args_t &args,
                              int64_t values, cudaStream_t stream)
{
    const cumoe_config_t &c = context.config;
    const GateScratch scratch = gate_scratch(context, args.num_tokens, true, args.workspace, values);
    GradientTokens tokens = {};
    tokens.gate = gate_facts(c, args.training);
    tokens.call = args.routing.call;
    tokens.token_mask = args.token_mask;
    tokens.logits = scratch.logits;
    tokens.rows = scratch.rows;
    tokens.expert = args.routing.expert;
    tokens.weight = args.routing.weight;
    tokens.dweight = args.dweight;
    tokens.dimportance = scratch.dimportance;
    tokens.dload = scratch.dload;
    tokens.has_load = scratch.has_load;

    const int halves = tokens.gate.noise ? 2 : 1;
    cudaError_t error = clear_unwritten(c, args, args.num_tokens > 0 ? halves : 0, stream);
    if (error == cudaSuccess && c.gate == CUMOE_GATE_BALANCED)
        error = balanced_thresholds<Real>(context, args, stream);
    if (error != cudaSuccess || args.num_tokens == 0) return error;
    const SumGradients sums = {c.num_experts,
                               args.routing.importance,
                               args.routing.load,
                               args.loss_gradient,
                               c.loss_weight[CUMOE_LOSS_IMPORTANCE],
                               c.loss_weight[CUMOE_LOSS_LOAD],
                               tokens.gate.smooth,
                               scratch.dimportance,
                               scratch.dload,
                               scratch.has_load};
    error = launch({dim3(1), dim3(kSumThreads), stream, shared_bytes<SumArrays>()}, gate_sum_gradients_kernel<Real>,
                   sums);
    if (error != cudaSuccess) return error;
    const int64_t block = gate_block(c, args.num_tokens, values);
    for (int64_t first = 0; first < args.num_tokens; first += block) {
        tokens.first = first;
        tokens.tokens = args.num_tokens - first < block ? args.num_tokens - first : block;
        error = run_block<Real>(context, args, tokens, scratch, stream);
        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}

} // namespace

size_t gate_backward_workspace(const cumoe_context_t &context, int64_t num_tokens)
{
    return gate_scratch(context, num_tokens, true, nullptr).size;
}

cudaError_t gate_backward_by_blocks(const cumoe_context_t &context, const cumoe_gate_backward_args_t &args,
                                    int64_t values, cudaStream_t stream)
{
    if (context.config.gate == CUMOE_GATE_EXTERNAL) return cudaSuccess; // it has no parameters
    return context.config.dtype == CUMOE_F64 ? run_gate_backward<double>(context, args, values, stream)
                                             : run_gate_backward<float>(context, args, values, stream);
}

cudaError_t gate_backward(const cumoe_context_t &context, const cumoe_gate_backward_args_t &args,
                          cudaStream_t stream)
{
    return gate_backward_by_blocks(context, args, kGateValues, stream);
}

} // namespace cumoe
