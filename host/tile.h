/* Which tiles the grouped products of CUDA are made of. Sums run over k in one order whatever the tile, so that the
 * choice may follow T and no bit does. */
#ifndef CUMOE_TILE_H
#define CUMOE_TILE_H

#include "host/kinds.h"

/* Products of 16-bit or TF32 values by tensor cores; the others are exact, by ordinary multiply-adds. */
static inline bool cumoe__uses_tensor_cores(const cumoe_config_t *config)
{
    const bool tf32 = config->dtype == CUMOE_F32 && config->compute == CUMOE_COMPUTE_TF32;
    return tf32 || cumoe__dtype_size(config->dtype) == 2;
}

/* Rows of a tile: 64 where experts are memory-bound or rows few, 128 where the tensor cores must be fed. */
static inline int32_t cumoe__row_tile(const cumoe_config_t *config, int64_t num_tokens)
{
    const int64_t rows_per_expert = cumoe__max_rows(config, num_tokens) / config->num_experts;
    return cumoe__uses_tensor_cores(config) && rows_per_expert >= 96 ? 128 : 64;
}

#endif
