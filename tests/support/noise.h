/* The one place where the tests ask the library for something that the reference then uses: the noise. */
#ifndef CUMOE_TESTS_NOISE_H
#define CUMOE_TESTS_NOISE_H

#include <stdint.h>

/* What the normals of a call have in common. */
typedef struct noise_name {
    uint64_t seed, offset;
    uint32_t stream;
    int64_t first_token;
} noise_name_t;

/* noise[t * E + e] = the normal of (name, token t, flat gate, e). With groups of group_size experts each (else E)
 * every group begins with a normal whose number is a multiple of 4. */
void noise_fill(noise_name_t name, int64_t tokens, int64_t experts, int64_t group_size, double *noise);

/* noise[t * G + g]: the same for the primary gate. */
void noise_fill_primary(noise_name_t name, int64_t tokens, int64_t groups, double *noise);

/* noise[e]: the same for one token and the experts of one group. */
void noise_fill_group(noise_name_t name, int64_t token, int64_t group, int64_t group_size, double *noise);

#endif
