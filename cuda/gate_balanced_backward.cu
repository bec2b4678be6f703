/* Gate BALANCED, backward: through the softmax over the experts that took a token, whose logits are not needed. */
#include "cuda/gate_balanced_backward.cuh"

#include "cuda/launch.cuh"

namespace cumoe
{

namespace
{

constexpr int kWarps = 8, kThreads = kWarps * kWarp, kBlocksPerSm = 6;

/* A warp for each token: zeros, and the gradients of the experts that took it. */
template <typename Real>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    balanced_gradient_kernel(RowGradients in, const int32_t *token_slot)
{
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int64_t live = live_rows(in.rows.call, in.rows.first, in.rows.count), E = in.gate.num_experts;
    const Real *weight = static_cast<const Real *>(in.weight);
    const Real *dweight = static_cast<const Real *>(in.dweight);
    const Real *dimportance = static_cast<const Real *>(in.dimportance);
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + warp; i < live;
         i += static_cast<int64_t>(gridDim.x) * kWarps) {
        Real *row = static_cast<Real *>(in.logits) + i * E;
        for (int64_t e = lane; e < E; e += kWarp) row[e] = 0;
        sync_warp(); // other lanes write to it

        // One chain in the order of slots, as everywhere.
        const int64_t begin = token_slot[in.rows.first + i], end = token_slot[in.rows.first + i + 1];
        Real mean = 0;
        for (int64_t first = begin; first < end; first += kWarp) {
            const int64_t slot = first + lane;
            const int32_t e = slot < end ? in.expert[slot] : -1;
            const Real term = e >= 0 ? weight[slot] * (dweight[slot] + dimportance[e]) : 0;
            const int64_t left = end - first;
            for (int l = 0; l < kWarp && l < left; l++) mean += shuffle(kFullMask, term, l);
        }
        for (int64_t slot = begin + lane; slot < end; slot += kWarp) {
            const int32_t e = in.expert[slot];
            if (e >= 0) row[e] = weight[slot] * (dweight[slot] + dimportance[e] - mean);
        }
    }
}

/* In training, -(upstream * excess); else nothing. */
template <typename Real>
__global__ void __launch_bounds__(kThreads)
    balanced_thresholds_kernel(int32_t num_experts, const int32_t *excess, const Real *loss_gradient,
                               float loss_weight, bool training, bool add, Real *gradient)
{
    const int32_t e = static_cast<int32_t>(blockIdx.x * kThreads + threadIdx.x);
    if (e >= num_experts) return;
    const Real upstream = loss_gradient ? loss_gradient[CUMOE_LOSS_THRESHOLD] : static_cast<Real>(loss_weight);
    const Real own = training ? -(upstream * static_cast<Real>(excess[e])) : 0;
    gradient[e] = add ? gradient[e] + own : own;
}

} // namespace

template <typename Real>
cudaError_t balanced_gradient(const cumoe_context_t &context, const RowGradients &in, const int32_t *token_slot,
                              cudaStream_t stream)
{
    return launch(
        {resident_blocks(context, (in.rows.count + kWarps - 1) / kWarps, kBlocksPerSm), dim3(kThreads), stream},
        balanced_gradient_kernel<Real>, in, token_slot);
}

template <typename Real>
cudaError_t balanced_thresholds(const cumoe_context_t &context, const cumoe_gate_backward_args_t &args,
                                cudaStream_t stream)
{
    const cumoe_config_t &c = context.config;
    const bool add = args.gradient_mode == CUMOE_GRADIENT_ADD;
    if (!args.gradients->thresholds || (add && !args.training)) return cudaSuccess;
    const unsigned blocks = static_cast<unsigned>((c.num_experts + kThreads - 1) / kThreads);
    return launch({dim3(blocks), dim3(kThreads), stream}, balanced_thresholds_kernel<Real>, c.num_experts,
                  static_cast<const int32_t *>(args.routing.excess), static_cast<const Real *>(args.loss_gradient),
                  c.loss_weight[CUMOE_LOSS_THRESHOLD], args.training != 0, add,
                  static_cast<Real *>(args.gradients->thresholds));
}

template cudaError_t balanced_gradient<float>(const cumoe_context_t &, const RowGradients &, const int32_t *,
                                              cudaStream_t);
template cudaError_t balanced_gradient<double>(const cumoe_context_t &, const RowGradients &, const int32_t *,
                                               cudaStream_t);
template cudaError_t balanced_thresholds<float>(const cumoe_context_t &, const cumoe_gate_backward_args_t &,
                                                cudaStream_t);
template cudaError_t balanced_thresholds<double>(const cumoe_context_t &, const cumoe_gate_backward_args_t &,
                                                 cudaStream_t);

} // namespace cumoe
