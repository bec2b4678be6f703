/* The largest number of experts of the paper, 256 groups of 512, with real values, forward and backward. The
 * reference is evaluated sparsely: a token needs its row of the primary gate and the rows of its two groups. Each
 * of these is a flat gate to tests/support/reference.h; what joins the levels (eq. 12-14) stands here. */
#include "tests/suite.h"
#include "tests/support/noise.h"
#include "tests/support/reference_formulas.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { T = 512, H = 32, I = 32, G = 256, B = 512, E = G * B, K1 = 2, K2 = 2, K = K1 * K2 };

enum { SAMPLES = 3 }; /* tokens */

static const noise_name_t NOISE = {.seed = 21, .offset = 5, .stream = 3, .first_token = 1000};
static const double LOSSES[CUMOE_NUM_LOSSES] = {0.75, 1.25}, EPSILON = (double)0.01F, MARGIN = 1e-5;

/* F32: sums of at most T + H terms, or of E with CV^2. */
static const double LIMIT = 8 * 32 * (double)FLT_EPSILON / 2;

/* What the library reads. */
typedef struct numbers {
    float x[T * H], dy[T * H];
    float *w_gate, *w_noise, w_gate_primary[G * H], w_noise_primary[G * H]; /* [E, H] */
    float *w_up, *w_down;                                                   /* [E, I, H], [E, H, I] */
} numbers_t;

typedef struct answer {
    const numbers_t *n;
    double x[T * H], dy[T * H], w_gate[G * H], w_noise[G * H], w_down[G * H * H], noise[T * G]; /* primary */
    reference_input_t in;
    reference_result_t primary;
    int32_t expert[T * K];
    double weight[T * K], dweight[T * K]; /* weights of y; <dy, E(x)> + the part of the importance */
    double local[T * K];                  /* weights inside a group */
    double y[T * H], dx[T * H];
    double *importance, *level_load, *load, *dload; /* [E] */
    double losses[2];
} answer_t;

/* A group with the tokens that chose it, as a flat gate. */
typedef struct group {
    int64_t number, tokens, choice[T]; /* choice: token * K1 + j1 */
    double *x, *dy, *noise, *w_gate, *w_noise, *w_up, *w_down;
    reference_input_t in;
    reference_result_t r;
} group_t;

static double *doubles(int64_t n)
{
    double *values = calloc((size_t)n + 1, sizeof *values);
    cr_assert_not_null(values);
    return values;
}

static float *floats(int64_t n)
{
    float *values = calloc((size_t)n + 1, sizeof *values);
    cr_assert_not_null(values);
    return values;
}

static double *widened(const float *values, int64_t n)
{
    double *wide = doubles(n);
    for (int64_t i = 0; i < n; i++) wide[i] = (double)values[i];
    return wide;
}

/* Uniform, of deviation about scale: normal numbers would take longer than all the rest. */
static void fill(random_state_t *random, float *values, int64_t n, double scale)
{
    for (int64_t i = 0; i < n; i++)
        values[i] = (float)(scale * 3.5 * ((double)(random_bits(random) >> 40) * 0x1p-24 - 0.5));
}

static void draw(random_state_t *random, numbers_t *n)
{
    n->w_gate = floats((int64_t)E * H), n->w_noise = floats((int64_t)E * H);
    n->w_up = floats((int64_t)E * I * H), n->w_down = floats((int64_t)E * H * I);
    fill(random, n->x, T * H, 1);
    fill(random, n->dy, T * H, 1);
    fill(random, n->w_gate, (int64_t)E * H, 1 / sqrt(H));
    fill(random, n->w_noise, (int64_t)E * H, 0.5 / sqrt(H));
    fill(random, n->w_gate_primary, G * H, 1 / sqrt(H));
    fill(random, n->w_noise_primary, G * H, 0.5 / sqrt(H));
    fill(random, n->w_up, (int64_t)E * I * H, 1 / sqrt(H));
    fill(random, n->w_down, (int64_t)E * H * I, 1 / sqrt(I));
}

