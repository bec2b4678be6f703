/* The configuration: defaults, size tags of other versions, every rule. */
#include "tests/suite.h"
#include "tests/unit/refusal.h"

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdio.h>

static cumoe_config_t valid_config(void)
{
    cumoe_config_t config;
    cr_assert_eq(cumoe_config_init(&config), CUMOE_SUCCESS);
    config.hidden_size = 8;
    config.intermediate_size = 12;
    config.num_experts = 8;
    config.top_k = 2;
    return config;
}

Test(config, defaults)
{
    cumoe_config_t c;
    memset(&c, 0xff, sizeof c);
    cr_assert_eq(cumoe_config_init(&c), CUMOE_SUCCESS);
    cr_expect_eq(c.struct_size, sizeof c);
    cr_expect(c.hidden_size == 0 && c.intermediate_size == 0 && c.num_experts == 0 && c.top_k == 0);
    cr_expect(c.dtype == CUMOE_F32 || c.dtype == CUMOE_DTYPE_DEFAULT);
    cr_expect_eq(c.compute, CUMOE_COMPUTE_EXACT);
    cr_expect_eq(c.activation, CUMOE_ACTIVATION_RELU);
    cr_expect(c.swiglu_limit == 7.0f && c.swiglu_alpha == 1.702f && c.swiglu_offset == 1.0f);
    cr_expect(c.expert_bias == 0 && c.recompute == 0);
    cr_expect_eq(c.gate, CUMOE_GATE_NOISY_TOPK);
    cr_expect(c.num_groups == 0 && c.top_k_groups == 0 && c.renormalize == 1);
    cr_expect(c.noise_epsilon == 0.01f && c.noise_stream == 0 && c.max_rows == 0);
    cr_expect(c.loss_weight[CUMOE_LOSS_IMPORTANCE] == 0.1f && c.loss_weight[CUMOE_LOSS_LOAD] == 0.1f);
    cr_expect(c.loss_weight[CUMOE_LOSS_SWITCH] == 0 && c.loss_weight[CUMOE_LOSS_Z] == 0);
    cr_expect(c.loss_weight[CUMOE_LOSS_THRESHOLD] == 1);
    cr_expect(c.max_threads == 0 && c.max_sms == 0 && c.ep == NULL);
}

/* ---- size tags ---- */

typedef struct newer_config {
    cumoe_config_t known;
    int64_t later[4];
} newer_config_t;

Test(config, init_writes_as_much_as_the_caller_has)
{
    newer_config_t newer;
    report_t report = {0};
    memset(&newer, 0xff, sizeof newer);
    cr_assert_eq(cumoe_config_init_sized(&newer.known, sizeof newer), CUMOE_SUCCESS); /* a newer header */
    for (int i = 0; i < 4; i++) cr_expect_eq(newer.later[i], 0);

    memset(&newer, 0xff, sizeof newer);
    cr_assert_eq(cumoe_config_init_sized(&newer.known, sizeof newer.known), CUMOE_SUCCESS);
    cr_expect(buffer_is_poison(newer.later, sizeof newer.later));

    expect_refusal(&report, cumoe_config_init_sized(NULL, sizeof newer), CUMOE_INVALID_ARGUMENT,
                   "cumoe_config_init", "config", "NULL");
    memset(&newer, 0xff, sizeof newer);
    expect_refusal(&report, cumoe_config_init_sized(&newer.known, 16), CUMOE_INVALID_ARGUMENT, "cumoe_config_init",
                   "struct_size", "16");
    cr_expect(buffer_is_poison(&newer, sizeof newer));
    EXPECT_EMPTY(report);
}

static cumoe_status_t create(const cumoe_config_t *config, report_t *report)
{
    static cumoe_handle_t *handle;
    if (!handle) handle = suite_handle();
    cumoe_layer_t *const untouched = (cumoe_layer_t *)(uintptr_t)0x1234;
    cumoe_layer_t *layer = untouched;
    const cumoe_status_t status = cumoe_layer_create(&layer, handle, config);
    if (status == CUMOE_SUCCESS)
        cumoe_layer_destroy(layer);
    else
        report_check(report, layer == untouched);
    return status;
}

