/* The noise: counter-based, one file for C and CUDA, the same bits on both.
 *
 * Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): ten rounds of a bijection
 * of 128 bits, so that any number of the stream is computed from its name alone. Here the key is (seed,
 * noise_stream of the layer), the counter (expert / 4 and level; global token; offset), and each name gives four
 * normals, for experts 4q .. 4q + 3; each group of the hierarchical gate begins with a q of its own. Forward,
 * backward, recomputation, every tile shape and every rank therefore see the same noise.
 *
 * Normals by Box and Muller with our own logarithm, sine and cosine. Every product that meets a sum is an explicit
 * fma and no other product feeds a sum, so no compiler has anything to contract, and the bits are those of IEEE
 * arithmetic. */
#ifndef CUMOE_PHILOX_H
#define CUMOE_PHILOX_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define CUMOE_NOISE_FN static __host__ __device__ __forceinline__
#else
#define CUMOE_NOISE_FN static inline __attribute__((always_inline, unused))
#endif

/* What a counter belongs to; part of the name of a number. */
enum {
    CUMOE_NOISE_FLAT = 0,    /* the gate, or the gates inside the groups of the hierarchical one */
    CUMOE_NOISE_PRIMARY = 1, /* the primary gate of the hierarchical one */
    CUMOE_NOISE_WEIGHTS = 2  /* initial values of weights */
};

typedef struct cumoe_philox {
    uint32_t word[4];
} cumoe_philox_t;

CUMOE_NOISE_FN cumoe_philox_t cumoe_philox4x32(cumoe_philox_t c, uint32_t key0, uint32_t key1)
{
#if defined(__CUDA_ARCH__)
#pragma unroll
#elif !defined(__CUDACC__)
#pragma GCC unroll 10
#endif
    for (int round = 0; round < 10; round++) {
        const uint64_t p0 = (uint64_t)0xD2511F53u * c.word[0];
        const uint64_t p1 = (uint64_t)0xCD9E8D57u * c.word[2];
        c.word[0] = (uint32_t)(p1 >> 32) ^ c.word[1] ^ key0;
        c.word[1] = (uint32_t)p1;
        c.word[2] = (uint32_t)(p0 >> 32) ^ c.word[3] ^ key1;
        c.word[3] = (uint32_t)p0;
        key0 += 0x9E3779B9u; /* golden ratio */
        key1 += 0xBB67AE85u; /* sqrt(3) - 1 */
    }
    return c;
}

/* The four words for experts 4 * quad .. 4 * quad + 3: quad in 20 bits, level in 2, token in 42, offset in 64. */
CUMOE_NOISE_FN cumoe_philox_t cumoe_noise_words(uint64_t seed, uint32_t stream, uint64_t offset, int64_t token,
                                                uint32_t level, uint32_t quad)
{
    const uint32_t high = (uint32_t)((uint64_t)token >> 32);
    const cumoe_philox_t counter = {
        {quad | level << 20 | high << 22, (uint32_t)token, (uint32_t)offset, (uint32_t)(offset >> 32)}};
    return cumoe_philox4x32(counter, (uint32_t)seed, (uint32_t)(seed >> 32) + stream);
}

/* sqrt(-2 ln u), u = (x / 2 + 1/2) / 2^31 in (0, 1]. The logarithm: u = m 2^e, m in [sqrt(1/2), sqrt(2)),
 * ln m = f - f^2/2 + f^3 P(f) with f = m - 1, error 6e-9. */
CUMOE_NOISE_FN float cumoe_noise_radius(uint32_t x)
{
    const float u = fmaf((float)(int32_t)(x >> 1), 0x1p-31f, 0x1p-32f);
    int32_t bits;
    memcpy(&bits, &u, sizeof bits);
    bits -= 0x3F3504F3; /* sqrt(1/2) */
    const float e = (float)(bits >> 23);
    bits = (bits & 0x007FFFFF) + 0x3F3504F3;
    float m;
    memcpy(&m, &bits, sizeof m);
    const float f = m - 1.0f;
    float p = fmaf(f, -0.0786537752f, 0.128791735f);
    p = fmaf(f, p, -0.131253093f);
    p = fmaf(f, p, 0.141814247f);
    p = fmaf(f, p, -0.166249692f);
    p = fmaf(f, p, 0.200022817f);
    p = fmaf(f, p, -0.250007957f);
    p = fmaf(f, p, 0.333333164f);
    p = fmaf(f, p, -0.5f);
    p = fmaf(f * f, p, f);
    return sqrtf(-2.0f * fmaf(e, 0.693147182f, p));
}

/* cos and sin of 2 pi x / 2^32: the top bits say the quadrant, the rest is an angle within 45 degrees of it. */
CUMOE_NOISE_FN void cumoe_noise_direction(uint32_t x, float *cosine, float *sine)
{
    const uint32_t quadrant = (x + 0x20000000u) >> 30;
    const float t = (float)(int32_t)(x - (quadrant << 30)) * 0x1p-30f; /* in quarter turns, [-1/2, 1/2) */
    const float s = t * t;
    float a = fmaf(s, 0.000158206749f, -0.00468126638f);
    a = fmaf(s, a, 0.0796925798f);
    a = fmaf(s, a, -0.645964086f);
    a = fmaf(s, a, 1.57079637f) * t; /* sin(t pi / 2) */
    float b = fmaf(s, 0.000903631677f, -0.0208600722f);
    b = fmaf(s, b, 0.253669202f);
    b = fmaf(s, b, -1.23370051f);
    b = fmaf(s, b, 1.0f); /* cos(t pi / 2) */
    const float c = quadrant & 1 ? a : b, d = quadrant & 1 ? b : a;
    *cosine = ((quadrant + 1) & 2) ? -c : c;
    *sine = (quadrant & 2) ? -d : d;
}

/* Four independent normals from four words. */
CUMOE_NOISE_FN void cumoe_noise_normals(cumoe_philox_t w, float normal[4])
{
    const float r0 = cumoe_noise_radius(w.word[0]), r1 = cumoe_noise_radius(w.word[2]);
    float c0, s0, c1, s1;
    cumoe_noise_direction(w.word[1], &c0, &s0);
    cumoe_noise_direction(w.word[3], &c1, &s1);
    normal[0] = r0 * c0;
    normal[1] = r0 * s0;
    normal[2] = r1 * c1;
    normal[3] = r1 * s1;
}

/* eps of eq. 4 for one token and expert. */
CUMOE_NOISE_FN float cumoe_noise_normal(uint64_t seed, uint32_t stream, uint64_t offset, int64_t token,
                                        int32_t level, int32_t expert)
{
    float normal[4];
    cumoe_noise_normals(cumoe_noise_words(seed, stream, offset, token, (uint32_t)level, (uint32_t)expert >> 2),
                        normal);
    /* no index: a GPU would put the array into memory */
    const float first = expert & 1 ? normal[1] : normal[0], second = expert & 1 ? normal[3] : normal[2];
    return expert & 2 ? second : first;
}

#endif
