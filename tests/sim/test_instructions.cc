/* The twins of the instructions against plain loops over all threads. */
#include "tests/sim/check.h"
#include "tests/sim/instructions.cuh"
#include "tests/sim/simulator.h"

#include <functional>
#include <map>
#include <math.h>
#include <string.h>
#include <string>

namespace
{

typedef std::vector<uint32_t> words_t; // [256]

uint32_t in(int i)
{
    return instruction_input(i);
}

uint64_t wide(int i)
{
    return static_cast<uint64_t>(in(i)) << 32 | in(i + 64);
}

float as_float(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

uint32_t as_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

words_t each(int count, const std::function<uint32_t(int)> &value)
{
    words_t out(kInstructionWords);
    for (int i = 0; i < count; i++) out[static_cast<size_t>(i)] = value(i);
    return out;
}

/* FOLD over the threads of t's warp; those of its parity alone with HALF. */
uint32_t over_warp(int t, bool half, uint32_t start, const std::function<uint32_t(uint32_t, int)> &fold)
{
    for (int u = t / 32 * 32; u < t / 32 * 32 + 32; u++)
        if (!half || u % 2 == t % 2) start = fold(start, u);
    return start;
}

words_t shuffled(const std::function<int(int lane, int i)> &source)
{
    return each(256, [=](int n) {
        const int t = n % 64, lane = source(t % 32, n / 64);
        return in((lane < 0 || lane > 31 ? t : t / 32 * 32 + lane) + n / 64 * 64);
    });
}

/* 64 threads update 8 words in turn: those of global memory begin with START, of shared memory with 0 .. 7. */
words_t updated(uint64_t start, const std::function<uint64_t(uint64_t, uint64_t)> &apply)
{
    words_t out(kInstructionWords, static_cast<uint32_t>(start));
    if (start) std::fill(out.begin() + 128, out.end(), 0);
    for (uint64_t i = 0; i < 16; i++) {
        uint64_t narrow = i < 8 ? start & 0xffffffffu : i - 8, value = i < 8 ? start : i - 8;
        for (int t = static_cast<int>(i % 8); t < 64; t += 8) {
            narrow = apply(narrow, in(t)) & 0xffffffffu;
            value = apply(value, wide(t));
        }
        out[i] = static_cast<uint32_t>(narrow);
        memcpy(&out[64 + 2 * i], &value, sizeof value);
    }
    return out;
}

words_t copied(int bytes)
{
    const int row_words = bytes / 4, rows = 256 / row_words;
    words_t out = each(256, in);
    for (int row = rows / 2; row < rows; row++) {
        const int kept = row % (bytes + 1);
        memset(reinterpret_cast<char *>(&out[static_cast<size_t>(row * row_words)]) + kept, 0,
               static_cast<size_t>(bytes - kept));
    }
    return out;
}

/* Column c of row r of matrix i, whose rows are those of the input from the end. */
uint32_t half_of(int i, int r, int c)
{
    const uint32_t pair = in(4 * (31 - 8 * i - r) + c / 2);
    return c % 2 ? pair >> 16 : pair & 0xffff;
}

words_t matrices(bool transposed)
{
    return each(128, [=](int n) {
        const int i = n % 4, g = n / 4 / 4, p = 2 * (n / 4 % 4);
        return transposed ? half_of(i, p, g) | half_of(i, p + 1, g) << 16
                          : half_of(i, g, p) | half_of(i, g, p + 1) << 16;
    });
}

float small(int i)
{
    return static_cast<float>(static_cast<int>(in(i % 256) % 17) - 8);
}

/* TIMES a b + c, in the places of the lanes. CUT: the low bits that a's values bring along do not count. */
words_t product(int depth, int times)
{
    return each(128, [=](int n) {
        const int lane = n / 4, i = lane / 4 + 8 * (n % 4 / 2), j = 2 * (lane % 4) + n % 2;
        float sum = small(8 * i + j + 5);
        for (int k = 0; k < depth; k++) sum += static_cast<float>(times) * small(16 * i + k) * small(8 * k + j + 3);
        return as_bits(sum);
    });
}

uint32_t tf32(float value)
{
    const double step = ldexp(1, ilogb(value) - 10); // ten bits behind the leading one
    return as_bits(static_cast<float>(round(value / step) * step));
}

const std::map<std::string, std::function<words_t()>> kExpected = {
    {"sync_threads", [] { return each(64, [](int t) { return in(63 - t); }); }},
    {"sync_warp", [] { return each(64, [](int t) { return in(t ^ 2); }); }},
    {"barrier", [] { return each(64, [](int t) { return t < 32 ? 0 : in(63 - t); }); }},
    {"fence_device", [] { return each(128, in); }},
    {"shuffle", [] { return each(64, [](int t) { return in(t / 32 * 32 + static_cast<int>(in(t + 64) % 32)); }); }},
    {"shuffle_wide", [] { return each(128, [](int n) { return in(n / 32 * 32 + 5); }); }},
    {"shuffle_xor", [] { return shuffled([](int lane, int i) { return (lane ^ 2 << i) % 32; }); }},
    {"shuffle_up", [] { return shuffled([](int lane, int i) { return lane - (5 * i + 1); }); }},
    {"shuffle_down", [] { return shuffled([](int lane, int i) { return lane + (5 * i + 1); }); }},
    {"ballot",
     [] {
         return each(128, [](int n) {
             const int begin = n / 64 * 64;
             return over_warp(n % 64, n >= 64, 0,
                              [=](uint32_t all, int u) { return all | in(u + begin) % 2 << u % 32; });
         });
     }},
    {"match_any",
     [] {
         return each(128, [](int n) {
             const int begin = n / 64 * 64;
             const uint32_t classes = n < 64 ? 7 : 3;
             return over_warp(n % 64, n >= 64, 0, [=](uint32_t all, int u) {
                 return all | static_cast<uint32_t>(in(u + begin) % classes == in(n) % classes) << u % 32;
             });
         });
     }},
    {"reduce_add",
     [] {
         return each(64, [](int t) { return over_warp(t, true, 0, [](uint32_t a, int u) { return a + in(u); }); });
     }},
    {"reduce_min",
     [] {
         return each(64, [](int t) {
             return over_warp(t, true, in(t), [](uint32_t a, int u) { return std::min(a, in(u)); });
         });
     }},
    {"reduce_max",
     [] {
         return each(64, [](int t) {
             return over_warp(t, true, in(t), [](uint32_t a, int u) { return std::max(a, in(u)); });
         });
     }},
    {"atomic_add", [] { return updated(0, [](uint64_t a, uint64_t b) { return a + b; }); }},
    {"atomic_min", [] { return updated(~0ull, [](uint64_t a, uint64_t b) { return std::min(a, b); }); }},
    {"atomic_max", [] { return updated(0, [](uint64_t a, uint64_t b) { return std::max(a, b); }); }},
    {"atomic_cas",
     [] {
         return each(256, [](int n) {
             if (n < 64) return n % 2 ? 0 : in(n);
             const int t = (n - 128) / 2;
             return n < 128 || t % 2 ? 0 : n % 2 ? in(t) : in(t + 64);
         });
     }},
    {"cp_async_4", [] { return copied(4); }},
    {"cp_async_8", [] { return copied(8); }},
    {"cp_async_16", [] { return copied(16); }},
    {"ldmatrix_x4", [] { return matrices(false); }},
    {"ldmatrix_x4_trans", [] { return matrices(true); }},
    {"mma_bf16", [] { return product(16, 1); }},
    {"mma_f16", [] { return product(16, 1); }},
    {"mma_ldmatrix", [] { return product(16, 2); }},
    {"mma_tf32", [] { return product(8, 1); }},
    {"popcount", [] { return each(64, [](int t) { return static_cast<uint32_t>(__builtin_popcount(in(t))); }); }},
    {"leading_zeros",
     [] {
         return each(64, [](int t) {
             const uint32_t value = t ? in(t) >> t % 32 : 0;
             return value ? static_cast<uint32_t>(31 - ilogb(value)) : 32;
         });
     }},
    {"float_bits", [] { return each(64, [](int t) { return as_bits(as_float(in(t) >> 1) * 2); }); }},
    {"to_tf32",
     [] {
         return each(128, [](int n) {
             return tf32(n < 64 ? as_float(in(n) % 0x7f800000u)
                                : -as_float(0x3f801000u + 0x2000u * static_cast<uint32_t>(n - 64)));
         });
     }},
    {"exp2_approx",
     [] { return each(256, [](int i) { return as_bits(exp2f((static_cast<float>(i) - 128) * 0.871f)); }); }},
    {"reciprocal_approx",
     [] { return each(256, [](int i) { return as_bits(1 / as_float(0x01000000u + in(i) % 0x7d000000u)); }); }},
    {"load_8", [] { return each(128, [](int n) { return in(2 * (63 - n / 2) + n % 2); }); }},
    {"load_16", [] { return each(256, [](int n) { return in(4 * (63 - n / 4) + n % 4); }); }},
    {"store_8", [] { return each(128, [](int n) { return in(n / 2 + 64 * (n % 2)); }); }},
    {"store_16", [] { return each(256, [](int n) { return in(n / 4 + 64 * (n % 4)); }); }},
    {"load_once", [] { return each(256, in); }},
    {"store_once", [] { return each(256, [](int n) { return in(n / 4 + 64 * (n % 4)); }); }},
};

bool is_near(uint32_t a, uint32_t b, int ulp)
{
    const int64_t difference = static_cast<int64_t>(a) - static_cast<int64_t>(b);
    return difference <= ulp && difference >= -ulp;
}

void compare(const Instruction &instruction, uint64_t seed)
{
    const auto found = kExpected.find(instruction.name);
    EXPECT(found != kExpected.end(), "%s has no expected values", instruction.name);
    if (found == kExpected.end()) return;
    words_t out;
    sim_set_seed(seed);
    EXPECT(instruction_run(instruction, &out) == cudaSuccess, "%s", instruction.name);
    const words_t expected = found->second();
    for (size_t i = 0; i < out.size(); i++)
        EXPECT(is_near(out[i], expected[i], instruction.ulp), "%s: word %zu is %08x, not %08x", instruction.name, i,
               out[i], expected[i]);
}

} // namespace

int main()
{
    for (uint64_t seed = 1; seed <= 3; seed++)
        for (int i = 0; i < kNumInstructions; i++) compare(kInstructions[i], seed);
    return check::result();
}
