/* The reference against itself: its gradients, written by hand, are the central differences of its forward pass. */
#include "tests/support/compare.h"
#include "tests/support/random.h"
#include "tests/support/reference.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { T = 7, H = 5, I = 4, MAX_E = 6 };

/* All inputs of one case, perturbed in place. */
typedef struct numbers {
    double x[T * H], dy[T * H], noise[T * MAX_E], index_weight[T * MAX_E];
    double w_gate[MAX_E * H], w_noise[MAX_E * H], w_up[MAX_E * I * H], w_glu[MAX_E * I * H];
    double w_down[MAX_E * H * H], b_up[MAX_E * I], b_glu[MAX_E * I], b_down[MAX_E * H]; /* IDENTITY: I = H */
    double noise_primary[T * MAX_E], w_gate_primary[MAX_E * H], w_noise_primary[MAX_E * H];
    double thresholds[MAX_E], gate_bias[MAX_E];
    int64_t index[T * MAX_E];
    uint8_t mask[T];
} numbers_t;

static void fill(random_state_t *random, double *values, size_t n, double scale)
{
    for (size_t i = 0; i < n; i++) values[i] = scale * random_normal(random);
}

static void fill_numbers(random_state_t *random, numbers_t *n, int64_t experts)
{
    fill(random, n->x, T * H, 1);
    fill(random, n->dy, T * H, 1);
    fill(random, n->noise, T * MAX_E, 1);
    fill(random, n->index_weight, T * MAX_E, 1);
    fill(random, n->w_gate, MAX_E * H, 0.5);
    fill(random, n->w_noise, MAX_E * H, 0.5);
    fill(random, n->w_up, MAX_E * I * H, 0.5);
    fill(random, n->w_glu, MAX_E * I * H, 0.5);
    fill(random, n->w_down, MAX_E * H * H, 0.5);
    fill(random, n->b_up, MAX_E * I, 1);
    fill(random, n->b_glu, MAX_E * I, 1);
    fill(random, n->b_down, MAX_E * H, 1);
    fill(random, n->noise_primary, T * MAX_E, 1);
    fill(random, n->w_gate_primary, MAX_E * H, 0.5);
    fill(random, n->w_noise_primary, MAX_E * H, 0.5);
    fill(random, n->thresholds, MAX_E, 0.3);
    fill(random, n->gate_bias, MAX_E, 0.2);
    for (int e = 0; e < MAX_E; e++) n->thresholds[e] = exp(n->thresholds[e]) / (double)experts;
    for (int s = 0; s < T * MAX_E; s++) n->index[s] = random_below(random, experts + 2) - 1;
    for (int t = 0; t < T; t++) n->mask[t] = t != 2;
}

static double total(const reference_input_t *in, reference_result_t *scratch)
{
    reference_forward(in, scratch);
    return reference_total(in, scratch);
}

/* Central differences of every element of one array against its gradient. */
static void check_array(const reference_input_t *in, reference_result_t *scratch, const char *what, double *values,
                        const double *gradient, size_t n, report_t *report)
{
    const double step = 1e-5;
    double *differences = calloc(n, sizeof *differences);
    cr_assert_not_null(differences);
    for (size_t i = 0; i < n; i++) {
        const double value = values[i];
        values[i] = value + step;
        const double above = total(in, scratch);
        values[i] = value - step;
        const double below = total(in, scratch);
        values[i] = value;
        differences[i] = (above - below) / (2 * step);
    }
    compare_scaled(report, what, (int64_t)n, gradient, differences, NULL, 1e-7);
    free(differences);
}

static void redraw_close_tokens(random_state_t *random, reference_input_t *in, numbers_t *n, reference_result_t *r)
{
    for (int close = 1; close > 0;) {
        close = 0;
        reference_forward(in, r);
        for (int t = 0; t < T; t++)
            if (reference_margin(in, r, t) < 1e-3) {
                fill(random, n->x + t * H, H, 1);
                close++;
            }
    }
}

static void check_gate_arrays(const reference_input_t *in, reference_result_t *scratch, numbers_t *n,
                              const reference_result_t *r, report_t *report)
{
    const size_t gate = (size_t)in->experts * H, primary = (size_t)in->groups * H;
    check_array(in, scratch, "w_gate", n->w_gate, r->dw_gate, gate, report);
    check_array(in, scratch, "w_noise", n->w_noise, r->dw_noise, gate, report);
    check_array(in, scratch, "w_gate_primary", n->w_gate_primary, r->dw_gate_primary, primary, report);
    check_array(in, scratch, "w_noise_primary", n->w_noise_primary, r->dw_noise_primary, primary, report);
}

