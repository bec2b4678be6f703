/* The gradients by hand, from the paper's formulas; tests/unit/test_reference.c holds them to central differences.
 */
#include "tests/support/reference_formulas.h"

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

void reference_backward(const reference_input_t *in, reference_result_t *r)
{
    const int64_t H = in->hidden_size;
    for (int64_t s = 0; s < r->token_slot[in->tokens]; s++)
        if (r->expert[s] >= 0) expert_backward(in, r, r->slot_token[s], s);
    reference_gate_backward(in, r);
    for (int64_t t = 0; t < in->tokens; t++) {
        if (!active(in, t)) continue;
        add_scaled(H, 1, r->dx_gate + t * H, r->dx + t * H);
        for (int64_t h = t * H; h < (t + 1) * H; h++) r->dx[h] = stored(in, r->dx[h]);
    }
}
