#include "cuda/experts_sums.cuh"

#include "cuda/launch.cuh"
#include "cuda/run.cuh"
#include "cuda/shared.cuh"

namespace cumoe
{

namespace
{

constexpr int kWarp = 32, kThreads = 128, kWarps = kThreads / kWarp;
constexpr int kBlocksPerSm = 8;

/* A column's rows begin .. end - 1 behind SUM. Several loads are on their way; the additions stay in order. */
template <typename T, typename Real>
__device__ __forceinline__ Real sum_rows(const BiasSum &s, int64_t begin, int64_t end, int64_t column, Real sum)
{
    const T *data = static_cast<const T *>(s.data) + column;
    const Real *weight = static_cast<const Real *>(s.weight);
#pragma unroll 8
    for (int64_t row = begin; row < end; row++) {
        const int64_t line = s.index ? s.index[row] : row;
        sum += (weight ? weight[s.slot[row]] : Real(1)) * static_cast<Real>(widened(data[line * s.stride]));
    }
    return sum;
}

/* A thread for each column of each group. */
template <typename Real>
__global__ void __launch_bounds__(kThreads) bias_gradient_kernel(BiasSum s)
{
    const int64_t blocks = (s.width + kThreads - 1) / kThreads; // of columns
    for (int64_t work = blockIdx.x; work < blocks * s.groups; work += gridDim.x) {
        const int64_t group = work / blocks, column = work % blocks * kThreads + threadIdx.x;
        const int64_t begin = s.offset[group], end = s.offset[group + 1];
        if (column >= s.width || (s.add && begin == end)) continue;
        const int64_t to = group * s.gradient.expert_stride + column * s.gradient.col_stride;
        Real sum = s.add ? load<Real>(s.gradient.data, s.gradient.dtype, to) : Real(0);
        if (s.dtype == CUMOE_BF16)
            sum = sum_rows<__nv_bfloat16>(s, begin, end, column, sum);
        else if (s.dtype == CUMOE_F16)
            sum = sum_rows<__half>(s, begin, end, column, sum);
        else
            sum = sum_rows<Real>(s, begin, end, column, sum);
        store(s.gradient.data, s.gradient.dtype, to, sum);
    }
}

struct LargestArrays {
    uint32_t *largest; // [kWarps]
    __host__ __device__ explicit LargestArrays(SharedArena &arena) : largest(arena.take<uint32_t>(kWarps)) {}
};

/* A block for each expert. */
__global__ void __launch_bounds__(kThreads)
    weight_exponents_kernel(cumoe_rows_t rows, int32_t num_experts, const float *weight, int32_t *exponent)
{
    SharedArena arena;
    const LargestArrays shared(arena);
    constexpr uint32_t kMagnitude = 0x7fffffffu, kInfinity = 0x7f800000u;
    for (int32_t expert = blockIdx.x; expert < num_experts; expert += gridDim.x) {
        // Magnitudes are in the order of their bits; a NaN is above all.
        const int32_t end = rows.offset[expert + 1];
        uint32_t bits = 0;
        for (int64_t row = rows.offset[expert] + static_cast<int64_t>(threadIdx.x); row < end; row += kThreads) {
            const uint32_t magnitude = float_bits(weight[rows.row_slot[row]]) & kMagnitude;
            bits = magnitude > bits ? magnitude : bits;
        }
        bits = reduce_max(kFullMask, bits);
        if (threadIdx.x % kWarp == 0) shared.largest[threadIdx.x / kWarp] = bits;
        sync_threads();

        for (int warp = 0; warp < kWarps; warp++) bits = bits > shared.largest[warp] ? bits : shared.largest[warp];
        if (threadIdx.x == 0) exponent[expert] = bits == 0 || bits >= kInfinity ? 0 : ilogbf(bits_float(bits)) + 1;
        sync_threads(); // largest is read; the next expert may write it
    }
}

/* The expert e with offset[e] <= row < offset[e + 1]. */
__device__ __forceinline__ int64_t expert_of_row(const int32_t *offset, int64_t num_experts, int64_t row)
{
    int64_t low = 0, high = num_experts - 1;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (row < offset[middle + 1])
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

struct WeightGradient {
    cumoe_rows_t rows;
    int64_t num_slots;
    int32_t num_experts;
    const void *partial; // [R, panels]
    int64_t panels;
    const void *dy;
    cumoe_dtype_t dtype;
    int64_t dy_stride, H;
    cumoe_matrix_t bias; // [E, 1, H]; data NULL = none
    void *dweight;       // [S]
};

constexpr int kLanes = 16; // of a slot with a bias: the interleaved sums of <dy, b_down>

/* Every lane its columns, all of them the sum of all lanes. All lanes of the warp come here; ROW < 0 = none. */
template <typename Real>
__device__ __forceinline__ Real share_of_bias(const WeightGradient &w, int64_t row, int lane)
{
    Real sum = 0, share = 0;
    if (row >= 0) {
        const int64_t from = w.rows.row_token[row] * w.dy_stride;
        const int64_t expert = expert_of_row(w.rows.offset, w.num_experts, row);
        for (int64_t h = lane; h < w.H; h += kLanes)
            sum += load<Real>(w.dy, w.dtype, from + h) *
                   load<Real>(w.bias.data, w.bias.dtype, expert * w.bias.expert_stride + h * w.bias.col_stride);
    }
    const int warp_lane = threadIdx.x % kWarp;
    for (int i = 0; i < kLanes; i++) share += shuffle(kFullMask, sum, warp_lane - lane + i);
    return share;
}

/* Slots walked over by blocks: kLanesOfSlot threads each, 1 without a bias. */
template <typename Real, int kLanesOfSlot>
__global__ void __launch_bounds__(kThreads) dweight_kernel(WeightGradient w)
{
    static_assert(kLanesOfSlot == 1 || kLanesOfSlot == kLanes, "as share_of_bias has it");
    constexpr int kSlots = kThreads / kLanesOfSlot; // of a block
    const int lane = threadIdx.x % kLanesOfSlot;
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * kSlots; first < w.num_slots;
         first += static_cast<int64_t>(gridDim.x) * kSlots) {
        const int64_t slot = first + threadIdx.x / kLanesOfSlot;
        const int64_t row = slot < w.num_slots ? w.rows.slot_row[slot] : -1;
        const Real share = kLanesOfSlot > 1 ? share_of_bias<Real>(w, row, lane) : Real(0);
        if (lane != 0 || slot >= w.num_slots) continue;
        Real sum = 0;
        for (int64_t p = 0; row >= 0 && p < w.panels; p++)
            sum += static_cast<const Real *>(w.partial)[row * w.panels + p];
        if (kLanesOfSlot > 1 && row >= 0) sum += share;
        static_cast<Real *>(w.dweight)[slot] = sum;
    }
}

template <int kLanesOfSlot>
cudaError_t launch_dweight(const cumoe_context_t &context, const WeightGradient &w, cudaStream_t stream)
{
    const int64_t blocks = (w.num_slots * kLanesOfSlot + kThreads - 1) / kThreads;
    return launch({resident_blocks(context, blocks, kBlocksPerSm), dim3(kThreads), stream},
                  context.config.dtype == CUMOE_F64 ? dweight_kernel<double, kLanesOfSlot>
                                                    : dweight_kernel<float, kLanesOfSlot>,
                  w);
}

template <typename Unit>
__global__ void __launch_bounds__(kThreads) copy_rows_kernel(RowCopy copy)
{
    const int64_t num_rows = *copy.num_rows;
    for (int64_t row = blockIdx.x; row < num_rows; row += gridDim.x) {
        const int64_t line = copy.index ? copy.index[row] : row;
        const Unit *from = static_cast<const Unit *>(copy.from) + line * copy.from_stride;
        for (int64_t i = threadIdx.x; i < copy.width; i += kThreads) {
            const Unit value = load_vector<Unit>(from + i);
            store_vector(static_cast<Unit *>(copy.to[0]) + row * copy.width + i, value);
            if (copy.to[1]) store_vector(static_cast<Unit *>(copy.to[1]) + row * copy.width + i, value);
        }
    }
}

/* As 16 bytes at a time, if they are so many. */
template <typename Unit>
cudaError_t copy_rows_of(const cumoe_context_t &context, RowCopy copy, cudaStream_t stream)
{
    constexpr int64_t kUnits = sizeof(uint4) / sizeof(Unit);
    const dim3 grid = resident_blocks(context, copy.max_rows, kBlocksPerSm);
    uintptr_t all = reinterpret_cast<uintptr_t>(copy.from);
    for (void *to : copy.to) all |= reinterpret_cast<uintptr_t>(to);
    if (all % sizeof(uint4) || copy.width % kUnits || copy.from_stride % kUnits)
        return launch({grid, dim3(kThreads), stream}, copy_rows_kernel<Unit>, copy);
    copy.width /= kUnits;
    copy.from_stride /= kUnits;
    return launch({grid, dim3(kThreads), stream}, copy_rows_kernel<uint4>, copy);
}

} // namespace

cudaError_t bias_gradient(const cumoe_context_t &context, const BiasSum &sum, cudaStream_t stream)
{
    if (!sum.gradient.data) return cudaSuccess;
    const int64_t work = (sum.width + kThreads - 1) / kThreads * sum.groups;
    const bool wide = context.config.dtype == CUMOE_F64;
    return launch({resident_blocks(context, work, kBlocksPerSm), dim3(kThreads), stream},
                  wide ? bias_gradient_kernel<double> : bias_gradient_kernel<float>, sum);
}

cudaError_t weight_exponents(const cumoe_context_t &context, const cumoe_rows_t &rows, const float *weight,
                             int32_t *exponent, cudaStream_t stream)
{
    const int32_t num_experts = context.config.num_experts;
    return launch({resident_blocks(context, num_experts, kBlocksPerSm), dim3(kThreads), stream,
                   shared_bytes<LargestArrays>()},
                  weight_exponents_kernel, rows, num_experts, weight, exponent);
}

cudaError_t write_dweight(const cumoe_context_t &context, const cumoe_down_backward_args_t &args,
                          const void *partial, int64_t panels, cudaStream_t stream)
{
    const cumoe_config_t &c = context.config;
    const int64_t slots = cumoe__max_slots(&c, args.num_tokens);
    const WeightGradient w = {
        args.rows,   slots,   c.num_experts,  partial,       panels,
        args.dy,     c.dtype, args.dy_stride, c.hidden_size, cumoe__bias_down(args.weights, &c),
        args.dweight};
    return w.bias.data ? launch_dweight<kLanes>(context, w, stream) : launch_dweight<1>(context, w, stream);
}

cudaError_t copy_rows(const cumoe_context_t &context, const RowCopy &copy, cudaStream_t stream)
{
    switch (cumoe__dtype_size(context.config.dtype)) {
    case 2:
        return copy_rows_of<uint16_t>(context, copy, stream);
    case 4:
        return copy_rows_of<uint32_t>(context, copy, stream);
    default:
        return copy_rows_of<uint64_t>(context, copy, stream);
    }
}

} // namespace cumoe