/* The loss THRESHOLD has a part in the gradient of the thresholds, and in no other. */
static void check_thresholds(reference_input_t in, reference_result_t *scratch, numbers_t *n, report_t *report)
{
    reference_result_t r;
    in.loss_gradient[CUMOE_LOSS_THRESHOLD] = 1.25;
    cr_assert(reference_create(&in, &r));
    reference_forward(&in, &r);
    reference_backward(&in, &r);
    double largest = 0;
    for (int64_t e = 0; e < in.experts; e++) largest = fmax(largest, fabs(r.dthresholds[e]));
    if (in.experts > 1) report_check(report, (largest > 0) == in.training);
    check_array(&in, scratch, "thresholds", n->thresholds, r.dthresholds, (size_t)in.experts, report);
    reference_destroy(&r);
}

static void check_case(reference_input_t in, bool bias, uint64_t seed, report_t *report)
{
    random_state_t random = random_start(seed);
    numbers_t n;
    fill_numbers(&random, &n, in.experts);
    const bool has_up = in.activation != CUMOE_ACTIVATION_IDENTITY;
    in.tokens = T, in.live_tokens = T - 1, in.hidden_size = H, in.intermediate_size = has_up ? I : H;
    in.swiglu_limit = 0.75, in.swiglu_alpha = 1.5, in.swiglu_offset = 0.625;
    in.token_mask = n.mask, in.noise = n.noise, in.noise_primary = n.noise_primary, in.noise_epsilon = 0.01;
    in.x = n.x, in.dy = n.dy, in.index = n.index, in.index_weight = n.index_weight;
    in.w_gate = n.w_gate, in.w_noise = n.w_noise, in.w_down = n.w_down;
    in.w_gate_primary = n.w_gate_primary, in.w_noise_primary = n.w_noise_primary, in.thresholds = n.thresholds;
    if (in.gate == CUMOE_GATE_SIGMOID_TOPK && in.top_k != 2) in.gate_bias = n.gate_bias;
    if (has_up) in.w_up = n.w_up, in.w_glu = n.w_glu;
    if (bias) in.b_up = n.b_up, in.b_glu = n.b_glu, in.b_down = n.b_down;

    reference_result_t r, scratch;
    cr_assert(reference_create(&in, &r) && reference_create(&in, &scratch));
    redraw_close_tokens(&random, &in, &n, &r);
    reference_backward(&in, &r);
    const size_t E = (size_t)in.experts, down = E * H * (size_t)in.intermediate_size;
    check_array(&in, &scratch, "x", n.x, r.dx, T * H, report);
    check_array(&in, &scratch, "w_up", n.w_up, r.dw_up, E * I * H, report);
    check_array(&in, &scratch, "w_glu", n.w_glu, r.dw_glu, E * I * H, report);
    check_array(&in, &scratch, "w_down", n.w_down, r.dw_down, down, report);
    if (bias && has_up) check_array(&in, &scratch, "b_up", n.b_up, r.db_up, E * I, report);
    if (bias && has_up) check_array(&in, &scratch, "b_glu", n.b_glu, r.db_glu, E * I, report);
    if (bias) check_array(&in, &scratch, "b_down", n.b_down, r.db_down, E * H, report);
    if (in.gate == CUMOE_GATE_EXTERNAL)
        check_array(&in, &scratch, "index_weight", n.index_weight, r.dweight, (size_t)(T * in.top_k), report);
    else
        check_gate_arrays(&in, &scratch, &n, &r, report);
    if (in.gate == CUMOE_GATE_BALANCED) check_thresholds(in, &scratch, &n, report);
    reference_destroy(&r);
    reference_destroy(&scratch);
}

typedef struct gate_sizes {
    int64_t experts, top_k, groups, top_k_groups;
} gate_sizes_t;

