/* The cost of a configuration: against arrays listed one by one, figures worked out by hand, the paper's claims,
 * and what the layer and the optimizer say of themselves. */
#include "tests/suite.h"
#include "tests/unit/refusal.h"

#include <cumoe/cumoe.h>
#include <math.h>
#include <stdio.h>

static cumoe_config_t config_of(int hidden, int intermediate, int experts, int top_k)
{
    cumoe_config_t config;
    cr_assert_eq(cumoe_config_init(&config), CUMOE_SUCCESS);
    config.hidden_size = hidden;
    config.intermediate_size = intermediate;
    config.num_experts = experts;
    config.top_k = top_k;
    return config;
}

static cumoe_cost_t cost_of(const cumoe_config_t *config, int64_t tokens, int64_t timesteps, int32_t ranks)
{
    cumoe_cost_t cost = {.struct_size = sizeof cost};
    const cumoe_status_t status = cumoe_config_cost(config, tokens, timesteps, ranks, &cost);
    cr_assert(status == CUMOE_SUCCESS, "%s", cumoe_last_error());
    return cost;
}

/* ---- every kind, against a list of arrays ---- */

static bool has_glu(const cumoe_config_t *c)
{
    return c->activation == CUMOE_ACTIVATION_SWIGLU || c->activation == CUMOE_ACTIVATION_GEGLU ||
           c->activation == CUMOE_ACTIVATION_SWIGLU_CLAMPED || c->activation == CUMOE_ACTIVATION_GEGLU_TANH;
}

static int token_size(const cumoe_config_t *c)
{
    return c->dtype == CUMOE_F64 ? 8 : c->dtype == CUMOE_F32 ? 4 : 2;
}

static int wide_size(const cumoe_config_t *c)
{
    return c->dtype == CUMOE_F64 ? 8 : 4;
}

/* Sums over arrays [count, rows, cols]. */
typedef struct tally {
    long double values, bytes, adam, factored, macs;
} tally_t;

/* count such arrays of element bytes, of which a token meets met; wide bytes for a value of the optimizer's. */
static void add(tally_t *t, int64_t count, int64_t rows, int64_t cols, int64_t met, int element, int wide,
                bool factored)
{
    const long double values = (long double)count * rows * cols, masters = element == 2 ? values * wide : 0;
    t->values += values;
    t->bytes += values * element;
    t->macs += (long double)met * rows * cols;
    t->adam += 2 * values * wide + masters;
    t->factored += (factored ? (long double)count * (rows + cols + 1) : 2 * values) * wide + masters;
}

/* The arrays of cumoe/weights.h, one field after the other. */
static tally_t tally_experts(const cumoe_config_t *c)
{
    const int64_t E = c->num_experts, H = c->hidden_size, K = c->gate == CUMOE_GATE_SOFTMAX ? E : c->top_k;
    const int token = token_size(c), wide = wide_size(c);
    const bool identity = c->activation == CUMOE_ACTIVATION_IDENTITY, glu = has_glu(c), bias = c->expert_bias;
    const int64_t I = identity ? H : c->intermediate_size;
    tally_t t = {0};
    if (!identity) add(&t, E, I, H, K, token, wide, true);          /* w_up */
    if (glu) add(&t, E, I, H, K, token, wide, true);                /* w_glu */
    add(&t, E, H, I, K, token, wide, true);                         /* w_down */
    if (bias && !identity) add(&t, E, 1, I, 0, token, wide, false); /* b_up */
    if (bias && glu) add(&t, E, 1, I, 0, token, wide, false);       /* b_glu */
    if (bias) add(&t, E, 1, H, 0, token, wide, false);              /* b_down */
    return t;
}

