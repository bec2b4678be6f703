/* Ranks as MPI processes. Of a library of its own, libcumoe_mpi, as MPI libraries cannot be exchanged for each
 * other: it goes with the one that it was built with. Not a part of cumoe/cumoe.h. */
#ifndef CUMOE_MPI_H
#define CUMOE_MPI_H

#include <cumoe/transport.h>
#include <mpi.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Make the group of all processes of a communicator, with its ranks. Collective. Rows of a GPU go through host
 * memory, so that processes may share one.
 *
 * MPI is initialised, and is finalised when the group is gone. Calls of the layer call MPI: below
 * MPI_THREAD_SERIALIZED they come from the thread that initialised it, and below MPI_THREAD_MULTIPLE no other
 * thread calls MPI meanwhile. cumoe_ep_abort() calls none: others learn of it when this rank next calls, or
 * destroys.
 *
 * After CUMOE_COMM_ERROR MPI may hold on to buffers of the call that failed, as it cannot take messages back: they
 * are to stay until the process ends. MPI_Finalize() waits for ranks that are dead; MPI_Abort() does not.
 *
 * ep       out: the group; unchanged on failure
 * handle   this rank's device; must outlive the group
 * comm     an intra-communicator; duplicated
 * timeout  seconds that a rank may be late, here and in later calls, 0..1e9; 0 = CUMOE_EP_DEFAULT_TIMEOUT
 *
 * CUMOE_INVALID_ARGUMENT  a pointer is NULL, comm no intra-communicator, timeout out of range, MPI not
 *                         initialised or finalised
 * CUMOE_OUT_OF_MEMORY     host memory
 * CUMOE_COMM_ERROR        MPI failed, or a rank did not come
 *
 * Allocates: yes.  Synchronizes: yes.  Capturable: no.  Thread-safe: as MPI. */
CUMOE_API CUMOE_NODISCARD cumoe_status_t cumoe_ep_create_mpi(cumoe_ep_t **ep, const cumoe_handle_t *handle,
                                                             MPI_Comm comm, double timeout);

#ifdef __cplusplus
}
#endif
#endif
