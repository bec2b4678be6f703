/* Creating, initialising and destroying weights: which arrays and types a layer takes, wrong calls, and what must
 * not happen to borrowed memory. */
#include "tests/suite.h"
#include "tests/unit/refusal.h"

#include <stdio.h>

enum { SIZE = 8, EXPERTS = 4, GROUPS = 2 }; /* H = I */

typedef struct layer_kind {
    cumoe_dtype_t dtype;
    cumoe_gate_kind_t gate;
    cumoe_activation_t activation;
    int32_t expert_bias;
} layer_kind_t;

static cumoe_layer_t *make_layer_kind(const cumoe_handle_t *handle, const layer_kind_t *kind)
{
    cumoe_config_t config;
    cumoe_layer_t *layer = NULL;
    cr_assert_eq(cumoe_config_init(&config), CUMOE_SUCCESS);
    config.hidden_size = config.intermediate_size = SIZE;
    config.num_experts = EXPERTS;
    config.top_k = kind->gate == CUMOE_GATE_SOFTMAX ? 0 : 2;
    config.dtype = kind->dtype;
    config.gate = kind->gate;
    if (kind->gate == CUMOE_GATE_HIERARCHICAL) config.num_groups = GROUPS, config.top_k_groups = 1;
    config.activation = kind->activation;
    config.expert_bias = kind->expert_bias;
    config.max_threads = 1;
    cr_assert_eq(cumoe_layer_create(&layer, handle, &config), CUMOE_SUCCESS, "%s", cumoe_last_error());
    return layer;
}

static cumoe_layer_t *make_layer(const cumoe_handle_t *handle, cumoe_dtype_t dtype)
{
    return make_layer_kind(handle, &(layer_kind_t){.dtype = dtype});
}

/* ---- arrays ---- */

enum { NUM_ARRAYS = 12 };

static const char *const ARRAY_NAMES[NUM_ARRAYS] = {"w_gate",     "w_noise",   "w_gate_primary", "w_noise_primary",
                                                    "thresholds", "gate_bias", "w_up",           "w_glu",
                                                    "w_down",     "b_up",      "b_glu",          "b_down"};

static void **array_pointer(cumoe_weights_t *w, int i)
{
    void **const pointers[NUM_ARRAYS] = {&w->w_gate,     &w->w_noise,   &w->w_gate_primary, &w->w_noise_primary,
                                         &w->thresholds, &w->gate_bias, &w->w_up,           &w->w_glu,
                                         &w->w_down,     &w->b_up,      &w->b_glu,          &w->b_down};
    return pointers[i];
}

/* Bytes of an array that cumoe_weights_create() made. */
static size_t array_size(const cumoe_weights_t *w, int i)
{
    static const size_t elements[NUM_ARRAYS] = {
        EXPERTS * SIZE, EXPERTS * SIZE,        GROUPS * SIZE,         GROUPS * SIZE,         EXPERTS,
        EXPERTS,        EXPERTS * SIZE * SIZE, EXPERTS * SIZE * SIZE, EXPERTS * SIZE * SIZE, EXPERTS * SIZE,
        EXPERTS * SIZE, EXPERTS * SIZE};
    return real_size(i < 6 ? w->gate_dtype : w->dtype) * elements[i];
}

static cumoe_weights_t adopt(buffer_list_t *buffers, const cumoe_handle_t *handle, const cumoe_weights_t *created)
{
    cumoe_weights_t adopted = *created;
    for (int i = 0; i < NUM_ARRAYS; i++)
        *array_pointer(&adopted, i) =
            device_adopt(buffers, handle, *array_pointer(&adopted, i), array_size(created, i));
    return adopted;
}

/* For every array a word of the reason why a layer does not have it; NULL = it has it. */
typedef struct array_case {
    layer_kind_t kind;
    cumoe_glu_placement_t glu;
    const char *absent[NUM_ARRAYS];
} array_case_t;

#define NO_BIASES     "expert_bias", "expert_bias", "expert_bias"
#define NO_OTHER_GATE "groups", "groups", "thresholds", "bias"

