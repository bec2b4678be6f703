/* What the formulas give in double precision, for two tokens and for two columns of an expert's matrices. z is read
 * from the stage's buffer, so that no rounding near the kink of an activation changes its derivative, and is
 * checked by itself. */
#include "bench.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { TOKENS = 2, COLUMNS = 2 };

/* || ours - right || and || right || of one kind of result, squared. */
typedef struct error {
    double difference, size;
} error_t;

typedef struct sample {
    const bench_t *bench;
    const cumoe_config_t *config;
    int64_t H, I, Z;
    float *x, *dy; /* [T, H], on the host */
    int32_t *offset, *row_token, *row_slot;
    float *weight; /* [S] */
    error_t z, y, dx, dw;
} sample_t;

static void compare(error_t *error, double ours, double right)
{
    error->difference += (ours - right) * (ours - right);
    error->size += right * right;
}

static double relative(const error_t *error)
{
    return error->difference == 0 ? 0 : sqrt(error->difference / error->size);
}

/* ---- numbers of the device ---- */

/* count numbers of the token type from place on; to be freed. */
static float *read_values(const sample_t *s, const void *array, int64_t place, int64_t count)
{
    const cumoe_dtype_t dtype = s->config->dtype;
    const size_t size = token_size(s->config);
    float *values = malloc((size_t)count * sizeof *values + 1);
    void *raw = bench_download(s->bench, (const char *)array + (size_t)place * size, (size_t)count * size);
    if (!values) abort();
    for (int64_t i = 0; i < count; i++)
        values[i] = dtype == CUMOE_F32 ? ((float *)raw)[i] : input_widen(dtype, ((uint16_t *)raw)[i]);
    free(raw);
    return values;
}

static double read_value(const sample_t *s, const void *array, int64_t place)
{
    float *value = read_values(s, array, place, 1);
    const double wide = (double)*value;
    free(value);
    return wide;
}

/* ---- activations ---- */

static double silu(double z, double alpha)
{
    return z / (1 + exp(-alpha * z));
}

static double gelu(double z)
{
    return 0.5 * z * (1 + erf(z / sqrt(2)));
}

static double gelu_tanh(double z)
{
    return 0.5 * z * (1 + tanh(sqrt(2 / acos(-1)) * (z + 0.044715 * z * z * z)));
}

static double activate(const cumoe_config_t *c, double up, double glu)
{
    const double limit = (double)c->swiglu_limit;
    switch (c->activation) {
    case CUMOE_ACTIVATION_RELU:
        return fmax(up, 0);
    case CUMOE_ACTIVATION_RELU2:
        return fmax(up, 0) * fmax(up, 0);
    case CUMOE_ACTIVATION_SILU:
        return silu(up, 1);
    case CUMOE_ACTIVATION_GELU:
        return gelu(up);
    case CUMOE_ACTIVATION_GELU_TANH:
        return gelu_tanh(up);
    case CUMOE_ACTIVATION_SWIGLU:
        return silu(glu, 1) * up;
    case CUMOE_ACTIVATION_GEGLU:
        return gelu(glu) * up;
    case CUMOE_ACTIVATION_GEGLU_TANH:
        return gelu_tanh(glu) * up;
    case CUMOE_ACTIVATION_SWIGLU_CLAMPED:
        return silu(fmin(glu, limit), (double)c->swiglu_alpha) *
               (fmax(fmin(up, limit), -limit) + (double)c->swiglu_offset);
    default:
        return NAN;
    }
}

/* By central differences, but at 0, where the derivative of ReLU is 0. */
static void slopes(const cumoe_config_t *c, double up, double glu, double *of_up, double *of_glu)
{
    const double step = 1e-5, h = c->activation == CUMOE_ACTIVATION_RELU ? 0.5 * fmin(step, fabs(up)) : step;
    *of_up = h > 0 ? (activate(c, up + h, glu) - activate(c, up - h, glu)) / (2 * h) : 0;
    *of_glu = (activate(c, up, glu + step) - activate(c, up, glu - step)) / (2 * step);
}

/* ---- tokens ---- */

/* One expert's matrices. */
typedef struct matrices {
    float *up, *glu, *down, *b_up, *b_glu, *b_down; /* [I, H], [I, H], [H, I], [I], [I], [H]; or NULL */
} matrices_t;

static matrices_t read_matrices(const sample_t *s, int64_t e)
{
    const cumoe_weights_t *w = &s->bench->weights;
    const int64_t H = s->H, I = s->I, size = H * I;
    return (matrices_t){.up = read_values(s, w->w_up, e * size, size),
                        .glu = w->w_glu ? read_values(s, w->w_glu, e * size, size) : NULL,
                        .down = read_values(s, w->w_down, e * size, size),
                        .b_up = w->b_up ? read_values(s, w->b_up, e * I, I) : NULL,
                        .b_glu = w->b_glu ? read_values(s, w->b_glu, e * I, I) : NULL,
                        .b_down = w->b_down ? read_values(s, w->b_down, e * H, H) : NULL};
}

