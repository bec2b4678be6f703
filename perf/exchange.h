/* cumoe-perf exchange: a layer whose experts are shared by ranks, and what its time goes into. */
#ifndef CUMOE_PERF_EXCHANGE_H
#define CUMOE_PERF_EXCHANGE_H

#include "ranks.h"

/* What is timed on all ranks. */
enum {
    ROWS,             /* bare exchanges, as many rows as the layer's: dispatch, and return */
    RANKS_FORWARD,    /* the layer; without a capacity with its plan */
    RANKS_BACKWARD,   /* */
    EXPERTS_FORWARD,  /* the rank's own experts alone, */
    EXPERTS_BACKWARD, /* on the rows that come to it */
    TIMED
};

/* Rows and tokens from one rank to others, or from others: [W], and their sums. */
typedef struct traffic {
    int64_t *rows, *tokens, num_rows, num_tokens;
} traffic_t;

enum { MOST_OF_SHARE = 40 };

/* Device memory of one layer or several; nothing more is given once an allocation has failed. */
typedef struct memory {
    const device_t *device;
    void *array[MOST_OF_SHARE];
    int arrays;
    cumoe_status_t failed;
} memory_t;

/* Device memory, set to 0. */
void *memory_take(memory_t *memory, int64_t count, size_t size);
void memory_free(memory_t *memory);
/* Frees HOST. */
void memory_upload(const memory_t *memory, void *array, void *host, size_t size);
void *memory_download(const memory_t *memory, const void *array, size_t size);

/* A layer and its calls. */
typedef struct run {
    cumoe_layer_t *layer;
    cumoe_weights_t weights, gradients; /* gradients: struct_size 0 = none */
    cumoe_forward_args_t forward;
    cumoe_backward_args_t backward;
} run_t;

/* What one rank has. */
typedef struct share {
    rank_t *rank;
    const subject_t *subject;
    memory_t memory;
    run_t layer, experts;
    cumoe_ep_plan_t *plan;     /* NULL with a capacity */
    cumoe_ep_sizes_t sizes;    /* of plan */
    int32_t *first;            /* [W + 1] the first expert of each rank */
    traffic_t sent, received;  /* rows that count */
    int64_t *padded;           /* [W] of the exchange with a capacity */
    int64_t dropped;           /* rows of this rank's tokens */
    unsigned char *incomplete; /* [T] a row of the token is dropped */
    int32_t *expert;           /* [num_rows] of the rows sent, by number on their rank */
    void *out, *in;            /* device memory for the bare exchange */
} share_t;

/* Collective. False, with a sentence: no kernel, no memory; or, wrong: what the library says of rows is not what
 * the choices of experts make of them. */
bool share_create(share_t *share, rank_t *rank, const subject_t *subject, bool *wrong, char *why, size_t why_size);
void share_destroy(share_t *share);
void share_enqueue(share_t *share, int timed);
/* Bytes of a row in the exchange. */
size_t share_row_size(const share_t *share);
/* Rows of each rank in the bare exchange: of dispatch, or of return. */
const int64_t *share_dispatched(const share_t *share, bool to_others);
const int64_t *share_returned(const share_t *share, bool to_others);

/* Chunks where there is a capacity, with which the library chooses one; without, no count of rows hangs on them.
 * And the rows that a chunk of a rank's experts has room for: parallel.h. */
int32_t num_chunks(const cumoe_config_t *config);
int64_t room_of_chunk(const cumoe_config_t *config);

/* exchange_rows.c: from choices [T, K] of some tokens the rows for each rank, as far as there is room. */
void rows_list(share_t *share, const int32_t *chosen, traffic_t *traffic, int64_t *dropped,
               unsigned char *incomplete, int32_t *expert);

/* exchange_layer.c: a layer of config with T tokens from number FIRST on, whose x and dy are those of the ranks;
 * all of its buffers but workspace and saved. Weights and gradients that run has already are lent. */
void run_create(run_t *run, memory_t *memory, const subject_t *subject, const cumoe_config_t *config, int64_t first,
                int64_t num_tokens);
void run_buffers(run_t *run, memory_t *memory, size_t workspace_size, size_t saved_size);
void run_destroy(run_t *run);

/* exchange_check.c: y, dx and the gradients of experts have the bits that the layer without ranks gives on rank 0
 * for the tokens of all. Collective. unchecked: why it was not made, or empty. False, with a sentence. */
bool share_check(share_t *share, char unchecked[200], char *why, size_t why_size);

/* ---- what comes of it, the same on every rank ---- */

typedef struct exchange {
    times_t times[TIMED + 2];          /* and forward + backward of the layer, of experts */
    double dispatched[2], returned[2]; /* bytes of the rank that has most: to others, to itself */
    double largest;                    /* bytes in nccl-tests' meaning: dispatch and return of the largest rank */
    int64_t rows, most_rows, dropped;  /* of all ranks, of the rank that gets most, dropped */
    double link;                       /* bytes a second; 0 = not known */
    bool checked;
} exchange_t;

enum { RANKS_BOTH = TIMED, EXPERTS_BOTH };

/* What is exchanged, but for times. Collective. */
void exchange_traffic(share_t *share, exchange_t *exchange);
/* Everybody in turns, as clock_parts(); a time is that of the slowest rank. */
void exchange_clock(share_t *share, double seconds, exchange_t *exchange, void (*progress)(void *, const char *),
                    void *context);
/* Bus bandwidth of a large exchange of equal parts; on one rank its copy. */
double exchange_link(rank_t *rank);

/* exchange_report.c */
void report_exchange(report_t *report, const subject_t *subject, const char *transport, const exchange_t *exchange);

#endif
