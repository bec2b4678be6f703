/* Small facts about types and kinds that host and backends share. */
#ifndef CUMOE_KINDS_H
#define CUMOE_KINDS_H

#include <cumoe/config.h>

#include <stdbool.h>

static inline size_t cumoe__dtype_size(cumoe_dtype_t dtype)
{
    return dtype == CUMOE_F64 || dtype == CUMOE_I64 ? 8 : dtype == CUMOE_BF16 || dtype == CUMOE_F16 ? 2 : 4;
}

/* Logits, weights of experts, losses: F32 whatever the tokens are, F64 with F64 tokens. */
static inline cumoe_dtype_t cumoe__gate_dtype(const cumoe_config_t *config)
{
    return config->dtype == CUMOE_F64 ? CUMOE_F64 : CUMOE_F32;
}

static inline bool cumoe__is_glu(cumoe_activation_t activation)
{
    return activation == CUMOE_ACTIVATION_SWIGLU || activation == CUMOE_ACTIVATION_GEGLU ||
           activation == CUMOE_ACTIVATION_SWIGLU_CLAMPED;
}

/* The pre-activations are the hidden activations. */
static inline bool cumoe__is_linear(cumoe_activation_t activation)
{
    return activation == CUMOE_ACTIVATION_IDENTITY;
}

static inline bool cumoe__is_noisy(cumoe_gate_kind_t gate)
{
    return gate == CUMOE_GATE_NOISY_TOPK || gate == CUMOE_GATE_HIERARCHICAL;
}

/* Columns of the pre-activations z: up, then glu. */
static inline int64_t cumoe__z_width(const cumoe_config_t *config)
{
    return (int64_t)config->intermediate_size * (cumoe__is_glu(config->activation) ? 2 : 1);
}

/* Bytes from the first to the last element of [rows, width] with a stride. */
static inline size_t cumoe__rows_size(const cumoe_config_t *config, int64_t rows, int64_t stride, int64_t width)
{
    return rows == 0 ? 0 : (size_t)((rows - 1) * stride + width) * cumoe__dtype_size(config->dtype);
}

#endif
