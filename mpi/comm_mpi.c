/* Messages of bytes between MPI processes: a transport (cumoe/transport.h) that polls, so that a rank that is late
 * or dead is noticed. */
#define _POSIX_C_SOURCE 200809L /* sched_yield */
#include <cumoe/mpi.h>

#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>

/* Counts of MPI are int: larger messages go in several. Tests make it small. */
#ifndef CUMOE_MPI_MOST_BYTES
#define CUMOE_MPI_MOST_BYTES ((size_t)1 << 30)
#endif

enum { TAG_BYTES, TAG_GIVEN_UP };

typedef struct mpi {
    MPI_Comm comm;
    MPI_Request given_up; /* receives a message without contents from a rank that gives up */
    bool failed;          /* and the others know */
    atomic_bool aborted;
    MPI_Request *requests;
    int *rank_of; /* of requests */
    int num_requests, num_received, room;
} mpi_t;

static cumoe_status_t fail_mpi(const char *call, int error)
{
    char text[MPI_MAX_ERROR_STRING] = "";
    int length;
    MPI_Error_string(error, text, &length);
    return cumoe_transport_fail(CUMOE_COMM_ERROR, "%s: %s", call, text);
}

#define TRY_MPI(function, ...)                                                                                     \
    do {                                                                                                           \
        const int error_ = function(__VA_ARGS__);                                                                  \
        if (error_ != MPI_SUCCESS) return fail_mpi(#function, error_);                                             \
    } while (0)

static bool is_running(void)
{
    int initialized, finalized;
    MPI_Initialized(&initialized);
    MPI_Finalized(&finalized);
    return initialized && !finalized;
}

/* ---- an exchange ---- */

static cumoe_status_t make_room(mpi_t *mpi, const cumoe_message_t *messages, int32_t count)
{
    size_t needed = 0;
    for (int32_t i = 0; i < count; i++) needed += (messages[i].size - 1) / CUMOE_MPI_MOST_BYTES + 1;
    if (needed <= (size_t)mpi->room) return CUMOE_SUCCESS;
    free(mpi->requests);
    free(mpi->rank_of);
    mpi->requests = malloc(needed * sizeof *mpi->requests);
    mpi->rank_of = malloc(needed * sizeof *mpi->rank_of);
    mpi->room = mpi->requests && mpi->rank_of ? (int)needed : 0;
    return mpi->room ? CUMOE_SUCCESS
                     : cumoe_transport_fail(CUMOE_OUT_OF_MEMORY, "no host memory for %zu messages", needed);
}

static cumoe_status_t start(mpi_t *mpi, const cumoe_message_t *message)
{
    for (size_t at = 0; at < message->size; at += CUMOE_MPI_MOST_BYTES) {
        const size_t left = message->size - at;
        const int bytes = (int)(left < CUMOE_MPI_MOST_BYTES ? left : CUMOE_MPI_MOST_BYTES);
        char *data = (char *)message->data + at;
        MPI_Request *request = &mpi->requests[mpi->num_requests];
        if (message->receive)
            TRY_MPI(MPI_Irecv, data, bytes, MPI_BYTE, message->rank, TAG_BYTES, mpi->comm, request);
        else
            TRY_MPI(MPI_Isend, data, bytes, MPI_BYTE, message->rank, TAG_BYTES, mpi->comm, request);
        mpi->rank_of[mpi->num_requests++] = message->rank;
        mpi->num_received += message->receive;
    }
    return CUMOE_SUCCESS;
}

/* Which rank is waited for: one that has sent nothing, else one that does not take what it gets. */
static int late_rank(const mpi_t *mpi)
{
    int done = 1, i = 0;
    while (i < mpi->num_requests && MPI_Test(&mpi->requests[i], &done, MPI_STATUS_IGNORE) == MPI_SUCCESS && done)
        i++;
    return mpi->rank_of[i < mpi->num_requests ? i : 0];
}

static cumoe_status_t fail_after(const mpi_t *mpi, int rank)
{
    const int late = late_rank(mpi);
    return late == rank ? cumoe_transport_fail(CUMOE_COMM_ERROR, "rank %d has given up", rank)
                        : cumoe_transport_fail(CUMOE_COMM_ERROR,
                                               "rank %d has not come so far, and rank %d has given up", late, rank);
}

static cumoe_status_t finish(mpi_t *mpi, double deadline)
{
    for (;;) {
        int done;
        TRY_MPI(MPI_Testall, mpi->num_requests, mpi->requests, &done, MPI_STATUSES_IGNORE);
        if (done) return CUMOE_SUCCESS;
        MPI_Status status;
        TRY_MPI(MPI_Test, &mpi->given_up, &done, &status);
        if (done) return fail_after(mpi, status.MPI_SOURCE);
        if (atomic_load(&mpi->aborted)) return cumoe_transport_fail(CUMOE_COMM_ERROR, "it has aborted");
        if (MPI_Wtime() > deadline)
            return cumoe_transport_fail(CUMOE_COMM_ERROR, "rank %d did not come in time", late_rank(mpi));
        sched_yield(); /* there may be more ranks than processors */
    }
}

/* Tell the others, and leave to MPI what is under way: receives that nothing has reached are taken back. */
static void give_up(mpi_t *mpi)
{
    if (mpi->failed) return;
    mpi->failed = true;
    for (int i = 0; i < mpi->num_requests; i++) {
        if (mpi->requests[i] == MPI_REQUEST_NULL) continue;
        if (i < mpi->num_received) MPI_Cancel(&mpi->requests[i]);
        MPI_Request_free(&mpi->requests[i]);
    }
    int rank, num_ranks;
    MPI_Comm_rank(mpi->comm, &rank);
    MPI_Comm_size(mpi->comm, &num_ranks);
    for (int r = 0; r < num_ranks; r++) {
        MPI_Request request;
        if (r != rank && MPI_Isend(NULL, 0, MPI_BYTE, r, TAG_GIVEN_UP, mpi->comm, &request) == MPI_SUCCESS)
            MPI_Request_free(&request);
    }
}

static cumoe_status_t run(mpi_t *mpi, const cumoe_message_t *messages, int32_t count, double timeout)
{
    const double deadline = MPI_Wtime() + timeout;
    mpi->num_requests = mpi->num_received = 0;
    cumoe_status_t status = make_room(mpi, messages, count);
    for (int receive = 1; receive >= 0; receive--) /* what comes finds its place */
        for (int32_t i = 0; i < count && status == CUMOE_SUCCESS; i++)
            if (messages[i].receive == receive) status = start(mpi, &messages[i]);
    return status == CUMOE_SUCCESS ? finish(mpi, deadline) : status;
}

static cumoe_status_t mpi_exchange(void *context, const cumoe_message_t *messages, int32_t count, double timeout)
{
    mpi_t *mpi = context;
    if (!is_running()) return cumoe_transport_fail(CUMOE_COMM_ERROR, "MPI is finalised");
    const cumoe_status_t status = run(mpi, messages, count, timeout);
    if (status != CUMOE_SUCCESS) give_up(mpi);
    return status;
}

/* From any thread, and so without MPI. */
static void mpi_abort(void *context)
{
    mpi_t *mpi = context;
    atomic_store(&mpi->aborted, true);
}

static void mpi_destroy(void *context)
{
    mpi_t *mpi = context;
    if (mpi->comm != MPI_COMM_NULL && is_running()) {
        if (atomic_load(&mpi->aborted)) give_up(mpi);
        if (mpi->given_up != MPI_REQUEST_NULL) {
            MPI_Cancel(&mpi->given_up);
            MPI_Request_free(&mpi->given_up);
        }
        if (!mpi->failed) MPI_Comm_free(&mpi->comm); /* else some may never come to do the same */
    }
    free(mpi->requests);
    free(mpi->rank_of);
    free(mpi);
}

/* ---- the group ---- */

/* Wait for all ranks in a way that can be left, as MPI_Comm_dup() cannot. */
static cumoe_status_t meet(MPI_Comm comm, double timeout)
{
    const double deadline = MPI_Wtime() + timeout;
    MPI_Request request;
    TRY_MPI(MPI_Ibarrier, comm, &request);
    for (int done = 0; !done; sched_yield()) {
        TRY_MPI(MPI_Test, &request, &done, MPI_STATUS_IGNORE);
        if (!done && MPI_Wtime() > deadline)
            return cumoe_transport_fail(CUMOE_COMM_ERROR, "cumoe_ep_create_mpi: a rank did not come in time");
    }
    return CUMOE_SUCCESS;
}

static cumoe_status_t connect_ranks(mpi_t *mpi, MPI_Comm comm, double timeout)
{
    if (meet(comm, timeout > 0 ? timeout : CUMOE_EP_DEFAULT_TIMEOUT) != CUMOE_SUCCESS) return CUMOE_COMM_ERROR;
    TRY_MPI(MPI_Comm_dup, comm, &mpi->comm);
    TRY_MPI(MPI_Comm_set_errhandler, mpi->comm, MPI_ERRORS_RETURN);
    TRY_MPI(MPI_Irecv, NULL, 0, MPI_BYTE, MPI_ANY_SOURCE, TAG_GIVEN_UP, mpi->comm, &mpi->given_up);
    return CUMOE_SUCCESS;
}

static cumoe_status_t check_comm(MPI_Comm comm)
{
    const char *function = "cumoe_ep_create_mpi";
    int between = 0;
    if (!is_running())
        return cumoe_transport_fail(CUMOE_INVALID_ARGUMENT,
                                    "%s: MPI is not initialised, or finalised: MPI_Init_thread() comes before it",
                                    function);
    if (comm == MPI_COMM_NULL)
        return cumoe_transport_fail(CUMOE_INVALID_ARGUMENT, "%s: comm = MPI_COMM_NULL, but is required", function);
    TRY_MPI(MPI_Comm_test_inter, comm, &between);
    return between ? cumoe_transport_fail(CUMOE_INVALID_ARGUMENT,
                                          "%s: comm is an inter-communicator, but must have one group", function)
                   : CUMOE_SUCCESS;
}

cumoe_status_t cumoe_ep_create_mpi(cumoe_ep_t **ep, const cumoe_handle_t *handle, MPI_Comm comm, double timeout)
{
    cumoe_status_t status = check_comm(comm);
    if (status != CUMOE_SUCCESS) return status;
    mpi_t *mpi = malloc(sizeof *mpi);
    if (!mpi) return cumoe_transport_fail(CUMOE_OUT_OF_MEMORY, "cumoe_ep_create_mpi: no host memory");
    *mpi = (mpi_t){.comm = MPI_COMM_NULL, .given_up = MPI_REQUEST_NULL};
    cumoe_transport_t transport = {.struct_size = sizeof transport,
                                   .name = "MPI",
                                   .context = mpi,
                                   .exchange = mpi_exchange,
                                   .abort = mpi_abort,
                                   .destroy = mpi_destroy};
    MPI_Comm_rank(comm, &transport.rank);
    MPI_Comm_size(comm, &transport.num_ranks);
    cumoe_ep_t *made = NULL;
    status = cumoe_ep_create_with(ep ? &made : NULL, handle, &transport, timeout); /* bad input is found here */
    if (status != CUMOE_SUCCESS) return free(mpi), status;
    status = connect_ranks(mpi, comm, timeout);
    if (status != CUMOE_SUCCESS) return cumoe_ep_destroy(made), status;
    *ep = made;
    return CUMOE_SUCCESS;
}
