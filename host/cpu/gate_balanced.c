/* BALANCED (App. F): every expert takes the tokens with its largest gates, or, at inference, those above its
 * threshold. The only gate in which tokens are coupled, so the gates of the whole batch are kept, column by column.
 */
#include "host/cpu/gate.h"
#include "host/elementary.h"

#include <omp.h>

/* Who is taken: a gate g of expert e and token t with
 *   g > cut[e], or g = cut[e] and t <= last[e]      and      g > least, or g = least and t * E + e <= last_of_all.
 * Gates are never below 0; what can not be taken is stored as -1. */
typedef struct balanced_call {
    const cumoe_config_t *config;
    const cumoe_gate_args_t *args;
    const cumoe_cpu_gate_scratch_t *scratch;
    int64_t tokens;      /* rows of the gates: T */
    double least;        /* -1 = no limit */
    int64_t last_of_all; /* t * E + e */
    int64_t dropped_rows;
} balanced_call_t;

enum { TOKENS = 16 /* of a column at a time: a cache line of F32 */ };

#define REAL  float
#define FN(x) x##_f32
#include "host/cpu/gate_row_real.h"

#include "host/cpu/gate_balanced_real.h"
#undef REAL
#undef FN
#define REAL  double
#define FN(x) x##_f64
#include "host/cpu/gate_row_real.h"

#include "host/cpu/gate_balanced_real.h"
#undef REAL
#undef FN

/* m of eq. 17: tokens that an expert takes. */
static int64_t tokens_per_expert(const cumoe_config_t *c, int64_t tokens)
{
    const int64_t m = tokens * c->top_k / c->num_experts;
    return tokens == 0 ? 0 : m < 1 ? 1 : m;
}

cumoe_cpu_batch_result_t cumoe__cpu_balanced_forward(const cumoe_config_t *c, const cumoe_gate_args_t *args,
                                                     const cumoe_cpu_gate_scratch_t *scratch)
{
    const bool wide = c->dtype == CUMOE_F64;
    const int64_t live = args->routing.call->live_tokens, block = cumoe__cpu_gate_block(c, args->num_tokens);
    const cumoe_cpu_level_t level = cumoe__cpu_flat_level(c, args->training);
    balanced_call_t call = {.config = c, .args = args, .scratch = scratch, .tokens = args->num_tokens, .least = -1};
    cumoe_cpu_batch_result_t result = {0};

    for (int64_t first = 0; first < live; first += block) {
        const int64_t tokens = live - first < block ? live - first : block;
        cumoe__cpu_gate_logits(c, &level, args->weights, args->x, args->x_stride, first, tokens, scratch);
        (wide ? softmax_block_f64 : softmax_block_f32)(&call, &level, first, tokens);
    }
    if (args->training) {
        const int64_t m = tokens_per_expert(c, *args->routing.tokens);
        result.threshold_loss = (wide ? take_largest_f64 : take_largest_f32)(&call, m);
    } else {
        (wide ? take_above_f64 : take_above_f32)(&call, cumoe__max_rows_of_thresholds(c, args->num_tokens));
        result.dropped_rows = call.dropped_rows;
    }
    (wide ? write_slots_f64 : write_slots_f32)(&call);
    return result;
}
