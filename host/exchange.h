/* Rows on their way between ranks: to the experts that other ranks have, and back. */
#ifndef CUMOE_EXCHANGE_H
#define CUMOE_EXCHANGE_H

#include "host/comm.h"
#include "host/layout.h"

/* What goes to a chunk of the experts of every rank, and comes for this chunk of this one's: where it stands among
 * all that is sent or received. */
typedef struct cumoe_chunk {
    cumoe_blocks_t rows_sent, tokens_sent, rows_received, tokens_received;
    int64_t first_row, num_rows; /* of those that come */
} cumoe_chunk_t;

/* How many rows and tokens go from here to each rank, and come from each. With a capacity: the most. */
struct cumoe_traffic {
    cumoe_chunk_t chunk[CUMOE_MAX_CHUNKS];
    int64_t num_rows_sent, num_tokens_sent, num_rows_received, num_tokens_received;
    int64_t num_places; /* for the rows that come: each chunk begins at a multiple of 64 */
    int32_t *count;     /* [2, L, 2] sent and received, rows and tokens */
    int64_t *blocks;    /* [chunks, 8, W] */
};

/* plan.c */
bool cumoe__traffic_alloc(cumoe_traffic_t *traffic, const cumoe_layer_t *layer);
void cumoe__traffic_free(cumoe_traffic_t *traffic);
void cumoe__traffic_fill_capacity(cumoe_traffic_t *traffic, const cumoe_layer_t *layer);

struct cumoe_ep_traffic_plan {
    const cumoe_layer_t *layer;
    int64_t num_tokens;  /* -1 = nothing planned yet */
    const void *routing; /* the buffer that it was planned into */
    cumoe_traffic_t traffic;
};

/* What the stages of experts work on: the tokens of this rank and all experts, or a chunk of this rank's and the
 * rows that came for it. */
typedef struct cumoe_side {
    cumoe_context_t context;
    cumoe_weights_t weights, gradients;
    int64_t num_tokens;
    cumoe_routing_t routing;
    cumoe_rows_t rows;
    int64_t first_row; /* where its rows stand in arrays of all chunks */
    const void *x;
    int64_t x_stride;
} cumoe_side_t;

static inline void *cumoe__side_rows(const cumoe_side_t *side, void *array, int64_t width)
{
    const size_t row = (size_t)width * cumoe__dtype_size(side->context.config.dtype);
    return array ? (char *)array + (size_t)side->first_row * row : NULL;
}

/* What is done with each chunk. While compute() of one runs on the caller's stream, another's exchange does on the
 * layer's own; the order of calls is the same on all ranks. FUNCTION is the caller's. */
typedef struct cumoe_chunk_ops {
    const char *function;
    void *call;
    cumoe_status_t (*dispatch)(void *call, int32_t chunk, cumoe_stream_t stream);
    cumoe_status_t (*compute)(void *call, int32_t chunk, cumoe_stream_t stream);
    cumoe_status_t (*give_back)(void *call, int32_t chunk, cumoe_stream_t stream);
} cumoe_chunk_ops_t;
cumoe_status_t cumoe__exchange_chunks(const cumoe_layer_t *layer, const cumoe_chunk_ops_t *ops,
                                      cumoe_stream_t stream);

/* The experts of a chunk, as a layer without ranks has them. */
cumoe_context_t cumoe__exchange_context(const cumoe_layer_t *layer, int32_t chunk);

/* The same for everything that a call brings: gradients may be NULL. */
cumoe_side_t cumoe__exchange_side(const cumoe_layer_t *layer, const cumoe_layout_t *layout,
                                  const cumoe_traffic_t *traffic, int32_t chunk, const cumoe_weights_t *weights,
                                  const cumoe_weights_t *gradients);

/* Where traffic is to point: at the plan's, or, with a capacity, at the layer's; NULL without ranks. plan and
 * routing are what the caller of FUNCTION named. */
cumoe_status_t cumoe__exchange_traffic(const char *function, const cumoe_layer_t *layer,
                                       const cumoe_ep_plan_t *plan, const void *routing, int64_t num_tokens,
                                       const cumoe_traffic_t **traffic);

/* From the gate to rows by expert and tokens by rank. */
cumoe_status_t cumoe__exchange_gate(const cumoe_layer_t *layer, const cumoe_gate_args_t *gate,
                                    const cumoe_layout_t *layout, cumoe_stream_t stream);

/* Let all ranks know how many rows come, and wait: the plan is made. */
cumoe_status_t cumoe__exchange_counts(const cumoe_layer_t *layer, int64_t num_tokens, const cumoe_layout_t *layout,
                                      cumoe_ep_plan_t *plan, cumoe_stream_t stream);
cumoe_ep_sizes_t cumoe__exchange_sizes(const cumoe_ep_plan_t *plan);

/* Forward: what goes to all ranks is packed; a chunk of it is sent; and what came becomes rows by expert. */
cumoe_status_t cumoe__exchange_pack(const cumoe_layer_t *layer, const cumoe_forward_args_t *args,
                                    const cumoe_layout_t *layout, const cumoe_traffic_t *traffic,
                                    cumoe_stream_t stream);
cumoe_status_t cumoe__exchange_dispatch(const cumoe_layer_t *layer, const cumoe_layout_t *layout,
                                        const cumoe_chunk_t *chunk, cumoe_stream_t stream);
cumoe_status_t cumoe__exchange_arrive(const cumoe_layer_t *layer, const cumoe_layout_t *layout, int32_t chunk,
                                      const cumoe_side_t *side, cumoe_stream_t stream);

/* Backward: the same of dy, whose rows stand as they came in the forward call. */
cumoe_status_t cumoe__exchange_pack_dy(const cumoe_layer_t *layer, const cumoe_backward_args_t *args,
                                       const cumoe_layout_t *layout, const cumoe_traffic_t *traffic,
                                       cumoe_stream_t stream);
cumoe_status_t cumoe__exchange_dispatch_dy(const cumoe_layer_t *layer, const cumoe_layout_t *layout,
                                           const cumoe_chunk_t *chunk, cumoe_stream_t stream);

/* Rows [N, H] that experts made, sorted by expert, are put in the order in which they came. */
cumoe_status_t cumoe__exchange_unpermute(const cumoe_layer_t *layer, const cumoe_side_t *side, const void *rows,
                                         const cumoe_layout_t *layout, cumoe_stream_t stream);

/* They go back where their tokens came from: to layout->results, at the places in slot_row. Backward: and a number
 * for each, to dweight_back. */
cumoe_status_t cumoe__exchange_return(const cumoe_layer_t *layer, const cumoe_layout_t *layout,
                                      const cumoe_chunk_t *chunk, bool backward, cumoe_stream_t stream);

/* From dweight_back to a number for each slot, dweight [S]. */
cumoe_status_t cumoe__exchange_take_dweight(const cumoe_layer_t *layer, void *dweight, int64_t num_tokens,
                                            const cumoe_layout_t *layout, cumoe_stream_t stream);

#endif
