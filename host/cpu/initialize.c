/* Initial values of weights: normals named by (seed, matrix, global expert, element), so that neither the layout
 * nor the number of ranks changes them. */
#include "host/cpu/cpu.h"
#include "host/philox.h"
#include "host/weights_layout.h"

/* The matrix takes the place of the noise stream, the expert that of the token, the element that of the offset. */
enum { MATRIX_GATE = 1, MATRIX_UP, MATRIX_GLU, MATRIX_DOWN };

static void fill(const cumoe_config_t *c, uint64_t seed, uint32_t matrix, cumoe_matrix_t m, int64_t rows,
                 int64_t cols, double std)
{
    if (!m.data) return;
#pragma omp parallel for collapse(2) schedule(static) num_threads(c->max_threads)
    for (int64_t e = 0; e < c->num_experts; e++)
        for (int64_t row = 0; row < rows; row++)
            for (int64_t col = 0; col < cols; col++) {
                const uint64_t element = (uint64_t)(row * cols + col);
                const int64_t at = e * m.expert_stride + row * m.row_stride + col * m.col_stride;
                const double value = std * (double)cumoe_noise_normal(seed, matrix, element / 4, e,
                                                                      CUMOE_NOISE_WEIGHTS, (int32_t)(element % 4));
                if (m.dtype == CUMOE_F64)
                    ((double *)m.data)[at] = value;
                else
                    ((float *)m.data)[at] = (float)value;
            }
}

cumoe_status_t cumoe__cpu_weights_init(const cumoe_context_t *context, uint64_t seed, const cumoe_weights_t *w,
                                       cumoe_stream_t stream)
{
    (void)stream;
    const cumoe_config_t *c = &context->config;
    const int64_t H = c->hidden_size, I = c->intermediate_size;
    const double gate_std = cumoe__is_noisy(c->gate) ? 0 : 0.02;
    const cumoe_matrix_t gate = {w->w_gate, w->gate_dtype, H, H, 1}, noise = {w->w_noise, w->gate_dtype, H, H, 1};
    fill(c, seed, MATRIX_GATE, gate, 1, H, gate_std);
    fill(c, seed, MATRIX_GATE, noise, 1, H, 0);
    fill(c, seed, MATRIX_UP, cumoe__matrix_up(w, c, false), I, H, 1 / sqrt((double)H));
    if (cumoe__is_glu(c->activation))
        fill(c, seed, MATRIX_GLU, cumoe__matrix_up(w, c, true), I, H, 1 / sqrt((double)H));
    fill(c, seed, MATRIX_DOWN, cumoe__matrix_down(w), H, I, 1 / sqrt((double)I));
    return CUMOE_SUCCESS;
}
