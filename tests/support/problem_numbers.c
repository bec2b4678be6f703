/* The numbers of a problem: drawn, rounded to the types that the library reads, and answered by the reference. */
#include "tests/support/problem.h"

#include <math.h>
#include <string.h>

/* Logits, thresholds and kinks of activations closer than this could fall on different sides in F32. */
static const double MARGIN = 1e-4;

enum { MAX_REDRAWS = 100 };

static double *doubles(problem_t *p, int64_t n)
{
    return buffer_get_zero(&p->buffers, (size_t)n * sizeof(double));
}

static bool padding(const problem_t *p, int64_t t)
{
    return p->input.token_mask && !p->input.token_mask[t];
}

/* What an array is filled with: normal numbers of a scale, or, in PATTERN_INTEGERS, -limit..limit times a power of
 * two. With RELU or IDENTITY and the sizes of tests/layer/test_rounding.c, products and sums of such numbers stay
 * below 24 bits on the way to y, dx and the gradients of experts: exact in F32, so that the roundings to 16 bits
 * are all the roundings there are. */
typedef struct fill {
    cumoe_dtype_t dtype;
    double scale;
    int limit, exponent;
} fill_t;

static void fill(const problem_t *p, random_state_t *random, double *values, int64_t n, fill_t how)
{
    const bool integers = p->layer_case.pattern == PATTERN_INTEGERS;
    for (int64_t i = 0; i < n; i++)
        values[i] = integers ? ldexp((double)(random_below(random, 2 * how.limit + 1) - how.limit), how.exponent)
                             : real_round(how.dtype, how.scale * random_normal(random));
}

/* Rows that are not live, and every other row of padding, are NaN: nobody may look at them. */
static void fill_token(const problem_t *p, random_state_t *random, double *x, int64_t t)
{
    const int64_t H = p->hidden_size;
    const case_pattern_t pattern = p->layer_case.pattern;
    double *row = x + t * H;
    if (pattern == PATTERN_TWINS && t % 2) {
        fill_token(p, random, x, t - 1); /* both */
        return;
    }
    const double scale = pattern == PATTERN_LARGE ? pow(10, (double)(t % 7)) : 1;
    fill(p, random, row, H, (fill_t){p->options.dtype, scale, 63, -3});
    const bool one_sided = pattern == PATTERN_ONE_EXPERT || pattern == PATTERN_EMPTY_EXPERTS;
    if (one_sided) row[0] = real_round(p->options.dtype, 1 + fabs(row[0]));
    if (pattern == PATTERN_ALL_REFUSED || pattern == PATTERN_PRIMARY_REFUSED) row[0] = t % 2 ? 1 : -1;
    for (int64_t h = 0; h < H; h++) {
        if (pattern == PATTERN_ZERO_X) row[h] = 0;
        if (t >= p->live_tokens || (padding(p, t) && t % 2) || (pattern == PATTERN_NONFINITE_TOKENS && t % 3 == 0))
            row[h] = NAN;
    }
    if (pattern == PATTERN_TWINS && t + 1 < p->tokens) memcpy(row + H, row, (size_t)H * sizeof *row);
}

/* How far a favourite stands above the others. BALANCED compares the g of tokens, which must not underflow. */
static double advantage(const problem_t *p)
{
    return p->options.variant.gate == CUMOE_GATE_BALANCED ? 3 : 100;
}

/* Column 0 of w_gate decides who wins. */
static void bend_gate(const problem_t *p, double *w_gate)
{
    const int64_t H = p->hidden_size, E = p->experts;
    for (int64_t e = 0; e < E; e++) {
        double *first = w_gate + e * H;
        switch (p->layer_case.pattern) {
        case PATTERN_ONE_EXPERT:
            *first = e == E - 1 ? advantage(p) : 0;
            break;
        case PATTERN_EMPTY_EXPERTS:
            *first = e == E - 1 || e == 0 ? -advantage(p) : 0;
            break;
        case PATTERN_TIES:
            memset(first, 0, (size_t)H * sizeof *first);
            break;
        case PATTERN_NONFINITE_WEIGHTS:
            if (e < 3) *first = (const double[]){NAN, INFINITY, -INFINITY}[e];
            break;
        case PATTERN_ALL_REFUSED:
            *first = -INFINITY;
            break;
        default:
            break;
        }
    }
}

