/* cumoe_gate_bias_update: gate_bias[e] += rate * sign(mean of the counts - expert_count[e]). */
#include "tests/suite.h"
#include "tests/unit/refusal.h"

#include <math.h>
#include <string.h>

static cumoe_layer_t *make_layer(const cumoe_handle_t *handle, int32_t experts, cumoe_dtype_t dtype,
                                 cumoe_gate_kind_t gate)
{
    cumoe_config_t config;
    cumoe_layer_t *layer = NULL;
    cr_assert_eq(cumoe_config_init(&config), CUMOE_SUCCESS);
    config.hidden_size = config.intermediate_size = 4;
    config.num_experts = experts, config.top_k = 1;
    config.dtype = dtype, config.gate = gate;
    cr_assert_eq(cumoe_layer_create(&layer, handle, &config), CUMOE_SUCCESS, "%s", cumoe_last_error());
    return layer;
}

/* In whole numbers: count * E against the sum; the step is one addition in the gate type. */
static double expected(cumoe_dtype_t type, double bias, int64_t count, int64_t sum, int64_t experts, float rate)
{
    const int sign = count * experts < sum ? 1 : count * experts > sum ? -1 : 0;
    if (sign == 0) return bias;
    return type == CUMOE_F64 ? bias + sign * (double)rate : (double)((float)bias + (float)sign * rate);
}

static void check(const cumoe_handle_t *handle, cumoe_dtype_t dtype, int32_t experts, const int32_t *counts,
                  float rate, report_t *report)
{
    const cumoe_dtype_t type = dtype == CUMOE_F64 ? CUMOE_F64 : CUMOE_F32;
    cumoe_layer_t *layer = make_layer(handle, experts, dtype, CUMOE_GATE_SIGMOID_TOPK);
    buffer_list_t buffers = {0};
    random_state_t random = random_start(3);
    void *bias = buffer_get(&buffers, (size_t)experts * real_size(type));
    void *wanted = buffer_get(&buffers, (size_t)experts * real_size(type));
    const size_t count_size = (size_t)experts * sizeof *counts;
    int32_t *count = memcpy(buffer_get(&buffers, count_size), counts, count_size);
    int64_t sum = 0;
    for (int32_t e = 0; e < experts; e++) sum += counts[e];
    for (int32_t e = 0; e < experts; e++) {
        const double before = random_normal(&random);
        real_set(bias, type, e, before);
        real_set(wanted, type, e, expected(type, before, counts[e], sum, experts, rate));
    }
    const cumoe_status_t status = device_gate_bias_update(handle, layer, bias, count, rate);
    if (status != CUMOE_SUCCESS) report_fail(report, "%s", cumoe_last_error());
    compare_bits(report, "gate_bias", bias, wanted, (size_t)experts * real_size(type));
    compare_bits(report, "expert_count", count, counts, count_size);
    report_check(report, buffer_guards_intact(&buffers));
    buffer_free_all(&buffers);
    cumoe_layer_destroy(layer);
}

Test(gate_bias, moves_towards_the_mean)
{
    enum { MANY = 131072 };
    static const int32_t small[][6] = {
        {1, 2, 3, 4, 5, 3},
        /* two at the mean */ {3, 3, 3, 3, 3, 3},
        {0, 0, 0, 0, 0, 0},
        {0, 0, 0, 0, 0, 7},
        {1, 1, 1, 1, 1, 2}, /* the mean is no whole number */
        {INT32_MAX, INT32_MAX, INT32_MAX, 0, 0, 0},
        {INT32_MAX, INT32_MAX, INT32_MAX, INT32_MAX, INT32_MAX, INT32_MAX - 1},
    };
    static const float rates[] = {0, 0.001F, 0.5F, 1e-30F};
    static int32_t many[MANY];
    report_t report = {0};
    cumoe_handle_t *handle = suite_handle();
    for (int dtype = CUMOE_F64; dtype <= CUMOE_F16; dtype++)
        for (size_t i = 0; i < sizeof small / sizeof *small; i++)
            for (int r = 0; r < 4; r++)
                for (int32_t experts = 1; experts <= 6; experts += r == 1 ? 1 : 5)
                    check(handle, (cumoe_dtype_t)dtype, experts, small[i], rates[r], &report);
    /* sums that no float holds: one below the mean by less than a part in 2^40 */
    for (int32_t e = 0; e < MANY; e++) many[e] = INT32_MAX - (e == 77);
    check(handle, CUMOE_F32, MANY, many, 0.25F, &report);
    for (int32_t e = 0; e < MANY; e++) many[e] = e % 1000;
    check(handle, CUMOE_F32, MANY, many, 0.25F, &report);
    cumoe_handle_destroy(handle);
    EXPECT_EMPTY(report);
}

Test(gate_bias, refusals)
{
    report_t report = {0};
    cumoe_handle_t *handle = suite_handle();
    cumoe_layer_t *layer = make_layer(handle, 4, CUMOE_F32, CUMOE_GATE_SIGMOID_TOPK);
    buffer_list_t buffers = {0};
    float *bias = buffer_get(&buffers, 8 * sizeof *bias);
    int32_t *count = buffer_get(&buffers, 8 * sizeof *count);
    const char *f = "cumoe_gate_bias_update";
#define REFUSE(layer, bias, count, rate, argument, value)                                                          \
    expect_refusal(&report, cumoe_gate_bias_update(layer, bias, count, rate, NULL), CUMOE_INVALID_ARGUMENT, f,     \
                   argument, value)
    REFUSE(NULL, bias, count, 0.5F, "layer", "NULL");
    REFUSE(layer, NULL, count, 0.5F, "gate_bias", "NULL");
    REFUSE(layer, bias, NULL, 0.5F, "expert_count", "NULL");
    REFUSE(layer, (char *)bias + 1, count, 0.5F, "gate_bias", "aligned");
    REFUSE(layer, bias, count + 1, 0.5F, "expert_count", "aligned");
    REFUSE(layer, bias, count, -0.5F, "rate", "-0.5");
    REFUSE(layer, bias, count, NAN, "rate", "nan");
    REFUSE(layer, bias, count, INFINITY, "rate", "inf");
    if (device_backend() == CUMOE_BACKEND_CPU)
        expect_refusal(&report, cumoe_gate_bias_update(layer, bias, count, 0.5F, (cumoe_stream_t)(uintptr_t)64),
                       CUMOE_INVALID_ARGUMENT, f, "stream", NULL);
    cumoe_layer_destroy(layer);
    static const cumoe_gate_kind_t others[] = {CUMOE_GATE_NOISY_TOPK, CUMOE_GATE_SOFTMAX_TOPK, CUMOE_GATE_BALANCED};
    for (int i = 0; i < 3; i++) {
        layer = make_layer(handle, 4, CUMOE_F32, others[i]);
        REFUSE(layer, bias, count, 0.5F, "gate", "SIGMOID_TOPK");
        cumoe_layer_destroy(layer);
    }
#undef REFUSE
    report_check(&report, buffer_is_poison(bias, 8 * sizeof *bias));
    report_check(&report, buffer_is_poison(count, 8 * sizeof *count));
    buffer_free_all(&buffers);
    cumoe_handle_destroy(handle);
    EXPECT_EMPTY(report);
}
