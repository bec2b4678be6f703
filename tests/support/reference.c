#include "tests/support/reference_formulas.h"

#include <stdlib.h>
#include <string.h>

/* ---- memory: one block, cut into pieces ---- */

typedef struct cutter {
    double *base; /* NULL while counting */
    size_t used;
} cutter_t;

static double *cut(cutter_t *cutter, int64_t count)
{
    double *piece = cutter->base ? cutter->base + cutter->used : NULL;
    cutter->used += (size_t)count;
    return piece;
}

int64_t reference_slots(const reference_input_t *in)
{
    return in->tokens * (in->gate == CUMOE_GATE_BALANCED ? in->experts + 1 : in->top_k);
}

static void cut_gate(const reference_input_t *in, reference_result_t *r, cutter_t *c)
{
    const int64_t T = in->tokens, H = in->hidden_size, E = in->experts, G = in->groups, slots = reference_slots(in);
    double **const token_expert[] = {&r->clean,  &r->std,  &r->noisy,   &r->probability,
                                     &r->dclean, &r->draw, &r->softmax, &r->share};
    double **const token_group[] = {&r->primary_clean,       &r->primary_std,    &r->primary_noisy,
                                    &r->primary_probability, &r->primary_dclean, &r->primary_draw};
    double **const slot[] = {&r->weight, &r->local_weight, &r->dweight};
    double **const expert[] = {&r->importance,      &r->load,      &r->level_load,
                               &r->batch_threshold, &r->runner_up, &r->dthresholds};
    double **const expert_h[] = {&r->dw_gate, &r->dw_noise, &r->dw_gate_size, &r->dw_noise_size};
    double **const group_h[] = {&r->dw_gate_primary, &r->dw_noise_primary, &r->dw_gate_primary_size,
                                &r->dw_noise_primary_size};
    for (size_t i = 0; i < sizeof token_expert / sizeof *token_expert; i++) *token_expert[i] = cut(c, T * E);
    for (size_t i = 0; i < sizeof token_group / sizeof *token_group; i++) *token_group[i] = cut(c, T * G);
    for (size_t i = 0; i < sizeof slot / sizeof *slot; i++) *slot[i] = cut(c, slots);
    for (size_t i = 0; i < sizeof expert / sizeof *expert; i++) *expert[i] = cut(c, E);
    for (size_t i = 0; i < sizeof expert_h / sizeof *expert_h; i++) *expert_h[i] = cut(c, E * H);
    for (size_t i = 0; i < sizeof group_h / sizeof *group_h; i++) *group_h[i] = cut(c, G * H);
    r->threshold = (int32_t *)cut(c, T * E);
    r->primary_threshold = (int32_t *)cut(c, T * G);
    r->log_sum = cut(c, T);
    r->expert = (int32_t *)cut(c, slots);
    r->slot_token = (int32_t *)cut(c, slots);
    r->token_slot = (int32_t *)cut(c, T + 1);
    r->count = (int64_t *)cut(c, E);
    r->excess = (int64_t *)cut(c, E);
    r->primary_group = (int32_t *)cut(c, T * in->top_k_groups);
    r->primary_weight = cut(c, T * in->top_k_groups);
    r->primary_load = cut(c, G);
    r->primary_count = (int64_t *)cut(c, G);
    r->dx_gate = cut(c, T * H);
    r->dx_gate_size = cut(c, T * H);
}

static void cut_all(const reference_input_t *in, reference_result_t *r, cutter_t *c)
{
    const int64_t T = in->tokens, H = in->hidden_size, I = in->intermediate_size, E = in->experts;
    const int64_t slots = reference_slots(in);
    double **const slot_i[] = {&r->up, &r->glu, &r->hidden, &r->dup, &r->dglu};
    double **const matrix[] = {&r->dw_up, &r->dw_glu, &r->dw_down};
    cut_gate(in, r, c);
    for (size_t i = 0; i < sizeof slot_i / sizeof *slot_i; i++) *slot_i[i] = cut(c, slots * I);
    for (size_t i = 0; i < sizeof matrix / sizeof *matrix; i++) *matrix[i] = cut(c, E * I * H);
    r->output = cut(c, slots * H);
    r->drows = cut(c, slots * H);
    r->y = cut(c, T * H);
    r->dx = cut(c, T * H);
    r->db_up = cut(c, E * I);
    r->db_glu = cut(c, E * I);
    r->db_down = cut(c, E * H);
    r->dx_size = cut(c, T * H);
}

