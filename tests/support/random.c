#include "tests/support/random.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

uint64_t random_seed(const char *test, uint64_t fallback)
{
    const char *text = getenv("CUMOE_TEST_SEED");
    const uint64_t seed = text ? strtoull(text, NULL, 0) : fallback;
    fprintf(stderr, "%s: CUMOE_TEST_SEED=%" PRIu64 "\n", test, seed);
    return seed;
}

random_state_t random_start(uint64_t seed)
{
    return (random_state_t){seed};
}

uint64_t random_bits(random_state_t *state)
{
    uint64_t z = state->value += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

int64_t random_below(random_state_t *state, int64_t n)
{
    return (int64_t)(random_bits(state) % (uint64_t)n);
}

double random_uniform(random_state_t *state)
{
    return ((double)(random_bits(state) >> 11) + 0.5) * 0x1p-53;
}

double random_normal(random_state_t *state)
{
    const double radius = sqrt(-2 * log(random_uniform(state)));
    const double angle = 2 * acos(-1) * random_uniform(state);
    return (double)(float)(radius * cos(angle));
}

void random_permutation(random_state_t *state, int64_t n, int64_t *permutation)
{
    for (int64_t i = 0; i < n; i++) {
        const int64_t j = random_below(state, i + 1);
        if (i != j) permutation[i] = permutation[j];
        permutation[j] = i;
    }
}
