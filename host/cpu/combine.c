/* Back from rows to tokens: the weighted sum of the experts' outputs, and, backward, the sum of the rows'
 * gradients. */
#include "host/cpu/cpu.h"
#include "host/cpu/float16.h"

#include <math.h>

enum { PIECE = 64 }; /* columns that are summed at a time */

#define REAL  float
#define FN(x) x##_f32
#include "host/cpu/rows_real.h"

#include "host/cpu/combine_real.h"
#undef REAL
#undef FN
#define REAL  double
#define FN(x) x##_f64
#include "host/cpu/rows_real.h"

#include "host/cpu/combine_real.h"
#undef REAL
#undef FN

cumoe_status_t cumoe__cpu_combine(const cumoe_context_t *context, const cumoe_combine_args_t *args,
                                  cumoe_stream_t stream)
{
    (void)stream;
    const cumoe_config_t *c = &context->config;
    const int64_t live = args->routing.call->live_tokens;
#pragma omp parallel for schedule(static) num_threads(c->max_threads)
    for (int64_t t = 0; t < live; t++) (c->dtype == CUMOE_F64 ? combine_token_f64 : combine_token_f32)(c, args, t);
    return CUMOE_SUCCESS;
}

cumoe_status_t cumoe__cpu_permute_backward(const cumoe_context_t *context,
                                           const cumoe_permute_backward_args_t *args, cumoe_stream_t stream)
{
    (void)stream;
    const cumoe_config_t *c = &context->config;
    const int64_t live = args->routing.call->live_tokens;
#pragma omp parallel for schedule(static) num_threads(c->max_threads)
    for (int64_t t = 0; t < live; t++) (c->dtype == CUMOE_F64 ? sum_token_f64 : sum_token_f32)(c, args, t);
    return CUMOE_SUCCESS;
}
