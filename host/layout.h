/* Where everything stands in the two buffers of a call. One function places the arrays; the size query asks it with
 * no buffers, the run with the caller's: size and use cannot drift apart. */
#ifndef CUMOE_LAYOUT_H
#define CUMOE_LAYOUT_H

#include "host/objects.h"

enum { CUMOE_LAYOUT_ARRAYS = 48 }; /* saved has fewer, each of which may end with padding */

typedef struct cumoe_traffic cumoe_traffic_t; /* exchange.h */

/* With ranks: P rows and P' tokens are sent, N' tokens and the rows of all chunks come, which take N places. */
typedef struct cumoe_exchange_layout {
    /* With the routing: what a plan finds. */
    int32_t *slot_parcel;     /* [S] */
    cumoe_rows_t parcels;     /* by parcel, of tokens */
    int32_t *sent, *received; /* [L, 2] rows and tokens of parcels */
    void *losses;             /* [CUMOE_NUM_LOSSES] gate type, where this rank does not ask for them */

    /* As the rows of a layer without ranks: in saved when there is one. */
    int32_t *sent_token;                 /* [P'] */
    cumoe_call_t *call;                  /* [chunks] */
    void *weight;                        /* [N] gate type */
    cumoe_rows_t rows[CUMOE_MAX_CHUNKS]; /* of the slots of a chunk */
    void *x;                             /* [N', H] */

    /* In workspace. */
    int32_t *expert_sent, *token_sent; /* [P] */
    void *weight_sent;                 /* [P] gate type */
    int32_t *expert, *token;           /* [N] */
    void *packed;                      /* [P', H] on its way to experts */
    void *returned;                    /* [N, H] on its way back; packed itself where that is over by then */
    void *dy;                          /* [N', H] backward */
    void *dweight;                     /* [N] gate type; backward */
    void *dweight_back;                /* [P] gate type; backward */
    void *results;                     /* [P, H] what comes back */
} cumoe_exchange_layout_t;

typedef struct cumoe_layout {
    /* In saved when there is one, else in workspace; with a plan in routing. */
    cumoe_routing_t routing;
    cumoe_rows_t rows;

    void *z; /* [R, I or 2I]; in saved or, with config.recompute, in workspace */
    cumoe_exchange_layout_t exchange;

    /* In workspace. */
    union {
        struct {
            void *hidden; /* [R, I]; z itself when nothing else needs z, and for IDENTITY */
            void *output; /* [R, H] */
        } forward;
        struct {
            void *dz;      /* [R, I or 2I] */
            void *drows;   /* [R, H]; dz itself for IDENTITY */
            void *dweight; /* [S] gate type */
            void *dx_gate; /* [T, H] gate type */
        } backward;
    };
    void *stage; /* scratch of one stage after the other */
    size_t stage_size;

    size_t workspace_size, saved_size, routing_size; /* what all this takes */
} cumoe_layout_t;

typedef enum cumoe_pass {
    CUMOE_PASS_PLAN,      /* with ranks: the gate alone */
    CUMOE_PASS_INFERENCE, /* forward, nothing kept */
    CUMOE_PASS_FORWARD,   /* forward, saved filled */
    CUMOE_PASS_BACKWARD
} cumoe_pass_t;

/* The caller's buffers; NULL for the query. */
typedef struct cumoe_memory {
    void *workspace;
    const void *saved, *routing;
} cumoe_memory_t;

/* traffic is NULL without ranks, and for a plan. */
cumoe_layout_t cumoe__layout(const cumoe_layer_t *layer, cumoe_pass_t pass, int64_t num_tokens,
                             const cumoe_traffic_t *traffic, cumoe_memory_t memory);

#endif
