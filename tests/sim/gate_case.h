/* A case of the gate: its numbers, and what double loops make of them. */
#ifndef CUMOE_SIM_GATE_CASE_H
#define CUMOE_SIM_GATE_CASE_H

#include "cuda/gate.cuh"
#include "host/philox.h"

#include <algorithm>
#include <cmath>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <random>
#include <string.h>
#include <vector>

namespace gate_case
{

enum Scores { kPlain, kBiased, kBadlyBiased }; // gate_bias NULL, given, with NaN and infinities

struct Case {
    const char *name;
    int64_t tokens, live; // of the call; live < 0 or > tokens: beyond the range
    int32_t hidden, experts, top_k;
    cumoe_gate_kind_t gate = CUMOE_GATE_NOISY_TOPK;
    cumoe_dtype_t dtype = CUMOE_F32;
    bool narrow_weights = false; // w_gate, w_noise of the token type
    bool training = true;
    bool mask = false;
    bool hostile = false; // NaN and infinities in x and w_gate, ties
    int64_t values = cumoe::kGateValues;
    bool add = false;       // to the gradients
    bool optional = true;   // outputs that may be NULL are there
    bool gradients = true;  // so are dw_gate, dw_noise and dx_gate
    bool given_loss = true; // loss_gradient is there
    Scores scores = kPlain; // of SIGMOID_TOPK
    bool renormalize = true;
    int32_t groups = 0, top_k_groups = 0; // of HIERARCHICAL
};

/* A case of SOFTMAX_TOPK or SIGMOID_TOPK. */
constexpr Case with_shares(Case c, cumoe_gate_kind_t gate, bool renormalize, Scores scores = kPlain)
{
    c.gate = gate;
    c.renormalize = renormalize;
    c.scores = scores;
    return c;
}

/* A case of HIERARCHICAL. */
constexpr Case with_groups(Case c, int32_t groups, int32_t top_k_groups)
{
    c.gate = CUMOE_GATE_HIERARCHICAL;
    c.groups = groups;
    c.top_k_groups = top_k_groups;
    return c;
}

constexpr cumoe_gate_kind_t kNoisy = CUMOE_GATE_NOISY_TOPK, kDense = CUMOE_GATE_SOFTMAX,
                            kOutside = CUMOE_GATE_EXTERNAL, kSoftmax = CUMOE_GATE_SOFTMAX_TOPK,
                            kSigmoid = CUMOE_GATE_SIGMOID_TOPK, kGroups = CUMOE_GATE_HIERARCHICAL;
constexpr cumoe_dtype_t kF32 = CUMOE_F32, kF64 = CUMOE_F64, kBf16 = CUMOE_BF16, kF16 = CUMOE_F16;

constexpr uint64_t kSeed = 77, kOffset = 1234567890123u;
constexpr int64_t kFirstToken = (int64_t{1} << 33) + 5;

inline size_t size_of(cumoe_dtype_t dtype)
{
    return cumoe__dtype_size(dtype);
}

/* Values in a type, and what the type keeps of them. */
inline std::vector<char> encode(cumoe_dtype_t dtype, std::vector<double> &values)
{
    std::vector<char> bytes(values.size() * size_of(dtype));
    for (size_t i = 0; i < values.size(); i++) {
        char *at = bytes.data() + i * size_of(dtype);
        const float single = static_cast<float>(values[i]);
        const __nv_bfloat16 bf16 = __float2bfloat16_rn(single);
        const __half f16 = __float2half_rn(single);
        if (dtype == kF64) memcpy(at, &values[i], 8);
        if (dtype == kF32) memcpy(at, &single, 4), values[i] = single;
        if (dtype == kBf16) memcpy(at, &bf16, 2), values[i] = __bfloat162float(bf16);
        if (dtype == kF16) memcpy(at, &f16, 2), values[i] = __half2float(f16);
    }
    return bytes;
}

inline std::vector<double> decode(cumoe_dtype_t dtype, const std::vector<char> &bytes)
{
    std::vector<double> values(bytes.size() / size_of(dtype));
    for (size_t i = 0; i < values.size(); i++) {
        float single;
        if (dtype == kF64)
            memcpy(&values[i], bytes.data() + 8 * i, 8);
        else
            memcpy(&single, bytes.data() + 4 * i, 4), values[i] = single;
    }
    return values;
}

/* The numbers of a case. */
struct Numbers {
    int64_t T, live, H, E, K, stride;
    std::vector<double> x, w_gate, w_noise, dweight, loss_gradient; // as their types keep them
    std::vector<char> w_gate_primary_bytes, w_noise_primary_bytes;
    std::vector<char> x_bytes, w_gate_bytes, w_noise_bytes, bias_bytes, dweight_bytes, loss_bytes;
    std::vector<uint8_t> mask;
    std::vector<int64_t> index; // EXTERNAL
    std::vector<char> index_weight_bytes;
    cumoe_dtype_t real, weight_dtype;
};

inline Numbers make_numbers(const Case &c, uint64_t seed)
{
    std::mt19937_64 random(seed);
    std::normal_distribution<double> normal;
    const auto draw = [&](size_t count, double scale) {
        std::vector<double> values(count);
        for (double &v : values) v = scale * normal(random);
        return values;
    };
    Numbers n = {};
    n.T = c.tokens;
    n.live = std::clamp<int64_t>(c.live, 0, c.tokens);
    n.H = c.hidden;
    n.E = c.experts;
    n.K = c.top_k;
    n.stride = c.hidden + (c.hidden % 4 == 0 ? 4 : 3); // runs of four stay aligned
    n.real = c.dtype == kF64 ? kF64 : kF32;
    n.weight_dtype = c.narrow_weights ? c.dtype : n.real;
    n.x = draw(static_cast<size_t>(n.T * n.stride), 1);
    n.w_gate = draw(static_cast<size_t>(n.E * n.H), 1 / std::sqrt(static_cast<double>(n.H)));
    n.w_noise = draw(static_cast<size_t>(n.E * n.H), 1 / std::sqrt(static_cast<double>(n.H)));
    n.dweight = draw(static_cast<size_t>(n.T * n.K), 1);
    n.loss_gradient = draw(CUMOE_NUM_LOSSES, 1);
    for (int64_t t = 0; t < n.T; t++) n.mask.push_back(!c.mask || random() % 4 > 0);
    if (c.hostile) {
        for (int64_t t = 0; t < n.T; t += 3)
            n.x[static_cast<size_t>(t * n.stride + t % n.H)] = t % 2 ? INFINITY : 1e30;
        for (int64_t t = 0; t < n.T; t += 7) n.x[static_cast<size_t>(t * n.stride)] = NAN;
        for (int64_t t = 1; t < n.T; t += 5)
            for (int64_t h = 0; h < n.H; h++) n.x[static_cast<size_t>(t * n.stride + h)] = 0; // ties
        n.w_gate[0] = NAN;
        n.w_noise[static_cast<size_t>(n.E * n.H - 1)] = -INFINITY;
        for (int64_t h = 0; h < n.H; h++) n.w_noise[static_cast<size_t>(3 * n.H + h)] = -400; // std is clamped
    }
    std::vector<double> primary =
                            draw(static_cast<size_t>(c.groups * n.H), 1 / std::sqrt(static_cast<double>(n.H))),
                        primary_noise = draw(primary.size(), 1 / std::sqrt(static_cast<double>(n.H)));
    if (c.groups > 0 && c.hostile) primary[primary.size() / 2] = NAN;
    n.w_gate_primary_bytes = encode(n.weight_dtype, primary);
    n.w_noise_primary_bytes = encode(n.weight_dtype, primary_noise);
    std::vector<double> bias = draw(static_cast<size_t>(n.E), 0.3);
    if (c.scores == kBadlyBiased) {
        bias[0] = INFINITY;
        bias[static_cast<size_t>(n.E / 2)] = NAN;
        bias[static_cast<size_t>(n.E - 1)] = -INFINITY;
        if (n.E > 3) bias[1] = 50; // chosen whatever its sigmoid is
    }
    n.bias_bytes = encode(n.real, bias);
    // What is masked or not live may hold anything.
    for (int64_t t = 0; t < n.T; t++)
        if (t >= n.live || !n.mask[static_cast<size_t>(t)])
            for (int64_t h = 0; h < n.H; h++) n.x[static_cast<size_t>(t * n.stride + h)] = NAN;
    for (int64_t slot = 0; slot < n.T * n.K; slot++)
        n.index.push_back(static_cast<int64_t>(random() % static_cast<uint64_t>(n.E + 4)) - 2);
    n.x_bytes = encode(c.dtype, n.x);
    n.w_gate_bytes = encode(n.weight_dtype, n.w_gate);
    n.w_noise_bytes = encode(n.weight_dtype, n.w_noise);
    n.dweight_bytes = encode(n.real, n.dweight);
    n.loss_bytes = encode(n.real, n.loss_gradient);
    std::vector<double> index_weight = n.dweight;
    n.index_weight_bytes = encode(c.dtype, index_weight);
    return n;
}

/* --- The double loops. */

struct Expected {
    std::vector<double> weight;           // [T, K]
    std::vector<std::vector<int>> order;  // [T] experts by descending noisy logit
    std::vector<double> noisy;            // [T, E]
    std::vector<double> importance, load; // [E]
    double loss[2];
};

inline double softplus(double x)
{
    return std::max(x, 0.0) + std::log1p(std::exp(-std::fabs(x)));
}

inline double cv2(const std::vector<double> &v)
{
    double mean = 0, square = 0;
    for (double a : v) mean += a / static_cast<double>(v.size());
    for (double a : v) square += (a - mean) * (a - mean) / static_cast<double>(v.size());
    return mean > 0 ? square / (mean * mean) : 0;
}

inline Expected plain_loops(const Case &c, const Numbers &n)
{
    const bool noise = c.training && c.gate == kNoisy, smooth = noise && n.K < n.E;
    const size_t E = static_cast<size_t>(n.E), K = static_cast<size_t>(n.K), T = static_cast<size_t>(n.T);
    Expected out = {std::vector<double>(T * K), std::vector<std::vector<int>>(T), std::vector<double>(T * E),
                    std::vector<double>(E),     std::vector<double>(E),           {}};
    for (size_t t = 0; t < static_cast<size_t>(n.live); t++) {
        if (!n.mask[t]) continue;
        std::vector<double> clean(E), std(E, 1.0);
        double *noisy = out.noisy.data() + t * E;
        for (size_t e = 0; e < E; e++) {
            double raw = 0;
            for (size_t h = 0; h < static_cast<size_t>(n.H); h++) {
                const double x = n.x[t * static_cast<size_t>(n.stride) + h];
                clean[e] += x * n.w_gate[e * static_cast<size_t>(n.H) + h];
                raw += x * n.w_noise[e * static_cast<size_t>(n.H) + h];
            }
            noisy[e] = clean[e];
            if (!noise) continue;
            std[e] = softplus(raw) + static_cast<double>(0.01f);
            noisy[e] +=
                std[e] * static_cast<double>(cumoe_noise_normal(
                             kSeed, 3, kOffset, kFirstToken + static_cast<int64_t>(t), 0, static_cast<int32_t>(e)));
        }
        std::vector<int> &order = out.order[t];
        for (size_t e = 0; e < E; e++) order.push_back(static_cast<int>(e));
        if (c.gate == kNoisy)
            std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return noisy[a] > noisy[b]; });
        double sum = 0;
        for (size_t j = 0; j < K; j++) sum += std::exp(noisy[order[j]]);
        for (size_t j = 0; j < K; j++) {
            out.weight[t * K + j] = std::exp(noisy[order[j]]) / sum;
            out.importance[static_cast<size_t>(order[j])] += out.weight[t * K + j];
            if (!smooth) out.load[static_cast<size_t>(order[j])] += 1;
        }
        for (size_t i = 0; smooth && i < E; i++) {
            const size_t e = static_cast<size_t>(order[i]);
            const double threshold = noisy[order[i < K ? K : K - 1]];
            out.load[e] += 0.5 * std::erfc(-(clean[e] - threshold) / std[e] / std::sqrt(2.0));
        }
    }
    out.loss[0] = cv2(out.importance);
    out.loss[1] = cv2(out.load);
    return out;
}

} // namespace gate_case

#endif