/* ---- forward ---- */

static reference_input_t flat_gate(int64_t tokens, int64_t experts, int64_t top_k, cumoe_activation_t activation)
{
    return (reference_input_t){.gate = CUMOE_GATE_NOISY_TOPK,
                               .activation = activation,
                               .tokens = tokens,
                               .live_tokens = tokens,
                               .hidden_size = H,
                               .intermediate_size = H,
                               .experts = experts,
                               .top_k = top_k,
                               .training = true,
                               .noise_epsilon = EPSILON};
}

static void choose_groups(answer_t *a)
{
    a->in = flat_gate(T, G, K1, CUMOE_ACTIVATION_IDENTITY);
    a->in.x = a->x, a->in.dy = a->dy, a->in.w_gate = a->w_gate, a->in.w_noise = a->w_noise;
    a->in.w_down = a->w_down, a->in.noise = a->noise;
    reference_forward(&a->in, &a->primary);
}

static void open_group(const answer_t *a, int64_t number, group_t *g)
{
    const numbers_t *n = a->n;
    g->number = number;
    g->tokens = 0;
    for (int64_t c = 0; c < T * K1; c++)
        if (a->primary.expert[c] == number) g->choice[g->tokens++] = c;
    g->x = doubles(g->tokens * H), g->dy = doubles(g->tokens * H), g->noise = doubles(g->tokens * B);
    for (int64_t i = 0; i < g->tokens; i++) {
        const int64_t t = g->choice[i] / K1;
        memcpy(g->x + i * H, a->x + t * H, H * sizeof(double));
        memcpy(g->dy + i * H, a->dy + t * H, H * sizeof(double));
        noise_fill_group(NOISE, t, number, B, g->noise + i * B);
    }
    g->w_gate = widened(n->w_gate + number * B * H, B * H),
    g->w_noise = widened(n->w_noise + number * B * H, B * H);
    g->w_up = widened(n->w_up + number * B * I * H, B * I * H);
    g->w_down = widened(n->w_down + number * B * H * I, B * H * I);
    g->in = flat_gate(g->tokens, B, K2, CUMOE_ACTIVATION_SILU);
    g->in.x = g->x, g->in.dy = g->dy, g->in.noise = g->noise, g->in.w_gate = g->w_gate, g->in.w_noise = g->w_noise;
    g->in.w_up = g->w_up, g->in.w_down = g->w_down;
    cr_assert(reference_create(&g->in, &g->r));
    reference_forward(&g->in, &g->r);
}

static void close_group(group_t *g)
{
    double *const arrays[] = {g->x, g->dy, g->noise, g->w_gate, g->w_noise, g->w_up, g->w_down};
    for (int i = 0; i < 7; i++) free(arrays[i]);
    reference_destroy(&g->r);
}

/* Outputs, importance and the load inside the group; how many tokens stand too close to a kink, drawn again. */
static int64_t visit_group(answer_t *a, int64_t number, random_state_t *random)
{
    group_t g;
    int64_t close = 0;
    open_group(a, number, &g);
    for (int64_t i = 0; i < g.tokens; i++) {
        const int64_t c = g.choice[i], t = c / K1;
        if (reference_margin(&g.in, &g.r, i) < MARGIN || reference_margin(&a->in, &a->primary, t) < MARGIN) {
            fill(random, (float *)a->n->x + t * H, H, 1);
            close++;
        }
        for (int64_t j = 0; j < K2; j++) {
            const int64_t s = c * K2 + j, e = number * B + g.r.expert[i * K2 + j];
            const double *output = g.r.output + (i * K2 + j) * H;
            a->expert[s] = (int32_t)e;
            a->local[s] = g.r.weight[i * K2 + j];
            a->weight[s] = a->primary.weight[c] * a->local[s];
            a->dweight[s] = dot(H, a->dy + t * H, output);
            a->importance[e] += a->weight[s];
            add_scaled(H, a->weight[s], output, a->y + t * H);
        }
    }
    for (int64_t b = 0; b < B; b++) { /* eq. 14 */
        const int64_t e = number * B + b;
        a->level_load[e] = g.r.load[b];
        a->load[e] = g.tokens ? a->primary.load[number] * g.r.load[b] / (double)g.tokens : 0;
    }
    close_group(&g);
    return close;
}