/* The same for the groups: the last is the favourite, the first is empty. */
static void bend_primary(const problem_t *p, double *w_gate_primary)
{
    const int64_t H = p->hidden_size, G = p->groups;
    for (int64_t g = 0; g < G; g++) {
        double *first = w_gate_primary + g * H;
        switch (p->layer_case.pattern) {
        case PATTERN_ONE_EXPERT:
            *first = g == G - 1 ? 100 : 0;
            break;
        case PATTERN_EMPTY_EXPERTS:
            *first = g == 0 && G > p->top_k_groups ? -100 : 0;
            break;
        case PATTERN_TIES:
            memset(first, 0, (size_t)H * sizeof *first);
            break;
        case PATTERN_NONFINITE_WEIGHTS:
            if (g > 1 && g == G - 1) *first = NAN;
            break;
        case PATTERN_PRIMARY_REFUSED:
            *first = -INFINITY;
            break;
        default:
            break;
        }
    }
}

/* Around 1 / E, where most g are, but not so near that equal logits could fall on either side. */
static void draw_thresholds(const problem_t *p, random_state_t *random, double *thresholds)
{
    static const double nonfinite[] = {NAN, INFINITY, -INFINITY};
    const case_pattern_t pattern = p->layer_case.pattern;
    for (int64_t e = 0; e < p->experts; e++) {
        double z = 0;
        while (fabs(z) < 0.05) z = 0.5 * random_normal(random);
        thresholds[e] = real_round(p->gate_type, exp(z) / (double)p->experts);
        if (pattern == PATTERN_LOW_THRESHOLDS) thresholds[e] = -1;
        if (pattern == PATTERN_HIGH_THRESHOLDS) thresholds[e] = 2;
        if (pattern == PATTERN_NONFINITE_THRESHOLDS && e < 3) thresholds[e] = nonfinite[e];
    }
}

static int64_t pick_expert(const problem_t *p, random_state_t *random, int64_t t, int64_t j)
{
    const int64_t E = p->experts, K = p->top_k;
    const int64_t sentinels[] = {-1, E, -7, E + 9, INT32_MIN, INT32_MAX, p->layer_case.wide_index ? INT64_MIN : -2};
    switch (p->layer_case.pattern) {
    case PATTERN_ONE_EXPERT:
        return j == 0 ? E - 1 : random_below(random, E);
    case PATTERN_EMPTY_EXPERTS:
        return 1 + random_below(random, E - 2);
    case PATTERN_DUPLICATES:
        return t % E;
    case PATTERN_SENTINELS:
        if (t % 5 == 0 || (t + j) % 2 == 0) return sentinels[(t * K + j) % 7];
        return random_below(random, E);
    default:
        return random_below(random, E);
    }
}

static fill_t fill_of_matrix(const problem_t *p, problem_matrix_t m)
{
    const double columns = (double)(m == MATRIX_DOWN ? p->intermediate_size : p->hidden_size);
    switch (m) {
    case MATRIX_GATE:
    case MATRIX_NOISE:
    case MATRIX_GATE_PRIMARY:
    case MATRIX_NOISE_PRIMARY:
        return (fill_t){p->options.gate_dtype ? p->options.gate_dtype : p->gate_type,
                        (m == MATRIX_NOISE || m == MATRIX_NOISE_PRIMARY ? 0.5 : 1) / sqrt(columns), 0, 0};
    case MATRIX_GATE_BIAS:
        return (fill_t){p->gate_type, 0.2, 0, 0};
    case MATRIX_UP:
    case MATRIX_GLU:
        return (fill_t){p->options.dtype, 1 / sqrt(columns), 15, -3};
    case MATRIX_DOWN:
        return (fill_t){p->options.dtype, 1 / sqrt(columns), 15, -2};
    default:
        return (fill_t){p->options.dtype, 0.5, 127, -2};
    }
}

