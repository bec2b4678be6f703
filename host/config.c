/* Every rule about a configuration that does not depend on the device, in one place. */
#include "host/kinds.h"
#include "host/objects.h"

#include <math.h>
#include <string.h>

enum { FIRST_CONFIG_SIZE = sizeof(cumoe_config_t) }; /* of version 0.1; fixed when the struct grows */

static const cumoe_config_t defaults = {
    .struct_size = sizeof(cumoe_config_t),
    .dtype = CUMOE_F32,
    .activation = CUMOE_ACTIVATION_RELU,
    .gate = CUMOE_GATE_NOISY_TOPK,
    .swiglu_limit = 7.0f,
    .swiglu_alpha = 1.702f,
    .swiglu_offset = 1.0f,
    .renormalize = 1,
    .noise_epsilon = 1e-2f,
    .loss_weight = {[CUMOE_LOSS_IMPORTANCE] = 0.1f, [CUMOE_LOSS_LOAD] = 0.1f, [CUMOE_LOSS_THRESHOLD] = 1.0f},
};

cumoe_status_t cumoe_config_init_sized(cumoe_config_t *config, size_t struct_size)
{
    CUMOE_REQUIRE(config, INVALID_ARGUMENT, "cumoe_config_init: config = NULL, but is required");
    CUMOE_REQUIRE(struct_size >= FIRST_CONFIG_SIZE, INVALID_ARGUMENT,
                  "cumoe_config_init: struct_size = %zu, but must be at least %zu (version 0.1)", struct_size,
                  (size_t)FIRST_CONFIG_SIZE);
    memset(config, 0, struct_size);
    memcpy(config, &defaults, struct_size < sizeof defaults ? struct_size : sizeof defaults);
    config->struct_size = struct_size;
    return CUMOE_SUCCESS;
}

cumoe_status_t cumoe__struct_read(const char *function, const char *name, const void *theirs, size_t first_size,
                                  void *ours, size_t our_size)
{
    CUMOE_REQUIRE(theirs, INVALID_ARGUMENT, "%s: %s = NULL, but is required", function, name);
    size_t size;
    memcpy(&size, theirs, sizeof size);
    CUMOE_REQUIRE(size >= first_size && size <= 65536, INVALID_ARGUMENT,
                  "%s: %s.struct_size = %zu, but must be the size of the struct in the header, at least %zu",
                  function, name, size, first_size);
    const unsigned char *bytes = theirs;
    for (size_t i = our_size; i < size; i++)
        CUMOE_REQUIRE(
            bytes[i] == 0, INVALID_ARGUMENT,
            "%s: %s has %zu bytes, of a newer header than this library's %zu, and uses one of its new fields "
            "(byte %zu is not 0)",
            function, name, size, our_size, i);
    memcpy(ours, theirs, size < our_size ? size : our_size);
    memcpy(ours, &our_size, sizeof our_size);
    return CUMOE_SUCCESS;
}

