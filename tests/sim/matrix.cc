/* The work of the matrix instructions of a warp; cuda/ptx.cuh says which lane has what. */
#include "tests/sim/device.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <string.h>

namespace sim
{

namespace
{

constexpr int kLanes = 32;

double from_bits(float, uint32_t bits)
{
    bits &= 0xffffe000u; // TF32
    float value;
    memcpy(&value, &bits, sizeof value);
    return static_cast<double>(value);
}

double from_bits(__nv_bfloat16, uint32_t bits)
{
    __nv_bfloat16_raw raw;
    raw.x = static_cast<unsigned short>(bits);
    return static_cast<double>(__bfloat162float(raw));
}

double from_bits(__half, uint32_t bits)
{
    __half_raw raw;
    raw.x = static_cast<unsigned short>(bits);
    return static_cast<double>(__half2float(raw));
}

/* d [16, 8] = a b + c, summed in double by ascending k and rounded once: the machine's own sum is not documented. A
 * register holds kPack values of consecutive k, and a register more of a lane is the other half of the rows, or of
 * k. */
template <typename T, int kDepth, int kPack>
void multiply(const void *const *in, void *const *out)
{
    constexpr int kBits = 32 / kPack, kHalf = kDepth / 2;
    double a[16][kDepth], b[8][kDepth]; // b transposed
    for (int lane = 0; lane < kLanes; lane++) {
        const Fragments *fragments = static_cast<const Fragments *>(in[lane]);
        const int g = lane / 4, k = kPack * (lane % 4);
        for (int part = 0; part < kPack; part++) {
            for (int n = 0; n < 4; n++)
                a[g + 8 * (n % 2)][k + part + kHalf * (n / 2)] = from_bits(T{}, fragments->a[n] >> kBits * part);
            for (int n = 0; n < 2; n++)
                b[g][k + part + kHalf * n] = from_bits(T{}, fragments->b[n] >> kBits * part);
        }
    }
    for (int lane = 0; lane < kLanes; lane++)
        for (int n = 0; n < 4; n++) {
            const double *row = a[lane / 4 + 8 * (n / 2)], *column = b[2 * (lane % 4) + n % 2];
            double sum = static_cast<double>(static_cast<const Fragments *>(in[lane])->c[n]);
            for (int k = 0; k < kDepth; k++) sum += row[k] * column[k];
            static_cast<float *>(out[lane])[n] = static_cast<float>(sum);
        }
}

/* Column C of row R of matrix I. */
uint32_t value(const void *const *in, int i, int r, int c)
{
    return static_cast<const uint16_t *>(in[8 * i + r])[c];
}

} // namespace

void multiply_bf16(const void *const *in, void *const *out, uint32_t)
{
    multiply<__nv_bfloat16, 16, 2>(in, out);
}

void multiply_f16(const void *const *in, void *const *out, uint32_t)
{
    multiply<__half, 16, 2>(in, out);
}

void multiply_tf32(const void *const *in, void *const *out, uint32_t)
{
    multiply<float, 8, 1>(in, out);
}

void load_matrices(const void *const *in, void *const *out, uint32_t)
{
    for (int lane = 0; lane < kLanes; lane++)
        for (int i = 0; i < 4; i++) {
            const int g = lane / 4, p = 2 * (lane % 4);
            static_cast<uint32_t *>(out[lane])[i] = value(in, i, g, p) | value(in, i, g, p + 1) << 16;
        }
}

void load_matrices_trans(const void *const *in, void *const *out, uint32_t)
{
    for (int lane = 0; lane < kLanes; lane++)
        for (int i = 0; i < 4; i++) {
            const int g = lane / 4, p = 2 * (lane % 4);
            static_cast<uint32_t *>(out[lane])[i] = value(in, i, p, g) | value(in, i, p + 1, g) << 16;
        }
}

} // namespace sim
