#include "tests/sim/pipeline.cuh"

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "cuda/shared.cuh"

using namespace cumoe;

namespace
{

constexpr int kTile = 64, kDepth = 32, kStages = 3;  // a block makes 64 x 64 of c, from 32 of K at a time
constexpr int kWarps = 4, kThreads = kWarps * 32;    // 2 x 2 warps of 32 x 32 each
constexpr int kChunk = 8, kChunks = kDepth / kChunk; // a copy of 16 bytes; of them in a row
constexpr int kStageSize = kTile * kDepth;

static_assert(kTile * kChunks % kThreads == 0, "every thread copies the same number of chunks");

struct Stages {
    __nv_bfloat16 *a, *b; // [kStages, kTile, kDepth] chunks of a row permuted
    __host__ __device__ explicit Stages(SharedArena &arena)
        : a(arena.take<__nv_bfloat16>(kStages * kStageSize, 128)),
          b(arena.take<__nv_bfloat16>(kStages * kStageSize, 128))
    {
    }
};

/* Where a chunk stands: the eight rows that ldmatrix reads at a time lie in different banks. */
__device__ __forceinline__ int place(int row, int chunk)
{
    return row * kDepth + (chunk ^ (row / 2 % kChunks)) * kChunk;
}

/* Copy columns k .. k + 31 of this thread's rows; zeros beyond the matrix, whose source is not read. */
__device__ __forceinline__ void copy_stage(const Product &p, const Stages &shared, int stage, int k, int m0, int n0)
{
    for (int i = threadIdx.x; i < kTile * kChunks; i += kThreads) {
        const int row = i / kChunks, chunk = i % kChunks, column = k + chunk * kChunk;
        const bool has_a = m0 + row < p.M && column < p.K, has_b = n0 + row < p.N && column < p.K;
        const __nv_bfloat16 *a = has_a ? p.a + static_cast<int64_t>(p.row[m0 + row]) * p.K + column : p.a;
        const __nv_bfloat16 *b = has_b ? p.b + static_cast<int64_t>(n0 + row) * p.K + column : p.b;
        cp_async<16>(shared.a + stage * kStageSize + place(row, chunk), a, has_a ? 16 : 0);
        cp_async<16>(shared.b + stage * kStageSize + place(row, chunk), b, has_b ? 16 : 0);
    }
}

/* sum [2, 4] tiles of 16 x 8: rows m .. m + 31 of a and n .. n + 31 of b, 16 of K at a time. */
__device__ __forceinline__ void multiply_stage(const __nv_bfloat16 *a, const __nv_bfloat16 *b, int m, int n,
                                               float (&sum)[2][4][4])
{
    const int lane = threadIdx.x % 32;
    for (int k = 0; k < kChunks; k += 2) {
        uint32_t a_tile[2][4], b_tile[2][4];
        for (int i = 0; i < 2; i++) {
            ldmatrix_x4(a_tile[i], a + place(m + 16 * i + lane % 16, k + lane / 16));
            ldmatrix_x4(b_tile[i], b + place(n + 16 * i + lane % 8 + lane / 16 * 8, k + lane / 8 % 2));
        }
        for (int i = 0; i < 2; i++)
            for (int j = 0; j < 4; j++) {
                const uint32_t pair[2] = {b_tile[j / 2][j % 2 * 2], b_tile[j / 2][j % 2 * 2 + 1]};
                mma_m16n8k16<__nv_bfloat16>(sum[i][j], a_tile[i], pair);
            }
    }
}

__global__ void __launch_bounds__(kThreads) product_kernel(Product p)
{
    SharedArena arena;
    const Stages shared(arena);
    const int m0 = blockIdx.x * kTile, n0 = blockIdx.y * kTile, steps = (p.K + kDepth - 1) / kDepth;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, m = warp / 2 * 32, n = warp % 2 * 32;
    float sum[2][4][4] = {};

    for (int stage = 0; stage < kStages - 1; stage++) {
        if (stage < steps) copy_stage(p, shared, stage, stage * kDepth, m0, n0);
        cp_async_commit();
    }
    for (int step = 0; step < steps; step++) {
        cp_async_wait<kStages - 2>();
        sync_threads(); // the stage is there for all, and all have read the one that is filled next
        const int next = step + kStages - 1;
        if (next < steps) copy_stage(p, shared, next % kStages, next * kDepth, m0, n0);
        cp_async_commit();
        const int at = step % kStages * kStageSize;
        multiply_stage(shared.a + at, shared.b + at, m, n, sum);
    }

    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 4; j++)
            for (int v = 0; v < 4; v++) {
                const int row = m0 + m + 16 * i + lane / 4 + 8 * (v / 2),
                          column = n0 + n + 8 * j + 2 * (lane % 4) + v % 2;
                if (row < p.M && column < p.N) p.c[static_cast<int64_t>(row) * p.N + column] = sum[i][j][v];
            }
}

} // namespace

cudaError_t pipeline_product(const Product &product, cudaStream_t stream)
{
    const auto tiles = [](int count) { return static_cast<unsigned>((count + kTile - 1) / kTile); };
    return launch({dim3(tiles(product.M), tiles(product.N)), dim3(kThreads), stream, shared_bytes<Stages>()},
                  product_kernel, product);
}
