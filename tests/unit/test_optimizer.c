/* The optimizer step against its formulas in double precision, in every type and layout, and what it promises
 * beside them. */
#include "optimizer_problem.h"

#include <math.h>

/* Four steps with numbers that change. */
static void several_steps(optimizer_problem_t *p, report_t *report)
{
    p->args.weight_decay = p->layer.options.bias ? 0.1f : 0;
    for (int64_t t = 1; t <= 4; t++) {
        p->args.values.learning_rate = 0.003 * (double)t;
        p->args.values.gradient_scale = t % 2 ? 0.3 : 0;
        optimizer_step(p, t, report);
    }
}

/* ---- the formulas ---- */

/* Of config, w_gate and gradients. */
static const cumoe_dtype_t DTYPES[][3] = {
    {CUMOE_F64},
    {CUMOE_F32},
    {CUMOE_BF16},
    {CUMOE_BF16, CUMOE_BF16, CUMOE_F32},
    {CUMOE_F16},
    {CUMOE_F16, CUMOE_F16, CUMOE_F32},
    {CUMOE_BF16, CUMOE_F32, CUMOE_BF16},
};

static const struct {
    cumoe_activation_t activation;
    cumoe_glu_placement_t glu, gradient_glu;
} PLACEMENTS[] = {
    {CUMOE_ACTIVATION_RELU, CUMOE_GLU_SEPARATE, CUMOE_GLU_SEPARATE},
    {CUMOE_ACTIVATION_IDENTITY, CUMOE_GLU_SEPARATE, CUMOE_GLU_SEPARATE},
    {CUMOE_ACTIVATION_SWIGLU, CUMOE_GLU_SEPARATE, CUMOE_GLU_LAST},
    {CUMOE_ACTIVATION_GEGLU, CUMOE_GLU_FIRST, CUMOE_GLU_SEPARATE},
    {CUMOE_ACTIVATION_SWIGLU_CLAMPED, CUMOE_GLU_LAST, CUMOE_GLU_INTERLEAVED},
    {CUMOE_ACTIVATION_SWIGLU, CUMOE_GLU_INTERLEAVED, CUMOE_GLU_FIRST},
};

Test(optimizer, every_type_and_layout)
{
    int number = 0;
    for (int optimizer = 0; optimizer < COUNT(OPTIMIZERS); optimizer++)
        for (int type = 0; type < COUNT(DTYPES); type++)
            for (int placement = 0; placement < COUNT(PLACEMENTS); placement++)
                for (int layout = LAYOUT_PLAIN; layout <= LAYOUT_TRANSPOSED; layout++, number++) {
                    if (device_is_slow() && (number / 3 + layout) % 3 != optimizer % 3) continue;
                    const optimizer_case_t c = {.optimizer = OPTIMIZERS[optimizer],
                                                .options = {.dtype = DTYPES[type][0],
                                                            .gate_dtype = DTYPES[type][1],
                                                            .gradient_dtype = DTYPES[type][2],
                                                            .activation = PLACEMENTS[placement].activation,
                                                            .bias = number % 2,
                                                            .variant = GATE_VARIANTS[number % NUM_GATE_VARIANTS],
                                                            .seed = (uint64_t)number},
                                                .glu = PLACEMENTS[placement].glu,
                                                .gradient_glu = PLACEMENTS[placement].gradient_glu,
                                                .layout = (case_layout_t)layout,
                                                .gradient_layout = (case_layout_t)((layout + number / 3) % 3)};
                    with_optimizer(&c, several_steps);
                }
}

/* One row, one column, one expert; more columns and rows than are taken at a time. */
Test(optimizer, sizes)
{
    static const int32_t sizes[][3] = {{1, 1, 1},    {1, 19, 2},   {19, 1, 2},  {16, 32, 4},   {33, 65, 9},
                                       {9001, 3, 2}, {2, 8201, 2}, {65, 40, 1}, {130, 140, 2}, {100, 1100, 1}};
    for (int optimizer = 0; optimizer < COUNT(OPTIMIZERS); optimizer++)
        for (int i = 0; i < COUNT(sizes) * 3; i++) {
            const int32_t *size = sizes[i / 3];
            if (device_is_slow() && (i / 3 + i) % 3 != optimizer % 3) continue;
            const optimizer_case_t c = {
                .H = size[0],
                .I = size[1],
                .E = size[2],
                .optimizer = OPTIMIZERS[optimizer],
                .layout = (case_layout_t)(i % 3),
                .options = {.dtype = i % 2 ? CUMOE_BF16 : CUMOE_F32, .max_threads = 1 + (i % 3 == 0)}};
            with_optimizer(&c, several_steps);
        }
}

/* Where there is one expert the distance between experts says nothing. */
static void forget_expert_strides(optimizer_problem_t *p, report_t *report)
{
    p->layer.weights.up_expert_stride = p->layer.weights.down_expert_stride = 0;
    several_steps(p, report);
}

