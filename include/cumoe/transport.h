/* A transport of your own between ranks: processes or machines, and whatever carries bytes between them. The
 * library asks for one thing, an exchange of messages in host memory. That all ranks make the same call, sums in a
 * fixed order and the way between device and host are its own part. cumoe/mpi.h is made of this.
 *
 * Every exchange waits on the host, and cannot be captured. */
#ifndef CUMOE_TRANSPORT_H
#define CUMOE_TRANSPORT_H

#include <cumoe/parallel.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct cumoe_message {
    int32_t rank;    /* of the other side, never this one */
    int32_t receive; /* 0 = send data to it, 1 = fill data with what comes from it */
    void *data;      /* [size] host memory, only read where it is sent */
    size_t size;     /* bytes, > 0 */
} cumoe_message_t;

typedef struct cumoe_transport {
    size_t struct_size;
    const char *name;        /* in sentences: "MPI"; lives as long as the group */
    int32_t rank, num_ranks; /* 0..num_ranks - 1, 1..1024 */
    void *context;           /* for the functions below */

    /* All messages, at once and in any order, but those between two ranks arrive in the order of the list. What one
     * side sends the other receives in an exchange of its own, in messages of the same sizes. Gives back
     * CUMOE_SUCCESS when all are through; else, after timeout seconds at the latest, what cumoe_transport_fail()
     * gives. Then no other exchange follows. */
    cumoe_status_t (*exchange)(void *context, const cumoe_message_t *messages, int32_t count, double timeout);

    /* Nothing more will come from this rank: tell others, if that can be. Called once or several times, and from
     * any thread: an exchange that is at work then fails soon. */
    void (*abort)(void *context);

    /* The last call, also after a failure; must not wait for others. */
    void (*destroy)(void *context);
} cumoe_transport_t;

/* Make the group of this rank. Not collective.
 *
 * ep         out: the group; unchanged on failure
 * handle     this rank's device; must outlive the group
 * transport  copied; the context belongs to the group from here on, but not on failure
 * timeout    seconds that a rank may be late, 0..1e9; 0 = CUMOE_EP_DEFAULT_TIMEOUT
 *
 * CUMOE_INVALID_ARGUMENT  a pointer is NULL, a number out of range
 * CUMOE_OUT_OF_MEMORY     host memory
 *
 * Allocates: yes.  Synchronizes: no.  Capturable: no.  Thread-safe: yes. */
CUMOE_API CUMOE_NODISCARD cumoe_status_t cumoe_ep_create_with(cumoe_ep_t **ep, const cumoe_handle_t *handle,
                                                              const cumoe_transport_t *transport, double timeout);

/* For those who write transports: make a sentence, as printf() does, that cumoe_last_error() gives, and give status
 * back. It becomes a part of what the user of the group reads: "rank 3 did not come in time".
 *
 * Allocates: no.  Synchronizes: no.  Capturable: yes.  Thread-safe: yes (one sentence a thread). */
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
CUMOE_API cumoe_status_t
cumoe_transport_fail(cumoe_status_t status, const char *format, ...);

#ifdef __cplusplus
}
#endif
#endif