static const array_case_t ARRAY_CASES[] = {
    {{.gate = CUMOE_GATE_NOISY_TOPK},
     .absent = {NULL, NULL, NO_OTHER_GATE, NULL, "glu", NULL, "expert_bias", "expert_bias", "expert_bias"}},
    {{.gate = CUMOE_GATE_SOFTMAX, .expert_bias = 1},
     .absent = {NULL, "noise", NO_OTHER_GATE, NULL, "glu", NULL, NULL, "glu", NULL}},
    {{.gate = CUMOE_GATE_EXTERNAL, .activation = CUMOE_ACTIVATION_SWIGLU, .expert_bias = 1},
     .absent = {"gate", "noise", NO_OTHER_GATE, NULL, NULL, NULL, NULL, NULL, NULL}},
    {{.gate = CUMOE_GATE_HIERARCHICAL},
     .absent = {NULL, NULL, NULL, NULL, "thresholds", "bias", NULL, "glu", NULL, NO_BIASES}},
    {{.gate = CUMOE_GATE_BALANCED},
     .absent = {NULL, "noise", "groups", "groups", NULL, "bias", NULL, "glu", NULL, NO_BIASES}},
    {{.gate = CUMOE_GATE_SOFTMAX_TOPK}, .absent = {NULL, "noise", NO_OTHER_GATE, NULL, "glu", NULL, NO_BIASES}},
    {{.gate = CUMOE_GATE_SIGMOID_TOPK},
     .absent = {NULL, "noise", "groups", "groups", "thresholds", NULL, NULL, "glu", NULL, NO_BIASES}},
    {{.activation = CUMOE_ACTIVATION_GEGLU},
     .absent = {NULL, NULL, NO_OTHER_GATE, NULL, NULL, NULL, "expert_bias", "expert_bias", "expert_bias"}},
    {{.activation = CUMOE_ACTIVATION_SWIGLU_CLAMPED, .expert_bias = 1},
     .glu = CUMOE_GLU_INTERLEAVED,
     .absent = {NULL, NULL, NO_OTHER_GATE, NULL, "w_up", NULL, NULL, "w_up", NULL}},
    {{.activation = CUMOE_ACTIVATION_IDENTITY, .expert_bias = 1},
     .absent = {NULL, NULL, NO_OTHER_GATE, "IDENTITY", "glu", NULL, "IDENTITY", "glu", NULL}},
    {{.activation = CUMOE_ACTIVATION_IDENTITY},
     .absent = {NULL, NULL, NO_OTHER_GATE, "IDENTITY", "glu", NULL, "expert_bias", "expert_bias", "expert_bias"}},
};

/* A layer takes the arrays that it has, and refuses every other one with the reason. */
Test(weights, an_array_that_the_layer_does_not_have_is_refused)
{
    report_t report = {0};
    cumoe_handle_t *handle = suite_handle();
    buffer_list_t buffers = {0};
    const size_t memory_size = EXPERTS * 2 * SIZE * SIZE * sizeof(float);
    void *memory = buffer_get(&buffers, memory_size);
    for (size_t c = 0; c < sizeof ARRAY_CASES / sizeof *ARRAY_CASES; c++) {
        const array_case_t *array_case = &ARRAY_CASES[c];
        cumoe_layer_t *layer = make_layer_kind(handle, &array_case->kind);
        cumoe_weights_t all = {.struct_size = sizeof all, .glu = array_case->glu};
        for (int i = 0; i < NUM_ARRAYS; i++) *array_pointer(&all, i) = array_case->absent[i] ? NULL : memory;
        cr_expect_eq(device_weights_init(handle, layer, 1, &all), CUMOE_SUCCESS, "%s", cumoe_last_error());
        buffer_poison(memory, memory_size);
        for (int i = 0; i < NUM_ARRAYS; i++) {
            if (!array_case->absent[i]) continue;
            cumoe_weights_t bad = all;
            char name[32];
            *array_pointer(&bad, i) = memory;
            snprintf(name, sizeof name, "weights.%s = 0x", ARRAY_NAMES[i]);
            expect_refusal(&report, cumoe_weights_init(layer, 1, &bad, NULL), CUMOE_INVALID_ARGUMENT,
                           "cumoe_weights_init", name, "must be NULL: ");
            const char *reason = strstr(cumoe_last_error(), "NULL: ");
            if (!reason || !strstr(reason, array_case->absent[i]))
                report_fail(&report, "the reason should be '%s': %s", array_case->absent[i], cumoe_last_error());
        }
        cr_expect(buffer_is_poison(memory, memory_size));
        cumoe_layer_destroy(layer);
    }
    buffer_free_all(&buffers);
    cumoe_handle_destroy(handle);
    EXPECT_EMPTY(report);
}

