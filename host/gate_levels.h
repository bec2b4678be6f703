/* HIERARCHICAL as two flat gates, which is how every backend computes it: a primary gate over groups, and one over
 * the B = E / G experts of a group. */
#ifndef CUMOE_GATE_LEVELS_H
#define CUMOE_GATE_LEVELS_H

#include "host/kinds.h"

#include <cumoe/stages.h>

/* The config of a level. */
static inline cumoe_config_t cumoe__level_config(const cumoe_config_t *config, bool primary)
{
    cumoe_config_t level = *config;
    level.gate = CUMOE_GATE_NOISY_TOPK;
    level.num_experts = primary ? config->num_groups : config->num_experts / config->num_groups;
    level.top_k = primary ? config->top_k_groups : config->top_k / config->top_k_groups;
    return level;
}

/* The primary pair, or its gradients, in the place of a flat gate's. */
static inline cumoe_weights_t cumoe__primary_weights(const cumoe_weights_t *weights)
{
    cumoe_weights_t primary = *weights;
    primary.w_gate = weights->w_gate_primary;
    primary.w_noise = weights->w_noise_primary;
    return primary;
}

/* What the primary gate decides, in the place of a flat gate's. */
static inline cumoe_routing_t cumoe__primary_routing(const cumoe_routing_t *routing)
{
    cumoe_routing_t primary = *routing;
    primary.expert = routing->primary_group;
    primary.weight = routing->primary_weight;
    primary.load = routing->primary_load;
    return primary;
}

#endif