static tally_t tally_gates(const cumoe_config_t *c)
{
    const int64_t E = c->num_experts, G = c->num_groups, H = c->hidden_size;
    const int wide = wide_size(c);
    tally_t t = {0};
    switch (c->gate) {
    case CUMOE_GATE_EXTERNAL:
        break;
    case CUMOE_GATE_NOISY_TOPK:
        for (int i = 0; i < 2; i++) add(&t, 1, E, H, 1, wide, wide, false);
        break;
    case CUMOE_GATE_HIERARCHICAL:
        for (int i = 0; i < 2; i++) add(&t, 1, G, H, 1, wide, wide, false);
        for (int i = 0; i < 2; i++) add(&t, G, E / G, H, c->top_k_groups, wide, wide, false);
        break;
    case CUMOE_GATE_SOFTMAX:
    case CUMOE_GATE_SOFTMAX_TOPK:
    case CUMOE_GATE_BALANCED:
    case CUMOE_GATE_SIGMOID_TOPK:
        add(&t, 1, E, H, 1, wide, wide, false);
        break;
    }
    if (c->gate == CUMOE_GATE_BALANCED) add(&t, 1, 1, E, 0, wide, wide, false);
    return t;
}

static void expect_equal(report_t *report, const char *field, double actual, long double expected)
{
    if ((long double)actual != expected) report_fail(report, "%s = %.0f, expected %.0Lf", field, actual, expected);
}

/* Parameters, memory of weights and optimizer, ops and work. */
static void check_counts(report_t *report, const cumoe_config_t *c, int64_t tokens)
{
    const tally_t experts = tally_experts(c), gates = tally_gates(c);
    const long double selection = c->gate == CUMOE_GATE_SIGMOID_TOPK ? c->num_experts : 0;
    const int wide = wide_size(c);
    const cumoe_cost_t cost = cost_of(c, tokens, 1, 1);
    expect_equal(report, "expert_parameters", (double)cost.expert_parameters, experts.values);
    expect_equal(report, "gate_parameters", (double)cost.gate_parameters, gates.values + selection);
    expect_equal(report, "parameters", (double)cost.parameters, experts.values + gates.values + selection);
    expect_equal(report, "weights_size", (double)cost.weights_size, experts.bytes + gates.bytes + selection * wide);
    expect_equal(report, "gradients_size", (double)cost.gradients_size, experts.bytes + gates.bytes);
    expect_equal(report, "adam_state_size", (double)cost.adam_state_size, experts.adam + gates.adam);
    expect_equal(report, "factored_state_size", (double)cost.factored_state_size,
                 experts.factored + gates.factored);
    expect_equal(report, "ops_per_timestep", (double)cost.ops_per_timestep, experts.macs + gates.macs);

    const long double forward = 2.0L * tokens * (experts.macs + gates.macs);
    const long double K = c->gate == CUMOE_GATE_SOFTMAX ? c->num_experts : c->top_k;
    const long double down = K * c->hidden_size * c->intermediate_size; /* what recomputing leaves out */
    const bool again = c->recompute && c->activation != CUMOE_ACTIVATION_IDENTITY;
    expect_equal(report, "forward_flop", cost.forward_flop, forward);
    expect_equal(report, "backward_flop", cost.backward_flop,
                 2 * forward + (again ? 2.0L * tokens * (experts.macs - down) : 0));
}