/* What is created is all that the layer has, SEPARATE, zero, each array apart from the others. */
Test(weights, create_makes_every_array)
{
    cumoe_handle_t *handle = suite_handle();
    for (size_t c = 0; c < sizeof ARRAY_CASES / sizeof *ARRAY_CASES; c++) {
        if (ARRAY_CASES[c].glu != CUMOE_GLU_SEPARATE) continue;
        for (int dtype = CUMOE_F64; dtype <= CUMOE_F16; dtype++) {
            layer_kind_t kind = ARRAY_CASES[c].kind;
            kind.dtype = (cumoe_dtype_t)dtype;
            cumoe_layer_t *layer = make_layer_kind(handle, &kind);
            cumoe_weights_t created;
            buffer_list_t buffers = {0};
            cr_assert_eq(cumoe_weights_create(layer, CUMOE_DTYPE_DEFAULT, &created), CUMOE_SUCCESS, "%s",
                         cumoe_last_error());
            cumoe_weights_t w = adopt(&buffers, handle, &created);
            cr_expect(w.dtype == kind.dtype && w.gate_dtype == (dtype == CUMOE_F64 ? CUMOE_F64 : CUMOE_F32));
            for (int i = 0; i < NUM_ARRAYS; i++) {
                const char *array = *array_pointer(&w, i);
                cr_expect_eq(array == NULL, ARRAY_CASES[c].absent[i] != NULL, "%s", ARRAY_NAMES[i]);
                if (!array) continue;
                const size_t size = array_size(&w, i);
                for (size_t byte = 0; byte < size; byte++) cr_assert_eq(array[byte], 0);
                memset(*array_pointer(&w, i), 1, size); /* another that reached into it would not be zero */
            }
            cr_expect_eq(device_weights_init(handle, layer, 1, &w), CUMOE_SUCCESS, "%s", cumoe_last_error());
            buffer_free_all(&buffers);
            cumoe_weights_destroy(layer, &created);
            cumoe_layer_destroy(layer);
        }
    }
    cumoe_handle_destroy(handle);
}

/* ---- types ---- */

/* Weights have the type of the config, those of a gate that or the gate type; created ones, which may be gradients,
 * may be of the gate type. */
Test(weights, types)
{
    report_t report = {0};
    cumoe_handle_t *handle = suite_handle();
    for (int config = CUMOE_F64; config <= CUMOE_F16; config++) {
        cumoe_layer_t *layer = make_layer(handle, (cumoe_dtype_t)config);
        const int gate = config == CUMOE_F64 ? CUMOE_F64 : CUMOE_F32;
        for (int dtype = -1; dtype <= CUMOE_I64 + 1; dtype++) {
            cumoe_weights_t of_experts = {.struct_size = sizeof of_experts, .dtype = (cumoe_dtype_t)dtype};
            cumoe_weights_t of_gate = {.struct_size = sizeof of_gate, .gate_dtype = (cumoe_dtype_t)dtype};
            const cumoe_status_t experts_status = cumoe_weights_init(layer, 1, &of_experts, NULL);
            if (dtype == CUMOE_DTYPE_DEFAULT || dtype == config)
                report_check(&report, experts_status == CUMOE_SUCCESS);
            else
                expect_refusal(&report, experts_status, CUMOE_INVALID_ARGUMENT, "cumoe_weights_init",
                               "weights.dtype", "config.dtype");
            const cumoe_status_t gate_status = cumoe_weights_init(layer, 1, &of_gate, NULL);
            if (dtype == CUMOE_DTYPE_DEFAULT || dtype == config || dtype == gate)
                report_check(&report, gate_status == CUMOE_SUCCESS);
            else
                expect_refusal(&report, gate_status, CUMOE_INVALID_ARGUMENT, "cumoe_weights_init",
                               "weights.gate_dtype", "gate type");
            cumoe_weights_t made;
            const cumoe_status_t create_status = cumoe_weights_create(layer, (cumoe_dtype_t)dtype, &made);
            if (dtype == CUMOE_DTYPE_DEFAULT || dtype == config || dtype == gate)
                report_check(&report, create_status == CUMOE_SUCCESS);
            else
                expect_refusal(&report, create_status, CUMOE_INVALID_ARGUMENT, "cumoe_weights_create", "dtype",
                               NULL);
            if (create_status == CUMOE_SUCCESS) cumoe_weights_destroy(layer, &made);
        }
        cumoe_layer_destroy(layer);
    }
    cumoe_handle_destroy(handle);
    EXPECT_EMPTY(report);
}