static void find_answer(answer_t *a, random_state_t *random)
{
    int64_t close = 1;
    noise_fill_primary(NOISE, T, G, a->noise);
    for (int64_t i = 0; i < T * H; i++) a->dy[i] = (double)a->n->dy[i];
    for (int64_t i = 0; i < G * H; i++) {
        a->w_gate[i] = (double)a->n->w_gate_primary[i];
        a->w_noise[i] = (double)a->n->w_noise_primary[i];
    }
    for (int attempt = 0; close > 0; attempt++) {
        cr_assert(attempt < 10);
        for (int64_t i = 0; i < T * H; i++) a->x[i] = (double)a->n->x[i], a->y[i] = 0;
        for (int64_t e = 0; e < E; e++) a->importance[e] = 0;
        choose_groups(a);
        close = 0;
        for (int64_t g = 0; g < G; g++) close += visit_group(a, g, random);
    }
    a->losses[0] = reference_cv_squared(E, a->importance);
    a->losses[1] = reference_cv_squared(E, a->load);
}

/* ---- backward ---- */

/* 2 n / S^2 (v_i - Q / S), for all i: reference_cv_squared_gradient() adds up anew for each. */
static void cv_squared_gradient(const double *v, double scale, double *gradient)
{
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < E; i++) sum += v[i], squares += v[i] * v[i];
    for (int64_t i = 0; i < E; i++) gradient[i] = scale * 2 * E / (sum * sum) * (v[i] - squares / sum);
}

/* The primary gate: its gradients, and its part of dx. */
static void primary_backward(answer_t *a)
{
    double dload[G] = {0};
    for (int64_t e = 0; e < E; e++)
        if (a->primary.count[e / B] > 0)
            dload[e / B] += a->dload[e] * a->level_load[e] / (double)a->primary.count[e / B];
    for (int64_t t = 0; t < T; t++) {
        const reference_row_t row = reference_flat_row(&a->in, &a->primary, t);
        double dprimary[K1] = {0}, dstd[G] = {0};
        for (int64_t s = t * K; s < (t + 1) * K; s++) dprimary[s % K / K2] += a->local[s] * a->dweight[s];
        reference_softmax_backward(&row, a->primary.expert + t * K1, a->primary.weight + t * K1, dprimary, dstd);
        reference_load_backward(&row, dload, dstd);
        reference_logits_backward(&a->in, &row, dstd, a->dx + t * H);
    }
}

/* A group: the gradients of its gates and experts, and its part of dx. */
static void group_backward(answer_t *a, group_t *g)
{
    double *dload = doubles(B), *dstd = doubles(B);
    const size_t gate_size = B * H * sizeof(double);
    for (int64_t s = 0; s < g->tokens * K2; s++) g->r.weight[s] *= a->primary.weight[g->choice[s / K2]];
    reference_backward(&g->in, &g->r); /* of experts; the gates' losses are not its own */
    memset(g->r.dw_gate, 0, gate_size), memset(g->r.dw_noise, 0, gate_size);
    memset(g->r.dclean, 0, (size_t)(g->tokens * B) * sizeof(double));
    for (int64_t i = 0; i < g->tokens * K2; i++)
        add_scaled(H, 1, g->r.drows + i * H, a->dx + g->choice[i / K2] / K1 * H);
    for (int64_t b = 0; b < B; b++)
        dload[b] = a->dload[g->number * B + b] * a->primary.load[g->number] / (double)g->tokens;
    for (int64_t i = 0; i < g->tokens; i++) {
        const int64_t c = g->choice[i];
        const reference_row_t row = reference_flat_row(&g->in, &g->r, i);
        double dweight[K2];
        for (int64_t j = 0; j < K2; j++) dweight[j] = a->primary.weight[c] * a->dweight[c * K2 + j];
        memset(dstd, 0, B * sizeof *dstd);
        reference_softmax_backward(&row, g->r.expert + i * K2, a->local + c * K2, dweight, dstd);
        reference_load_backward(&row, dload, dstd);
        reference_logits_backward(&g->in, &row, dstd, a->dx + c / K1 * H);
    }
    free(dload);
    free(dstd);
}