static void free_matrices(matrices_t *m)
{
    float *arrays[] = {m->up, m->glu, m->down, m->b_up, m->b_glu, m->b_down};
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) free(arrays[i]);
}

static double dot(const float *a, const float *b, int64_t count)
{
    double sum = 0;
    for (int64_t i = 0; i < count; i++) sum += (double)a[i] * (double)b[i];
    return sum;
}

/* What expert e adds to y and dx of a token whose row is r. */
static void add_expert(sample_t *s, const matrices_t *m, int64_t token, int64_t r, double weight, double *y,
                       double *dx)
{
    const int64_t H = s->H, I = s->I;
    const float *x = s->x + token * H;
    float *z = read_values(s, s->bench->up.z, r * s->Z, s->Z);
    double *d = calloc((size_t)I, sizeof *d);
    if (!d) abort();
    for (int64_t i = 0; i < I; i++) {
        compare(&s->z, (double)z[i], dot(m->up + i * H, x, H) + (m->b_up ? (double)m->b_up[i] : 0));
        if (m->glu)
            compare(&s->z, (double)z[I + i], dot(m->glu + i * H, x, H) + (m->b_glu ? (double)m->b_glu[i] : 0));
    }
    for (int64_t h = 0; h < H; h++) {
        double out = m->b_down ? (double)m->b_down[h] : 0;
        for (int64_t i = 0; i < I; i++) {
            const double w = (double)m->down[h * I + i];
            out += w * activate(s->config, (double)z[i], m->glu ? (double)z[I + i] : 0);
            if (dx) d[i] += w * (double)s->dy[token * H + h];
        }
        y[h] += weight * out;
    }
    for (int64_t i = 0; dx && i < I; i++) {
        double of_up, of_glu;
        slopes(s->config, (double)z[i], m->glu ? (double)z[I + i] : 0, &of_up, &of_glu);
        for (int64_t h = 0; h < H; h++) {
            dx[h] += weight * d[i] * of_up * (double)m->up[i * H + h];
            if (m->glu) dx[h] += weight * d[i] * of_glu * (double)m->glu[i * H + h];
        }
    }
    free(z);
    free(d);
}

static void check_token(sample_t *s, int64_t token)
{
    const bench_t *b = s->bench;
    const bool back = goes_back(b);
    const int64_t H = s->H;
    double *y = calloc((size_t)H, sizeof *y), *dx = back ? calloc((size_t)H, sizeof *dx) : NULL;
    if (!y || (back && !dx)) abort();
    for (int64_t r = 0; r < s->offset[s->config->num_experts]; r++) { /* its rows, wherever the slots are */
        if (s->row_token[r] != token) continue;
        int64_t e = 0;
        while (s->offset[e + 1] <= r) e++;
        matrices_t m = read_matrices(s, e);
        add_expert(s, &m, token, r, (double)s->weight[s->row_slot[r]], y, dx);
        free_matrices(&m);
    }
    float *ours = read_values(s, b->layer_y, token * H, H);
    for (int64_t h = 0; h < H; h++) compare(&s->y, (double)ours[h], y[h]);
    free(ours);
    if (back) { /* what comes through the gate is the stage's own */
        const float *gate = b->gate_backward.dx_gate;
        float *from_gate = gate ? bench_download(b, gate + token * H, (size_t)H * sizeof *gate) : NULL;
        ours = read_values(s, b->layer_dx, token * H, H);
        for (int64_t h = 0; h < H; h++)
            compare(&s->dx, (double)ours[h], dx[h] + (from_gate ? (double)from_gate[h] : 0));
        free(ours);
        free(from_gate);
    }
    free(y);
    free(dx);
}

/* ---- columns ---- */