/* Initial values of 16 bits are those of F32, rounded; biases are 0. */
Test(weights, initial_values_of_16_bits)
{
    cumoe_handle_t *handle = suite_handle();
    const layer_kind_t kind = {.activation = CUMOE_ACTIVATION_SWIGLU, .expert_bias = 1};
    cumoe_layer_t *f32 = make_layer_kind(handle, &kind);
    cumoe_weights_t created;
    buffer_list_t buffers = {0};
    cr_assert_eq(cumoe_weights_create(f32, CUMOE_DTYPE_DEFAULT, &created), CUMOE_SUCCESS);
    const cumoe_weights_t w = adopt(&buffers, handle, &created);
    cr_assert_eq(device_weights_init(handle, f32, 5, &w), CUMOE_SUCCESS, "%s", cumoe_last_error());
    for (int dtype = CUMOE_BF16; dtype <= CUMOE_F16; dtype++) {
        layer_kind_t narrow = kind;
        narrow.dtype = (cumoe_dtype_t)dtype;
        cumoe_layer_t *layer = make_layer_kind(handle, &narrow);
        cumoe_weights_t created_half;
        cr_assert_eq(cumoe_weights_create(layer, CUMOE_DTYPE_DEFAULT, &created_half), CUMOE_SUCCESS);
        buffer_list_t halves = {0};
        const cumoe_weights_t half = adopt(&halves, handle, &created_half);
        memset(half.b_up, 1, EXPERTS * SIZE * 2);
        memset(half.b_glu, 1, EXPERTS * SIZE * 2);
        memset(half.b_down, 1, EXPERTS * SIZE * 2);
        cr_assert_eq(device_weights_init(handle, layer, 5, &half), CUMOE_SUCCESS, "%s", cumoe_last_error());
        for (int64_t i = 0; i < EXPERTS * SIZE * SIZE; i++) {
            const double up = real_get(w.w_up, CUMOE_F32, i), glu = real_get(w.w_glu, CUMOE_F32, i);
            const double down = real_get(w.w_down, CUMOE_F32, i);
            cr_assert_eq(real_get(half.w_up, narrow.dtype, i), real_round(narrow.dtype, up));
            cr_assert_eq(real_get(half.w_glu, narrow.dtype, i), real_round(narrow.dtype, glu));
            cr_assert_eq(real_get(half.w_down, narrow.dtype, i), real_round(narrow.dtype, down));
        }
        for (int64_t i = 0; i < EXPERTS * SIZE; i++)
            cr_assert(real_get(half.b_up, narrow.dtype, i) == 0 && real_get(half.b_glu, narrow.dtype, i) == 0 &&
                      real_get(half.b_down, narrow.dtype, i) == 0);
        buffer_free_all(&halves);
        cumoe_weights_destroy(layer, &created_half);
        cumoe_layer_destroy(layer);
    }
    buffer_free_all(&buffers);
    cumoe_weights_destroy(f32, &created);
    cumoe_layer_destroy(f32);
    cumoe_handle_destroy(handle);
}

/* ---- calls ---- */

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
    expect_refusal(&report, cumoe_weights_create(layer, CUMOE_F32, &w), CUMOE_INVALID_ARGUMENT, f, "dtype", "2");
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
    buffer_list_t buffers = {0};
    const cumoe_weights_t values = adopt(&buffers, handle, &w);
    for (int i = 0; i < 4 * 8 * 8; i++)
        cr_expect(((float *)values.w_up)[i] == 0 && ((float *)values.w_down)[i] == 0);
    buffer_free_all(&buffers);
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
    cumoe_weights_t created[2];
    buffer_list_t buffers = {0};
    for (int i = 0; i < 2; i++)
        cr_assert_eq(cumoe_weights_create(layer, CUMOE_DTYPE_DEFAULT, &created[i]), CUMOE_SUCCESS);
    const cumoe_weights_t all = adopt(&buffers, handle, &created[0]), some = adopt(&buffers, handle, &created[1]);
    cr_assert_eq(device_weights_init(handle, layer, 9, &all), CUMOE_SUCCESS);
    cumoe_weights_t part = some;
    part.w_gate = part.w_noise = part.w_up = NULL;
    cr_assert_eq(device_weights_init(handle, layer, 9, &part), CUMOE_SUCCESS, "%s", cumoe_last_error());
    const size_t size = 4 * 8 * 8 * sizeof(float);
    cr_expect(memcmp(some.w_down, all.w_down, size) == 0);
    cr_expect(memcmp(some.w_up, all.w_up, size) != 0);
    cr_assert_eq(device_weights_init(handle, layer, 10, &all), CUMOE_SUCCESS); /* another seed, other numbers */
    cr_expect(memcmp(some.w_down, all.w_down, size) != 0);
    buffer_free_all(&buffers);
    for (int i = 0; i < 2; i++) cumoe_weights_destroy(layer, &created[i]);
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