/* With every loss alone, with none and with all. */
static void check_gate(reference_input_t gate, const gate_sizes_t *sizes, int num_sizes)
{
    static const cumoe_loss_t losses[] = {CUMOE_LOSS_IMPORTANCE, CUMOE_LOSS_LOAD, CUMOE_LOSS_SWITCH, CUMOE_LOSS_Z};
    static const double gradients[] = {1.5, 0.75, 0.625, 0.375};
    static const int combinations[] = {0, 1, 2, 4, 8, 15};
    const uint64_t seed = random_seed("reference", 1);
    report_t report = {0};
    for (int i = 0; i < num_sizes; i++)
        for (int c = 0; c < 6; c++)
            for (int glu = 0; glu < 2; glu++) {
                char name[96];
                snprintf(name, sizeof name, "E = %d, K = %d, G = %d, K1 = %d, losses %d, glu %d",
                         (int)sizes[i].experts, (int)sizes[i].top_k, (int)sizes[i].groups,
                         (int)sizes[i].top_k_groups, combinations[c], glu);
                report.context = name;
                reference_input_t in = gate;
                in.experts = sizes[i].experts, in.top_k = sizes[i].top_k;
                in.groups = sizes[i].groups, in.top_k_groups = sizes[i].top_k_groups;
                in.activation = glu ? CUMOE_ACTIVATION_SWIGLU : CUMOE_ACTIVATION_RELU;
                for (int l = 0; l < 4; l++)
                    if (combinations[c] >> l & 1) in.loss_gradient[losses[l]] = gradients[l];
                check_case(in, false, seed, &report);
            }
    cr_expect(report.failures == 0, "%s", report.text);
}

static const gate_sizes_t TOP_K_SIZES[] = {{5, 2}, {5, 1}, {5, 4}, {3, 3}, {1, 1}};
static const gate_sizes_t DENSE_SIZES[] = {{5, 5}, {1, 1}};

/* K1 < G and K2 < B; K2 = B; K1 = G; both; one group; groups of one expert; one expert */
static const gate_sizes_t HIERARCHICAL_SIZES[] = {{6, 2, 3, 2}, {6, 4, 3, 2}, {6, 2, 2, 1},
                                                  {6, 2, 2, 2}, {4, 4, 2, 2}, {6, 2, 1, 1},
                                                  {6, 2, 6, 2}, {6, 1, 2, 1}, {1, 1, 1, 1}};

enum { NUM_HIERARCHICAL_SIZES = sizeof HIERARCHICAL_SIZES / sizeof *HIERARCHICAL_SIZES };

Test(reference, gradients_of_noisy_topk)
{
    for (int training = 0; training < 2; training++)
        check_gate((reference_input_t){.gate = CUMOE_GATE_NOISY_TOPK, .training = training}, TOP_K_SIZES, 5);
}

Test(reference, gradients_of_softmax)
{
    check_gate((reference_input_t){.gate = CUMOE_GATE_SOFTMAX, .training = true}, DENSE_SIZES, 2);
}

Test(reference, gradients_of_external)
{
    check_gate((reference_input_t){.gate = CUMOE_GATE_EXTERNAL, .training = true}, TOP_K_SIZES, 5);
}

Test(reference, gradients_of_softmax_topk)
{
    for (int renormalize = 0; renormalize < 2; renormalize++)
        check_gate((reference_input_t){.gate = CUMOE_GATE_SOFTMAX_TOPK, .renormalize = renormalize}, TOP_K_SIZES,
                   5);
}

Test(reference, gradients_of_sigmoid_topk)
{
    for (int renormalize = 0; renormalize < 2; renormalize++)
        check_gate((reference_input_t){.gate = CUMOE_GATE_SIGMOID_TOPK, .renormalize = renormalize}, TOP_K_SIZES,
                   5);
}

Test(reference, gradients_of_hierarchical)
{
    for (int training = 0; training < 2; training++)
        check_gate((reference_input_t){.gate = CUMOE_GATE_HIERARCHICAL, .training = training}, HIERARCHICAL_SIZES,
                   NUM_HIERARCHICAL_SIZES);
}

Test(reference, gradients_of_balanced)
{
    for (int training = 0; training < 2; training++)
        for (int64_t max_rows = 0; max_rows < 5; max_rows += 4)
            check_gate((reference_input_t){.gate = CUMOE_GATE_BALANCED, .training = training, .max_rows = max_rows},
                       TOP_K_SIZES, 5);
}