/* Gradients that belong to column i inside expert e: row i of dw_up and dw_glu, column i of dw_down. */
static void check_column(sample_t *s, int64_t e, int64_t i)
{
    const bench_t *b = s->bench;
    const cumoe_weights_t *w = &b->weights, *g = &b->gradients;
    const int64_t H = s->H, I = s->I, matrix = e * H * I;
    double *down = calloc((size_t)(4 * H), sizeof *down), *dw_up = down + H, *dw_glu = dw_up + H,
           *dw_down = dw_glu + H;
    if (!down) abort();
    for (int64_t h = 0; h < H; h++) down[h] = read_value(s, w->w_down, matrix + h * I + i);
    for (int64_t r = s->offset[e]; r < s->offset[e + 1]; r++) {
        const float *x = s->x + s->row_token[r] * H, *dy = s->dy + s->row_token[r] * H;
        const double weight = (double)s->weight[s->row_slot[r]], up = read_value(s, b->up.z, r * s->Z + i);
        const double glu = w->w_glu ? read_value(s, b->up.z, r * s->Z + I + i) : 0;
        double d = 0, of_up, of_glu;
        for (int64_t h = 0; h < H; h++) d += (double)dy[h] * down[h];
        slopes(s->config, up, glu, &of_up, &of_glu);
        const double hidden = activate(s->config, up, glu);
        for (int64_t h = 0; h < H; h++) {
            dw_up[h] += weight * d * of_up * (double)x[h];
            dw_glu[h] += weight * d * of_glu * (double)x[h];
            dw_down[h] += weight * hidden * (double)dy[h];
        }
    }
    for (int64_t h = 0; h < H; h++) {
        compare(&s->dw, read_value(s, g->w_up, matrix + i * H + h), dw_up[h]);
        if (w->w_glu) compare(&s->dw, read_value(s, g->w_glu, matrix + i * H + h), dw_glu[h]);
        compare(&s->dw, read_value(s, g->w_down, matrix + h * I + i), dw_down[h]);
    }
    free(down);
}

/* The expert with the fewest rows, but some: its sums are soon made. */
static int64_t idlest(const sample_t *s)
{
    int64_t found = -1;
    for (int64_t e = 0; e < s->config->num_experts; e++) {
        const int64_t rows = s->offset[e + 1] - s->offset[e];
        if (rows > 0 && (found < 0 || rows < s->offset[found + 1] - s->offset[found])) found = e;
    }
    return found;
}

/* ---- all ---- */

/* Four roundings of the type, and what a long sum in F32 loses. */
static double tolerance_of(const sample_t *s)
{
    static const double unit[] = {
        [TYPE_BF16] = 0x1p-8, [TYPE_F16] = 0x1p-11, [TYPE_F32] = 0x1p-24, [TYPE_TF32] = 0x1p-11};
    const double longest = fmax(fmax((double)s->H, (double)s->I), (double)s->bench->counts.most);
    return 4 * unit[s->bench->subject.type] + 4 * 0x1p-24 * sqrt(longest);
}

static float *host_tokens(const sample_t *s, bool ones, uint64_t seed)
{
    const int64_t count = s->bench->subject.num_tokens * s->H;
    const cumoe_dtype_t dtype = s->config->dtype;
    float *values = malloc((size_t)count * sizeof *values);
    void *raw = malloc((size_t)count * token_size(s->config));
    if (!values || !raw) abort();
    input_tokens(&s->bench->subject, ones, seed, raw);
    for (int64_t i = 0; i < count; i++)
        values[i] = dtype == CUMOE_F32 ? ((float *)raw)[i] : input_widen(dtype, ((uint16_t *)raw)[i]);
    free(raw);
    return values;
}

double check_sample(const bench_t *b, double *tolerance)
{
    const cumoe_config_t *c = &b->subject.config;
    const int64_t T = b->subject.num_tokens, R = b->counts.rows;
    int64_t slots;
    perf_check(cumoe_layer_max_rows(b->layer, T, NULL, &slots));
    sample_t s = {.bench = b, .config = c, .H = c->hidden_size, .I = c->intermediate_size, .Z = z_width(c)};
    s.x = host_tokens(&s, true, 1);
    s.dy = goes_back(b) ? host_tokens(&s, false, 2) : NULL;
    s.offset = bench_download(b, b->permute.rows.offset, (size_t)(c->num_experts + 1) * sizeof *s.offset);
    s.row_token = bench_download(b, b->permute.rows.row_token, (size_t)R * sizeof *s.row_token);
    s.row_slot = bench_download(b, b->permute.rows.row_slot, (size_t)R * sizeof *s.row_slot);
    s.weight = bench_download(b, b->gate.routing.weight, (size_t)slots * sizeof *s.weight);
    for (int64_t i = 0; i < TOKENS && i < T; i++) check_token(&s, i * (T / 2));
    for (int64_t i = 0; i < COLUMNS && s.dy && R > 0; i++) check_column(&s, idlest(&s), i * (s.I - 1));
    void *arrays[] = {s.x, s.dy, s.offset, s.row_token, s.row_slot, s.weight};
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) free(arrays[i]);
    *tolerance = tolerance_of(&s);
    const double errors[] = {relative(&s.z), relative(&s.y), relative(&s.dx), relative(&s.dw)};
    double largest = 0;
    for (int i = 0; i < 4; i++) {
        if (!(errors[i] <= largest)) largest = errors[i]; /* NaN as well */
    }
    return largest;
}