static void draw_matrices(problem_t *p, random_state_t *random)
{
    const cumoe_dtype_t gradient_dtype = p->options.gradient_dtype ? p->options.gradient_dtype : p->options.dtype;
    const double **const inputs[NUM_MATRICES] = {
        &p->input.w_gate,     &p->input.w_noise,   &p->input.w_gate_primary, &p->input.w_noise_primary,
        &p->input.thresholds, &p->input.gate_bias, &p->input.w_up,           &p->input.w_glu,
        &p->input.b_up,       &p->input.b_glu,     &p->input.w_down,         &p->input.b_down};
    for (problem_matrix_t m = 0; m < NUM_MATRICES; m++) {
        if (!problem_has_matrix(p, m)) continue;
        const int64_t n = problem_matrix_elements(p, m);
        const fill_t before = {m < MATRIX_UP ? p->gate_type : gradient_dtype, 1, 255, 2};
        p->values[m] = doubles(p, n);
        fill(p, random, p->values[m], n, fill_of_matrix(p, m));
        p->gradient_before[m] = doubles(p, n);
        fill(p, random, p->gradient_before[m], n, before);
        *inputs[m] = p->values[m];
    }
    if (p->values[MATRIX_GATE]) bend_gate(p, p->values[MATRIX_GATE]);
    if (p->values[MATRIX_GATE_PRIMARY]) bend_primary(p, p->values[MATRIX_GATE_PRIMARY]);
    if (p->values[MATRIX_THRESHOLDS]) draw_thresholds(p, random, p->values[MATRIX_THRESHOLDS]);
}

void problem_draw_numbers(problem_t *p, random_state_t *random)
{
    const int64_t T = p->tokens, H = p->hidden_size, K = p->top_k;
    double *x = doubles(p, T * H), *dy = doubles(p, T * H), *index_weight = doubles(p, T * K);
    int64_t *index = buffer_get_zero(&p->buffers, (size_t)(T * K) * sizeof *index);
    draw_matrices(p, random);
    for (int64_t t = 0; t < T; t++) fill_token(p, random, x, t);
    fill(p, random, dy, T * H, (fill_t){p->options.dtype, 1, 63, -4});
    for (int64_t i = 0; i < T * H; i++)
        if (i / H >= p->live_tokens || padding(p, i / H)) dy[i] = NAN;
    const cumoe_dtype_t weight_dtype = p->options.index_weight_dtype;
    fill(p, random, index_weight, T * K, (fill_t){weight_dtype ? weight_dtype : p->gate_type, 1, 3, 0});
    for (int64_t s = 0; s < T * K; s++) index[s] = pick_expert(p, random, s / K, s % K);
    p->input.x = x, p->input.dy = dy, p->input.index = index, p->input.index_weight = index_weight;
}

/* Draw the tokens again that stand too close to a kink of the function. */
bool problem_find_answer(problem_t *p, random_state_t *random, report_t *report)
{
    const case_pattern_t pattern = p->layer_case.pattern;
    const bool kinks_wanted = pattern == PATTERN_TIES || pattern == PATTERN_ZERO_X || pattern == PATTERN_INTEGERS;
    if (!reference_create(&p->input, &p->expected)) {
        report_fail(report, "%s: no memory for the reference", p->name);
        return false;
    }
    int64_t close = 1;
    for (int attempt = 0; close > 0 && attempt < MAX_REDRAWS; attempt++) {
        reference_forward(&p->input, &p->expected);
        close = 0;
        for (int64_t t = 0; t < p->tokens && !kinks_wanted; t++) {
            if (reference_margin(&p->input, &p->expected, t) >= MARGIN) continue;
            fill_token(p, random, (double *)p->input.x, t);
            close++;
        }
    }
    if (close > 0) report_fail(report, "%s: no tokens with a margin of %g found", p->name, MARGIN);
    reference_backward(&p->input, &p->expected);
    reference_sizes(&p->input, &p->expected);
    return close == 0;
}
