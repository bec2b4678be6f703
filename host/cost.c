/* What a configuration costs. The formulas stand in cumoe/cost.h. */
#include "host/kinds.h"
#include "host/objects.h"

#include <cumoe/cost.h>
#include <string.h>

static const char function[] = "cumoe_config_cost";

enum { FIRST_COST_SIZE = sizeof(cumoe_cost_t) }; /* of version 0.1; fixed when the struct grows */

/* A configuration as the formulas see it. */
typedef struct facts {
    const cumoe_config_t *config;
    int64_t E, H, I, Z;
    int64_t matrices, biases;            /* of an expert: how many matrices, values of biases */
    int64_t gate_matrices;               /* of a gate: 2 with noise */
    int64_t gate_values, selection_bias; /* parameters of all gates: with a gradient, without */
    int64_t tokens, rows;                /* N, R */
    int64_t token, gate;                 /* bytes of an element */
    int64_t local;                       /* experts of a rank */
} facts_t;

static facts_t facts_of(const cumoe_config_t *c, int64_t num_tokens, int32_t num_ranks)
{
    const int64_t E = c->num_experts, H = c->hidden_size, Z = cumoe__z_width(c);
    const int64_t together = cumoe__experts_together(c);
    const bool linear = cumoe__is_linear(c->activation), learned = c->gate != CUMOE_GATE_EXTERNAL;
    facts_t f = {.config = c,
                 .E = E,
                 .H = H,
                 .I = c->intermediate_size,
                 .Z = Z,
                 .matrices = 2 + cumoe__is_glu(c->activation) - linear,
                 .biases = c->expert_bias ? H + (linear ? 0 : Z) : 0,
                 .gate_matrices = learned + cumoe__is_noisy(c->gate),
                 .tokens = num_tokens,
                 .rows = num_tokens * c->top_k,
                 .token = (int64_t)cumoe__dtype_size(c->dtype),
                 .gate = (int64_t)cumoe__dtype_size(cumoe__gate_dtype(c)),
                 .local = ((E / together - 1) / num_ranks + 1) * together};
    f.gate_values = f.gate_matrices * H * (E + c->num_groups) + (c->gate == CUMOE_GATE_BALANCED ? E : 0);
    f.selection_bias = c->gate == CUMOE_GATE_SIGMOID_TOPK ? E : 0;
    return f;
}

static int64_t smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static int64_t matrix_values(const facts_t *f)
{
    return f->matrices * f->H * f->I;
}

/* Elements of the gates that are read for so many tokens. */
static int64_t gate_values_met(const facts_t *f, int64_t tokens)
{
    const int64_t G = f->config->num_groups;
    if (G == 0) return f->gate_matrices * f->H * f->E;
    return f->gate_matrices * f->H * (G + smaller(G, tokens * f->config->top_k_groups) * (f->E / G));
}

static void count_parameters(const facts_t *f, cumoe_cost_t *cost)
{
    cost->expert_parameters = f->E * (matrix_values(f) + f->biases);
    cost->gate_parameters = f->gate_values + f->selection_bias;
    cost->parameters = cost->expert_parameters + cost->gate_parameters;
    cost->ops_per_timestep = f->config->top_k * matrix_values(f) + gate_values_met(f, 1);
    cost->compute_to_traffic = (double)matrix_values(f) / (2.0 * (double)f->H);
}

static void count_work(const facts_t *f, cumoe_cost_t *cost)
{
    const bool again = f->config->recompute && !cumoe__is_linear(f->config->activation);
    cost->forward_flop = 2.0 * (double)f->tokens * (double)cost->ops_per_timestep;
    cost->backward_flop =
        2 * cost->forward_flop + (again ? 2.0 * (double)f->rows * (double)f->H * (double)f->Z : 0);
}

static void count_bytes(const facts_t *f, cumoe_cost_t *cost)
{
    const bool recompute = f->config->recompute, linear = cumoe__is_linear(f->config->activation);
    const int64_t experts = smaller(f->local, f->rows);
    const double weights = (double)(f->token * experts * (matrix_values(f) + f->biases)) +
                           (double)(f->tokens ? f->gate * gate_values_met(f, f->tokens) : 0);
    const double x = (double)(f->token * f->tokens * f->H), row_output = (double)(f->token * f->rows * f->H);
    const double hidden = (double)(f->token * f->rows * f->I), z = (double)(f->token * f->rows * f->Z);
    const double dx_gate = f->gate_matrices ? (double)(f->gate * f->tokens * f->H) : 0;
    cost->forward_bytes = weights + 2 * x + 2 * hidden + 2 * row_output + (recompute || linear ? 0 : z);
    cost->backward_bytes = weights + (double)cost->gradients_size + 3 * x + (recompute ? 2 : 1) * z + 2 * z +
                           (linear ? 0 : 2 * row_output) + 2 * dx_gate;
}

