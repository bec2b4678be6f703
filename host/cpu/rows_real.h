/* Rows of tokens, weights or activations as REAL: 16-bit types are widened as they are read, rounded as they are
 * written. Included with REAL and FN defined, where elementary code works on short pieces of rows. */

/* to[0..n) = elements at .. at + n - 1. */
static inline __attribute__((always_inline)) void FN(load)(const void *data, cumoe_dtype_t dtype, int64_t at,
                                                           int64_t n, REAL *restrict to)
{
    const uint16_t *half = (const uint16_t *)data + at;
    if (dtype == CUMOE_BF16)
        for (int64_t i = 0; i < n; i++) to[i] = bf16_to_f32(half[i]);
    else if (dtype == CUMOE_F16)
        for (int64_t i = 0; i < n; i++) to[i] = f16_to_f32(half[i]);
    else
        for (int64_t i = 0; i < n; i++) to[i] = ((const REAL *)data)[at + i];
}

static inline __attribute__((always_inline)) void FN(store)(const REAL *restrict from, int64_t n,
                                                            cumoe_dtype_t dtype, void *data, int64_t at)
{
    uint16_t *half = (uint16_t *)data + at;
    if (dtype == CUMOE_BF16)
        for (int64_t i = 0; i < n; i++) half[i] = f32_to_bf16((float)from[i]);
    else if (dtype == CUMOE_F16)
        for (int64_t i = 0; i < n; i++) half[i] = f32_to_f16((float)from[i]);
    else
        for (int64_t i = 0; i < n; i++) ((REAL *)data)[at + i] = from[i];
}

/* What storing in dtype would leave of them. */
static inline __attribute__((always_inline)) void FN(round)(REAL *values, int64_t n, cumoe_dtype_t dtype)
{
    if (dtype == CUMOE_BF16)
        for (int64_t i = 0; i < n; i++) values[i] = bf16_to_f32(f32_to_bf16((float)values[i]));
    else if (dtype == CUMOE_F16)
        for (int64_t i = 0; i < n; i++) values[i] = f16_to_f32(f32_to_f16((float)values[i]));
}
