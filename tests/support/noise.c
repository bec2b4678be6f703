#include "tests/support/noise.h"

#include "host/philox.h"

void noise_fill(uint64_t seed, uint32_t stream, uint64_t offset, int64_t first_token, int64_t tokens,
                int64_t experts, double *noise)
{
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t e = 0; e < experts; e++)
            *noise++ =
                (double)cumoe_noise_normal(seed, stream, offset, first_token + t, CUMOE_NOISE_FLAT, (int32_t)e);
}
