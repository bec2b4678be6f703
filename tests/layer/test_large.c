/* Rows of so many tokens that the CPU writes them past its caches (host/cpu/stream.h). */
#include "tests/suite.h"

/* The last block of columns is half a one; not with 16 bits, as such rows would not be on cache lines. */
static const layer_case_t ROWS[] = {{"large rows", 0, 8, 1040, 5, 4}, {"large rows of 16 bits", 0, 8, 1056, 5, 4}};

Test(large, rows)
{
    const uint64_t seed = random_seed("large rows", 31);
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    for (int i = 0; i < (device_is_slow() ? 1 : 2); i++) {
        const problem_options_t options = {.dtype = i == 0 ? CUMOE_F32 : CUMOE_BF16,
                                           .activation = i == 0 ? CUMOE_ACTIVATION_SWIGLU : CUMOE_ACTIVATION_GEGLU,
                                           .bias = true,
                                           .variant = GATE_VARIANTS[VARIANT_EXTERNAL],
                                           .seed = seed};
        const int64_t row = 2 * ROWS[i].intermediate_size * (int64_t)real_size(options.dtype);
        layer_case_t large = ROWS[i];
        large.tokens = (int32_t)(1 + (32 << 20) / (large.top_k * row));
        problem_t p;
        if (problem_create(&p, handle, &large, &options, &report) && problem_run_forward(&p, &report) &&
            problem_run_backward(&p, &report)) {
            problem_check_forward(&p, &report);
            problem_check_backward(&p, &report);
        }
        problem_destroy(&p);
    }
    cumoe_handle_destroy(handle);
    EXPECT_EMPTY(report);
}