Test(config, a_newer_config_is_taken_if_its_tail_is_zero)
{
    report_t report = {0};
    newer_config_t newer = {.known = valid_config()};
    newer.known.struct_size = sizeof newer;
    cr_expect_eq(create(&newer.known, &report), CUMOE_SUCCESS, "%s", cumoe_last_error());
    ((char *)newer.later)[sizeof newer.later - 1] = 1;
    const cumoe_status_t status = create(&newer.known, &report);
    cr_expect(status == CUMOE_INVALID_ARGUMENT || status == CUMOE_UNSUPPORTED_CONFIG, "%s",
              cumoe_status_name(status));
    cr_expect(strstr(cumoe_last_error(), "config") != NULL, "%s", cumoe_last_error());
    EXPECT_EMPTY(report);
}

Test(config, a_config_without_a_size_is_refused)
{
    report_t report = {0};
    cumoe_config_t config = valid_config();
    config.struct_size = 0;
    expect_refusal(&report, create(&config, &report), CUMOE_INVALID_ARGUMENT, "cumoe_layer_create",
                   "config.struct_size", "0");
    config.struct_size = sizeof config - 8;
    expect_refusal(&report, create(&config, &report), CUMOE_INVALID_ARGUMENT, "cumoe_layer_create",
                   "config.struct_size", NULL);
    EXPECT_EMPTY(report);
}

/* ---- every rule ---- */

typedef enum field_type { INT32, INT64, FLOAT } field_type_t;

typedef struct bad_field {
    const char *name;
    size_t offset;
    field_type_t type;
    double value;
    const char *text; /* of the value, in the sentence */
    cumoe_status_t status;
} bad_field_t;

#define FIELD(field, type, value, text, status)                                                                    \
    {                                                                                                              \
#field, offsetof(cumoe_config_t, field), type, value, text, CUMOE_##status                                 \
    }

static const bad_field_t BAD_FIELDS[] = {
    FIELD(hidden_size, INT32, 0, "0", INVALID_ARGUMENT),
    FIELD(hidden_size, INT32, -5, "-5", INVALID_ARGUMENT),
    FIELD(hidden_size, INT32, INT32_MIN, "-2147483648", INVALID_ARGUMENT),
    FIELD(intermediate_size, INT32, 0, "0", INVALID_ARGUMENT),
    FIELD(intermediate_size, INT32, -1, "-1", INVALID_ARGUMENT),
    FIELD(num_experts, INT32, 0, "0", INVALID_ARGUMENT),
    FIELD(num_experts, INT32, -8, "-8", INVALID_ARGUMENT),
    FIELD(num_experts, INT32, CUMOE_MAX_EXPERTS + 1, "131073", INVALID_ARGUMENT),
    FIELD(num_experts, INT32, INT32_MAX, "2147483647", INVALID_ARGUMENT),
    FIELD(top_k, INT32, 0, "0", INVALID_ARGUMENT),
    FIELD(top_k, INT32, -1, "-1", INVALID_ARGUMENT),
    FIELD(top_k, INT32, 9, "9", INVALID_ARGUMENT),
    FIELD(dtype, INT32, 99, "99", INVALID_ARGUMENT),
    FIELD(dtype, INT32, -1, NULL, INVALID_ARGUMENT),
    FIELD(dtype, INT32, CUMOE_I32, NULL, INVALID_ARGUMENT),
    FIELD(compute, INT32, 99, "99", INVALID_ARGUMENT),
    FIELD(compute, INT32, CUMOE_COMPUTE_TF32, NULL, UNSUPPORTED_DEVICE),
    FIELD(activation, INT32, 99, "99", INVALID_ARGUMENT),
    FIELD(activation, INT32, CUMOE_NUM_ACTIVATIONS, "10", INVALID_ARGUMENT),
    FIELD(activation, INT32, -1, NULL, INVALID_ARGUMENT),
    FIELD(swiglu_limit, FLOAT, 0, "0", INVALID_ARGUMENT),
    FIELD(swiglu_limit, FLOAT, -7, "-7", INVALID_ARGUMENT),
    FIELD(swiglu_limit, FLOAT, (double)NAN, "nan", INVALID_ARGUMENT),
    FIELD(swiglu_limit, FLOAT, (double)INFINITY, "inf", INVALID_ARGUMENT),
    FIELD(swiglu_alpha, FLOAT, (double)NAN, "nan", INVALID_ARGUMENT),
    FIELD(swiglu_offset, FLOAT, (double)INFINITY, "inf", INVALID_ARGUMENT),
    FIELD(expert_bias, INT32, -1, "-1", INVALID_ARGUMENT),
    FIELD(expert_bias, INT32, 2, "2", INVALID_ARGUMENT),
    FIELD(recompute, INT32, 2, "2", INVALID_ARGUMENT),
    FIELD(gate, INT32, 99, "99", INVALID_ARGUMENT),
    FIELD(renormalize, INT32, 2, "2", INVALID_ARGUMENT),
    FIELD(noise_epsilon, FLOAT, -1, "-1", INVALID_ARGUMENT),
    FIELD(noise_epsilon, FLOAT, (double)NAN, "nan", INVALID_ARGUMENT),
    FIELD(noise_epsilon, FLOAT, (double)INFINITY, "inf", INVALID_ARGUMENT),
    FIELD(renormalize, INT32, -1, "-1", INVALID_ARGUMENT),
    FIELD(num_groups, INT32, 2, "2", INVALID_ARGUMENT),
    FIELD(num_groups, INT32, -1, "-1", INVALID_ARGUMENT),
    FIELD(max_rows, INT64, -1, "-1", INVALID_ARGUMENT),
    FIELD(max_rows, INT64, 5, "5", INVALID_ARGUMENT), /* NOISY_TOPK */
    FIELD(max_rows, INT64, 2147483648, "2147483648", INVALID_ARGUMENT),
    FIELD(loss_weight[0], FLOAT, -1, "-1", INVALID_ARGUMENT),
    FIELD(loss_weight[1], FLOAT, (double)NAN, "nan", INVALID_ARGUMENT),
    FIELD(loss_weight[4], FLOAT, (double)INFINITY, "inf", INVALID_ARGUMENT),
    FIELD(max_threads, INT32, -1, "-1", INVALID_ARGUMENT),
    FIELD(max_sms, INT32, -1, "-1", INVALID_ARGUMENT),
};