#define RANGE(field, low, high, text)                                                                              \
    CUMOE_REQUIRE(c->field >= (low) && c->field <= (high), INVALID_ARGUMENT,                                       \
                  "%s: config." #field " = %lld, but must be " text, function, (long long)c->field)

static cumoe_status_t check_sizes(const char *function, const cumoe_config_t *c)
{
    RANGE(hidden_size, 1, CUMOE_MAX_WIDTH, "1..2^24");
    RANGE(intermediate_size, 1, CUMOE_MAX_WIDTH, "1..2^24");
    RANGE(num_experts, 1, CUMOE_MAX_EXPERTS, "1..131072");
    CUMOE_REQUIRE((int64_t)c->num_experts * c->hidden_size < ((int64_t)1 << 56) / c->intermediate_size,
                  INVALID_ARGUMENT,
                  "%s: config.num_experts * hidden_size * intermediate_size = %d * %d * %d, but must be below 2^56",
                  function, c->num_experts, c->hidden_size, c->intermediate_size);
    return CUMOE_SUCCESS;
}

/* An enumeration: whatever stands there is compared and printed as the int that C makes of it. */
#define KIND(field, low, high, text)                                                                               \
    CUMOE_REQUIRE((int)c->field >= (int)(low) && (int)c->field <= (int)(high), INVALID_ARGUMENT,                   \
                  "%s: config." #field " = %d, but must be " text, function, (int)c->field)

static cumoe_status_t check_kinds(const char *function, const cumoe_config_t *c)
{
    KIND(dtype, CUMOE_F64, CUMOE_F16, "F64 (1), F32 (2), BF16 (3) or F16 (4)");
    KIND(compute, CUMOE_COMPUTE_EXACT, CUMOE_COMPUTE_TF32, "EXACT (0) or TF32 (1)");
    KIND(activation, CUMOE_ACTIVATION_RELU, CUMOE_NUM_ACTIVATIONS - 1, "a cumoe_activation_t, 0..9");
    KIND(gate, CUMOE_GATE_NOISY_TOPK, CUMOE_GATE_SIGMOID_TOPK, "a cumoe_gate_kind_t, 0..6");
    RANGE(expert_bias, 0, 1, "0 or 1");
    RANGE(recompute, 0, 1, "0 or 1");
    RANGE(renormalize, 0, 1, "0 or 1");
    RANGE(max_rows, 0, INT32_MAX, "0..2^31 - 1");
    CUMOE_REQUIRE(c->max_rows == 0 || c->gate == CUMOE_GATE_BALANCED, INVALID_ARGUMENT,
                  "%s: config.max_rows = %lld, but only with CUMOE_GATE_BALANCED rows vary in number: must be 0",
                  function, (long long)c->max_rows);
    RANGE(max_threads, 0, 4096, "0..4096");
    RANGE(max_sms, 0, 4096, "0..4096");
    RANGE(exchange_capacity, 0, INT32_MAX, "0..2^31 - 1");
    RANGE(exchange_chunks, 0, CUMOE_MAX_CHUNKS, "0..16");
    return CUMOE_SUCCESS;
}

static cumoe_status_t check_gate(const char *function, const cumoe_config_t *c)
{
    const int32_t most = c->num_experts < CUMOE_MAX_TOP_K ? c->num_experts : CUMOE_MAX_TOP_K;
    if (c->gate == CUMOE_GATE_SOFTMAX)
        CUMOE_REQUIRE(c->top_k == 0 || c->top_k == c->num_experts, INVALID_ARGUMENT,
                      "%s: config.top_k = %d, but the dense softmax gate uses all: must be 0 or %d (num_experts)",
                      function, c->top_k, c->num_experts);
    else
        CUMOE_REQUIRE(c->top_k >= 1 && c->top_k <= most, INVALID_ARGUMENT,
                      "%s: config.top_k = %d, but must be 1..%d (%s)", function, c->top_k, most,
                      most == c->num_experts ? "num_experts" : "CUMOE_MAX_TOP_K");
    if (c->gate == CUMOE_GATE_HIERARCHICAL) {
        CUMOE_REQUIRE(c->num_groups >= 1 && c->num_experts % c->num_groups == 0, INVALID_ARGUMENT,
                      "%s: config.num_groups = %d, but must divide num_experts = %d", function, c->num_groups,
                      c->num_experts);
        CUMOE_REQUIRE(
            c->top_k_groups >= 1 && c->top_k_groups <= c->num_groups && c->top_k % c->top_k_groups == 0 &&
                c->top_k / c->top_k_groups <= c->num_experts / c->num_groups,
            INVALID_ARGUMENT,
            "%s: config.top_k_groups = %d, but must be 1..%d (num_groups), divide top_k = %d, and leave at "
            "most %d experts per group",
            function, c->top_k_groups, c->num_groups, c->top_k, c->num_experts / c->num_groups);
    } else {
        CUMOE_REQUIRE(
            c->num_groups == 0 && c->top_k_groups == 0, INVALID_ARGUMENT,
            "%s: config.num_groups = %d, top_k_groups = %d, but only CUMOE_GATE_HIERARCHICAL has groups: must "
            "be 0",
            function, c->num_groups, c->top_k_groups);
    }
    return CUMOE_SUCCESS;
}

static cumoe_status_t check_numbers(const char *function, const cumoe_config_t *c)
{
    CUMOE_REQUIRE(isfinite(c->noise_epsilon) && c->noise_epsilon >= 0, INVALID_ARGUMENT,
                  "%s: config.noise_epsilon = %g, but must be finite and >= 0", function, (double)c->noise_epsilon);
    CUMOE_REQUIRE(isfinite(c->swiglu_limit) && c->swiglu_limit > 0, INVALID_ARGUMENT,
                  "%s: config.swiglu_limit = %g, but must be finite and > 0", function, (double)c->swiglu_limit);
    CUMOE_REQUIRE(isfinite(c->swiglu_alpha), INVALID_ARGUMENT, "%s: config.swiglu_alpha = %g, but must be finite",
                  function, (double)c->swiglu_alpha);
    CUMOE_REQUIRE(isfinite(c->swiglu_offset), INVALID_ARGUMENT, "%s: config.swiglu_offset = %g, but must be finite",
                  function, (double)c->swiglu_offset);
    for (int i = 0; i < CUMOE_NUM_LOSSES; i++)
        CUMOE_REQUIRE(isfinite(c->loss_weight[i]) && c->loss_weight[i] >= 0, INVALID_ARGUMENT,
                      "%s: config.loss_weight[%d] = %g, but must be finite and >= 0", function, i,
                      (double)c->loss_weight[i]);
    return CUMOE_SUCCESS;
}

cumoe_status_t cumoe__config_read(const char *function, const cumoe_config_t *theirs, cumoe_config_t *ours)
{
    cumoe_config_t read = defaults;
    CUMOE_TRY(cumoe__struct_read(function, "config", theirs, FIRST_CONFIG_SIZE, &read, sizeof read));
    if (read.dtype == CUMOE_DTYPE_DEFAULT) read.dtype = defaults.dtype;
    CUMOE_TRY(check_kinds(function, &read));
    if (cumoe__is_linear(read.activation)) read.intermediate_size = read.hidden_size;
    CUMOE_TRY(check_sizes(function, &read));
    CUMOE_TRY(check_gate(function, &read));
    CUMOE_TRY(check_numbers(function, &read));
    if (read.gate == CUMOE_GATE_SOFTMAX) read.top_k = read.num_experts;
    *ours = read;
    return CUMOE_SUCCESS;
}
