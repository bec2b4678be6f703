/* Initial values of weights: normals named by (seed, matrix, global expert, element), so that neither the layout
 * nor the number of ranks changes them. */
#include "host/cpu/cpu.h"
#include "host/cpu/float16.h"
#include "host/philox.h"
#include "host/weights_layout.h"

/* The matrix takes the place of the noise stream, the expert that of the token, the element that of the offset. */
enum { MATRIX_GATE = 1, MATRIX_UP, MATRIX_GLU, MATRIX_DOWN };

enum { QUADS = 16, CHUNK = 4 * QUADS };

/* Normals of elements first .. first + CHUNK - 1, first a multiple of 4. */
CUMOE_CPU_CLONES static void chunk_of_normals(uint64_t seed, uint32_t matrix, int64_t expert, uint64_t first,
                                              float *restrict normal)
{
    float n[4][QUADS];
    for (int q = 0; q < QUADS; q++) {
        float four[4];
        cumoe_noise_normals(
            cumoe_noise_words(seed, matrix, first / 4 + (uint64_t)q, expert, CUMOE_NOISE_WEIGHTS, 0), four);
        n[0][q] = four[0], n[1][q] = four[1], n[2][q] = four[2], n[3][q] = four[3];
    }
    for (int q = 0; q < QUADS; q++)
        for (int j = 0; j < 4; j++) normal[4 * q + j] = n[j][q];
}

static void write_value(void *data, cumoe_dtype_t dtype, int64_t at, double value)
{
    if (dtype == CUMOE_F64)
        ((double *)data)[at] = value;
    else if (dtype == CUMOE_F32)
        ((float *)data)[at] = (float)value;
    else
        ((uint16_t *)data)[at] = dtype == CUMOE_BF16 ? f32_to_bf16((float)value) : f32_to_f16((float)value);
}

/* Elements first .. of one expert's matrix [rows, cols]; NAMED is its number among all ranks' experts. */
static void fill_chunk(uint64_t seed, uint32_t matrix, cumoe_matrix_t m, int64_t expert, int64_t named,
                       int64_t first, int64_t elements, int64_t cols, double std)
{
    float normal[CHUNK] = {0};
    if (std > 0) chunk_of_normals(seed, matrix, named, (uint64_t)first, normal);
    for (int64_t i = first; i < first + CHUNK && i < elements; i++) {
        const int64_t at = expert * m.expert_stride + i / cols * m.row_stride + i % cols * m.col_stride;
        write_value(m.data, m.dtype, at, std * (double)normal[i - first]);
    }
}

static void fill_all(const cumoe_config_t *c, uint64_t seed, uint32_t matrix, cumoe_matrix_t m,
                     int64_t first_expert, int64_t experts, int64_t rows, int64_t cols, double std)
{
    if (!m.data) return;
#pragma omp parallel for collapse(2) schedule(static) num_threads(c->max_threads)
    for (int64_t e = 0; e < experts; e++)
        for (int64_t first = 0; first < rows * cols; first += CHUNK)
            fill_chunk(seed, matrix, m, e, first_expert + e, first, rows * cols, cols, std);
}

static void fill(const cumoe_context_t *context, uint64_t seed, uint32_t matrix, cumoe_matrix_t m, int64_t rows,
                 int64_t cols, double std)
{
    const cumoe_ranks_t *ranks = &context->ranks;
    fill_all(&context->config, seed, matrix, m, ranks->first_expert, ranks->own_experts, rows, cols, std);
}

/* What starts with 0: [experts, cols] of the gate. */
static void fill_zeros(const cumoe_config_t *c, void *data, cumoe_dtype_t dtype, int64_t experts, int64_t cols)
{
    const cumoe_matrix_t m = {data, dtype, cols, cols, 1};
    fill_all(c, 0, MATRIX_GATE, m, 0, experts, 1, cols, 0);
}

cumoe_status_t cumoe__cpu_weights_init(const cumoe_context_t *context, uint64_t seed, const cumoe_weights_t *w,
                                       cumoe_stream_t stream)
{
    (void)stream;
    const cumoe_config_t *c = &context->config;
    const int64_t H = c->hidden_size, I = c->intermediate_size;
    const double gate_std = cumoe__is_noisy(c->gate) ? 0 : 0.02;
    const cumoe_matrix_t gate = {w->w_gate, w->gate_dtype, H, H, 1};
    fill_all(c, seed, MATRIX_GATE, gate, 0, c->num_experts, 1, H, gate_std);
    fill_zeros(c, w->w_noise, w->gate_dtype, c->num_experts, H);
    fill_zeros(c, w->w_gate_primary, w->gate_dtype, c->num_groups, H);
    fill_zeros(c, w->w_noise_primary, w->gate_dtype, c->num_groups, H);
    fill_zeros(c, w->thresholds, cumoe__gate_dtype(c), c->num_experts, 1);
    fill_zeros(c, w->gate_bias, cumoe__gate_dtype(c), c->num_experts, 1);
    fill(context, seed, MATRIX_UP, cumoe__matrix_up(w, c, false), I, H, 1 / sqrt((double)H));
    fill(context, seed, MATRIX_UP, cumoe__bias_up(w, c, false), 1, I, 0);
    if (cumoe__is_glu(c->activation)) {
        fill(context, seed, MATRIX_GLU, cumoe__matrix_up(w, c, true), I, H, 1 / sqrt((double)H));
        fill(context, seed, MATRIX_GLU, cumoe__bias_up(w, c, true), 1, I, 0);
    }
    fill(context, seed, MATRIX_DOWN, cumoe__matrix_down(w), H, I, 1 / sqrt((double)I));
    fill(context, seed, MATRIX_DOWN, cumoe__bias_down(w, c), 1, H, 0);
    return CUMOE_SUCCESS;
}