/* ---- the library ---- */

typedef struct run {
    cumoe_handle_t *handle;
    cumoe_layer_t *layer;
    cumoe_weights_t weights, gradients;
    cumoe_forward_args_t forward;
    cumoe_backward_args_t backward;
    buffer_list_t buffers;
} run_t;

static void *piece(run_t *run, int64_t n, size_t size)
{
    return buffer_get(&run->buffers, (size_t)n * size);
}

static void create_layer(run_t *run)
{
    cumoe_config_t config;
    cr_assert_eq(cumoe_config_init(&config), CUMOE_SUCCESS);
    config.hidden_size = H, config.intermediate_size = I, config.num_experts = E, config.top_k = K;
    config.gate = CUMOE_GATE_HIERARCHICAL, config.num_groups = G, config.top_k_groups = K1;
    config.activation = CUMOE_ACTIVATION_SILU;
    config.noise_stream = NOISE.stream;
    for (int l = 0; l < CUMOE_NUM_LOSSES; l++) config.loss_weight[l] = (float)LOSSES[l];
    cr_assert_eq(cumoe_layer_create(&run->layer, run->handle, &config), CUMOE_SUCCESS, "%s", cumoe_last_error());
    cr_assert_eq(cumoe_layer_buffer_sizes(run->layer, T, &run->forward.workspace_size, &run->forward.saved_size),
                 CUMOE_SUCCESS);
}

static void call(run_t *run, const numbers_t *n)
{
    const size_t real = sizeof(float);
    run->handle = suite_handle();
    create_layer(run);
    run->weights = (cumoe_weights_t){.struct_size = sizeof run->weights,
                                     .w_gate = n->w_gate,
                                     .w_noise = n->w_noise,
                                     .w_gate_primary = (void *)n->w_gate_primary,
                                     .w_noise_primary = (void *)n->w_noise_primary,
                                     .w_up = n->w_up,
                                     .w_down = n->w_down};
    run->gradients = (cumoe_weights_t){.struct_size = sizeof run->gradients,
                                       .w_gate = piece(run, (int64_t)E * H, real),
                                       .w_noise = piece(run, (int64_t)E * H, real),
                                       .w_gate_primary = piece(run, G * H, real),
                                       .w_noise_primary = piece(run, G * H, real),
                                       .w_up = piece(run, (int64_t)E * I * H, real),
                                       .w_down = piece(run, (int64_t)E * H * I, real)};
    cumoe_forward_args_t *f = &run->forward;
    f->struct_size = sizeof *f, f->num_tokens = T, f->weights = &run->weights, f->x = n->x;
    f->y = piece(run, T * H, real), f->training = 1;
    f->seed = NOISE.seed, f->offset = NOISE.offset, f->first_token = NOISE.first_token;
    f->chosen_expert = piece(run, T * K, sizeof(int32_t)), f->chosen_weight = piece(run, T * K, real);
    f->importance = piece(run, E, real), f->load = piece(run, E, real);
    f->losses = piece(run, CUMOE_NUM_LOSSES, real);
    f->workspace = piece(run, (int64_t)f->workspace_size, 1), f->saved = piece(run, (int64_t)f->saved_size, 1);
    cr_assert_eq(device_layer_forward(run->handle, run->layer, f), CUMOE_SUCCESS, "%s", cumoe_last_error());
    run->backward = (cumoe_backward_args_t){.struct_size = sizeof run->backward,
                                            .num_tokens = T,
                                            .weights = &run->weights,
                                            .x = n->x,
                                            .dy = n->dy,
                                            .training = 1,
                                            .dx = piece(run, T * H, real),
                                            .gradients = &run->gradients,
                                            .workspace = f->workspace,
                                            .workspace_size = f->workspace_size,
                                            .saved = f->saved,
                                            .saved_size = f->saved_size};
    cr_assert_eq(device_layer_backward(run->handle, run->layer, &run->backward), CUMOE_SUCCESS, "%s",
                 cumoe_last_error());
    cr_assert(buffer_guards_intact(&run->buffers));
}

