/* A pipelined product in the simulator, against plain loops. Values are small integers, so that sums are exact. */
#include "tests/sim/buffer.h"
#include "tests/sim/check.h"
#include "tests/sim/pipeline.cuh"
#include "tests/sim/simulator.h"

#include <random>

namespace
{

struct Size {
    int M, N, K;
};

const Size kSizes[] = {{64, 64, 96}, {1, 1, 8}, {65, 30, 40}, {100, 130, 264}, {64, 8, 32}, {3, 200, 64}};

std::vector<float> random_integers(size_t count, std::mt19937 *random)
{
    std::vector<float> values(count);
    for (float &value : values) value = static_cast<float>((*random)() % 9) - 4;
    return values;
}

std::vector<__nv_bfloat16> to_bf16(const std::vector<float> &values)
{
    std::vector<__nv_bfloat16> out;
    for (const float value : values) out.push_back(__float2bfloat16(value));
    return out;
}

void run(const Size &size, uint64_t seed)
{
    const size_t M = static_cast<size_t>(size.M), N = static_cast<size_t>(size.N), K = static_cast<size_t>(size.K);
    std::mt19937 random(static_cast<unsigned>(seed));
    const size_t source_rows = M + 5;
    const std::vector<float> a = random_integers(source_rows * K, &random), b = random_integers(N * K, &random);
    std::vector<int32_t> row(M);
    for (int32_t &r : row) r = static_cast<int32_t>(random() % source_rows);

    sim_set_seed(seed);
    Buffer<__nv_bfloat16> device_a(to_bf16(a)), device_b(to_bf16(b));
    Buffer<int32_t> device_row(row);
    Buffer<float> device_c(M * N);
    const Product product = {device_a.data(), device_b.data(), device_row.data(), device_c.data(), size.M,
                             size.N,          size.K};
    EXPECT(pipeline_product(product, nullptr) == cudaSuccess, "%d x %d x %d", size.M, size.N, size.K);

    const std::vector<float> c = device_c.read();
    for (size_t m = 0; m < M; m++)
        for (size_t n = 0; n < N; n++) {
            float sum = 0;
            for (size_t k = 0; k < K; k++) sum += a[static_cast<size_t>(row[m]) * K + k] * b[n * K + k];
            EXPECT(c[m * N + n] == sum, "%d x %d x %d at (%zu, %zu): %g, not %g", size.M, size.N, size.K, m, n,
                   static_cast<double>(c[m * N + n]), static_cast<double>(sum));
        }
}

} // namespace

int main()
{
    for (uint64_t seed = 1; seed <= 2; seed++)
        for (const Size &size : kSizes) run(size, seed);
    return check::result();
}
