/* The least that each part has to do. FLOP: a multiply-add is two. Bytes: every array is read once and written
 * once, of the weights those of experts that have rows, of their gradients all; routing is not counted. Letters as
 * in cumoe/cost.h: Z columns of z, P elements of the gate's matrices. */
#include "perf.h"

#include <math.h>

/* The arrays of a call in bytes. */
typedef struct arrays {
    double tokens, dx_gate;         /* [T, H] of the token type, of the gate type */
    double z, hidden, output;       /* [R, Z], [R, I], [R, H] */
    double w_gate, w_up, w_down;    /* as they are read: experts with rows, biases with them */
    double dw_gate, dw_up, dw_down; /* as they are written: all experts */
    double values, gate_values;     /* parameters, by count */
} arrays_t;

bool is_glu(const cumoe_config_t *c)
{
    return c->activation == CUMOE_ACTIVATION_SWIGLU || c->activation == CUMOE_ACTIVATION_GEGLU ||
           c->activation == CUMOE_ACTIVATION_GEGLU_TANH || c->activation == CUMOE_ACTIVATION_SWIGLU_CLAMPED;
}

double gate_matrices(const cumoe_config_t *c)
{
    const bool noisy = c->gate == CUMOE_GATE_NOISY_TOPK || c->gate == CUMOE_GATE_HIERARCHICAL;
    return c->gate == CUMOE_GATE_EXTERNAL ? 0 : noisy ? 2 : 1;
}

/* Columns of a gate's matrices that so many choices of groups can meet: with two levels not all. */
double gate_columns(const cumoe_config_t *c, double choices)
{
    const double E = c->num_experts, G = c->num_groups;
    return G > 0 ? G + fmin(G, choices) * (E / G) : E;
}

static arrays_t arrays_of(const subject_t *s, const counts_t *counts)
{
    const cumoe_config_t *c = &s->config;
    const double T = (double)s->num_tokens, R = (double)counts->rows, active = (double)counts->experts;
    const double H = c->hidden_size, I = c->intermediate_size, E = c->num_experts, Z = is_glu(c) ? 2 * I : I;
    const double bias = c->expert_bias, token = c->dtype == CUMOE_F32 ? 4 : 2, gate = 4;
    const double up = Z * H + bias * Z, down = H * I + bias * H, P = gate_matrices(c) * H;
    const double thresholds = c->gate == CUMOE_GATE_BALANCED ? E : 0, all = P * (E + c->num_groups) + thresholds;
    return (arrays_t){.tokens = token * T * H,
                      .dx_gate = P > 0 ? gate * T * H : 0,
                      .z = token * R * Z,
                      .hidden = token * R * I,
                      .output = token * R * H,
                      .w_gate = gate * P * gate_columns(c, T * c->top_k_groups),
                      .w_up = token * active * up,
                      .w_down = token * active * down,
                      .dw_gate = gate * all,
                      .dw_up = token * E * up,
                      .dw_down = token * E * down,
                      .values = E * (up + down),
                      .gate_values = all};
}

static work_t stage_work(const subject_t *s, const counts_t *counts, const arrays_t *a, int stage)
{
    const cumoe_config_t *c = &s->config;
    const double R = (double)counts->rows, H = c->hidden_size, I = c->intermediate_size, Z = is_glu(c) ? 2 * I : I;
    const double logits = 2 * (double)s->num_tokens * gate_matrices(c) * H * gate_columns(c, c->top_k_groups);
    const double x = a->dx_gate > 0 ? a->tokens : 0; /* as a gate reads it */
    switch (stage) {
    case CUMOE_STAGE_GATE:
        return (work_t){logits, x + a->w_gate, logits};
    case CUMOE_STAGE_UP:
        return (work_t){2 * R * H * Z, a->tokens + a->w_up + a->z + a->hidden, 0};
    case CUMOE_STAGE_DOWN:
        return (work_t){2 * R * I * H, a->hidden + a->w_down + a->output, 0};
    case CUMOE_STAGE_COMBINE:
        return (work_t){0, a->output + a->tokens, 0};
    case CUMOE_STAGE_DOWN_BACKWARD: /* d and dw_down; reads dy, w_down, z, writes dz */
        return (work_t){4 * R * I * H, a->tokens + a->w_down + 2 * a->z + a->dw_down, 0};
    case CUMOE_STAGE_GATE_BACKWARD: /* dx_gate, and the gradients of the gate; logits computed again do not count */
        return (work_t){2 * logits, x + a->w_gate + a->dw_gate + a->dx_gate, 2 * logits};
    case CUMOE_STAGE_UP_BACKWARD: /* drows and dw_up */
        return (work_t){4 * R * H * Z, a->tokens + a->w_up + a->z + a->output + a->dw_up, 0};
    case CUMOE_STAGE_PERMUTE_BACKWARD:
        return (work_t){0, a->output + a->dx_gate + a->tokens, 0};
    default:
        return (work_t){0}; /* permute: routing alone */
    }
}

/* Adam reads value, gradient and both moments and writes all but the gradient, in F32; of 16-bit values it reads
 * and writes the F32 master, and writes the value. */
static double adam_bytes(const subject_t *s, const arrays_t *a)
{
    const double value = s->config.dtype == CUMOE_F32 ? 28 : 2 + 3 * 8 + 2;
    return value * a->values + 28 * a->gate_values;
}

work_t work_of(const subject_t *s, const counts_t *counts, int part)
{
    const arrays_t a = arrays_of(s, counts);
    if (part < CUMOE_NUM_STAGES) return stage_work(s, counts, &a, part);
    if (part == OPTIMIZER) return (work_t){0, adam_bytes(s, &a), 0};
    const int first = part == BACKWARD ? CUMOE_STAGE_DOWN_BACKWARD : 0;
    const int end = part == BACKWARD || part == BOTH ? CUMOE_NUM_STAGES : CUMOE_STAGE_DOWN_BACKWARD;
    work_t sum = {0};
    for (int stage = first; stage < end; stage++) {
        const work_t work = stage_work(s, counts, &a, stage);
        sum.flop += work.flop;
        sum.bytes += work.bytes;
        sum.gate_flop += work.gate_flop;
    }
    const double x = a.dx_gate > 0 ? a.tokens : 0; /* read by the gate already */
    sum.bytes -= part == BOTH ? 2 * x : x;
    if (part == INFERENCE) sum.bytes -= a.z;
    return sum;
}

static bool equal(const char *what, double ours, double theirs, char *why, size_t why_size)
{
    if (fabs(ours - theirs) <= 1e-12 * theirs) return true;
    snprintf(why, why_size, "wrong: %s of the stages add up to %.17g, and cumoe_config_cost() says %.17g", what,
             ours, theirs);
    return false;
}

bool work_agrees(const subject_t *s, char *why, size_t why_size)
{
    cumoe_cost_t cost = {.struct_size = sizeof cost};
    perf_check(cumoe_config_cost(&s->config, s->num_tokens, 1, 1, &cost));
    const int64_t rows = s->num_tokens * s->config.top_k, E = s->config.num_experts;
    const counts_t most = {.rows = rows, .experts = rows < E ? rows : E};
    const work_t forward = work_of(s, &most, FORWARD), backward = work_of(s, &most, BACKWARD);
    return equal("FLOP forward", forward.flop, cost.forward_flop, why, why_size) &&
           equal("FLOP backward", backward.flop, cost.backward_flop, why, why_size) &&
           equal("bytes forward", forward.bytes, cost.forward_bytes, why, why_size) &&
           equal("bytes backward", backward.bytes, cost.backward_bytes, why, why_size);
}