/* Bytes moved, and what is saved, array by array. Enough tokens that every expert can have a row. */
static void check_bytes(report_t *report, const cumoe_config_t *c, int64_t tokens)
{
    const tally_t experts = tally_experts(c), gates = tally_gates(c);
    const int64_t E = c->num_experts, H = c->hidden_size, K = c->gate == CUMOE_GATE_SOFTMAX ? E : c->top_k;
    const bool identity = c->activation == CUMOE_ACTIVATION_IDENTITY, learned = c->gate != CUMOE_GATE_EXTERNAL;
    const int64_t I = identity ? H : c->intermediate_size, Z = has_glu(c) ? 2 * I : I, rows = tokens * K;
    const int token = token_size(c), wide = wide_size(c);
    const cumoe_cost_t cost = cost_of(c, tokens, 1, 1);

    const long double thresholds = c->gate == CUMOE_GATE_BALANCED ? (long double)E * wide : 0;
    const long double weights = experts.bytes + gates.bytes - thresholds; /* those are for inference */
    const int64_t kept = rows * Z * token;
    const int64_t forward_values = tokens * H + tokens * H                      /* x; y */
                                   + rows * (I + I) + rows * (H + H)            /* hidden; output */
                                   + (c->recompute || identity ? 0 : rows * Z); /* z */
    expect_equal(report, "forward_bytes", cost.forward_bytes, weights + (long double)(forward_values * token));
    const int64_t backward_values = 3 * tokens * H                                  /* x, dy; dx */
                                    + rows * Z * (c->recompute ? 2 : 1)             /* z */
                                    + 2 * rows * Z + (identity ? 0 : 2 * rows * H); /* dz; drows */
    expect_equal(report, "backward_bytes", cost.backward_bytes,
                 weights + (long double)cost.gradients_size + (long double)(backward_values * token) +
                     (learned ? (long double)(2 * tokens * H * wide) : 0));

    const bool balanced = c->gate == CUMOE_GATE_BALANCED, groups = c->gate == CUMOE_GATE_HIERARCHICAL;
    const int64_t slots = rows + (balanced ? tokens : 0); /* a token that is NaN has one of its own */
    const int64_t routing = 32 + 8 + slots * (4 + wide + 4) + E * (8 + 8) + (E + 1) * 4 + rows * (4 + 4) +
                            (balanced ? (tokens + 1) * 4 + slots * 4 + E * 4 : 0) +
                            (groups ? tokens * c->top_k_groups * (4 + wide) + c->num_groups * (8 + 4) : 0);
    expect_equal(report, "saved_size_recomputing", (double)cost.saved_size_recomputing, (long double)routing);
    expect_equal(report, "saved_size", (double)cost.saved_size, (long double)(routing + kept));
}

typedef void config_body_t(report_t *report, const cumoe_config_t *config, int64_t tokens);

/* Every gate, activation and type, with and without biases and recomputation, on two odd shapes. */
static void for_every_kind(config_body_t *body)
{
    static const int shapes[][6] = {{12, 20, 24, 6, 4, 3}, {7, 5, 9, 2, 3, 1}}; /* H, I, E, K, G, K1 */
    report_t report = {0};
    char context[120];
    report.context = context;
    for (int i = 0; i < 2 * 7 * 9 * 4 * 4; i++) {
        const int *s = shapes[i % 2];
        cumoe_config_t c = config_of(s[0], s[1], s[2], s[3]);
        c.gate = (cumoe_gate_kind_t)(i / 2 % 7);
        c.activation = (cumoe_activation_t)(i / 14 % 9);
        c.dtype = (cumoe_dtype_t)(CUMOE_F64 + i / 126 % 4);
        c.expert_bias = i / 504 % 2;
        c.recompute = i / 1008 % 2;
        if (c.gate == CUMOE_GATE_SOFTMAX) c.top_k = 0;
        if (c.gate == CUMOE_GATE_HIERARCHICAL) {
            c.num_groups = s[4];
            c.top_k_groups = s[5];
        }
        snprintf(context, sizeof context, "H = %d, gate %d, activation %d, dtype %d, bias %d, recompute %d", s[0],
                 (int)c.gate, (int)c.activation, (int)c.dtype, c.expert_bias, c.recompute);
        body(&report, &c, 1000);
    }
    EXPECT_EMPTY(report);
}

Test(cost, parameters_and_work_of_every_kind)
{
    for_every_kind(check_counts);
}

Test(cost, bytes_of_every_kind)
{
    for_every_kind(check_bytes);
}

/* ---- by hand ---- */

Test(cost, mixtral_by_hand)
{
    cumoe_config_t c = config_of(4096, 14336, 8, 2);
    c.gate = CUMOE_GATE_SOFTMAX_TOPK;
    c.activation = CUMOE_ACTIVATION_SWIGLU;
    c.dtype = CUMOE_BF16;
    const cumoe_cost_t cost = cost_of(&c, 8192, 1, 1);
    cr_expect_eq(cost.expert_parameters, 1409286144);
    cr_expect_eq(cost.gate_parameters, 32768);
    cr_expect_eq(cost.ops_per_timestep, 352354304);
    cr_expect_float_eq(cost.forward_flop, 5.77297291673600e12, 1);
    cr_expect_eq(cost.compute_to_traffic, 21504);
    cr_expect_eq(cost.weights_size, 2818703360U);
    cr_expect_eq(cost.adam_state_size, 16911695872U); /* per expert value 4 + 4 + 4 bytes */
}

