/* Expert parallelism (paper, section 3.1): W ranks share the experts of a layer. Each rank has its own tokens and a
 * copy of the gates; of each expert there is one copy, and its batch comes from the tokens of all ranks.
 *
 * A group of ranks (cumoe_ep_t) goes into cumoe_config_t.ep. Then cumoe_layer_create(), cumoe_ep_plan(),
 * cumoe_layer_forward() and cumoe_layer_backward() are collective, as are sums and exchanges below: all ranks make
 * the same calls in the same order, a rank one at a time, also for two layers of a group. Each brings tokens of its
 * own, in any number, also none. The same on all ranks must be: the config (cumoe_layer_create() compares),
 * training, seed, offset, and upstream gradients of losses. first_token is the global index of a rank's row 0:
 * ranks are in the order of tokens.
 *
 * Of w_up, w_glu, w_down and the biases a rank has its own experts, at least one, or one group of HIERARCHICAL
 * (cumoe_layer_experts_of_rank()). y, dx and chosen_* are those of the rank's tokens. Importance, load, losses,
 * statistics and expert_count are those of the tokens of all ranks, which are together within the limits of T.
 * Gradients of experts are complete. Those of the gates are the rank's share: cumoe_ep_sum_gradients() adds them
 * up, once, after the last of several backward calls that add.
 *
 * A token travels once to a rank that has experts of its choice, and comes back as a row for each of them. y, dx,
 * the gradients of experts, importance and load losses have the same bits for any number of ranks.
 *
 * Two ways to size the exchange. Bounded, with config.exchange_capacity = C > 0: C rows from each rank to each
 * rank, buffers as without ranks, no wait on the host. Rows beyond C are dropped, the last in the order of (expert,
 * token): the highest experts of a rank lose first. They are counted in statistics.exchange_overflow of the rank
 * whose tokens they are, and stay in rows and expert_count.
 *
 * Exact, with config.exchange_capacity = 0: cumoe_ep_plan() runs the gate, exchanges counts, waits once, and says
 * how large the buffers of this call must be.
 *
 * Exchange and products overlap in chunks: config.exchange_chunks = n cuts the experts of each rank into n runs,
 * and while the rows of one are computed, those of the next and results of the one before travel, on a stream of
 * the layer's own that the caller's waits for. Bits are the same for any n. With a capacity, a chunk has room for C
 * / n rows, rounded up, and it is there that rows beyond are dropped. 0 chooses: 2 on GPUs with several ranks of
 * two experts at least and without a capacity, else 1. On the CPU nothing overlaps. While calls of a layer are
 * captured, it has no others.
 *
 * A rank that fails, stalls or calls something else is reported as CUMOE_COMM_ERROR within the timeout, on every
 * rank. Then the group is of no more use (but for configs that differ); destroy it. Not with ranks: BALANCED,
 * single stages (stages.h), cumoe_layer_saved_bound(). */
#ifndef CUMOE_PARALLEL_H
#define CUMOE_PARALLEL_H

#include <cumoe/layer.h>

