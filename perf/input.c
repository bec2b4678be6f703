/* Random tokens, gates and routings, made on the host. */
#include "perf.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct random {
    uint64_t state;
} random_t;

/* splitmix64 */
static uint64_t next(random_t *random)
{
    uint64_t z = random->state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

/* In 0..1, without 1. */
static double uniform(random_t *random)
{
    return (double)(next(random) >> 11) * 0x1p-53;
}

/* The bits of i / 128, -128 <= i <= 128, which is a normal number of both 16-bit types and exact in them. */
static uint16_t half_of(cumoe_dtype_t dtype, int i)
{
    const float value = (float)i / 128;
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (dtype == CUMOE_BF16 || i == 0) return (uint16_t)(bits >> 16);
    const uint32_t exponent = (bits >> 23 & 255) - 127 + 15;
    return (uint16_t)((bits >> 16 & 0x8000) | exponent << 10 | (bits >> 13 & 1023));
}

float input_widen(cumoe_dtype_t dtype, uint32_t bits)
{
    float value;
    if (dtype == CUMOE_BF16) bits <<= 16;
    if (dtype == CUMOE_F16) bits = (bits & 0x8000) << 16 | (bits & 0x7fff) << 13;
    memcpy(&value, &bits, sizeof value);
    return dtype == CUMOE_F16 ? value * 0x1p112F : value; /* its exponent counts from 112 less */
}

/* The numbers of a type, by their codes. */
typedef struct codes {
    uint16_t half[257];
} codes_t;

static codes_t codes_of(cumoe_dtype_t dtype)
{
    codes_t codes;
    for (int i = -128; i <= 128; i++) codes.half[i + 128] = half_of(dtype, i);
    return codes;
}

static void put(cumoe_dtype_t dtype, const codes_t *codes, void *values, int64_t index, int code)
{
    if (dtype == CUMOE_F32) {
        ((float *)values)[index] = (float)(code - 128) / 128;
    } else {
        ((uint16_t *)values)[index] = codes->half[code];
    }
}

void input_values(cumoe_dtype_t dtype, int64_t count, uint64_t seed, void *values)
{
    const codes_t codes = codes_of(dtype);
    random_t random = {seed};
    uint64_t bytes = 0;
    for (int64_t i = 0; i < count; i++, bytes >>= 8) {
        if (i % 8 == 0) bytes = next(&random);
        put(dtype, &codes, values, i, (int)(bytes & 255));
    }
}

void input_tokens(const subject_t *s, bool ones, uint64_t seed, void *values)
{
    const int64_t H = s->config.hidden_size;
    const codes_t codes = codes_of(s->config.dtype);
    input_values(s->config.dtype, s->num_tokens * H, seed, values);
    for (int64_t t = 0; ones && t < s->num_tokens; t++) put(s->config.dtype, &codes, values, t * H, 256);
}

/* What the logit of an expert has beside chance. Chance has a deviation of 1. */
static double preference(const subject_t *s, int64_t expert)
{
    if (s->skew == ZIPF) return -log(1.0 + (double)expert);
    if (s->skew == ONE && expert < s->config.top_k) return 1000;
    return 0;
}

void input_gate(const subject_t *s, bool groups, float *w_gate)
{
    const int64_t E = groups ? s->config.num_groups : s->config.num_experts, H = s->config.hidden_size;
    const double scale = 3 / sqrt((double)H); /* tokens and weights are even in -1..1, of variance 1/3 each */
    random_t random = {groups ? 6 : 3};
    for (int64_t e = 0; e < E; e++) {
        float *row = w_gate + e * H;
        for (int64_t h = 0; h < H; h++) row[h] = (float)(scale * (2 * uniform(&random) - 1));
        row[0] = (float)preference(s, e);
    }
}

/* The first expert whose entry is larger. */
static int32_t find(const double *sums, int32_t E, double value)
{
    int32_t low = 0, high = E - 1;
    while (low < high) {
        const int32_t middle = (low + high) / 2;
        if (sums[middle] > value) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return low;
}

void input_routing(const subject_t *s, uint64_t seed, int32_t *expert, float *weight)
{
    const int32_t E = s->config.num_experts, K = s->config.top_k;
    random_t random = {seed};
    double *sums = malloc((size_t)E * sizeof *sums), sum = 0;
    int64_t *taken_by = malloc((size_t)E * sizeof *taken_by); /* the last token that chose an expert */
    if (!sums || !taken_by) abort();
    for (int32_t e = 0; e < E; e++) {
        sum += s->skew == ZIPF ? 1.0 / (1.0 + e) : s->skew == ONE && e >= K ? 0 : 1;
        sums[e] = sum;
        taken_by[e] = -1;
    }
    for (int64_t t = 0; t < s->num_tokens; t++) {
        for (int32_t k = 0; k < K; k++) {
            int32_t e = find(sums, E, sum * uniform(&random));
            for (int tries = 0; tries < 16 && taken_by[e] == t; tries++) e = find(sums, E, sum * uniform(&random));
            while (taken_by[e] == t) e = (e + 1) % E; /* the next free one ends a long search */
            taken_by[e] = t;
            expert[t * K + k] = e;
            weight[t * K + k] = 1 / (float)K;
        }
    }
    free(sums);
    free(taken_by);
}