/* With few tokens most experts, and most gates of the second level, are not read. */
Test(cost, a_single_token)
{
    cumoe_config_t c = config_of(10, 20, 1000, 6);
    cumoe_cost_t cost = cost_of(&c, 1, 1, 1);
    cr_expect_eq(cost.forward_bytes, 4 * (6 * 400 + 2 * 10 * 1000 + 2 * 10 + 6 * (20 * 3 + 10 * 2)));
    c.gate = CUMOE_GATE_HIERARCHICAL;
    c.num_groups = 50;
    c.top_k_groups = 2;
    cost = cost_of(&c, 1, 1, 1);
    cr_expect_eq(cost.forward_bytes, 4 * (6 * 400 + 2 * 10 * (50 + 2 * 20) + 2 * 10 + 6 * (20 * 3 + 10 * 2)));
    cost = cost_of(&c, 0, 1, 1);
    cr_expect(cost.forward_flop == 0 && cost.backward_flop == 0 && cost.forward_bytes == 0);
    cr_expect_eq(cost.backward_bytes, (double)cost.gradients_size); /* zeros are written */
}

/* ---- the paper ---- */

/* Section 3.2: with one hidden layer the ratio of computation to traffic is its width. */
Test(cost, compute_to_traffic)
{
    cumoe_config_t c = config_of(512, 1024, 16, 4);
    cr_expect_eq(cost_of(&c, 1, 1, 1).compute_to_traffic, 1024);
    c.activation = CUMOE_ACTIVATION_GEGLU;
    cr_expect_eq(cost_of(&c, 1, 1, 1).compute_to_traffic, 1536);
    c.activation = CUMOE_ACTIVATION_IDENTITY;
    cr_expect_eq(cost_of(&c, 1, 1, 1).compute_to_traffic, 256);
}

/* Section 3.1: each of n experts sees k b / n examples; d replicas and the unrolled steps are factors. When experts
 * grow with the devices, neither that number nor the memory of a device changes. */
Test(cost, the_shrinking_batch)
{
    cumoe_config_t c = config_of(512, 1024, 4096, 4);
    c.gate = CUMOE_GATE_HIERARCHICAL;
    c.num_groups = 16;
    c.top_k_groups = 2;
    cumoe_cost_t cost = cost_of(&c, 300, 20, 16);
    cr_expect_float_eq(cost.rows_per_expert, 300 * 4 / 4096.0, 1e-12);
    cr_expect_float_eq(cost.rows_per_expert_ranks, 300 * 16 * 4 / 4096.0, 1e-12);
    cr_expect_float_eq(cost.rows_per_expert_timesteps, 300 * 16 * 20 * 4 / 4096.0, 1e-11);
    cr_expect_eq(cost.forward_flop, cost_of(&c, 6000, 1, 1).forward_flop);

    cumoe_config_t external = config_of(512, 1024, 256, 4);
    external.gate = CUMOE_GATE_EXTERNAL;
    const cumoe_cost_t small = cost_of(&external, 1000, 1, 16);
    external.num_experts = 1024;
    const cumoe_cost_t large = cost_of(&external, 1000, 1, 64);
    cr_expect_eq(small.rows_per_expert_ranks, large.rows_per_expert_ranks);
    cr_expect_eq(small.weights_size, large.weights_size);
    cr_expect_eq(small.adam_state_size, large.adam_state_size);
    cr_expect_eq(small.forward_bytes, large.forward_bytes);

    external.num_experts = 10;
    cr_expect_eq(cost_of(&external, 1, 1, 4).weights_size, 3 * 4 * 2 * 512 * 1024); /* 3 of 10 experts */
    cr_expect_eq(cost_of(&external, 1, 1, 64).weights_size, 4 * 2 * 512 * 1024);
}