Test(optimizer, padded_rows_of_one_expert)
{
    for (int optimizer = 0; optimizer < COUNT(OPTIMIZERS); optimizer++) {
        const optimizer_case_t c = {.E = 1, .optimizer = OPTIMIZERS[optimizer], .layout = LAYOUT_PADDED};
        with_optimizer(&c, forget_expert_strides);
    }
}

/* Squares far below the 1e-30 of the means, and far above 1. */
Test(optimizer, gradients_of_any_size)
{
    static const double sizes[] = {1e-25, 1e-15, 1e-7, 1e9, 1e16};
    for (int optimizer = 0; optimizer < COUNT(OPTIMIZERS); optimizer++)
        for (int i = 0; i < COUNT(sizes); i++) {
            const optimizer_case_t c = {.optimizer = OPTIMIZERS[optimizer], .gradient_size = sizes[i]};
            with_optimizer(&c, several_steps);
        }
}

static void other_numbers(optimizer_problem_t *p, report_t *report)
{
    p->args.beta1 = 0.5f;
    p->args.beta2 = 0.75f;
    p->args.epsilon = 0.25f;
    p->args.weight_decay = 0.5f;
    p->args.values.learning_rate = 0.125;
    for (int64_t t = 1; t <= 5; t++) optimizer_step(p, t, report);
    for (int64_t t = 1000000; t <= 1000001; t++) optimizer_step(p, t, report);
    p->args.values.learning_rate = 0;
    optimizer_step(p, 6, report);
}

Test(optimizer, every_number_of_the_arguments)
{
    for (int optimizer = 0; optimizer < COUNT(OPTIMIZERS); optimizer++)
        for (int f64 = 0; f64 < 2; f64++) {
            const optimizer_case_t c = {.optimizer = OPTIMIZERS[optimizer],
                                        .options = {.dtype = f64 ? CUMOE_F64 : CUMOE_F32, .bias = true}};
            with_optimizer(&c, other_numbers);
        }
}

/* g_ij = s_t a_i b_j in every step: r_i c_j / mean(r) is the v of Adam. With beta1 next to nothing m is g, and the
 * formulas of Adam must give what the factored form gives. */
static void rank_one(optimizer_problem_t *p, report_t *report)
{
    p->args.beta1 = p->args.epsilon = 1e-30f;
    for (int64_t t = 1; t <= 5; t++) {
        const double scale = (double)(1 + random_below(&p->random, 5));
        for (problem_matrix_t m = 0; m < NUM_MATRICES; m++) {
            const optimizer_numbers_t *n = &p->numbers[m];
            for (int64_t i = 0; i < n->elements; i++) {
                const int64_t row = i / n->cols % n->rows, col = i % n->cols;
                n->gradient[i] = scale * (double)(1 + row * 5 % 7) * (double)(col * 3 % 8 - 3) / 8;
            }
            if (n->elements) problem_matrix_set(&p->layer, &p->layer.gradients, m, n->gradient);
        }
        p->args.values.step = t;
        p->args.optimizer = CUMOE_OPTIMIZER_ADAM;
        optimizer_expect_step(p);
        p->args.optimizer = CUMOE_OPTIMIZER_FACTORED_ADAM;
        optimizer_run_step(p, report);
        optimizer_check(p, report);
    }
}

Test(optimizer, factored_is_adam_where_the_squares_have_rank_one)
{
    optimizer_case_t c = {.optimizer = CUMOE_OPTIMIZER_FACTORED_ADAM,
                          .options = {.variant = {"external", CUMOE_GATE_EXTERNAL, 1}}};
    with_optimizer(&c, rank_one);
    c.options.dtype = CUMOE_BF16;
    c.options.gradient_dtype = CUMOE_F32;
    with_optimizer(&c, rank_one);
}

/* ---- arrays that are not there, steps that are not taken ---- */

/* Steps 1 and 2 without the gradient of one array, which keeps its values; then it is like a parameter whose
 * moments are 0. */
static void one_gradient_later(optimizer_problem_t *p, report_t *report)
{
    const cumoe_weights_t all = p->layer.gradients;
    for (problem_matrix_t late = 0; late < NUM_MATRICES; late++) {
        if (!optimizer_has_gradient(p, late)) continue;
        *(void **)problem_matrix_pointer(&p->layer.gradients, late) = NULL;
        buffer_poison(p->args.state, p->args.state_size);
        p->args.weight_decay = 0.5f;
        optimizer_step(p, 1, report);
        optimizer_step(p, 2, report);
        p->layer.gradients = all;
        optimizer_step(p, 3, report);
        optimizer_step(p, 4, report);
    }
}

