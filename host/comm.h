/* THE SECOND SEAM: what a transport between ranks implements.
 *
 * All ranks make the same calls in the same order. Calls are enqueued on the stream where the transport can; those
 * that cannot wait until the stream is done, and are done when they return. A failure breaks the group: this and
 * all later calls of every rank give CUMOE_COMM_ERROR, within the group's timeout. Buffers are memory of the
 * group's device. A call has at most CUMOE_GATE_MAX_SUMS transfers or sums. */
#ifndef CUMOE_COMM_H
#define CUMOE_COMM_H

#include "host/objects.h"

#include <cumoe/transport.h>

/* Rows begin[r] .. begin[r] + count[r] - 1 of an array are for rank r, or come from it. [W], host memory that is
 * read during the call. */
typedef struct cumoe_blocks {
    const int64_t *begin, *count;
} cumoe_blocks_t;

/* An all-to-all of rows of one size. What a rank sends to another has the size that this one receives. */
typedef struct cumoe_transfer {
    const void *send;
    void *recv;
    size_t row_size;
    cumoe_blocks_t sent, received;
} cumoe_transfer_t;

typedef struct cumoe_comm_ops {
    void (*destroy)(void *comm);
    void (*abort)(void *comm);
    cumoe_status_t (*exchange)(void *comm, const cumoe_transfer_t *transfers, int count, cumoe_stream_t stream);
    /* Floating point numbers are added in an order that hangs on the number of ranks alone. */
    cumoe_status_t (*sum)(void *comm, const cumoe_sum_t *sums, int count, cumoe_stream_t stream);
    /* cumoe_ep_wait(). */
    cumoe_status_t (*wait)(void *comm, cumoe_stream_t stream, double timeout);
} cumoe_comm_ops_t;

struct cumoe_ep {
    const cumoe_comm_ops_t *ops;
    void *comm; /* the transport's own */
    const cumoe_handle_t *handle;
    int32_t rank, num_ranks;
    double timeout; /* seconds */
};

#define CUMOE_EP_MAX_RANKS   1024
#define CUMOE_EP_MAX_TIMEOUT 1e9

/* parallel.c: 0 becomes the default. */
cumoe_status_t cumoe__check_timeout(const char *function, double *timeout);
/* comm_local.c: add size bytes of F64, F32, I64 or I32. */
void cumoe__comm_add(void *to, const void *from, size_t size, cumoe_dtype_t dtype);
/* parallel.c: see that all ranks of config->ep have the same configuration; collective. */
cumoe_status_t cumoe__ep_agree(const char *function, const cumoe_config_t *config);

#endif