static void set_field(cumoe_config_t *config, const bad_field_t *field)
{
    char *at = (char *)config + field->offset;
    const int32_t i32 = field->type == INT32 ? (int32_t)field->value : 0;
    const int64_t i64 = field->type == INT64 ? (int64_t)field->value : 0;
    const float f = (float)field->value;
    if (field->type == INT32)
        memcpy(at, &i32, sizeof i32);
    else if (field->type == INT64)
        memcpy(at, &i64, sizeof i64);
    else
        memcpy(at, &f, sizeof f);
}

Test(config, every_rule)
{
    report_t report = {0};
    for (size_t i = 0; i < sizeof BAD_FIELDS / sizeof *BAD_FIELDS; i++) {
        const bad_field_t *field = &BAD_FIELDS[i];
        cumoe_config_t config = valid_config();
        config.activation = CUMOE_ACTIVATION_SWIGLU_CLAMPED;
        set_field(&config, field);
        char name[64];
        snprintf(name, sizeof name, "config.%s", field->name);
        expect_refusal(&report, create(&config, &report), field->status, "cumoe_layer_create", name, field->text);
    }
    EXPECT_EMPTY(report);
}

Test(config, rules_between_fields)
{
    report_t report = {0};
    cumoe_config_t config = valid_config();
    config.num_experts = 100;
    config.top_k = CUMOE_MAX_TOP_K + 1;
    expect_refusal(&report, create(&config, &report), CUMOE_INVALID_ARGUMENT, "cumoe_layer_create", "config.top_k",
                   "65");

    config = valid_config();
    config.gate = CUMOE_GATE_SOFTMAX;
    expect_refusal(&report, create(&config, &report), CUMOE_INVALID_ARGUMENT, "cumoe_layer_create", "config.top_k",
                   "2");
    config.top_k = 0;
    cr_expect_eq(create(&config, &report), CUMOE_SUCCESS, "%s", cumoe_last_error());
    config.top_k = config.num_experts;
    cr_expect_eq(create(&config, &report), CUMOE_SUCCESS, "%s", cumoe_last_error());

    config = valid_config();
    config.gate = CUMOE_GATE_HIERARCHICAL;
    config.num_groups = 4;
    config.top_k_groups = 2;
    config.num_groups = 3; /* does not divide E */
    expect_refusal(&report, create(&config, &report), CUMOE_INVALID_ARGUMENT, "cumoe_layer_create",
                   "config.num_groups", "3");

    config = valid_config();
    config.exchange_capacity = 64; /* of ranks that there are not */
    expect_refusal(&report, create(&config, &report), CUMOE_INVALID_ARGUMENT, "cumoe_layer_create",
                   "config.exchange_capacity", "64");

    config = valid_config();
    config.exchange_chunks = 2;
    expect_refusal(&report, create(&config, &report), CUMOE_INVALID_ARGUMENT, "cumoe_layer_create",
                   "config.exchange_chunks", "2");
    EXPECT_EMPTY(report);
}

