/* How the ranks of a group meet: rank 0 listens, the others come to it over TCP, and when all are there each gets a
 * few bytes from it. */
#ifndef CUMOE_BOOTSTRAP_H
#define CUMOE_BOOTSTRAP_H

#include "host/error.h"

#include <stddef.h>
#include <stdint.h>

typedef struct cumoe_meeting {
    const char *function; /* the public call, in sentences */
    const char *address;  /* of rank 0: a name or a number, IPv4 or IPv6 */
    int32_t port;
    int32_t rank, num_ranks;
    double timeout; /* seconds that the last rank may be late */
} cumoe_meeting_t;

/* data: [size], rank 0 gives it, the others get it; unchanged on failure. Whoever else comes to the port, and what
 * he says or does not say, does no harm to the ranks; but there is no secret: who says first that he is rank 1, is
 * it. */
cumoe_status_t cumoe__bootstrap(const cumoe_meeting_t *meeting, void *data, size_t size);

/* join.c: what a launcher's environment says of the meeting; all but the timeout. */
cumoe_status_t cumoe__meeting_read(cumoe_meeting_t *meeting);

#endif