/* Appendix D: Adam triples the memory of parameters, the factored form leaves it nearly as it is. */
Test(cost, factored_state)
{
    cumoe_config_t c = config_of(512, 1024, 256, 4);
    c.gate = CUMOE_GATE_EXTERNAL;
    const cumoe_cost_t cost = cost_of(&c, 1, 1, 1);
    cr_expect_eq(cost.adam_state_size, 2 * cost.weights_size);
    cr_expect_lt((double)cost.factored_state_size, 0.003 * (double)cost.weights_size);
}

/* ---- what layer and optimizer say ---- */

/* Each array of a buffer begins at a multiple of 64. */
static void check_size(report_t *report, const char *what, size_t counted, size_t size)
{
    enum { ALIGNMENT = 63 * 24 }; /* of no more than 24 arrays */
    if (size < counted || size - counted > ALIGNMENT)
        report_fail(report, "%s: counted %zu bytes, but the library says %zu", what, counted, size);
}

static void check_sizes_of_layer(report_t *report, const cumoe_config_t *config, int64_t tokens)
{
    if (config->gate > CUMOE_GATE_EXTERNAL) return; /* no backend has them */
    const cumoe_cost_t cost = cost_of(config, tokens, 1, 1);
    const cumoe_weights_t weights = {.struct_size = sizeof weights};
    size_t workspace, saved = 0, adam = 0, factored = 0;
    cumoe_handle_t *handle = suite_handle();
    cumoe_layer_t *layer = NULL;
    const cumoe_status_t status = cumoe_layer_create(&layer, handle, config);
    cr_assert(status == CUMOE_SUCCESS, "%s", cumoe_last_error());
    report_check(report, cumoe_layer_buffer_sizes(layer, tokens, &workspace, &saved) == CUMOE_SUCCESS);
    report_check(report, cumoe_optimizer_state_size(layer, CUMOE_OPTIMIZER_ADAM, &weights, &adam) == CUMOE_SUCCESS);
    report_check(report, cumoe_optimizer_state_size(layer, CUMOE_OPTIMIZER_FACTORED_ADAM, &weights, &factored) ==
                             CUMOE_SUCCESS);
    check_size(report, "saved", config->recompute ? cost.saved_size_recomputing : cost.saved_size, saved);
    check_size(report, "Adam", cost.adam_state_size, adam);
    check_size(report, "factored Adam", cost.factored_state_size, factored);
    cumoe_layer_destroy(layer);
    cumoe_handle_destroy(handle);
}

Test(cost, sizes_of_layer_and_optimizer)
{
    for_every_kind(check_sizes_of_layer);
}

/* ---- the largest sizes ---- */

static void expect_near(report_t *report, const char *field, double actual, long double expected)
{
    if (!(fabsl((long double)actual - expected) <= 1e-14L * expected))
        report_fail(report, "%s = %.17g, expected %.17Lg", field, actual, expected);
}

Test(cost, nothing_overflows)
{
    report_t report = {0};
    static const int shapes[][3] = {{1 << 24, (1 << 15) - 1, CUMOE_MAX_EXPERTS}, /* E H I just below 2^56 */
                                    {(1 << 15) - 1, 1 << 24, CUMOE_MAX_EXPERTS},
                                    {1 << 24, 1 << 24, 255},
                                    {1 << 24, 1, CUMOE_MAX_EXPERTS}};
    for (int i = 0; i < 4 * 4; i++) {
        cumoe_config_t c = config_of(shapes[i / 4][0], shapes[i / 4][1], shapes[i / 4][2], 64);
        c.activation = CUMOE_ACTIVATION_SWIGLU;
        c.expert_bias = 1;
        c.dtype = (cumoe_dtype_t)(CUMOE_F64 + i % 4);
        const int64_t tokens = INT32_MAX / 64;
        const tally_t experts = tally_experts(&c), gates = tally_gates(&c);
        const cumoe_cost_t cost = cost_of(&c, 1, tokens, 1);
        expect_near(&report, "parameters", (double)cost.parameters, experts.values + gates.values);
        expect_near(&report, "weights_size", (double)cost.weights_size, experts.bytes + gates.bytes);
        expect_near(&report, "adam_state_size", (double)cost.adam_state_size, experts.adam + gates.adam);
        expect_near(&report, "forward_flop", cost.forward_flop, 2.0L * tokens * (experts.macs + gates.macs));
        const long double T = tokens, R = 64 * T, H = c.hidden_size, I = c.intermediate_size;
        const int token = token_size(&c), wide = wide_size(&c);
        expect_near(&report, "backward_bytes", cost.backward_bytes,
                    2 * (experts.bytes + gates.bytes) + token * (3 * T * H + R * (6 * I + 2 * H)) +
                        2 * wide * T * H);
        report_check(&report, (long double)cost.saved_size > token * R * 2 * I);
    }
    EXPECT_EMPTY(report);

    cumoe_config_t wide = config_of(8, 8, CUMOE_MAX_EXPERTS, 1);
    const double rows = cost_of(&wide, INT32_MAX, 1, INT32_MAX).rows_per_expert_timesteps;
    cr_expect_float_eq(rows, 2147483647.0 * 2147483647.0 / 131072, 1);
}

