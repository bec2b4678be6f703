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

/* dx_gate of tokens, a piece of its columns: the gradients of their choices' rows are added in the order of
 * choices. */
struct PieceOfRows {
    const cumoe_call_t *call;
    int64_t num_tokens;        // T
    int32_t top_k_groups;      // K1
    const int32_t *choice_row; // [T, K1], -1 = none
    const void *piece;         // [rows, columns]
    int64_t first, columns;    // of H
    void *dx_gate;             // [T, H]
    int64_t hidden_size;       // H
};
template <typename Real>
__global__ void __launch_bounds__(kAddThreads, kAddBlocksPerSm) gate_add_rows_kernel(PieceOfRows in)
{
    const int64_t live = live_rows(in.call, 0, in.num_tokens);
    const Real *const piece = static_cast<const Real *>(in.piece);
    for (int64_t t = blockIdx.x; t < live; t += gridDim.x) {
        Real *const to = static_cast<Real *>(in.dx_gate) + t * in.hidden_size + in.first;
        for (int64_t column = threadIdx.x; column < in.columns; column += kAddThreads) {
            Real sum = to[column];
            for (int64_t choice = t * in.top_k_groups; choice < (t + 1) * in.top_k_groups; choice++) {
                const int64_t row = in.choice_row[choice];
                if (row >= 0) sum += piece[row * in.columns + column];
            }
            to[column] = sum;
        }
    }
}

/* The gradients of logits as a factor: half 0 = clean, 1 = raw, lines are rows or experts. */
Operand dlogits(const cumoe_config_t &c, const RowGradients &in, int half, bool lines_are_rows)
{
    const cumoe_dtype_t dtype = cumoe__gate_dtype(&c);
    const size_t skip =
        static_cast<size_t>(half) * static_cast<size_t>(in.gate.num_experts) * cumoe__dtype_size(dtype);
    const void *data = static_cast<const char *>(in.logits) + skip;
    const int64_t columns = in.gate.columns;
    return {data, dtype, 0, lines_are_rows ? columns : 1, lines_are_rows ? 1 : columns, nullptr};
}

/* to [rows, COLUMNS] = dclean w_gate, + draw w_noise, of the columns of H from FIRST on. */
cudaError_t input_gradient(const cumoe_context_t &context, const cumoe_gate_backward_args_t &args,
                           const RowGradients &in, int64_t first, int64_t columns, void *to, cudaStream_t stream)
{
    const cumoe_config_t &c = context.config;
    const int64_t H = c.hidden_size, group = in.gate.num_experts * H;
    const cumoe_dtype_t dtype = args.weights->gate_dtype;
    const size_t skip = static_cast<size_t>(first) * cumoe__dtype_size(dtype);
    const void *const matrices[2] = {args.weights->w_gate, args.weights->w_noise};
    RowsProduct product = {};
    product.parts = 1;
    product.terms = in.gate.noise ? 2 : 1;
    product.n = columns;
    product.k = in.gate.num_experts;
    for (int half = 0; half < product.terms; half++) {
        product.a[half] = dlogits(c, in, half, true);
        product.b[half] = {static_cast<const char *>(matrices[half]) + skip, dtype, group, 1, H, nullptr};
    }
    walk_over(in.rows, &product);
    StoreRows store = {};
    store.c = to;
    store.dtype = cumoe__gate_dtype(&c);
    store.row_stride = columns;
    return exact_rows_product(context, product, store, stream);
}

/* One of them: dw += dlogits^T x of the rows; the first rows of a WRITE begin from 0. What is cut into groups of
 * rows has a matrix for each: those of a level, or slices of tokens, which are added up. */