bool reference_create(const reference_input_t *input, reference_result_t *result)
{
    cutter_t cutter = {NULL, 0};
    memset(result, 0, sizeof *result);
    cut_all(input, result, &cutter);
    cutter.base = calloc(cutter.used + 1, sizeof(double));
    if (!cutter.base) return false;
    result->memory = cutter.base;
    result->memory_size = cutter.used * sizeof(double);
    cutter.used = 0;
    cut_all(input, result, &cutter);
    return true;
}

void reference_destroy(reference_result_t *result)
{
    free(result->memory);
    memset(result, 0, sizeof *result);
}

/* ---- coefficient of variation ---- */

double reference_cv_squared(int64_t n, const double *v)
{
    double sum = 0, variance = 0;
    for (int64_t i = 0; i < n; i++) sum += v[i];
    if (sum == 0) return 0;
    const double mean = sum / (double)n;
    for (int64_t i = 0; i < n; i++) variance += (v[i] - mean) * (v[i] - mean) / (double)n;
    return variance / (mean * mean);
}

/* d/dv_i of n Q / S^2 - 1 with S = sum, Q = sum of squares */
double reference_cv_squared_gradient(int64_t n, const double *v, int64_t i)
{
    double sum = 0, squares = 0;
    for (int64_t j = 0; j < n; j++) sum += v[j];
    for (int64_t j = 0; j < n; j++) squares += v[j] * v[j];
    return sum == 0 ? 0 : 2 * (double)n / (sum * sum) * (v[i] - squares / sum);
}

/* ---- experts ---- */

static double product(int64_t n, const double *a, const double *b, const double *bias, int64_t row)
{
    return dot(n, a, b + row * n) + (bias ? bias[row] : 0);
}

static void expert_forward(const reference_input_t *in, reference_result_t *r, int64_t t, int64_t slot)
{
    const int64_t H = in->hidden_size, I = in->intermediate_size, e = r->expert[slot];
    const double *x = in->x + t * H;
    for (int64_t i = 0; i < I; i++) {
        const int64_t si = slot * I + i;
        r->up[si] = has_up(in) ? stored(in, product(H, x, in->w_up, in->b_up, e * I + i)) : x[i];
        if (has_glu(in)) r->glu[si] = stored(in, product(H, x, in->w_glu, in->b_glu, e * I + i));
        r->hidden[si] = stored(in, reference_activation(in, r->up[si], r->glu[si]).value);
    }
    for (int64_t h = 0; h < H; h++)
        r->output[slot * H + h] = stored(in, product(I, r->hidden + slot * I, in->w_down, in->b_down, e * H + h));
}

/* ---- the whole ---- */

static void number_slots(const reference_input_t *in, reference_result_t *r)
{
    for (int64_t s = 0; s < reference_slots(in); s++) r->expert[s] = -1;
    if (in->gate == CUMOE_GATE_BALANCED) return; /* the gate does */
    for (int64_t t = 0; t <= in->tokens; t++) r->token_slot[t] = (int32_t)(t * in->top_k);
    for (int64_t s = 0; s < reference_slots(in); s++) r->slot_token[s] = (int32_t)(s / in->top_k);
}

void reference_forward(const reference_input_t *in, reference_result_t *r)
{
    const int64_t H = in->hidden_size;
    memset(r->memory, 0, r->memory_size);
    memset(r->losses, 0, sizeof r->losses);
    memset(&r->statistics, 0, sizeof r->statistics);
    r->threshold_loss_size = 0;

    number_slots(in, r);
    reference_gate_forward(in, r);
    for (int64_t t = 0; t < in->tokens; t++) {
        if (t >= in->live_tokens)
            for (int64_t h = 0; h < H; h++) r->y[t * H + h] = NAN;
        for (int64_t s = r->token_slot[t]; s < r->token_slot[t + 1]; s++) {
            if (r->expert[s] >= 0) {
                expert_forward(in, r, t, s);
                add_scaled(H, r->weight[s], r->output + s * H, r->y + t * H);
            } else if (isnan(r->weight[s])) {
                for (int64_t h = 0; h < H; h++) r->y[t * H + h] = NAN;
            }
        }
        for (int64_t h = 0; h < H; h++) r->y[t * H + h] = stored(in, r->y[t * H + h]);
    }
}

double reference_total(const reference_input_t *in, const reference_result_t *r)
{
    const int64_t H = in->hidden_size;
    double total = 0;
    for (int64_t t = 0; t < in->tokens; t++)
        if (active(in, t) && !isnan(r->y[t * H])) total += dot(H, in->dy + t * H, r->y + t * H);
    for (int l = 0; l < CUMOE_NUM_LOSSES; l++)
        if (in->loss_gradient[l] != 0) total += in->loss_gradient[l] * r->losses[l];
    return total;
}