Test(reference, gradients_of_every_activation)
{
    const uint64_t seed = random_seed("activations", 2);
    report_t report = {0};
    for (int activation = 0; activation < CUMOE_NUM_ACTIVATIONS; activation++)
        for (int bias = 0; bias < 2; bias++)
            for (int external = 0; external < 2; external++) {
                char name[96];
                snprintf(name, sizeof name, "activation %d, bias %d, external %d", activation, bias, external);
                report.context = name;
                const reference_input_t in = {
                    .gate = external ? CUMOE_GATE_EXTERNAL : CUMOE_GATE_NOISY_TOPK,
                    .activation = (cumoe_activation_t)activation,
                    .training = true,
                    .experts = 5,
                    .top_k = 2,
                    .loss_gradient = {[CUMOE_LOSS_IMPORTANCE] = 1.5, [CUMOE_LOSS_LOAD] = 0.75},
                };
                check_case(in, bias, seed, &report);
            }
    cr_expect(report.failures == 0, "%s", report.text);
}

/* Values that anybody can look up. */
Test(reference, activations_of_known_numbers)
{
    static const struct {
        cumoe_activation_t activation;
        double up, glu, value, dup, dglu;
    } known[] = {
        {CUMOE_ACTIVATION_RELU, 0, 0, 0, 0, 0},
        {CUMOE_ACTIVATION_RELU2, 3, 0, 9, 6, 0},
        {CUMOE_ACTIVATION_RELU2, -3, 0, 0, 0, 0},
        {CUMOE_ACTIVATION_SILU, 1, 0, 0.7310585786300049, 0.9276705118714867, 0},
        {CUMOE_ACTIVATION_GELU, 1, 0, 0.8413447460685429, 1.0833154705876864, 0},
        {CUMOE_ACTIVATION_GELU_TANH, 1, 0, 0.8411919906082768, 1.0829640838457826, 0},
        {CUMOE_ACTIVATION_SWIGLU, 2, 1, 1.4621171572600098, 0.7310585786300049, 1.8553410237429735},
        {CUMOE_ACTIVATION_GEGLU, 2, 1, 1.6826894921370859, 0.8413447460685429, 2.1666309411753730},
        {CUMOE_ACTIVATION_GEGLU_TANH, 2, 1, 1.6823839812165536, 0.8411919906082768, 2.1659281676915652},
        {CUMOE_ACTIVATION_IDENTITY, -5, 0, -5, 1, 0},
        /* the limit 1 met exactly, passed above, passed below */
        {CUMOE_ACTIVATION_SWIGLU_CLAMPED, 1, 1, 1.4621171572600098, 0.7310585786300049, 1.8553410237429735},
        {CUMOE_ACTIVATION_SWIGLU_CLAMPED, 9, 9, 1.4621171572600098, 0, 0},
        {CUMOE_ACTIVATION_SWIGLU_CLAMPED, -9, 1, 0, 0, 0},
        {CUMOE_ACTIVATION_SWIGLU_CLAMPED, 0, 1, 0.7310585786300049, 0.7310585786300049, 0.9276705118714867},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        const reference_input_t in = {
            .activation = known[i].activation, .swiglu_limit = 1, .swiglu_alpha = 1, .swiglu_offset = 1};
        const reference_activation_t a = reference_activation(&in, known[i].up, known[i].glu);
        cr_expect_float_eq(a.value, known[i].value, 2e-15, "value %d: %.17g", (int)i, a.value);
        cr_expect_float_eq(a.dup, known[i].dup, 2e-15, "dup %d: %.17g", (int)i, a.dup);
        cr_expect_float_eq(a.dglu, known[i].dglu, 2e-15, "dglu %d: %.17g", (int)i, a.dglu);
    }
}

