/* THE SEAM: what a backend implements. The layer knows the order of stages, a backend knows how a stage is
 * computed.
 *
 * Stage functions get arguments that have been checked: required pointers are there and aligned, sizes agree,
 * strides are resolved (never 0), structs have the library's size, gradients is never NULL (its pointers may be).
 * They allocate nothing, wait for nothing, and only enqueue. What begins inside an array (the glu half of z, dz,
 * w_up or b_up, a row of odd width) is aligned to its elements alone. */
#ifndef CUMOE_BACKEND_H
#define CUMOE_BACKEND_H

#include "host/weights_layout.h"

#include <cumoe/handle.h>
#include <cumoe/optimizer.h>
#include <cumoe/stages.h>

#ifdef __cplusplus
extern "C" {
#endif

struct cumoe_ep_id;
struct cumoe_ep_args;

/* A second stream, of the layer's own beside the caller's, and marks by which one waits for the other. */
enum { CUMOE_LANE_MARKS = 3 };
typedef struct cumoe_lane {
    cumoe_stream_t stream;
    void *marks[CUMOE_LANE_MARKS];
} cumoe_lane_t;

/* Who shares the experts of a layer; alone: 1 rank that has all. */
typedef struct cumoe_ranks {
    int32_t count, rank;
    int32_t first_expert, own_experts; /* of this rank: the E that arrays of experts have */
} cumoe_ranks_t;

/* What every stage of a layer needs to know. */
typedef struct cumoe_context {
    cumoe_config_t config; /* checked and complete: top_k and max_threads are never 0 */
    void *device;          /* the backend's own, from open() */
    cumoe_ranks_t ranks;
} cumoe_context_t;

/* One array of parameters as an optimizer sees it: [experts, rows, cols] in any layout. Its state is contiguous and
 * of the gate type. */
typedef struct cumoe_parameter {
    cumoe_matrix_t value, gradient; /* without gradient.data, step 1 initialises the state and that is all */
    int64_t experts, rows, cols;
    void *master;              /* [experts, rows, cols] of 16-bit values; else NULL */
    void *moment1, *moment2;   /* [experts, rows, cols]; NULL where factored */
    void *row_mean, *col_mean; /* [experts, rows], [experts, cols]; NULL where not factored */
    void *average;             /* [experts] mean of row_mean; NULL where not factored */
} cumoe_parameter_t;

/* An array that becomes, on every rank, the sum of those of all ranks; integers wrap. */
typedef struct cumoe_sum {
    void *data; /* NULL = nothing to do */
    int64_t count;
    cumoe_dtype_t dtype; /* I32, I64, F32, F64 */
} cumoe_sum_t;

enum { CUMOE_GATE_MAX_SUMS = 12 };

/* Rows of a rank's tokens go to the ranks that have their experts, in L = W * exchange_chunks parcels
 * (cumoe__first_of_parcel()); a token goes once to a rank, with the first parcel that needs it. Rows stand sorted
 * by expert, and so by parcel. Those of a parcel begin, in what is sent, behind those of lower parcels, or, with a
 * capacity, at parcel * capacity, and what they leave free is -1. A row that has no room there is dropped. */
typedef struct cumoe_dispatch_args {
    int64_t num_tokens;      /* T of this rank */
    int64_t capacity;        /* rows, and tokens, of a parcel; 0 = as many as there are */
    cumoe_routing_t routing; /* in   expert, weight, call */
    cumoe_rows_t rows; /* in   offset, slot_row. pack: slot_row becomes the place among what is sent, -1 = none */
    int32_t *slot_parcel; /* [S]  mark: the parcel of a slot that has room there, where it is the first of its token
                             with that rank; else -1 */
    cumoe_rows_t parcels; /* in   count, pack: the tokens sorted by slot_parcel: offset [L + 1], slot_row */
    int32_t *count;       /* out  [L, 2] count: rows and tokens of each parcel */
    int32_t *expert;      /* out  [P] pack: number of a sent row's expert among those of its parcel; with a capacity
                             the caller has filled it with -1 */
    int32_t *token;       /* out  [P] pack: number of a sent row's token among those for the same rank */
    void *weight;         /* out  [P] gate type, pack */
    int32_t *sent_token;  /* out  [tokens sent] pack: filled as expert */
    cumoe_statistics_t *statistics; /* out  [1] or NULL; pack: exchange_overflow */
} cumoe_dispatch_args_t;

/* What came: slots, each a row for an expert of this rank, sorted by expert by the stage permute, as if each were a
 * token with one choice. */
typedef struct cumoe_arrive_args {
    int64_t num_slots;    /* N of this chunk, all ranks together */
    int64_t capacity;     /* as sent */
    int32_t chunk;        /* which of the experts of this rank */
    const int32_t *count; /* in   [L, 2] rows and tokens from each rank for each chunk; without capacity */
    const int32_t *token; /* in   [N] number among those of the same rank, whatever the chunk */
    cumoe_call_t *call;   /* out  begin: N live tokens */
    cumoe_rows_t rows;    /* end: in offset, slot_row; out row_token, among the tokens of all ranks and chunks */
} cumoe_arrive_args_t;

/* Row i of to = row index[i] of from, bit for bit; where index[i] < 0 zeros, or nothing. */
typedef struct cumoe_gather_args {
    const void *from;
    int64_t from_stride; /* in elements */
    void *to;            /* [count, width] */
    const int32_t *index;
    int64_t count, width; /* of elements */
    size_t element;       /* bytes: 2, 4, 8 */
    bool zeros;
} cumoe_gather_args_t;

typedef struct cumoe_backend_ops {
    /* Device. */
    cumoe_status_t (*open)(int32_t ordinal, void **device, char *description, size_t description_size);
    void (*close)(void *device);
    cumoe_status_t (*memory_alloc)(void *device, size_t size, void **ptr);
    void (*memory_free)(void *device, void *ptr);
    cumoe_status_t (*memory_copy)(void *device, void *dst, const void *src, size_t size, cumoe_copy_t kind,
                                  cumoe_stream_t stream);
    cumoe_status_t (*memory_set)(void *device, void *ptr, int value, size_t size, cumoe_stream_t stream);
    cumoe_status_t (*stream_create)(void *device, cumoe_stream_t *stream);
    void (*stream_destroy)(void *device, cumoe_stream_t stream);
    cumoe_status_t (*stream_synchronize)(void *device, cumoe_stream_t stream);

    /* All four NULL where there are no streams. lane: all or nothing. A mark stands for what is enqueued on a
     * stream so far, and what comes later on another waits for that. */
    cumoe_status_t (*lane_create)(void *device, cumoe_lane_t *lane);
    void (*lane_destroy)(void *device, cumoe_lane_t *lane);
    cumoe_status_t (*mark_set)(void *device, const char *function, void *mark, cumoe_stream_t stream);
    cumoe_status_t (*mark_wait)(void *device, const char *function, void *mark, cumoe_stream_t stream);

    /* UNSUPPORTED_CONFIG with its name for what the backend has no kernel for; resolves max_threads. */
    cumoe_status_t (*supports)(void *device, cumoe_config_t *config);

    bool row_tiles; /* rows.tile is required */

    /* Stages. */
    size_t (*workspace_size)(const cumoe_context_t *context, cumoe_stage_t stage, int64_t num_tokens);
    cumoe_status_t (*gate)(const cumoe_context_t *, const cumoe_gate_args_t *, cumoe_stream_t);
    cumoe_status_t (*permute)(const cumoe_context_t *, const cumoe_permute_args_t *, cumoe_stream_t);
    cumoe_status_t (*up)(const cumoe_context_t *, const cumoe_up_args_t *, cumoe_stream_t);
    cumoe_status_t (*down)(const cumoe_context_t *, const cumoe_down_args_t *, cumoe_stream_t);
    cumoe_status_t (*combine)(const cumoe_context_t *, const cumoe_combine_args_t *, cumoe_stream_t);
    cumoe_status_t (*down_backward)(const cumoe_context_t *, const cumoe_down_backward_args_t *, cumoe_stream_t);
    cumoe_status_t (*gate_backward)(const cumoe_context_t *, const cumoe_gate_backward_args_t *, cumoe_stream_t);
    cumoe_status_t (*up_backward)(const cumoe_context_t *, const cumoe_up_backward_args_t *, cumoe_stream_t);
    cumoe_status_t (*permute_backward)(const cumoe_context_t *, const cumoe_permute_backward_args_t *,
                                       cumoe_stream_t);

    /* Groups over the device's own network, or NULL. An id is one to meet by; NULL: only see whether there could be
     * one. args is complete: with a communicator, or with id, rank and num_ranks. */
    cumoe_status_t (*group_id)(const char *function, struct cumoe_ep_id *id);
    cumoe_status_t (*group_join)(const char *function, const cumoe_handle_t *handle,
                                 const struct cumoe_ep_args *args, cumoe_ep_t **ep);

    /* Between ranks. With several, gate() leaves out what hangs on the tokens of all: gate_sums() lists the arrays
     * that are to be added up, and gate_finish() with the same arguments does the rest. */
    int (*gate_sums)(const cumoe_context_t *, const cumoe_gate_args_t *, cumoe_sum_t sums[CUMOE_GATE_MAX_SUMS]);
    cumoe_status_t (*gate_finish)(const cumoe_context_t *, const cumoe_gate_args_t *, cumoe_stream_t);
    cumoe_status_t (*dispatch_mark)(const cumoe_context_t *, const cumoe_dispatch_args_t *, cumoe_stream_t);
    cumoe_status_t (*dispatch_count)(const cumoe_context_t *, const cumoe_dispatch_args_t *, cumoe_stream_t);
    cumoe_status_t (*dispatch_pack)(const cumoe_context_t *, const cumoe_dispatch_args_t *, cumoe_stream_t);
    cumoe_status_t (*arrive_begin)(const cumoe_context_t *, const cumoe_arrive_args_t *, cumoe_stream_t);
    cumoe_status_t (*arrive_end)(const cumoe_context_t *, const cumoe_arrive_args_t *, cumoe_stream_t);
    cumoe_status_t (*gather)(const cumoe_context_t *, const cumoe_gather_args_t *, cumoe_stream_t);

    /* Parameters. */
    cumoe_status_t (*gate_bias_update)(const cumoe_context_t *, void *gate_bias, const int32_t *expert_count,
                                       float rate, cumoe_stream_t);
    cumoe_status_t (*weights_init)(const cumoe_context_t *, uint64_t seed, const cumoe_weights_t *, cumoe_stream_t);
    /* parameters is host memory, read during the call. args->call is device memory: whether to skip, and whether t
     * <= 1, which first clears the state and fills all masters, is decided on the device. */
    cumoe_status_t (*optimizer_step)(const cumoe_context_t *, const cumoe_optimizer_args_t *,
                                     const cumoe_parameter_t *parameters, int count, cumoe_stream_t);
} cumoe_backend_ops_t;

extern const cumoe_backend_ops_t cumoe__backend_cpu, cumoe__backend_cuda;

#ifdef __cplusplus
}
#endif
#endif
