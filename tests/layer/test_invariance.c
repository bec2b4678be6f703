/* Promises about bits: the company that a token is in does not matter. */
#include "tests/suite.h"

#include <string.h>

/* In training the tokens of BALANCED are coupled, and so they are where max_rows has no room for all. */
static const gate_variant_t ALL_ROWS = {"balanced, all rows", CUMOE_GATE_BALANCED, .training = 0, .max_rows = 1600};

static const gate_variant_t *const GATED[] = {
    &GATE_VARIANTS[VARIANT_NOISY],
    &GATE_VARIANTS[VARIANT_NOISY_INFERENCE],
    &GATE_VARIANTS[VARIANT_SOFTMAX],
    &GATE_VARIANTS[VARIANT_SOFTMAX_TOPK_PLAIN],
    &GATE_VARIANTS[VARIANT_SIGMOID],
    &GATE_VARIANTS[VARIANT_HIERARCHICAL],
    &ALL_ROWS,
};

enum { NUM_GATED = sizeof GATED / sizeof *GATED };

/* Tokens first .. first + count - 1 of the problem in a call of their own: y and dx as in the whole call. */
static void check_chunk(const problem_t *p, int64_t first, int64_t count, report_t *report)
{
    const int64_t H = p->hidden_size;
    const int32_t *offset = p->forward.chosen_offset;
    const int64_t first_slot = offset ? offset[first] : first * p->top_k;
    const int64_t slots = offset ? offset[first + count] - first_slot : count * p->top_k;
    int64_t max_slots;
    const size_t real = real_size(p->options.dtype), gate_real = real_size(p->gate_type);
    const size_t at = (size_t)(first * H) * real;
    const size_t bytes = (size_t)(count * H) * real;
    buffer_list_t buffers = {0};
    cumoe_forward_args_t f = p->forward;
    f.num_tokens = count;
    f.x = memcpy(buffer_get(&buffers, bytes), (const char *)p->forward.x + at, bytes);
    f.y = buffer_get(&buffers, bytes);
    f.first_token = p->forward.first_token + first;
    cr_assert(cumoe_layer_max_rows(p->layer, count, NULL, &max_slots) == CUMOE_SUCCESS);
    f.chosen_expert = buffer_get(&buffers, (size_t)max_slots * sizeof(int32_t));
    f.chosen_weight = buffer_get(&buffers, (size_t)max_slots * gate_real);
    f.chosen_offset = NULL;
    f.expert_count = NULL;
    f.importance = f.load = f.losses = NULL;
    f.statistics = NULL;
    cr_assert(cumoe_layer_buffer_sizes(p->layer, count, &f.workspace_size, &f.saved_size) == CUMOE_SUCCESS);
    f.workspace = buffer_get(&buffers, f.workspace_size);
    f.saved = buffer_get(&buffers, f.saved_size);
    cr_assert(device_layer_forward(p->handle, p->layer, &f) == CUMOE_SUCCESS, "%s", cumoe_last_error());
    compare_bits(report, "y", f.y, (const char *)p->forward.y + at, bytes);
    compare_bits(report, "chosen_expert", f.chosen_expert, p->forward.chosen_expert + first_slot,
                 (size_t)slots * sizeof(int32_t));
    compare_bits(report, "chosen_weight", f.chosen_weight,
                 (const char *)p->forward.chosen_weight + (size_t)first_slot * gate_real,
                 (size_t)slots * gate_real);

    cumoe_backward_args_t b = p->backward;
    b.num_tokens = count;
    b.x = f.x;
    b.dy = memcpy(buffer_get(&buffers, bytes), (const char *)p->backward.dy + at, bytes);
    b.dx = buffer_get(&buffers, bytes);
    b.gradients = NULL;
    b.workspace = f.workspace, b.workspace_size = f.workspace_size;
    b.saved = f.saved, b.saved_size = f.saved_size;
    cr_assert(device_layer_backward(p->handle, p->layer, &b) == CUMOE_SUCCESS, "%s", cumoe_last_error());
    compare_bits(report, "dx", b.dx, (const char *)p->backward.dx + at, bytes);
    report_check(report, buffer_guards_intact(&buffers));
    buffer_free_all(&buffers);
}

/* A token's bits hang on nothing but the token: alone, in company, at any position. */
Test(invariance, alone_and_in_company)
{
    const int32_t T = device_is_slow() ? 200 : 4096, stride = device_is_slow() ? 100 : 128;
    const layer_case_t sizes[] = {
        {"invariance", T, 24, 40, 16, 2, .first_token = 100, .groups = 4, .top_k_groups = 1},
        {"invariance, odd", T, 35, 37, 9, 3, .groups = 3, .top_k_groups = 3}};
    static const double no_losses[CUMOE_NUM_LOSSES] = {0};
    const uint64_t seed = random_seed("invariance", 21);
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    for (int i = 0; i < NUM_SUITE_OPTIONS * NUM_GATED; i++) {
        if (i / NUM_SUITE_OPTIONS > 2 && (i + i / NUM_SUITE_OPTIONS) % 2) continue; /* later kinds: half of them */
        random_state_t random = random_start(seed);
        const problem_options_t options = suite_options(i % NUM_SUITE_OPTIONS, GATED[i / NUM_SUITE_OPTIONS], seed);
        problem_t p;
        cr_assert(problem_create(&p, handle, &sizes[(i + i / NUM_SUITE_OPTIONS) % 2], &options, &report), "%s",
                  report.text);
        p.backward.loss_gradient = memcpy(buffer_get(&p.buffers, sizeof no_losses), no_losses, sizeof no_losses);
        if (problem_run_forward(&p, &report) && problem_run_backward(&p, &report)) {
            for (int64_t t = 0; t < T; t += 1 + random_below(&random, stride)) check_chunk(&p, t, 1, &report);
            check_chunk(&p, T - 1, 1, &report);
            static const int64_t lengths[] = {2, 3, 7, 16, 33, 100, 1000, 2049};
            for (int l = 0; l < 8 && lengths[l] < T; l++)
                check_chunk(&p, random_below(&random, T - lengths[l]), lengths[l], &report);
        }
        problem_destroy(&p);
    }
    cumoe_handle_destroy(handle);
    EXPECT_EMPTY(report);
}