static void compare(report_t *report, const char *what, const void *actual, int64_t first, int64_t n,
                    const double *expected)
{
    compare_vector(report, what, (const float *)actual + first, CUMOE_F32, n, expected, LIMIT);
}

static void check_forward(const answer_t *a, const run_t *run, report_t *report)
{
    const cumoe_forward_args_t *f = &run->forward;
    compare_bits(report, "chosen_expert", f->chosen_expert, a->expert, sizeof a->expert);
    compare(report, "chosen_weight", f->chosen_weight, 0, T * K, a->weight);
    compare(report, "y", f->y, 0, T * H, a->y);
    compare(report, "importance", f->importance, 0, E, a->importance);
    compare(report, "load", f->load, 0, E, a->load);
    compare(report, "losses", f->losses, 0, 2, a->losses);
}

static void check_group(answer_t *a, const run_t *run, int64_t number, report_t *report)
{
    const cumoe_weights_t *d = &run->gradients;
    group_t g;
    open_group(a, number, &g);
    group_backward(a, &g);
    compare(report, "w_gate", d->w_gate, number * B * H, B * H, g.r.dw_gate);
    compare(report, "w_noise", d->w_noise, number * B * H, B * H, g.r.dw_noise);
    compare(report, "w_up", d->w_up, number * B * I * H, B * I * H, g.r.dw_up);
    compare(report, "w_down", d->w_down, number * B * H * I, B * H * I, g.r.dw_down);
    close_group(&g);
}

/* The groups of the sampled tokens, each once; then all parts of their dx are there. */
static void check_backward(answer_t *a, const run_t *run, report_t *report)
{
    bool visited[G] = {false};
    double *dimportance = doubles(E);
    cv_squared_gradient(a->importance, LOSSES[0], dimportance);
    cv_squared_gradient(a->load, LOSSES[1], a->dload);
    for (int64_t s = 0; s < T * K; s++) a->dweight[s] += dimportance[a->expert[s]];
    free(dimportance);
    primary_backward(a);
    compare(report, "w_gate_primary", run->gradients.w_gate_primary, 0, G * H, a->primary.dw_gate);
    compare(report, "w_noise_primary", run->gradients.w_noise_primary, 0, G * H, a->primary.dw_noise);
    for (int64_t i = 0; i < SAMPLES; i++)
        for (int64_t c = i * (T - 1) / (SAMPLES - 1) * K1, end = c + K1; c < end; c++) {
            const int32_t group = a->primary.expert[c];
            if (!visited[group]) check_group(a, run, group, report);
            visited[group] = true;
        }
    for (int64_t i = 0; i < SAMPLES; i++) {
        const int64_t t = i * (T - 1) / (SAMPLES - 1);
        compare(report, "dx", run->backward.dx, t * H, H, a->dx + t * H);
    }
}

/* Experts that nobody chose: zeros, written. */
static void check_idle(const answer_t *a, const run_t *run, report_t *report)
{
    bool *chosen = calloc(E, sizeof *chosen);
    int64_t wrong = 0;
    for (int64_t s = 0; s < T * K; s++) chosen[a->expert[s]] = true;
    for (int64_t i = 0; i < (int64_t)E * I * H; i++)
        wrong += !chosen[i / (I * H)] &&
                 (((float *)run->gradients.w_up)[i] != 0 || ((float *)run->gradients.w_down)[i] != 0);
    report_check(report, wrong == 0);
    free(chosen);
}