Test(optimizer, an_array_without_a_gradient_keeps_its_values)
{
    for (int optimizer = 0; optimizer < COUNT(OPTIMIZERS); optimizer++)
        for (int glu = CUMOE_GLU_SEPARATE; glu <= CUMOE_GLU_FIRST; glu++) {
            const optimizer_case_t c = {.optimizer = OPTIMIZERS[optimizer],
                                        .options = {.dtype = glu ? CUMOE_F16 : CUMOE_F32,
                                                    .activation = CUMOE_ACTIVATION_SWIGLU,
                                                    .bias = true},
                                        .gradient_glu = (cumoe_glu_placement_t)glu,
                                        .layout = LAYOUT_PADDED};
            with_optimizer(&c, one_gradient_later);
        }
}

/* Even the state keeps its bits, and not even a first step writes it. */
static void skipped_steps(optimizer_problem_t *p, report_t *report)
{
    cumoe_optimizer_call_t *call = buffer_get_aligned(&p->layer.buffers, sizeof *call, 8);
    void *state = buffer_get(&p->layer.buffers, p->args.state_size);
    p->args.values.skip = 1;
    optimizer_run_idle_step(p, report);
    report_check(report, buffer_is_poison(p->args.state, p->args.state_size));
    p->args.values.skip = 0;
    optimizer_step(p, 1, report);
    memcpy(state, p->args.state, p->args.state_size);
    *call = (cumoe_optimizer_call_t){.learning_rate = (double)NAN, .gradient_scale = -1, .step = 2, .skip = -5};
    p->args.call = call;
    p->gradient_size = (double)NAN;
    optimizer_draw_gradients(p);
    optimizer_run_idle_step(p, report);
    compare_bits(report, "state", p->args.state, state, p->args.state_size);
    p->args.call = NULL;
    p->gradient_size = 1;
    optimizer_step(p, 2, report);
}

Test(optimizer, skip_leaves_everything)
{
    for (int optimizer = 0; optimizer < COUNT(OPTIMIZERS); optimizer++) {
        const optimizer_case_t c = {.optimizer = OPTIMIZERS[optimizer],
                                    .options = {.dtype = CUMOE_BF16, .bias = true}};
        with_optimizer(&c, skipped_steps);
    }
}

static void zero_gradients(optimizer_problem_t *p, report_t *report)
{
    for (p->args.values.step = 1; p->args.values.step <= 3; p->args.values.step++) {
        optimizer_expect_step(p);
        optimizer_run_idle_step(p, report);
    }
    optimizer_step(p, 4, report); /* the next gradient finds a sound state */
}

Test(optimizer, gradients_of_zero_change_nothing)
{
    for (int optimizer = 0; optimizer < COUNT(OPTIMIZERS); optimizer++)
        for (int type = 0; type < COUNT(DTYPES); type++) {
            const optimizer_case_t c = {.optimizer = OPTIMIZERS[optimizer],
                                        .options = {.dtype = DTYPES[type][0], .gradient_dtype = DTYPES[type][2]}};
            with_optimizer(&c, zero_gradients);
        }
}

/* A gradient that is NaN shows: in its parameter, or, by the means, in all of its expert's matrix. */
static void nan_gradient(optimizer_problem_t *p, report_t *report)
{
    const optimizer_numbers_t *up = &p->numbers[MATRIX_UP], *down = &p->numbers[MATRIX_DOWN];
    const int64_t of_expert = up->rows * up->cols, at = of_expert + 5;
    optimizer_draw_gradients(p);
    up->gradient[at] = (double)NAN;
    problem_matrix_set(&p->layer, &p->layer.gradients, MATRIX_UP, up->gradient);
    optimizer_run_step(p, report);
    problem_matrix_get(&p->layer, &p->layer.weights, MATRIX_UP, up->value);
    problem_matrix_get(&p->layer, &p->layer.weights, MATRIX_DOWN, down->value);
    for (int64_t i = 0; i < up->elements; i++) {
        const bool wanted = p->args.optimizer == CUMOE_OPTIMIZER_ADAM ? i == at : i / of_expert == 1;
        if (isnan(up->value[i]) != wanted)
            report_fail(report, "w_up[%lld] should be %s", (long long)i, wanted ? "NaN" : "a number");
    }
    for (int64_t i = 0; i < down->elements; i++) report_check(report, isfinite(down->value[i]));
}

Test(optimizer, a_nan_shows_in_the_parameters)
{
    for (int optimizer = 0; optimizer < COUNT(OPTIMIZERS); optimizer++)
        for (int type = 0; type < COUNT(DTYPES); type++) {
            const optimizer_case_t c = {.optimizer = OPTIMIZERS[optimizer],
                                        .options = {.dtype = DTYPES[type][0], .gradient_dtype = DTYPES[type][2]}};
            with_optimizer(&c, nan_gradient);
        }
}
