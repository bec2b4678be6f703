/* The inside of a bench: filled by stages_bench.c, used by stages_calls.c. */
#ifndef CUMOE_PERF_STAGES_BENCH_H
#define CUMOE_PERF_STAGES_BENCH_H

#include "stages.h"

enum { MOST_ARRAYS = 40 };

struct bench {
    subject_t subject;
    cumoe_handle_t *handle;
    cumoe_stream_t stream;
    cumoe_layer_t *layer;
    cumoe_weights_t weights, gradients;
    counts_t counts;

    void *array[MOST_ARRAYS]; /* all device memory but the weights */
    int arrays;
    cumoe_status_t failed; /* the first allocation that did */

    void *layer_y, *layer_dx, *stages_y, *stages_dx; /* [T, H] */
    cumoe_gate_args_t gate;
    cumoe_permute_args_t permute;
    cumoe_up_args_t up;
    cumoe_down_args_t down;
    cumoe_combine_args_t combine;
    cumoe_down_backward_args_t down_backward;
    cumoe_gate_backward_args_t gate_backward;
    cumoe_up_backward_args_t up_backward;
    cumoe_permute_backward_args_t permute_backward;
    cumoe_forward_args_t forward, inference;
    cumoe_backward_args_t backward;
    cumoe_optimizer_args_t optimizer;
    char no_optimizer[200]; /* why there is no state, or empty */
};

static inline size_t token_size(const bench_t *b)
{
    return b->subject.config.dtype == CUMOE_F32 ? 4 : 2;
}

#endif
