/* The inside of a bench: filled by bench.c, called by calls.c, looked into by check.c. */
#ifndef CUMOE_PERF_BENCH_H
#define CUMOE_PERF_BENCH_H

#include "perf.h"

enum { MOST_ARRAYS = 40 };

struct bench {
    subject_t subject;
    device_t *device;
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

    dense_t *dense; /* or NULL, and why */
    char no_dense[200];
    loop_t *loop;
    graph_t *graph[NUM_PARTS];
};

/* Whether there are gradients, and what leads to them. */
static inline bool goes_back(const bench_t *b)
{
    return b->gradients.struct_size > 0;
}

/* An array of the device on the host, to be freed. */
void *bench_download(const bench_t *bench, const void *device, size_t size);
/* y, dx and gradients of some tokens and columns from the formulas: the largest relative error, and the largest
 * that rounding explains. */
double check_sample(const bench_t *bench, double *tolerance);

#endif
