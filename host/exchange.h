/* Rows on their way between ranks: to the experts that other ranks have, and back. */
#ifndef CUMOE_EXCHANGE_H
#define CUMOE_EXCHANGE_H

#include "host/comm.h"
#include "host/layout.h"

/* How many rows and tokens go from here to each rank, and come from each. With a capacity: the most. */
struct cumoe_traffic {
    cumoe_blocks_t rows_sent, tokens_sent, rows_received, tokens_received;
    int64_t num_rows_sent, num_tokens_sent, num_rows_received, num_tokens_received;
};

struct cumoe_ep_traffic_plan {
    const cumoe_layer_t *layer;
    int64_t num_tokens;  /* -1 = nothing planned yet */
    const void *routing; /* the buffer that it was planned into */
    cumoe_traffic_t traffic;
    int32_t *count;  /* [2, W, 2] sent and received, rows and tokens */
    int64_t *blocks; /* [8, W] of traffic */
};

/* What the stages of experts work on: the tokens of this rank, or the rows that came. */
typedef struct cumoe_side {
    int64_t num_tokens;
    cumoe_routing_t routing;
    cumoe_rows_t rows;
    const void *x;
    int64_t x_stride;
} cumoe_side_t;

/* Where traffic is to point: at the plan's, or, with a capacity, at *bounded, which is filled in; NULL without
 * ranks. plan and routing are what the caller of FUNCTION named. */
cumoe_status_t cumoe__exchange_traffic(const char *function, const cumoe_layer_t *layer,
                                       const cumoe_ep_plan_t *plan, const void *routing, int64_t num_tokens,
                                       cumoe_traffic_t *bounded, const cumoe_traffic_t **traffic);

/* From the gate to rows by expert and tokens by rank. */
cumoe_status_t cumoe__exchange_gate(const cumoe_layer_t *layer, const cumoe_gate_args_t *gate,
                                    const cumoe_layout_t *layout, cumoe_stream_t stream);

/* Let all ranks know how many rows come, and wait: the plan is made. */
cumoe_status_t cumoe__exchange_counts(const cumoe_layer_t *layer, int64_t num_tokens, const cumoe_layout_t *layout,
                                      cumoe_ep_plan_t *plan, cumoe_stream_t stream);
cumoe_ep_sizes_t cumoe__exchange_sizes(const cumoe_ep_plan_t *plan);

/* Forward: tokens go to experts; side is what came. */
cumoe_status_t cumoe__exchange_dispatch(const cumoe_layer_t *layer, const cumoe_forward_args_t *args,
                                        const cumoe_layout_t *layout, const cumoe_traffic_t *traffic,
                                        cumoe_side_t *side, cumoe_stream_t stream);

/* Backward: the rows that came in the forward call, and the dy of their tokens. */
cumoe_status_t cumoe__exchange_dispatch_dy(const cumoe_layer_t *layer, const cumoe_backward_args_t *args,
                                           const cumoe_layout_t *layout, const cumoe_traffic_t *traffic,
                                           cumoe_stream_t stream);
cumoe_side_t cumoe__exchange_side(const cumoe_layer_t *layer, const cumoe_layout_t *layout,
                                  const cumoe_traffic_t *traffic);

/* Rows [N, H] that experts made, sorted by expert, go back where their tokens came from: to layout->results, at the
 * places in slot_row. */
cumoe_status_t cumoe__exchange_return(const cumoe_layer_t *layer, const void *rows, const cumoe_layout_t *layout,
                                      const cumoe_traffic_t *traffic, cumoe_stream_t stream);

/* The same of a number for each slot, to dweight [S]. */
cumoe_status_t cumoe__exchange_return_dweight(const cumoe_layer_t *layer, void *dweight, int64_t num_tokens,
                                              const cumoe_layout_t *layout, const cumoe_traffic_t *traffic,
                                              cumoe_stream_t stream);

#endif
