/* The one place where the tests ask the library for something that the reference then uses: the noise. */
#ifndef CUMOE_TESTS_NOISE_H
#define CUMOE_TESTS_NOISE_H

#include <stdint.h>

/* noise[t * E + e] = the normal of (seed, stream, offset, first_token + t, flat gate, e). */
void noise_fill(uint64_t seed, uint32_t stream, uint64_t offset, int64_t first_token, int64_t tokens,
                int64_t experts, double *noise);

#endif