/* A level chooses no more than it has, and both together choose K. */
Test(config, rules_of_groups)
{
    static const struct {
        int32_t top_k, num_groups, top_k_groups; /* of E = 8 */
        const char *field, *text;                /* NULL = valid */
    } rules[] = {
        {2, 3, 1, "config.num_groups", "3"},
        {2, 0, 1, "config.num_groups", "0"},
        {2, -2, 1, "config.num_groups", "-2"},
        {2, 16, 1, "config.num_groups", "16"},
        {2, 4, 0, "config.top_k_groups", "0"},
        {2, 4, -1, "config.top_k_groups", "-1"},
        {6, 2, 3, "config.top_k_groups", "3"}, /* more than groups */
        {3, 4, 2, "config.top_k_groups", "2"}, /* does not divide K */
        {6, 4, 2, "config.top_k_groups", "2"}, /* three of the two in a group */
        {2, 8, 1, "config.top_k_groups", "1"}, /* two of one */
        {2, 4, 2, NULL, NULL},
        {4, 4, 2, NULL, NULL},
        {8, 4, 4, NULL, NULL},
        {3, 1, 1, NULL, NULL},
        {3, 8, 3, NULL, NULL},
    };
    report_t report = {0};
    for (size_t i = 0; i < sizeof rules / sizeof *rules; i++) {
        cumoe_config_t config = valid_config();
        config.gate = CUMOE_GATE_HIERARCHICAL;
        config.top_k = rules[i].top_k;
        config.num_groups = rules[i].num_groups;
        config.top_k_groups = rules[i].top_k_groups;
        const cumoe_status_t status = create(&config, &report);
        if (rules[i].field)
            expect_refusal(&report, status, CUMOE_INVALID_ARGUMENT, "cumoe_layer_create", rules[i].field,
                           rules[i].text);
        else
            report_check(&report, status == CUMOE_SUCCESS);
    }
    cumoe_config_t config = valid_config();
    config.top_k_groups = 1;
    expect_refusal(&report, create(&config, &report), CUMOE_INVALID_ARGUMENT, "cumoe_layer_create", "top_k_groups",
                   "1");
    EXPECT_EMPTY(report);
}

/* T * K, or, where experts choose, the largest of E, T * K and config.max_rows, but at most T * E; a slot more for
 * each token. */
Test(config, most_rows_and_slots)
{
    static const struct {
        cumoe_gate_kind_t gate;
        int64_t max_rows, tokens, rows, slots; /* E = 8, K = 2 */
    } sizes[] = {
        {CUMOE_GATE_NOISY_TOPK, 0, 0, 0, 0},
        {CUMOE_GATE_NOISY_TOPK, 0, 5, 10, 10},
        {CUMOE_GATE_SOFTMAX, 0, 5, 40, 40},
        {CUMOE_GATE_EXTERNAL, 0, 5, 10, 10},
        {CUMOE_GATE_SIGMOID_TOPK, 0, 5, 10, 10},
        {CUMOE_GATE_BALANCED, 0, 0, 0, 0},
        {CUMOE_GATE_BALANCED, 0, 1, 8, 9},
        {CUMOE_GATE_BALANCED, 0, 3, 8, 11},
        {CUMOE_GATE_BALANCED, 0, 5, 10, 15},
        {CUMOE_GATE_BALANCED, 7, 5, 10, 15},
        {CUMOE_GATE_BALANCED, 13, 5, 13, 18},
        {CUMOE_GATE_BALANCED, 100, 5, 40, 45},
        {CUMOE_GATE_BALANCED, 1, 100000, 200000, 300000},
    };
    report_t report = {0};
    cumoe_handle_t *handle = suite_handle();
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        cumoe_config_t config = valid_config();
        cumoe_layer_t *layer;
        int64_t rows = -7, slots = -7;
        config.gate = sizes[i].gate;
        config.max_rows = sizes[i].max_rows;
        if (config.gate == CUMOE_GATE_SOFTMAX) config.top_k = 0;
        cr_assert_eq(cumoe_layer_create(&layer, handle, &config), CUMOE_SUCCESS, "%s", cumoe_last_error());
        report_check(&report, cumoe_layer_max_rows(layer, sizes[i].tokens, &rows, &slots) == CUMOE_SUCCESS);
        if (rows != sizes[i].rows || slots != sizes[i].slots)
            report_fail(&report, "case %d: %lld rows, %lld slots", (int)i, (long long)rows, (long long)slots);
        report_check(&report, cumoe_layer_max_rows(layer, sizes[i].tokens, NULL, NULL) == CUMOE_SUCCESS);
        const char *f = "cumoe_layer_max_rows";
        rows = slots = -7;
        expect_refusal(&report, cumoe_layer_max_rows(NULL, 4, &rows, &slots), CUMOE_INVALID_ARGUMENT, f, "layer",
                       "NULL");
        expect_refusal(&report, cumoe_layer_max_rows(layer, -4, &rows, &slots), CUMOE_INVALID_ARGUMENT, f,
                       "num_tokens", "-4");
        expect_refusal(&report, cumoe_layer_max_rows(layer, INT64_MAX, &rows, &slots), CUMOE_INVALID_ARGUMENT, f,
                       "num_tokens", "9223372036854775807");
        report_check(&report, rows == -7 && slots == -7);
        cumoe_layer_destroy(layer);
    }
    cumoe_handle_destroy(handle);
    EXPECT_EMPTY(report);
}