#ifdef __cplusplus
extern "C" {
#endif

#define CUMOE_EP_DEFAULT_TIMEOUT 600.0 /* seconds */

/* What one rank makes and gives to all others, by any means, so that they meet: NCCL's unique id. */
typedef struct cumoe_ep_id {
    char bytes[128];
} cumoe_ep_id_t;

/* One id for each group: a second group of the same ranks needs another.
 *
 * CUMOE_INVALID_ARGUMENT    id is NULL
 * CUMOE_UNSUPPORTED_DEVICE  the library was built without CUDA
 * CUMOE_COMM_ERROR          NCCL is not found, too old (2.18 is needed), or failed; the sentence says which
 *
 * Allocates: yes.  Synchronizes: may.  Capturable: no.  Thread-safe: yes. */
CUMOE_API CUMOE_NODISCARD cumoe_status_t cumoe_ep_id_create(cumoe_ep_id_t *id);

/* Where a group comes from: a communicator; or an id, a rank and a number of ranks; or, with none of these, the
 * environment as torchrun sets it: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Without the first two, Slurm's
 * SLURM_PROCID and SLURM_NTASKS. Rank 0 then makes an id, and the others fetch it from MASTER_ADDR over TCP, at the
 * port CUMOE_MASTER_PORT, or, if that is not set, MASTER_PORT + 1: torchrun itself listens at MASTER_PORT. There is
 * no secret in it: the port must be out of reach of strangers.
 *
 * Which GPU a rank has is the caller's choice, by the handle: LOCAL_RANK as a rule. */
typedef struct cumoe_ep_args {
    size_t struct_size;
    void *nccl_comm;         /* an ncclComm_t, borrowed: it must outlive the group */
    const cumoe_ep_id_t *id; /* the same on every rank */
    int32_t rank, num_ranks; /* with id: 0..num_ranks - 1, 1..1024; else 0, 0 */
    double timeout;          /* seconds that a rank may be late, 0..1e9; 0 = 600 */
} cumoe_ep_args_t;

/* Join a group of GPUs over NCCL, one rank for each GPU. Collective, but for a borrowed communicator.
 *
 * NCCL is loaded now: the library that CUMOE_NCCL in the environment names, else the one that is in the process
 * already (PyTorch's), else libnccl.so.2. Exchanges are enqueued, and can be captured: after a first call without
 * capture, in which NCCL connects ranks. Captured graphs must be gone before the group is.
 *
 * A borrowed communicator is never aborted or destroyed: when the group fails, it is its owner who must abort it,
 * and then destroy the group. A blocking one waits for others as long as NCCL does, whatever the timeout.
 *
 * ep      out: the group; unchanged on failure
 * handle  the device, CUDA; must outlive the group
 * args    see there; NULL = the environment
 *
 * CUMOE_INVALID_ARGUMENT    a pointer is NULL; rank, num_ranks or timeout out of range; a communicator of another
 *                           device; a variable of the environment is missing or no number
 * CUMOE_UNSUPPORTED_DEVICE  handle is the CPU: see cumoe_ep_create_local(), cumoe_ep_create_mpi() of cumoe/mpi.h
 * CUMOE_COMM_ERROR          NCCL is not found, too old, or failed; a rank did not come
 * CUMOE_OUT_OF_MEMORY       host memory
 *
 * Allocates: yes.  Synchronizes: yes.  Capturable: no.  Thread-safe: yes. */
CUMOE_API CUMOE_NODISCARD cumoe_status_t cumoe_ep_create(cumoe_ep_t **ep, const cumoe_handle_t *handle,
                                                         const cumoe_ep_args_t *args);

/* A group within this process, for tests and for many ranks on one device: ranks are threads of the caller's, one
 * each. Every exchange waits on the host, and cannot be captured.
 *
 * ep         out: [num_ranks]; unchanged on failure
 * handle     the device of all ranks; must outlive the group
 * num_ranks  1..1024
 * timeout    seconds that a rank may be late, 0..1e9; 0 = CUMOE_EP_DEFAULT_TIMEOUT
 *
 * CUMOE_INVALID_ARGUMENT  a pointer is NULL, a number out of range
 * CUMOE_OUT_OF_MEMORY     host memory
 *
 * Allocates: yes.  Synchronizes: no.  Capturable: no.  Thread-safe: yes. */
CUMOE_API CUMOE_NODISCARD cumoe_status_t cumoe_ep_create_local(cumoe_ep_t **ep, const cumoe_handle_t *handle,
                                                               int32_t num_ranks, double timeout);

/* Leave. Not collective: others learn of it when they wait for this rank. NULL is ignored. Layers of the group must
 * be gone.
 *
 * Allocates: no.  Synchronizes: may.  Capturable: no.  Thread-safe: yes. */
CUMOE_API void cumoe_ep_destroy(cumoe_ep_t *ep);

/* Give up: this and, within the timeout, all other ranks get CUMOE_COMM_ERROR from calls that wait, and from all
 * later ones. NULL is ignored.
 *
 * Allocates: no.  Synchronizes: may.  Capturable: no.  Thread-safe: yes. */
CUMOE_API void cumoe_ep_abort(cumoe_ep_t *ep);

/* Wait until everything enqueued on the stream is done, as cumoe_stream_synchronize(), but for no longer than
 * timeout seconds (0 = the group's): where a rank failed or is late the group is aborted, so that the stream comes
 * to its end. Ranks of one process have waited for each other in the calls themselves.
 *
 * CUMOE_INVALID_ARGUMENT  ep is NULL, a stream on the CPU, timeout out of range
 * CUMOE_COMM_ERROR        a rank failed or is late, or the group was aborted
 * CUMOE_CUDA_ERROR        something on the stream failed
 *
 * Allocates: no.  Synchronizes: yes.  Capturable: no.  Thread-safe: yes. */
CUMOE_API CUMOE_NODISCARD cumoe_status_t cumoe_ep_wait(const cumoe_ep_t *ep, cumoe_stream_t stream, double timeout);

/* This rank, and how many there are; -1 for NULL.
 *
 * Allocates: no.  Synchronizes: no.  Capturable: yes.  Thread-safe: yes. */
CUMOE_API int32_t cumoe_ep_rank(const cumoe_ep_t *ep);
CUMOE_API int32_t cumoe_ep_num_ranks(const cumoe_ep_t *ep);

/* Which experts a rank of the layer's group has: first .. first + count - 1, of E. All of them without a group.
 * HIERARCHICAL: whole groups of experts.
 *
 * CUMOE_INVALID_ARGUMENT  a pointer is NULL, no such rank
 *
 * Allocates: no.  Synchronizes: no.  Capturable: yes.  Thread-safe: yes. */
CUMOE_API CUMOE_NODISCARD cumoe_status_t cumoe_layer_experts_of_rank(const cumoe_layer_t *layer, int32_t rank,
                                                                     int32_t *first, int32_t *count);

/* Add up the gradients of what is replicated (w_gate, w_noise and the primary pair), in place, over all ranks.
 * Collective. NULL arrays are skipped, and must be NULL on every rank. Nothing to do without a group.
 *
 * CUMOE_INVALID_ARGUMENT  layer or gradients is NULL, or gradients does not fit the layer
 * CUMOE_COMM_ERROR        a rank failed or is late
 *
 * Allocates: no.  Synchronizes: no (LOCAL, MPI: yes).  Capturable: with NCCL.  Thread-safe: yes. */
CUMOE_API CUMOE_NODISCARD cumoe_status_t cumoe_ep_sum_gradients(const cumoe_layer_t *layer,
                                                                const cumoe_weights_t *gradients,
                                                                cumoe_stream_t stream);

/* Add up an array over all ranks, in place: gradients of what else a model has, losses, counts. Collective.
 *
 * data   device memory [count], aligned to its elements; NULL with count = 0
 * dtype  I32, I64 (sums wrap), F32 or F64
 *
 * CUMOE_INVALID_ARGUMENT  ep is NULL, data NULL or misaligned, count out of range, dtype none of these, a stream
 *                         on the CPU
 * CUMOE_COMM_ERROR        a rank failed or is late
 *
 * Allocates: no.  Synchronizes: no (LOCAL, MPI: yes).  Capturable: with NCCL.  Thread-safe: yes. */
CUMOE_API CUMOE_NODISCARD cumoe_status_t cumoe_ep_sum(const cumoe_ep_t *ep, void *data, int64_t count,
                                                      cumoe_dtype_t dtype, cumoe_stream_t stream);

/* Rows of the caller's own between all ranks: those for rank 0, then those for rank 1, and so on; what comes
 * likewise. */
typedef struct cumoe_ep_exchange_args {
    size_t struct_size;
    const void *send;    /* [sum of sent, row_size] device memory; NULL without rows */
    void *recv;          /* [sum of received, row_size] device memory that send has no part of; NULL without rows */
    const int64_t *sent; /* [W] host memory: rows for each rank, this one included; 0 = none */
    const int64_t *received; /* [W] host memory: rows from each rank: what that rank has in sent for this one */
    size_t row_size; /* bytes, at least 1, the same on every rank; all rows of an array 2^58 bytes at most */
} cumoe_ep_exchange_args_t;

/* An all-to-all of rows, carried as those of a layer are. Collective.
 *
 * args  see there; of the host's arrays nothing is read after the call
 *
 * CUMOE_INVALID_ARGUMENT  a pointer is NULL, a number out of range, received of this rank's own rows not what is
 *                         sent, recv overlaps send, a stream on the CPU
 * CUMOE_COMM_ERROR        a rank failed, is late, or has other numbers of rows. NCCL compares nothing: rows may be
 *                         cut off there, or a rank seem late, which cumoe_ep_wait() reports
 *
 * Allocates: no.  Synchronizes: no (LOCAL, MPI: yes).  Capturable: with NCCL.  Thread-safe: yes. */
CUMOE_API CUMOE_NODISCARD cumoe_status_t cumoe_ep_exchange(const cumoe_ep_t *ep,
                                                           const cumoe_ep_exchange_args_t *args,
                                                           cumoe_stream_t stream);

/* Exact mode. A plan is host memory that knows how many rows go from where to where; it is used again for
 * the next call. From cumoe_ep_plan() to the end of the last backward call it belongs to one forward call and its
 * buffer routing: each call in flight has a plan of its own. Plans go before their layer.
 *
 * CUMOE_INVALID_ARGUMENT  a pointer is NULL, the layer has no group or a capacity
 * CUMOE_OUT_OF_MEMORY     host memory
 *
 * Allocates: host memory.  Synchronizes: no.  Capturable: no.  Thread-safe: yes. */
CUMOE_API CUMOE_NODISCARD cumoe_status_t cumoe_ep_plan_create(const cumoe_layer_t *layer, cumoe_ep_plan_t **plan);

/* NULL is ignored.
 *
 * Allocates: no.  Synchronizes: no.  Capturable: no.  Thread-safe: yes. */
CUMOE_API void cumoe_ep_plan_destroy(cumoe_ep_plan_t *plan);

/* Bytes of the buffer routing, which lives from cumoe_ep_plan() to the last backward call: device memory, 16-byte
 * aligned.
 *
 * CUMOE_INVALID_ARGUMENT  a pointer is NULL, the layer has no group or a capacity, num_tokens out of range
 *
 * Allocates: no.  Synchronizes: no.  Capturable: yes.  Thread-safe: yes. */
CUMOE_API CUMOE_NODISCARD cumoe_status_t cumoe_ep_routing_size(const cumoe_layer_t *layer, int64_t num_tokens,
                                                               size_t *routing_size);

/* What cumoe_ep_plan() found. */
typedef struct cumoe_ep_sizes {
    size_t workspace_size;                                          /* of forward and backward */
    size_t saved_size;                                              /* of forward with saved */
    int64_t rows_sent, rows_received, tokens_sent, tokens_received; /* over all ranks, this one included */
    int64_t reserved[4];                                            /* 0 */
} cumoe_ep_sizes_t;

/* Run the gate, and let all ranks know how many rows will come: collective. The arguments are those of the forward
 * call that follows, which does not run the gate again; all outputs but y are written here. Of the buffers
 * workspace (cumoe_layer_buffer_sizes()) and routing count here. Waits once, for all ranks.
 *
 * plan   out: to be named in the forward and backward calls
 * sizes  out: what these need
 *
 * Statuses as cumoe_layer_forward(), and
 * CUMOE_COMM_ERROR  a rank failed, is late or makes another call
 *
 * Allocates: no.  Synchronizes: yes.  Capturable: no.  Thread-safe: yes, with distinct plans and buffers. */
CUMOE_API CUMOE_NODISCARD cumoe_status_t cumoe_ep_plan(const cumoe_layer_t *layer, const cumoe_forward_args_t *args,
                                                       cumoe_ep_plan_t *plan, cumoe_ep_sizes_t *sizes,
                                                       cumoe_stream_t stream);

#ifdef __cplusplus
}
#endif
#endif
