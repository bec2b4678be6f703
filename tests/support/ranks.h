/* A problem, solved by several ranks: each has some of its tokens, and its experts. What they give is compared, bit
 * for bit where that is promised, with what one device gives for all. */
#ifndef CUMOE_TESTS_RANKS_H
#define CUMOE_TESTS_RANKS_H

#include "tests/support/problem.h"

enum { RANKS_MAX = 8 };

/* Which tokens a rank has. */
typedef enum ranks_split {
    SPLIT_EVEN,
    SPLIT_UNEVEN, /* fewer and fewer */
    SPLIT_LAST,   /* the last has all */
    NUM_SPLITS
} ranks_split_t;

typedef cumoe_status_t ranks_create_t(cumoe_ep_t **ep, const cumoe_handle_t *handle, int32_t num_ranks,
                                      double timeout);

typedef struct ranks_options {
    int32_t num_ranks;
    ranks_split_t split;
    int64_t capacity;         /* config.exchange_capacity; 0 = exact */
    int32_t chunks;           /* config.exchange_chunks, but for what a rank's experts allow */
    double timeout;           /* seconds; 0 = the library's */
    ranks_create_t *create;   /* NULL = cumoe_ep_create_local() */
    cumoe_ep_t *const *group; /* [num_ranks], which end with the run; NULL = to be created */
} ranks_options_t;

struct rank;
typedef void rank_body_t(struct rank *rank);

/* One rank's share of a problem: its own buffers, and arguments ready to call. */
typedef struct rank {
    const problem_t *whole;
    const ranks_options_t *options;
    cumoe_ep_t *ep;
    const cumoe_handle_t *handle;
    cumoe_layer_t *layer;
    cumoe_ep_plan_t *plan;
    buffer_list_t buffers;
    int64_t first_token, tokens, live_tokens;
    int32_t first_expert, experts;
    cumoe_call_t *call;
    cumoe_weights_t weights, gradients;
    cumoe_forward_args_t forward;
    cumoe_backward_args_t backward;
    rank_body_t *body;
    void *context;
    report_t report;
} rank_t;

/* How many experts the rank with the fewest has. */
int32_t ranks_least_experts(const problem_t *whole, int32_t num_ranks);

/* The share of ep's rank: layer (collective), buffers. */
bool rank_create(rank_t *rank, const problem_t *whole, const ranks_options_t *options, cumoe_ep_t *ep);
void rank_destroy(rank_t *rank);

/* Forward; backward, and the gates' gradients added up; both: collective. */
bool rank_forward(rank_t *rank);
bool rank_backward(rank_t *rank);
bool rank_run(rank_t *rank);

/* Of y, dx, the gradients of experts and, once, the losses of importance and load; each byte by its place in the
 * whole problem, so that the sum over all ranks hangs on the whole alone. */
uint64_t rank_hash(const rank_t *rank);

/* What the rank gave against what the problem has from a run of its own: everything, or what experts have a part
 * in. */
void rank_check(rank_t *rank);
void rank_check_experts(rank_t *rank);

/* All ranks, as threads, do BODY, with rank->context; their reports are gathered. */
void ranks_run(const problem_t *whole, const ranks_options_t *options, rank_body_t *body, void *context,
               report_t *report);

/* Create, run and check. The problem has been run. */
void ranks_check(const problem_t *whole, const ranks_options_t *options, report_t *report);

#endif