/* Whatever the tokens are, every activation is there, with biases and without. */
Test(config, every_type_and_activation)
{
    report_t report = {0};
    for (int dtype = CUMOE_DTYPE_DEFAULT; dtype <= CUMOE_F16; dtype++)
        for (int activation = 0; activation < CUMOE_NUM_ACTIVATIONS; activation++)
            for (int32_t flags = 0; flags < 4; flags++) {
                cumoe_config_t config = valid_config();
                config.dtype = (cumoe_dtype_t)dtype;
                config.activation = (cumoe_activation_t)activation;
                config.expert_bias = flags & 1;
                config.recompute = flags / 2;
                cr_expect_eq(create(&config, &report), CUMOE_SUCCESS, "%s", cumoe_last_error());
            }
    EXPECT_EMPTY(report);
}

Test(config, identity_ignores_the_intermediate_size)
{
    static const int32_t sizes[] = {0, -1, INT32_MIN, INT32_MAX};
    report_t report = {0};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        cumoe_config_t config = valid_config();
        config.activation = CUMOE_ACTIVATION_IDENTITY;
        config.intermediate_size = sizes[i];
        cr_expect_eq(create(&config, &report), CUMOE_SUCCESS, "%s", cumoe_last_error());
    }
    EXPECT_EMPTY(report);
}

/* The largest sizes: either they work or they are refused, but nothing overflows. */
Test(config, huge_sizes)
{
    report_t report = {0};
    cumoe_config_t config = valid_config();
    config.hidden_size = config.intermediate_size = INT32_MAX;
    config.num_experts = CUMOE_MAX_EXPERTS; /* E * I * H elements: 2^79 */
    const cumoe_status_t status = create(&config, &report);
    cr_expect(status == CUMOE_INVALID_ARGUMENT || status == CUMOE_UNSUPPORTED_CONFIG, "%s",
              cumoe_status_name(status));

    config = valid_config();
    config.num_experts = CUMOE_MAX_EXPERTS;
    config.top_k = CUMOE_MAX_TOP_K;
    cr_expect_eq(create(&config, &report), CUMOE_SUCCESS, "%s", cumoe_last_error());
    EXPECT_EMPTY(report);
}

Test(config, null_arguments)
{
    report_t report = {0};
    cumoe_handle_t *handle = suite_handle();
    cumoe_config_t config = valid_config();
    cumoe_layer_t *layer = NULL;
    expect_refusal(&report, cumoe_layer_create(NULL, handle, &config), CUMOE_INVALID_ARGUMENT, "cumoe_layer_create",
                   "layer", "NULL");
    expect_refusal(&report, cumoe_layer_create(&layer, NULL, &config), CUMOE_INVALID_ARGUMENT, "cumoe_layer_create",
                   "handle", "NULL");
    expect_refusal(&report, cumoe_layer_create(&layer, handle, NULL), CUMOE_INVALID_ARGUMENT, "cumoe_layer_create",
                   "config", "NULL");
    cr_expect_null(layer);
    cumoe_layer_destroy(NULL);
    cumoe_handle_destroy(handle);
    EXPECT_EMPTY(report);
}