/* The tests' own conversions. */
Test(reference, numbers_of_16_bits)
{
    static const struct {
        cumoe_dtype_t dtype;
        double value;
        uint16_t bits;
        double nearest;
    } known[] = {
        {CUMOE_F16, 1, 0x3c00, 1},
        {CUMOE_F16, -2, 0xc000, -2},
        {CUMOE_F16, 65519, 0x7bff, 65504},
        {CUMOE_F16, 65520, 0x7c00, INFINITY},
        {CUMOE_F16, 0x1p-14, 0x0400, 0x1p-14},
        {CUMOE_F16, 0x1p-24, 0x0001, 0x1p-24},
        {CUMOE_F16, 0x1p-25, 0x0000, 0},           /* ties to even */
        {CUMOE_F16, 0x1.8p-24, 0x0002, 0x1p-23},   /* ties to even */
        {CUMOE_F16, 0x1.002p0, 0x3c00, 1},         /* ties to even */
        {CUMOE_F16, 0x1.006p0, 0x3c02, 0x1.008p0}, /* ties to even */
        {CUMOE_F16, 0x1.ffcp-15, 0x0400, 0x1p-14}, /* ties to even: a normal number */
        {CUMOE_BF16, 1, 0x3f80, 1},
        {CUMOE_BF16, -3.5, 0xc060, -3.5},
        {CUMOE_BF16, 0x1.01p0, 0x3f80, 1},
        {CUMOE_BF16, 0x1.03p0, 0x3f82, 0x1.04p0},
        {CUMOE_BF16, 0x1p-133, 0x0001, 0x1p-133},
        {CUMOE_BF16, 0x1.fep127, 0x7f7f, 0x1.fep127},
        {CUMOE_BF16, 0x1.ffp127, 0x7f80, INFINITY},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        uint16_t bits = 0;
        real_set(&bits, known[i].dtype, 0, known[i].value);
        cr_expect_eq(bits, known[i].bits, "%a: %#x", known[i].value, bits);
        cr_expect(real_round(known[i].dtype, known[i].value) == known[i].nearest, "%a", known[i].value);
    }
    for (cumoe_dtype_t dtype = CUMOE_BF16; dtype <= CUMOE_F16; dtype++)
        for (int i = 0; i <= UINT16_MAX; i++) {
            const uint16_t bits = (uint16_t)i;
            uint16_t back = 0;
            const double value = real_get(&bits, dtype, 0);
            real_set(&back, dtype, 0, value);
            if (isnan(value))
                cr_assert(isnan(real_get(&back, dtype, 0)), "%#x", i);
            else
                cr_assert_eq(back, bits, "%#x", i);
        }
}

Test(reference, cv_squared_of_known_vectors)
{
    const double v[] = {1, 2, 3, 6}; /* mean 3, population variance 3.5 */
    const double zero[] = {0, 0, 0};
    cr_assert_float_eq(reference_cv_squared(4, v), 3.5 / 9, 1e-15);
    cr_assert_float_eq(reference_cv_squared_gradient(4, v, 0), 2 * 4.0 / 144 * (1 - 50.0 / 12), 1e-15);
    cr_assert_float_eq(reference_cv_squared(3, zero), 0, 0);
    cr_assert_float_eq(reference_cv_squared_gradient(3, zero, 1), 0, 0);
}

/* Only its own noise redrawn, the fraction of draws in which an expert is chosen is P(x, i). */
Test(reference, probability_is_the_frequency_of_being_chosen)
{
    enum { E = 4, K = 2, DRAWS = 20000 };
    random_state_t random = random_start(random_seed("probability", 3));
    numbers_t n;
    fill_numbers(&random, &n, E);
    reference_input_t in = {.gate = CUMOE_GATE_NOISY_TOPK, .training = true, .tokens = 1, .live_tokens = 1};
    in.hidden_size = H, in.intermediate_size = I, in.experts = E, in.top_k = K, in.noise_epsilon = 0.01;
    in.noise = n.noise, in.x = n.x, in.w_gate = n.w_gate, in.w_noise = n.w_noise;
    in.w_up = n.w_up, in.w_down = n.w_down, in.dy = n.dy;
    reference_result_t r;
    cr_assert(reference_create(&in, &r));
    for (int i = 0; i < E; i++) {
        reference_forward(&in, &r);
        const double probability = r.probability[i], kept = n.noise[i];
        int chosen = 0;
        for (int draw = 0; draw < DRAWS; draw++) {
            n.noise[i] = random_normal(&random);
            reference_forward(&in, &r);
            chosen += r.expert[0] == i || r.expert[1] == i;
        }
        n.noise[i] = kept;
        const double deviation = sqrt(probability * (1 - probability) / DRAWS);
        cr_expect(fabs(chosen / (double)DRAWS - probability) < 5 * deviation + 1e-4, "expert %d: %g, P = %g", i,
                  chosen / (double)DRAWS, probability);
    }
    reference_destroy(&r);
}