/* ---- bad input ---- */

Test(cost, refusals)
{
    report_t report = {0};
    const char *f = "cumoe_config_cost";
    cumoe_config_t good = config_of(8, 12, 8, 2), bad = good;
    cumoe_cost_t cost, untouched;
    memset(&cost, 0x55, sizeof cost);
    cost.struct_size = sizeof cost;
    untouched = cost;
    const cumoe_status_t invalid = CUMOE_INVALID_ARGUMENT;
    expect_refusal(&report, cumoe_config_cost(NULL, 1, 1, 1, &cost), invalid, f, "config", "NULL");
    expect_refusal(&report, cumoe_config_cost(&good, 1, 1, 1, NULL), invalid, f, "cost", "NULL");
    expect_refusal(&report, cumoe_config_cost(&good, -1, 1, 1, &cost), invalid, f, "num_tokens", "-1");
    expect_refusal(&report, cumoe_config_cost(&good, 1, 0, 1, &cost), invalid, f, "num_timesteps", "0");
    expect_refusal(&report, cumoe_config_cost(&good, 1, 1, 0, &cost), invalid, f, "num_ranks", "0");
    expect_refusal(&report, cumoe_config_cost(&good, 1 << 30, 1, 1, &cost), invalid, f, "num_tokens", "1073741824");
    expect_refusal(&report, cumoe_config_cost(&good, 2, INT64_MAX, 1, &cost), invalid, f, "num_timesteps",
                   "9223372036854775807");
    bad.top_k = 9;
    expect_refusal(&report, cumoe_config_cost(&bad, 1, 1, 1, &cost), invalid, f, "config.top_k", "9");
    bad = good;
    bad.struct_size = 8;
    expect_refusal(&report, cumoe_config_cost(&bad, 1, 1, 1, &cost), invalid, f, "config.struct_size", "8");
    cr_expect_arr_eq(&cost, &untouched, sizeof cost);
    cost.struct_size = 0;
    expect_refusal(&report, cumoe_config_cost(&good, 1, 1, 1, &cost), invalid, f, "cost.struct_size", "0");
    cost.struct_size = SIZE_MAX;
    expect_refusal(&report, cumoe_config_cost(&good, 1, 1, 1, &cost), invalid, f, "cost.struct_size", NULL);
    EXPECT_EMPTY(report);
}

/* A program of a newer header asks for more figures than there are. */
Test(cost, a_longer_struct_is_filled_up_with_zeros)
{
    struct {
        cumoe_cost_t known;
        int64_t later[3];
    } newer;
    memset(&newer, 0xff, sizeof newer);
    newer.known.struct_size = sizeof newer;
    const cumoe_config_t c = config_of(8, 12, 8, 2);
    cr_assert_eq(cumoe_config_cost(&c, 1, 1, 1, &newer.known), CUMOE_SUCCESS);
    cr_expect_eq(newer.known.struct_size, sizeof newer);
    cr_expect_eq(newer.known.expert_parameters, 8 * 2 * 8 * 12);
    for (int i = 0; i < 3; i++) cr_expect_eq(newer.later[i], 0);
}