/* Routing as the layer keeps it: see cumoe_routing_t, cumoe_rows_t. */
static size_t routing_size(const facts_t *f)
{
    const cumoe_config_t *c = f->config;
    const int64_t rows = cumoe__max_rows(c, f->tokens), slots = cumoe__max_slots(c, f->tokens);
    const int64_t index = sizeof(int32_t), sum = sizeof(int64_t);
    int64_t size = (int64_t)sizeof(cumoe_call_t) + sum;       /* call, tokens */
    size += slots * (2 * index + f->gate) + rows * 2 * index; /* expert, slot_row, weight; row_token, row_slot */
    size += f->E * (2 * sum + index) + index;                 /* importance, load, offset */
    if (cumoe__has_token_slots(c))
        size += (f->tokens + 1 + slots + f->E) * index; /* token_slot, slot_token, excess */
    if (c->gate == CUMOE_GATE_HIERARCHICAL)
        size += f->tokens * c->top_k_groups * (index + f->gate) + c->num_groups * (sum + index);
    return (size_t)size;
}

static void count_memory(const facts_t *f, cumoe_cost_t *cost)
{
    const int64_t matrices = f->local * matrix_values(f), biases = f->local * f->biases;
    const int64_t means =
        f->local * f->matrices * (f->H + f->I + 1); /* per row and per column, and their average */
    const int64_t masters = f->token == 2 ? matrices + biases : 0;
    const int64_t gradients = f->token * (matrices + biases) + f->gate * f->gate_values;
    cost->weights_size = (size_t)(gradients + f->gate * f->selection_bias);
    cost->gradients_size = (size_t)gradients;
    cost->adam_state_size = (size_t)(f->gate * (2 * (matrices + biases + f->gate_values) + masters));
    cost->factored_state_size = (size_t)(f->gate * (means + 2 * (biases + f->gate_values) + masters));
    cost->saved_size_recomputing = routing_size(f);
    cost->saved_size =
        cost->saved_size_recomputing + (size_t)(f->token * cumoe__max_rows(f->config, f->tokens) * f->Z);
}

static cumoe_status_t check(const cumoe_config_t *config, int64_t num_tokens, int64_t num_timesteps,
                            int32_t num_ranks)
{
    const int64_t most = INT32_MAX / config->top_k;
    CUMOE_REQUIRE(num_tokens >= 0, INVALID_ARGUMENT, "%s: num_tokens = %lld, but must be 0 or more", function,
                  (long long)num_tokens);
    CUMOE_REQUIRE(num_timesteps >= 1, INVALID_ARGUMENT, "%s: num_timesteps = %lld, but must be 1 or more", function,
                  (long long)num_timesteps);
    CUMOE_REQUIRE(num_tokens == 0 || num_timesteps <= most / num_tokens, INVALID_ARGUMENT,
                  "%s: num_tokens * num_timesteps * top_k = %lld * %lld * %d, but must be below 2^31", function,
                  (long long)num_tokens, (long long)num_timesteps, config->top_k);
    CUMOE_REQUIRE(num_ranks >= 1, INVALID_ARGUMENT, "%s: num_ranks = %d, but must be 1 or more", function,
                  num_ranks);
    return CUMOE_SUCCESS;
}

cumoe_status_t cumoe_config_cost(const cumoe_config_t *config, int64_t num_tokens, int64_t num_timesteps,
                                 int32_t num_ranks, cumoe_cost_t *cost)
{
    cumoe_config_t ours;
    CUMOE_TRY(cumoe__config_read(function, config, &ours));
    CUMOE_TRY(check(&ours, num_tokens, num_timesteps, num_ranks));
    CUMOE_REQUIRE(cost, INVALID_ARGUMENT, "%s: cost = NULL, but the result needs a place", function);
    const size_t size = cost->struct_size;
    CUMOE_REQUIRE(size >= FIRST_COST_SIZE && size <= 65536, INVALID_ARGUMENT,
                  "%s: cost.struct_size = %zu, but must be the size of the struct in the header, at least %zu",
                  function, size, (size_t)FIRST_COST_SIZE);

    const facts_t f = facts_of(&ours, num_tokens * num_timesteps, num_ranks);
    cumoe_cost_t counted = {.struct_size = size};
    count_parameters(&f, &counted);
    count_memory(&f, &counted);
    count_work(&f, &counted);
    count_bytes(&f, &counted);
    counted.rows_per_expert = (double)ours.top_k * (double)num_tokens / (double)ours.num_experts;
    counted.rows_per_expert_ranks = counted.rows_per_expert * num_ranks;
    counted.rows_per_expert_timesteps = counted.rows_per_expert_ranks * (double)num_timesteps;
    memset(cost, 0, size);
    memcpy(cost, &counted, size < sizeof counted ? size : sizeof counted);
    return CUMOE_SUCCESS;
}
