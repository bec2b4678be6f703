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
           activation == CUMOE_ACTIVATION_SWIGLU_CLAMPED || activation == CUMOE_ACTIVATION_GEGLU_TANH;
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

/* Every expert has a share in every token, of which the Switch loss and the z-loss are made. */
static inline bool cumoe__has_shares(cumoe_gate_kind_t gate)
{
    return gate == CUMOE_GATE_SOFTMAX_TOPK || gate == CUMOE_GATE_SIGMOID_TOPK;
}

/* Tokens choose as many experts as took them: routing.token_slot says where their slots are. */
static inline bool cumoe__has_token_slots(const cumoe_config_t *config)
{
    return config->gate == CUMOE_GATE_BALANCED;
}

/* Most rows of BALANCED where thresholds decide. */
static inline int64_t cumoe__max_rows_of_thresholds(const cumoe_config_t *config, int64_t num_tokens)
{
    const int64_t average = num_tokens * config->top_k, all = num_tokens * config->num_experts;
    const int64_t wanted = config->max_rows > 0 ? config->max_rows : average;
    return wanted < all ? wanted : all;
}

/* Most rows of a call: see cumoe_layer_max_rows(). Where experts decide they take one token at least. */
static inline int64_t cumoe__max_rows(const cumoe_config_t *config, int64_t num_tokens)
{
    const int64_t average = num_tokens * config->top_k;
    if (config->gate != CUMOE_GATE_BALANCED || num_tokens == 0) return average;
    const int64_t thresholds = cumoe__max_rows_of_thresholds(config, num_tokens);
    const int64_t batchwise = average > config->num_experts ? average : config->num_experts;
    return batchwise > thresholds ? batchwise : thresholds;
}

/* Most slots of a call: those of rows, and with BALANCED one for each token that is NaN. */
static inline int64_t cumoe__max_slots(const cumoe_config_t *config, int64_t num_tokens)
{
    return cumoe__max_rows(config, num_tokens) + (cumoe__has_token_slots(config) ? num_tokens : 0);
}

/* Experts of ranks: whole groups where there are groups, else single ones, as evenly as can be. */
static inline int32_t cumoe__experts_together(const cumoe_config_t *config)
{
    return config->num_groups > 0 ? config->num_experts / config->num_groups : 1;
}
static inline int32_t cumoe__first_expert(const cumoe_config_t *config, int32_t num_ranks, int32_t rank)
{
    const int32_t together = cumoe__experts_together(config);
    return (int32_t)((int64_t)(config->num_experts / together) * rank / num_ranks) * together;
}

/* A parcel is what goes to a chunk of the experts of a rank, and has the number rank * num_chunks + chunk. */
static inline int32_t cumoe__first_of_parcel(const cumoe_config_t *config, int32_t num_ranks, int32_t parcel)
{
    const int32_t n = config->exchange_chunks, rank = parcel / n;
    const int32_t first = cumoe__first_expert(config, num_ranks, rank);
    const int64_t own = cumoe__first_expert(config, num_ranks, rank + 1) - first;
    return first + (int32_t)(own * (parcel % n) / n);
}

/* Rows, and tokens, that a parcel has room for; 0 = as many as there are. */
static inline int64_t cumoe__parcel_capacity(const cumoe_config_t *config)
{
    return (config->exchange_capacity + config->exchange_chunks - 1) / config->exchange_chunks;
}

/* A call has a plan of what goes between ranks. */
static inline bool cumoe__is_planned(const cumoe_config_t *config)
{
    return config->ep && config->exchange_capacity == 0;
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