template <typename Real>
cudaError_t weight_gradient(const cumoe_context_t &context, const cumoe_gate_backward_args_t &args,
                            const RowGradients &in, const GateScratch &scratch, int32_t slices, int half,
                            void *gradient, cudaStream_t stream)
{
    const cumoe_config_t &c = context.config;
    const GateRows &rows = in.rows;
    const size_t skip = static_cast<size_t>(rows.first * args.x_stride) * cumoe__dtype_size(c.dtype);
    const bool add = rows.first > 0 || args.gradient_mode == CUMOE_GRADIENT_ADD;
    const int64_t elements = static_cast<int64_t>(in.gate.num_experts) * c.hidden_size;
    DepthProduct product = {};
    product.m = in.gate.num_experts;
    product.n = c.hidden_size;
    product.a = dlogits(c, in, half, false);
    product.b = {static_cast<const char *>(args.x) + skip, c.dtype, 0, 1, args.x_stride, rows.choices.row_token};
    if (rows.token_mask) product.a.index = product.b.index = scratch.counted;
    product.groups = slices > 1 ? slices : rows.groups;
    product.c = slices > 1 ? scratch.slice : gradient;
    product.c_dtype = slices > 1 ? cumoe__gate_dtype(&c) : args.gradients->gate_dtype;
    product.c_group_stride = elements;
    product.c_row_stride = c.hidden_size;
    product.c_col_stride = 1;
    product.add = slices == 1 && add;
    if (slices > 1 || rows.token_mask) {
        product.offset = scratch.offset;
    } else {
        product.offset = rows.choices.offset;
        product.call = rows.call;
        product.first_token = rows.first;
        product.max_rows = rows.count;
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
                             const RowGradients &in, const GateScratch &scratch, cudaStream_t stream)
{
    void *const gradients[2] = {args.gradients->w_gate, in.gate.noise ? args.gradients->w_noise : nullptr};
    if (!gradients[0] && !gradients[1]) return cudaSuccess;
    const int32_t slices = in.rows.choices.offset ? 1 : gate_slices(context.config, in.rows.count);
    if (slices > 1 || in.rows.token_mask) {
        const cudaError_t error = launch({dim3(1), dim3(kListThreads), stream, shared_bytes<ListArrays>()},
                                         gate_list_kernel, in.rows.token_mask, in.rows.call, in.rows.first,
                                         in.rows.count, slices, scratch.counted, scratch.offset);
        if (error != cudaSuccess) return error;
    }
    for (int half = 0; half < 2; half++) {
        if (!gradients[half]) continue;
        const cudaError_t error =
            weight_gradient<Real>(context, args, in, scratch, slices, half, gradients[half], stream);
        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}

/* WRITE leaves zeros in what no rows write: everything when there is no token, w_noise without noise. */
cudaError_t clear_unwritten(const cumoe_gate_backward_args_t &args, int64_t rows, int64_t columns,
                            const cumoe_weights_t &level, int halves_written, cudaStream_t stream)
{
    if (args.gradient_mode != CUMOE_GRADIENT_WRITE) return cudaSuccess;
    void *const gradients[2] = {level.w_gate, level.w_noise};
    const size_t size = static_cast<size_t>(rows * columns) * cumoe__dtype_size(level.gate_dtype);
    for (int half = halves_written; half < 2; half++) {
        if (!gradients[half]) continue;
        const cudaError_t error = cudaMemsetAsync(gradients[half], 0, size, stream);
        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}

template <typename Real, int kTeamWarps>
cudaError_t differentiate_by(const cumoe_context_t &context, const RowGradients &in, cudaStream_t stream)
{
    using Threads = Team<Real, kTeamWarps>;
    return launch({gate_grid(context, in.rows.count, true), dim3(Threads::kBlockThreads), stream,
                   shared_bytes<RowArrays<Real, kTeamWarps>>(kRowsOfTeam, in.gate.quads)},
                  gate_gradient_kernel<Real, kTeamWarps>, in);
}

/* The logits of rows, again, and their gradients, and those of the matrices; the context is that of the level. */
template <typename Real>
cudaError_t differentiate(const cumoe_context_t &context, const cumoe_gate_backward_args_t &args,
                          const RowGradients &in, const GateScratch &scratch, cudaStream_t stream)
{
    cudaError_t error = cudaSuccess;
    if (in.gate.noise || in.gate.shares || in.rows.choices.offset)
        error = gate_logits(context, in.gate, in.rows, *args.weights, args.x, args.x_stride, in.logits, stream);
    if (error != cudaSuccess) return error;
    if (context.config.gate == CUMOE_GATE_BALANCED)
        error = balanced_gradient<Real>(context, in, args.routing.token_slot, stream);
    else
        error = context.config.num_experts <= kGateWarpExperts
                    ? differentiate_by<Real, 1>(context, in, stream)
                    : differentiate_by<Real, kGateTeamWarps>(context, in, stream);
    if (error == cudaSuccess) error = weight_gradients<Real>(context, args, in, scratch, stream);
    return error;
}

/* A flat gate, or the first level of two as one: IN but for its rows. */
template <typename Real>
cudaError_t tokens_backward(const cumoe_context_t &context, const cumoe_gate_backward_args_t &args, RowGradients in,
                            int64_t values, const GateScratch &scratch, cudaStream_t stream)
{
    const int64_t H = context.config.hidden_size, block = gate_block(context.config, args.num_tokens, values);
    in.rows = {args.routing.call, args.token_mask, 0, 0, 1, {}, nullptr};
    in.logits = scratch.logits;
    in.scratch = scratch.rows;
    in.expert = args.routing.expert;
    in.weight = args.routing.weight;
    for (int64_t first = 0; first < args.num_tokens; first += block) {
        in.rows.first = first;
        in.rows.count = args.num_tokens - first < block ? args.num_tokens - first : block;
        cudaError_t error = differentiate<Real>(context, args, in, scratch, stream);
        if (error == cudaSuccess && args.dx_gate)
            error = input_gradient(context, args, in, 0, H, static_cast<Real *>(args.dx_gate) + first * H, stream);
        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}

/* The second level adds to dx_gate, some columns at a time. */
template <typename Real>
cudaError_t add_input_gradient(const cumoe_context_t &context, const cumoe_gate_backward_args_t &args,
                               const RowGradients &in, const GroupScratch &scratch, cudaStream_t stream)
{
    const int64_t H = context.config.hidden_size;
    PieceOfRows piece = {};
    piece.call = args.routing.call;
    piece.num_tokens = args.num_tokens;
    piece.top_k_groups = context.config.top_k_groups;
    piece.choice_row = scratch.choices.slot_row;
    piece.piece = scratch.piece;
    piece.dx_gate = args.dx_gate;
    piece.hidden_size = H;
    for (piece.first = 0; piece.first < H; piece.first += scratch.columns) {
        piece.columns = H - piece.first < scratch.columns ? H - piece.first : scratch.columns;
        cudaError_t error = input_gradient(context, args, in, piece.first, piece.columns, scratch.piece, stream);
        if (error == cudaSuccess)
            error = launch({resident_blocks(context, args.num_tokens, kAddBlocksPerSm), dim3(kAddThreads), stream},
                           gate_add_rows_kernel<Real>, piece);
        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}

/* HIERARCHICAL, IN that of the second level but for its rows. These come first: their gradients are those of the
 * primary weights as well. */
template <typename Real>
cudaError_t groups_backward(const cumoe_context_t &context, const cumoe_gate_backward_args_t &args, RowGradients in,
                            const GateFacts &primary_facts, int64_t values, const GateScratch &scratch,
                            cudaStream_t stream)
{
    cudaError_t error = sort_choices(context, args.num_tokens, args.routing, scratch.groups, &in.rows, stream);
    if (error != cudaSuccess) return error;
    in.logits = scratch.groups.logits;
    in.scratch = scratch.groups.rows;
    in.weight = args.routing.primary_weight;
    in.dprimary = scratch.groups.dprimary;
    error = differentiate<Real>(gate_level(context, false), args, in, scratch, stream);
    if (error != cudaSuccess) return error;

    const cumoe_weights_t weights = cumoe__primary_weights(args.weights),
                          gradients = cumoe__primary_weights(args.gradients);
    cumoe_gate_backward_args_t primary_args = args;
    primary_args.weights = &weights;
    primary_args.gradients = &gradients;
    primary_args.routing = cumoe__primary_routing(&args.routing);
    RowGradients primary = {};
    primary.gate = primary_facts;
    primary.dweight = scratch.groups.dprimary;
    primary.dload = scratch.groups.dload;
    primary.has_load = scratch.has_load + 1;
    error = tokens_backward<Real>(gate_level(context, true), primary_args, primary, values, scratch, stream);
    if (error == cudaSuccess && args.dx_gate)
        error = add_input_gradient<Real>(context, args, in, scratch.groups, stream);
    return error;
}

template <typename Real>
cudaError_t run_gate_backward(const cumoe_context_t &context, const cumoe_gate_backward_args_t &args,
                              int64_t values, cudaStream_t stream)
{
    const cumoe_config_t &c = context.config;
    const bool groups = c.gate == CUMOE_GATE_HIERARCHICAL;
    const GateScratch scratch = gate_scratch(context, args.num_tokens, true, args.workspace, values);
    GateFacts primary = {};
    if (groups)
        primary = gate_facts(gate_level(context, true).config, args.weights, args.training, CUMOE_NOISE_PRIMARY);
    RowGradients in = {};
    in.gate = gate_facts(groups ? gate_level(context, false).config : c, args.weights, args.training);
    in.dweight = args.dweight;
    in.dimportance = scratch.dimportance;
    in.dload = scratch.dload;
    in.has_load = scratch.has_load;
    in.dz = scratch.dz;

    const int halves = args.num_tokens == 0 ? 0 : in.gate.noise ? 2 : 1;
    cudaError_t error = clear_unwritten(args, c.num_experts, c.hidden_size, *args.gradients, halves, stream);
    if (error == cudaSuccess && groups)
        error = clear_unwritten(args, c.num_groups, c.hidden_size, cumoe__primary_weights(args.gradients), halves,
                                stream);
    if (error == cudaSuccess && c.gate == CUMOE_GATE_BALANCED)
        error = balanced_thresholds<Real>(context, args, stream);
    if (error != cudaSuccess || args.num_tokens == 0) return error;
    SumGradients sums = {};
    sums.num_experts = c.num_experts;
    sums.tokens = args.routing.tokens;
    sums.importance = args.routing.importance;
    sums.load = args.routing.load;
    sums.loss_gradient = args.loss_gradient;
    memcpy(sums.loss_weight, c.loss_weight, sizeof sums.loss_weight);
    if (groups)
        sums.primary = {c.num_groups, in.gate.num_experts, args.routing.primary_load, args.routing.primary_count};
    sums.smooth = in.gate.smooth;
    sums.primary_smooth = primary.smooth;
    sums.shares = in.gate.shares;
    sums.dimportance = scratch.dimportance;
    sums.dload = scratch.dload;
    sums.dprimary = scratch.groups.dload;
    sums.has_load = scratch.has_load;
    sums.dz = scratch.dz;
    error = launch({dim3(1), dim3(kSumThreads), stream, shared_bytes<SumArrays>()}, gate_sum_gradients_kernel<Real>,
                   sums);
    if (error != cudaSuccess) return error;
    return groups ? groups_backward<Real>(context, args, in, primary, values, scratch, stream)
                  : tokens_backward<Real>(context, args, in, values, scratch, stream);
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