Test(e131072, hierarchical_in_training)
{
    random_state_t random = random_start(random_seed("e131072", 1));
    static numbers_t numbers;
    static answer_t answer;
    run_t run = {0};
    report_t report = {0};
    draw(&random, &numbers);
    answer.n = &numbers;
    answer.importance = doubles(E), answer.level_load = doubles(E), answer.load = doubles(E),
    answer.dload = doubles(E);
    answer.in = flat_gate(T, G, K1, CUMOE_ACTIVATION_IDENTITY);
    cr_assert(reference_create(&answer.in, &answer.primary));
    find_answer(&answer, &random);
    call(&run, &numbers);
    check_forward(&answer, &run, &report);
    check_backward(&answer, &run, &report);
    check_idle(&answer, &run, &report);
    EXPECT_EMPTY(report);
    buffer_free_all(&run.buffers);
    cumoe_layer_destroy(run.layer);
    cumoe_handle_destroy(run.handle);
    reference_destroy(&answer.primary);
    double *const arrays[] = {answer.importance, answer.level_load, answer.load, answer.dload};
    for (int i = 0; i < 4; i++) free(arrays[i]);
    float *const weights[] = {numbers.w_gate, numbers.w_noise, numbers.w_up, numbers.w_down};
    for (int i = 0; i < 4; i++) free(weights[i]);
}

/* Scratch of the gate: 4 * T * (G + K1 * E / G) floats and maps, whatever E is. Beside them the gate packs panels
 * per thread, and a row may take at least 256 columns of dx. */
Test(e131072, workspace_of_the_gate)
{
    enum { TOKENS = 4096 };
    static const int32_t shapes[][4] = {/* E, G, K, K1 */
                                        {E, G, 4, 2},
                                        {4096, 64, 4, 2},
                                        {65536, 256, 8, 4},
                                        {E, 1024, 4, 2},
                                        {512, 8, 2, 1}};
    static const int32_t widths[] = {32, 1024};
    cumoe_handle_t *handle = suite_handle();
    for (size_t i = 0; i < 2 * sizeof shapes / sizeof *shapes; i++) {
        const int32_t *shape = shapes[i / 2], groups = shape[1], k1 = shape[3];
        cumoe_config_t config;
        cumoe_layer_t *layer;
        cr_assert_eq(cumoe_config_init(&config), CUMOE_SUCCESS);
        config.hidden_size = widths[i % 2], config.intermediate_size = 8;
        config.num_experts = shape[0], config.top_k = shape[2];
        config.gate = CUMOE_GATE_HIERARCHICAL, config.num_groups = groups, config.top_k_groups = k1;
        config.max_threads = 2;
        cr_assert_eq(cumoe_layer_create(&layer, handle, &config), CUMOE_SUCCESS, "%s", cumoe_last_error());
        const size_t columns = (size_t)groups + (size_t)k1 * (size_t)(shape[0] / groups);
        const size_t rows_of_dx = (size_t)k1 * (size_t)(widths[i % 2] < 256 ? widths[i % 2] : 256);
        const size_t maps = (size_t)TOKENS * (size_t)shape[2] * 32 + (size_t)shape[0] * 32 + (size_t)groups * 64;
        const size_t panels = (size_t)4 << 20;
        const size_t most = 4 * TOKENS * (columns + rows_of_dx / 4) * sizeof(float) + maps + panels;
        for (int backward = 0; backward < 2; backward++) {
            size_t size = 0;
            const cumoe_stage_t stage = backward ? CUMOE_STAGE_GATE_BACKWARD : CUMOE_STAGE_GATE;
            cr_assert_eq(cumoe_stage_workspace_size(layer, stage, TOKENS, &size), CUMOE_SUCCESS);
            cr_expect(size <= most, "E = %d, G = %d, K1 = %d, H = %d, backward %d: %zu bytes, at most %zu",
                      shape[0], groups, k1, widths[i % 2], backward, size, most);
        }
        cumoe_layer_destroy(layer);
    }
    cumoe_handle_destroy(handle);
}
