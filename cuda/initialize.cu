/* Initial values of weights: the same bits as on the CPU (host/cpu/initialize.c), whatever the layout and the grid.
 */
#include "cuda/launch.cuh"
#include "cuda/stages.cuh"
#include "cuda/vector.cuh"
#include "host/philox.h"

namespace cumoe
{

namespace
{

constexpr int kThreads = 256, kBlocksPerSm = 8;
constexpr int kQuad = 4; // normals of a name

/* The matrix takes the place of the noise stream, the expert that of the token, the element that of the offset. */
enum : uint32_t { MATRIX_GATE = 1, MATRIX_UP, MATRIX_GLU, MATRIX_DOWN };

struct Filling {
    cumoe_matrix_t to;                         // [experts, rows, cols]
    int64_t first_expert, experts, rows, cols; // first: the number of the first among all ranks' experts
    double std;                                // 0: zeros
    uint64_t seed;
    uint32_t matrix;
};

__device__ __forceinline__ void write_value(const cumoe_matrix_t &to, int64_t at, double value)
{
    if (to.dtype == CUMOE_F64)
        static_cast<double *>(to.data)[at] = value;
    else
        store(to.data, to.dtype, at, static_cast<float>(value));
}

__global__ void __launch_bounds__(kThreads) fill_kernel(Filling filling)
{
    const int64_t elements = filling.rows * filling.cols, quads = (elements + kQuad - 1) / kQuad;
    const int64_t work = filling.experts * quads, step = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < work; i += step) {
        const int64_t expert = i / quads, quad = i - expert * quads;
        float normal[kQuad] = {};
        if (filling.std > 0)
            cumoe_noise_normals(cumoe_noise_words(filling.seed, filling.matrix, static_cast<uint64_t>(quad),
                                                  filling.first_expert + expert, CUMOE_NOISE_WEIGHTS, 0),
                                normal);
        int64_t row = quad * kQuad / filling.cols, col = quad * kQuad - row * filling.cols;
        for (int j = 0; j < kQuad; j++) {
            if (quad * kQuad + j >= elements) break;
            const cumoe_matrix_t &to = filling.to;
            write_value(to, expert * to.expert_stride + row * to.row_stride + col * to.col_stride,
                        filling.std * static_cast<double>(normal[j]));
            if (++col < filling.cols) continue;
            col = 0;
            row++;
        }
    }
}

/* Fills one matrix after the other, until the first error. */
class Filler
{
  public:
    Filler(const cumoe_context_t &context, uint64_t seed, cudaStream_t stream)
        : context_(context), seed_(seed), stream_(stream)
    {
    }
    void fill(uint32_t matrix, const cumoe_matrix_t &to, int64_t rows, int64_t cols, double std)
    {
        fill(matrix, to, context_.ranks.first_expert, context_.ranks.own_experts, rows, cols, std);
    }
    /* Replicated, contiguous [rows, cols]; rows are what is called experts elsewhere. */
    void fill_gate(void *data, cumoe_dtype_t dtype, int64_t rows, int64_t cols, double std)
    {
        fill(MATRIX_GATE, {data, dtype, cols, cols, 1}, 0, rows, 1, cols, std);
    }
    cudaError_t error() const
    {
        return error_;
    }

  private:
    void fill(uint32_t matrix, const cumoe_matrix_t &to, int64_t first, int64_t experts, int64_t rows, int64_t cols,
              double std)
    {
        if (!to.data || error_ != cudaSuccess) return;
        const int64_t quads = (rows * cols + kQuad - 1) / kQuad;
        const dim3 blocks = resident_blocks(context_, (experts * quads + kThreads - 1) / kThreads, kBlocksPerSm);
        error_ = launch({blocks, kThreads, stream_}, fill_kernel,
                        Filling{to, first, experts, rows, cols, std, seed_, matrix});
    }
    const cumoe_context_t &context_;
    uint64_t seed_;
    cudaStream_t stream_;
    cudaError_t error_ = cudaSuccess;
};

} // namespace

cudaError_t weights_init(const cumoe_context_t &context, uint64_t seed, const cumoe_weights_t &weights,
                         cudaStream_t stream)
{
    const cumoe_config_t *config = &context.config;
    const int64_t H = config->hidden_size, I = config->intermediate_size;
    const double gate_std = cumoe__is_noisy(config->gate) ? 0 : 0.02;
    const double up_std = 1 / std::sqrt(static_cast<double>(H)), down_std = 1 / std::sqrt(static_cast<double>(I));
    Filler filler(context, seed, stream);
    const cumoe_dtype_t gate = weights.gate_dtype, real = cumoe__gate_dtype(config);
    filler.fill_gate(weights.w_gate, gate, config->num_experts, H, gate_std);
    filler.fill_gate(weights.w_noise, gate, config->num_experts, H, 0);
    filler.fill_gate(weights.w_gate_primary, gate, config->num_groups, H, 0);
    filler.fill_gate(weights.w_noise_primary, gate, config->num_groups, H, 0);
    filler.fill_gate(weights.thresholds, real, config->num_experts, 1, 0);
    filler.fill_gate(weights.gate_bias, real, config->num_experts, 1, 0);
    const int halves = cumoe__is_glu(config->activation) ? 2 : 1;
    for (int glu = 0; glu < halves; glu++) {
        const uint32_t matrix = glu ? MATRIX_GLU : MATRIX_UP;
        filler.fill(matrix, cumoe__matrix_up(&weights, config, glu), I, H, up_std);
        filler.fill(matrix, cumoe__bias_up(&weights, config, glu), 1, I, 0);
    }
    filler.fill(MATRIX_DOWN, cumoe__matrix_down(&weights), H, I, down_std);
    filler.fill(MATRIX_DOWN, cumoe__bias_down(&weights, config), 1, H, 0);
    return filler.error();
}

} // namespace cumoe
