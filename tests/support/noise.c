#include "tests/support/noise.h"

#include "host/philox.h"

static double normal(noise_name_t name, int64_t t, int32_t level, int64_t number)
{
    return (double)cumoe_noise_normal(name.seed, name.stream, name.offset, name.first_token + t, level,
                                      (int32_t)number);
}

void noise_fill_group(noise_name_t name, int64_t token, int64_t group, int64_t group_size, double *noise)
{
    const int64_t numbers = (group_size + 3) / 4 * 4; /* of a group */
    for (int64_t e = 0; e < group_size; e++) noise[e] = normal(name, token, CUMOE_NOISE_FLAT, group * numbers + e);
}

void noise_fill(noise_name_t name, int64_t tokens, int64_t experts, int64_t group_size, double *noise)
{
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t g = 0; g < experts / group_size; g++, noise += group_size)
            noise_fill_group(name, t, g, group_size, noise);
}

void noise_fill_primary(noise_name_t name, int64_t tokens, int64_t groups, double *noise)
{
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t g = 0; g < groups; g++) *noise++ = normal(name, t, CUMOE_NOISE_PRIMARY, g);
}
