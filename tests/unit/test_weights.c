/* Creating, initialising and destroying weights: wrong calls, and what must not happen to borrowed memory. */
#include "tests/suite.h"
#include "tests/unit/refusal.h"

static cumoe_layer_t *make_layer(const cumoe_handle_t *handle, cumoe_dtype_t dtype)
{
    cumoe_config_t config;
    cumoe_layer_t *layer = NULL;
    cr_assert_eq(cumoe_config_init(&config), CUMOE_SUCCESS);
    config.hidden_size = config.intermediate_size = 8;
    config.num_experts = 4;
    config.top_k = 2;
    config.dtype = dtype;
    cr_assert_eq(cumoe_layer_create(&layer, handle, &config), CUMOE_SUCCESS, "%s", cumoe_last_error());
    return layer;
}

Test(weights, create_refuses)
{
    report_t report = {0};
    cumoe_handle_t *handle = suite_handle();
    cumoe_layer_t *layer = make_layer(handle, CUMOE_F64);
    cumoe_weights_t w;
    memset(&w, 0xff, sizeof w);
    const char *f = "cumoe_weights_create";
    expect_refusal(&report, cumoe_weights_create(NULL, CUMOE_F64, &w), CUMOE_INVALID_ARGUMENT, f, "layer", "NULL");
    expect_refusal(&report, cumoe_weights_create(layer, CUMOE_F64, NULL), CUMOE_INVALID_ARGUMENT, f, "weights",
                   "NULL");
    expect_refusal(&report, cumoe_weights_create(layer, CUMOE_F32, &w), CUMOE_INVALID_ARGUMENT, f, "dtype", NULL);
    expect_refusal(&report, cumoe_weights_create(layer, (cumoe_dtype_t)99, &w), CUMOE_INVALID_ARGUMENT, f, "dtype",
                   "99");
    cr_expect(buffer_is_poison(&w, sizeof w));
    cumoe_layer_destroy(layer);
    cumoe_handle_destroy(handle);
    EXPECT_EMPTY(report);
}

Test(weights, init_refuses)
{
    report_t report = {0};
    cumoe_handle_t *handle = suite_handle();
    cumoe_layer_t *layer = make_layer(handle, CUMOE_F32);
    cumoe_weights_t w;
    cr_assert_eq(cumoe_weights_create(layer, CUMOE_DTYPE_DEFAULT, &w), CUMOE_SUCCESS, "%s", cumoe_last_error());
    const char *f = "cumoe_weights_init";
    expect_refusal(&report, cumoe_weights_init(NULL, 1, &w, NULL), CUMOE_INVALID_ARGUMENT, f, "layer", "NULL");
    expect_refusal(&report, cumoe_weights_init(layer, 1, NULL, NULL), CUMOE_INVALID_ARGUMENT, f, "weights", "NULL");
    cumoe_weights_t bad = w;
    bad.struct_size = 3;
    expect_refusal(&report, cumoe_weights_init(layer, 1, &bad, NULL), CUMOE_INVALID_ARGUMENT, f, "struct_size",
                   "3");
    bad = w;
    bad.w_up = (char *)bad.w_up + 1;
    expect_refusal(&report, cumoe_weights_init(layer, 1, &bad, NULL), CUMOE_INVALID_ARGUMENT, f, "w_up", "aligned");
    bad = w;
    bad.down_row_stride = -8;
    expect_refusal(&report, cumoe_weights_init(layer, 1, &bad, NULL), CUMOE_INVALID_ARGUMENT, f, "down_row_stride",
                   "-8");
    for (int i = 0; i < 4 * 8 * 8; i++) cr_expect(((float *)w.w_up)[i] == 0 && ((float *)w.w_down)[i] == 0);
    cumoe_weights_destroy(layer, &w);
    cumoe_layer_destroy(layer);
    cumoe_handle_destroy(handle);
    EXPECT_EMPTY(report);
}

/* Arrays that are NULL are skipped, the others get the numbers that they always get. */
Test(weights, init_skips_what_is_not_there)
{
    cumoe_handle_t *handle = suite_handle();
    cumoe_layer_t *layer = make_layer(handle, CUMOE_F32);
    cumoe_weights_t all, some;
    cr_assert_eq(cumoe_weights_create(layer, CUMOE_DTYPE_DEFAULT, &all), CUMOE_SUCCESS);
    cr_assert_eq(cumoe_weights_create(layer, CUMOE_DTYPE_DEFAULT, &some), CUMOE_SUCCESS);
    cr_assert_eq(cumoe_weights_init(layer, 9, &all, NULL), CUMOE_SUCCESS);
    cumoe_weights_t part = some;
    part.w_gate = part.w_noise = part.w_up = NULL;
    cr_assert_eq(cumoe_weights_init(layer, 9, &part, NULL), CUMOE_SUCCESS, "%s", cumoe_last_error());
    const size_t size = 4 * 8 * 8 * sizeof(float);
    cr_expect(memcmp(some.w_down, all.w_down, size) == 0);
    cr_expect(memcmp(some.w_up, all.w_up, size) != 0);
    cr_assert_eq(cumoe_weights_init(layer, 10, &all, NULL), CUMOE_SUCCESS); /* another seed, other numbers */
    cr_expect(memcmp(some.w_down, all.w_down, size) != 0);
    cumoe_weights_destroy(layer, &all);
    cumoe_weights_destroy(layer, &some);
    cumoe_layer_destroy(layer);
    cumoe_handle_destroy(handle);
}

Test(weights, destroy_clears_borrowed_pointers_and_frees_nothing)
{
    cumoe_handle_t *handle = suite_handle();
    cumoe_layer_t *layer = make_layer(handle, CUMOE_F32);
    static float borrowed[4 * 8 * 8];
    borrowed[0] = 5;
    cumoe_weights_t w = {.struct_size = sizeof w, .w_up = borrowed, .w_down = borrowed};
    cumoe_weights_destroy(layer, &w);
    cr_expect(w.w_up == NULL && w.w_down == NULL && borrowed[0] == 5);
    cumoe_weights_destroy(layer, NULL);
    cumoe_layer_destroy(layer);
    cumoe_handle_destroy(handle);
}
