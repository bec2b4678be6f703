/* The noise: the published generator, and normals that are normal and independent. */
#include "host/philox.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>

/* The known answers that were published with the generator (Random123, kat_vectors, philox4x32 10). */
Test(philox, known_answers)
{
    static const struct {
        uint32_t counter[4], key[2], answer[4];
    } vectors[] = {
        {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
         {0xffffffff, 0xffffffff},
         {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
         {0xa4093822, 0x299f31d0},
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    for (size_t i = 0; i < sizeof vectors / sizeof *vectors; i++) {
        cumoe_philox_t counter;
        for (int w = 0; w < 4; w++) counter.word[w] = vectors[i].counter[w];
        const cumoe_philox_t answer = cumoe_philox4x32(counter, vectors[i].key[0], vectors[i].key[1]);
        for (int w = 0; w < 4; w++) cr_expect_eq(answer.word[w], vectors[i].answer[w], "vector %zu, word %d", i, w);
    }
}

enum { N = 400000 };

/* The i-th sample along one axis of the name of a number; the other coordinates are arbitrary and fixed. */
typedef enum axis { TOKEN, EXPERT, OFFSET, STREAM, SEED, NUM_AXES } axis_t;

static const char *const AXIS_NAMES[NUM_AXES] = {"token", "expert", "offset", "stream", "seed"};

static double sample(axis_t axis, int64_t i)
{
    return (double)cumoe_noise_normal(axis == SEED ? (uint64_t)i : 11, axis == STREAM ? (uint32_t)i : 5,
                                      axis == OFFSET ? (uint64_t)i : 3, axis == TOKEN ? i : 17, CUMOE_NOISE_FLAT,
                                      axis == EXPERT ? (int32_t)(i % 131072) : 2);
}

static int64_t axis_samples(axis_t axis)
{
    return axis == EXPERT ? 131072 : N;
}

Test(philox, moments_and_tails)
{
    for (int axis = 0; axis < NUM_AXES; axis++) {
        const int64_t n = axis_samples(axis);
        double sum[5] = {0};
        int64_t beyond[4] = {0};
        for (int64_t i = 0; i < n; i++) {
            const double v = sample(axis, i);
            cr_assert(isfinite(v) && fabs(v) < 7);
            for (int power = 1; power <= 4; power++) sum[power] += pow(v, power);
            for (int k = 0; k < 4; k++) beyond[k] += fabs(v) > k + 1;
        }
        const double deviation = 5 / sqrt((double)n); /* five of the standard deviation of a mean */
        cr_expect(fabs(sum[1] / (double)n) < deviation, "%s: mean %g", AXIS_NAMES[axis], sum[1] / (double)n);
        cr_expect(fabs(sum[2] / (double)n - 1) < sqrt(2) * deviation, "%s: variance", AXIS_NAMES[axis]);
        cr_expect(fabs(sum[3] / (double)n) < sqrt(15) * deviation, "%s: skewness", AXIS_NAMES[axis]);
        cr_expect(fabs(sum[4] / (double)n - 3) < sqrt(96) * deviation, "%s: kurtosis", AXIS_NAMES[axis]);
        for (int k = 0; k < 4; k++) {
            const double p = erfc((k + 1) / sqrt(2));
            cr_expect(fabs((double)beyond[k] / (double)n - p) < sqrt(p * (1 - p)) * deviation + 1 / (double)n,
                      "%s: %lld of %lld beyond %d", AXIS_NAMES[axis], (long long)beyond[k], (long long)n, k + 1);
        }
    }
}

/* Neighbours along every axis, up to distance 8, and their squares do not know of each other. */
Test(philox, neighbours_are_independent)
{
    for (int axis = 0; axis < NUM_AXES; axis++) {
        const int64_t n = axis_samples(axis);
        double *v = malloc((size_t)n * sizeof *v);
        cr_assert_not_null(v);
        for (int64_t i = 0; i < n; i++) v[i] = sample(axis, i);
        for (int64_t lag = 1; lag <= 8; lag++) {
            double product = 0, squares = 0;
            for (int64_t i = 0; i + lag < n; i++) {
                product += v[i] * v[i + lag];
                squares += (v[i] * v[i] - 1) * (v[i + lag] * v[i + lag] - 1);
            }
            const double deviation = 5 / sqrt((double)n);
            cr_expect(fabs(product / (double)n) < deviation, "%s: correlation at distance %d", AXIS_NAMES[axis],
                      (int)lag);
            cr_expect(fabs(squares / (double)n) < 2 * deviation, "%s: squares at distance %d", AXIS_NAMES[axis],
                      (int)lag);
        }
        free(v);
    }
}

/* Every part of the name counts, all of its bits included. */
Test(philox, every_bit_of_the_name_counts)
{
    const float base = cumoe_noise_normal(1, 2, 3, 4, CUMOE_NOISE_FLAT, 5);
    for (int bit = 0; bit < 64; bit++) {
        const uint64_t flip = UINT64_C(1) << bit;
        cr_expect(cumoe_noise_normal(1 ^ flip, 2, 3, 4, CUMOE_NOISE_FLAT, 5) != base, "seed, bit %d", bit);
        cr_expect(cumoe_noise_normal(1, 2, 3 ^ flip, 4, CUMOE_NOISE_FLAT, 5) != base, "offset, bit %d", bit);
        if (bit < 32) cr_expect(cumoe_noise_normal(1, 2 ^ (uint32_t)flip, 3, 4, CUMOE_NOISE_FLAT, 5) != base);
        if (bit < 42) cr_expect(cumoe_noise_normal(1, 2, 3, 4 ^ (int64_t)flip, CUMOE_NOISE_FLAT, 5) != base);
        if (bit < 17) cr_expect(cumoe_noise_normal(1, 2, 3, 4, CUMOE_NOISE_FLAT, 5 ^ (int32_t)flip) != base);
    }
    cr_expect(cumoe_noise_normal(1, 2, 3, 4, CUMOE_NOISE_PRIMARY, 5) != base);
    cr_expect(cumoe_noise_normal(1, 2, 3, 4, CUMOE_NOISE_WEIGHTS, 5) != base);
}

/* Logarithm, sine and cosine against those of the C library. */
Test(philox, elementary_functions)
{
    for (uint64_t i = 0; i < 2000000; i++) {
        const uint32_t x = (uint32_t)(i * 2147483647u);
        const double u = ((double)(x >> 1) + 0.5) * 0x1p-31;
        const double radius = sqrt(-2 * log(u)), angle = 2 * acos(-1) * (double)x * 0x1p-32;
        float cosine, sine;
        cumoe_noise_direction(x, &cosine, &sine);
        const double radius_error = fabs((double)cumoe_noise_radius(x) - radius);
        /* near u = 1 the 24 bits of a float carry few of ln u */
        if (radius_error > 1e-6 * radius + 1e-7 / (radius + 1e-4))
            cr_assert_fail("radius of %08x: %g off", x, radius_error);
        if (fabs((double)cosine - cos(angle)) > 3e-7 || fabs((double)sine - sin(angle)) > 3e-7)
            cr_assert_fail("direction of %08x", x);
    }
}
