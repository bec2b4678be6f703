/* The gradients by hand, from the paper's formulas; tests/unit/test_reference.c holds them to central differences.
 */
#include "tests/support/reference_formulas.h"

#include <stdlib.h>

/* ---- experts ---- */

/* g = weight, d = dy w_down:  dz = g d act'(z),  dweight = <d, hidden>. */
static void down_backward(const reference_input_t *in, reference_result_t *r, int64_t t, int64_t slot)
{
    const int64_t H = in->hidden_size, I = in->intermediate_size, e = r->expert[slot];
    const double *dy = in->dy + t * H;
    const double g = r->weight[slot];
    for (int64_t i = 0; i < I; i++) {
        const int64_t si = slot * I + i;
        const reference_activation_t a = reference_activation(in, r->up[si], r->glu[si]);
        const double scaled = in->round_scaled ? in->round_scaled(g * r->hidden[si]) : g * r->hidden[si];
        double d = 0;
        for (int64_t h = 0; h < H; h++) d += dy[h] * in->w_down[(e * H + h) * I + i];
        for (int64_t h = 0; h < H; h++) r->dw_down[(e * H + h) * I + i] += dy[h] * scaled;
        r->dweight[slot] += d * r->hidden[si];
        r->dup[si] = stored(in, g * d * a.dup);
        r->dglu[si] = stored(in, g * d * a.dglu);
    }
    add_scaled(H, g, dy, r->db_down + e * H);
    if (in->b_down) r->dweight[slot] += dot(H, dy, in->b_down + e * H);
}

/* One of up and glu: its dz into the gradients and, through w, into drows. */
static void up_backward(const reference_input_t *in, reference_result_t *r, int64_t t, int64_t slot,
                        const double *w, const double *dz, double *dw, double *db)
{
    const int64_t H = in->hidden_size, I = in->intermediate_size, e = r->expert[slot];
    add_scaled(I, 1, dz + slot * I, db + e * I);
    for (int64_t i = 0; i < I; i++) {
        add_scaled(H, dz[slot * I + i], in->x + t * H, dw + (e * I + i) * H);
        add_scaled(H, dz[slot * I + i], w + (e * I + i) * H, r->drows + slot * H);
    }
}

static void expert_backward(const reference_input_t *in, reference_result_t *r, int64_t t, int64_t slot)
{
    const int64_t H = in->hidden_size;
    down_backward(in, r, t, slot);
    if (has_up(in))
        up_backward(in, r, t, slot, in->w_up, r->dup, r->dw_up, r->db_up);
    else
        add_scaled(H, 1, r->dup + slot * H, r->drows + slot * H);
    if (has_glu(in)) up_backward(in, r, t, slot, in->w_glu, r->dglu, r->dw_glu, r->db_glu);
    for (int64_t h = slot * H; h < (slot + 1) * H; h++) r->drows[h] = stored(in, r->drows[h]);
    add_scaled(H, 1, r->drows + slot * H, r->dx + t * H);
}

/* ---- gate, backward ---- */

static void add_noisy(const reference_input_t *in, reference_result_t *r, int64_t te, double dnoisy, double *dstd)
{
    r->dclean[te] += dnoisy;
    if (noise_on(in)) dstd[te] += dnoisy * in->noise[te];
}

/* Task and importance loss through the softmax over the chosen logits. */
static void weight_backward(const reference_input_t *in, reference_result_t *r, int64_t t, double *dstd)
{
    const int64_t E = in->experts, K = in->top_k;
    double mean = 0;
    for (int pass = 0; pass < 2; pass++)
        for (int64_t j = 0; j < K; j++) {
            const int64_t e = r->expert[t * K + j];
            if (e < 0) continue;
            const double g = r->weight[t * K + j];
            const double dg = r->dweight[t * K + j] + in->loss_gradient[CUMOE_LOSS_IMPORTANCE] *
                                                          reference_cv_squared_gradient(E, r->importance, e);
            if (pass == 0)
                mean += g * dg;
            else
                add_noisy(in, r, t * E + e, g * (dg - mean), dstd);
        }
}

/* Load loss through P(x, i): clean logit, standard deviation, and the noisy logit that is the threshold. */
static void load_backward(const reference_input_t *in, reference_result_t *r, int64_t t, double *dstd)
{
    const int64_t E = in->experts;
    for (int64_t i = 0; i < E; i++) {
        const int64_t te = t * E + i, k = r->threshold[te];
        if (k < 0) continue;
        const double z = (r->clean[te] - r->noisy[t * E + k]) / r->std[te];
        const double g = in->loss_gradient[CUMOE_LOSS_LOAD] * reference_cv_squared_gradient(E, r->load, i) *
                         normal_density(z) / r->std[te];
        r->dclean[te] += g;
        dstd[te] -= g * z;
        add_noisy(in, r, t * E + k, -g, dstd);
    }
}

static void gate_backward(const reference_input_t *in, reference_result_t *r, int64_t t, double *dstd)
{
    const int64_t H = in->hidden_size, E = in->experts;
    weight_backward(in, r, t, dstd);
    if (smooth_load(in)) load_backward(in, r, t, dstd);
    for (int64_t e = 0; e < E; e++) {
        const int64_t te = t * E + e;
        if (r->dclean[te] != 0) {
            add_scaled(H, r->dclean[te], in->x + t * H, r->dw_gate + e * H);
            add_scaled(H, r->dclean[te], in->w_gate + e * H, r->dx_gate + t * H);
        }
        if (noise_on(in) && dstd[te] != 0) {
            r->draw[te] = dstd[te] * sigmoid(dot(H, in->x + t * H, in->w_noise + e * H));
            add_scaled(H, r->draw[te], in->x + t * H, r->dw_noise + e * H);
            add_scaled(H, r->draw[te], in->w_noise + e * H, r->dx_gate + t * H);
        }
    }
    add_scaled(H, 1, r->dx_gate + t * H, r->dx + t * H);
}

void reference_backward(const reference_input_t *in, reference_result_t *r)
{
    double *dstd = calloc((size_t)(in->tokens * in->experts) + 1, sizeof *dstd);
    for (int64_t t = 0; t < in->tokens; t++) {
        if (!active(in, t)) continue;
        for (int64_t s = t * in->top_k; s < (t + 1) * in->top_k; s++)
            if (r->expert[s] >= 0) expert_backward(in, r, t, s);
        if (in->gate != CUMOE_GATE_EXTERNAL) gate_backward(in, r, t, dstd);
        for (int64_t h = t * in->hidden_size; h < (t + 1) * in->hidden_size; h++) r->dx[h] = stored(in, r->dx[h]);
    }
    free(dstd);
}
