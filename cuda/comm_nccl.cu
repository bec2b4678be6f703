/* Ranks that exchange messages over NCCL. Communicators of our own are non-blocking: NCCL answers at once, and how
 * long to wait for its other half is ours to say. A borrowed one may be either. */
#include "cuda/device.cuh"
#include "cuda/nccl.cuh"
#include "host/comm.h"

#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

namespace cumoe
{

namespace
{

struct Group {
    cumoe_ep_t ep;
    Nccl nccl;
    int ordinal;
    bool borrowed;
    pthread_mutex_t lock; // of what follows, and held by whoever calls NCCL with comm
    NcclComm comm;
    bool broken; // comm is gone, or its owner's alone
    char reason[320];
};

class Lock
{
  public:
    explicit Lock(pthread_mutex_t *mutex) : mutex_(mutex)
    {
        pthread_mutex_lock(mutex_);
    }
    ~Lock()
    {
        pthread_mutex_unlock(mutex_);
    }
    Lock(const Lock &) = delete;
    Lock &operator=(const Lock &) = delete;

  private:
    pthread_mutex_t *mutex_;
};

Group &of(void *comm)
{
    return *static_cast<Group *>(comm);
}

double seconds()
{
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

/* Between two looks at something that others do: soon at first, as NCCL's part of a call takes microseconds. */
void pause(int round)
{
    const timespec nap = {0, 100000};
    if (round < 1000)
        sched_yield();
    else
        nanosleep(&nap, nullptr);
}

bool failed(NcclResult result)
{
    return result != kNcclSuccess && result != kNcclInProgress;
}

/* The first reason is the one that counts. ncclCommAbort() frees the communicator, which a borrowed one's owner
 * would not know of: it is left to him. */
void break_group(Group &group, const char *what, const char *why, const char *more)
{
    if (group.broken) return;
    group.broken = true;
    snprintf(group.reason, sizeof group.reason, "%s: %s%s%s", what, why, *more ? ": " : "", more);
    if (!group.borrowed && group.comm) (void)group.nccl.ncclCommAbort(group.comm);
    group.comm = nullptr;
}

void break_by(Group &group, const char *name, NcclResult result)
{
    char more[200]; // of NCCL's own memory, which the abort may write
    const char *last = group.nccl.ncclGetLastError(group.comm);
    snprintf(more, sizeof more, "%s", last ? last : "");
    break_group(group, name, group.nccl.ncclGetErrorString(result), more);
}

void break_late(Group &group, const char *name, double timeout)
{
    char why[80];
    snprintf(why, sizeof why, "a rank failed or is late, not done within %g s", timeout);
    break_group(group, name, why, "");
}

cumoe_status_t status_of(Group &group, const char *function)
{
    const Lock lock(&group.lock);
    CUMOE_REQUIRE(!group.broken, COMM_ERROR, "%s: rank %d of %d over NCCL: %s", function, group.ep.rank,
                  group.ep.num_ranks, group.reason);
    return CUMOE_SUCCESS;
}

/* Whether NCCL has no more to do for a call. NAME: the call. An error of another time is found here as well. */
bool is_settled(Group &group, const char *name)
{
    const Lock lock(&group.lock);
    if (group.broken) return true;
    NcclResult state = kNcclSuccess;
    const NcclResult result = group.nccl.ncclCommGetAsyncError(group.comm, &state);
    if (failed(result))
        break_by(group, "ncclCommGetAsyncError", result);
    else if (failed(state))
        break_by(group, name, state);
    return group.broken || state == kNcclSuccess;
}

void settle(Group &group, const char *name)
{
    const double deadline = seconds() + group.ep.timeout;
    for (int round = 0; !is_settled(group, name); round++) {
        if (seconds() >= deadline) {
            const Lock lock(&group.lock);
            break_late(group, name, group.ep.timeout);
        }
        pause(round);
    }
}

/* The first call that failed; those behind it are left out. */
struct Failure {
    const char *name = nullptr;
    NcclResult result = kNcclSuccess;

    void note(const char *name_of_call, NcclResult result_of_call)
    {
        if (name || !failed(result_of_call)) return;
        name = name_of_call;
        result = result_of_call;
    }
};

/* Calls between ncclGroupStart() and ncclGroupEnd(), which is called whatever they gave. */
template <typename Enqueue>
cumoe_status_t run_group(Group &group, const Enqueue &enqueue)
{
    const char *function = "cumoe";
    const DeviceCall call(group.ordinal);
    CUMOE_TRY(call.status(function, call.error()));
    {
        const Lock lock(&group.lock);
        Failure failure;
        if (!group.broken) failure.note("ncclGroupStart", group.nccl.ncclGroupStart());
        if (!group.broken && !failure.name) {
            enqueue(failure);
            failure.note("ncclGroupEnd", group.nccl.ncclGroupEnd());
        }
        if (failure.name) break_by(group, failure.name, failure.result);
    }
    settle(group, "ncclGroupEnd");
    return status_of(group, function);
}

void enqueue_transfer(const Group &group, const cumoe_transfer_t &t, int rank, cudaStream_t stream,
                      Failure &failure)
{
    const size_t sent = static_cast<size_t>(t.sent.count[rank]) * t.row_size;
    const size_t received = static_cast<size_t>(t.received.count[rank]) * t.row_size;
    const char *from = static_cast<const char *>(t.send) + static_cast<size_t>(t.sent.begin[rank]) * t.row_size;
    char *to = static_cast<char *>(t.recv) + static_cast<size_t>(t.received.begin[rank]) * t.row_size;
    if (sent > 0 && !failure.name)
        failure.note("ncclSend", group.nccl.ncclSend(from, sent, kNcclUint8, rank, group.comm, stream));
    if (received > 0 && !failure.name)
        failure.note("ncclRecv", group.nccl.ncclRecv(to, received, kNcclUint8, rank, group.comm, stream));
}

/* Messages between two ranks are told apart by their order. */
cumoe_status_t nccl_exchange(void *comm, const cumoe_transfer_t *transfers, int count, cumoe_stream_t stream)
{
    Group &group = of(comm);
    return run_group(group, [&](Failure &failure) {
        for (int rank = 0; rank < group.ep.num_ranks; rank++)
            for (int i = 0; i < count; i++) enqueue_transfer(group, transfers[i], rank, stream, failure);
    });
}

NcclType type_of(cumoe_dtype_t dtype)
{
    switch (dtype) {
    case CUMOE_F64:
        return kNcclFloat64;
    case CUMOE_F32:
        return kNcclFloat32;
    case CUMOE_I64:
        return kNcclInt64;
    default:
        return kNcclInt32;
    }
}

cumoe_status_t nccl_sum(void *comm, const cumoe_sum_t *sums, int count, cumoe_stream_t stream)
{
    Group &group = of(comm);
    return run_group(group, [&](Failure &failure) {
        for (int i = 0; i < count; i++) {
            const cumoe_sum_t &sum = sums[i];
            if (!sum.data || sum.count == 0 || failure.name) continue;
            failure.note("ncclAllReduce",
                         group.nccl.ncclAllReduce(sum.data, sum.data, static_cast<size_t>(sum.count),
                                                  type_of(sum.dtype), kNcclSum, group.comm, stream));
        }
    });
}

cumoe_status_t nccl_wait(void *comm, cumoe_stream_t stream, double timeout)
{
    const char *function = "cumoe_ep_wait";
    Group &group = of(comm);
    const DeviceCall call(group.ordinal);
    CUMOE_TRY(call.status(function, call.error()));
    const double deadline = seconds() + timeout;
    for (int round = 0;; round++) {
        (void)is_settled(group, "ncclCommGetAsyncError");
        CUMOE_TRY(status_of(group, function));
        const cudaError_t error = cudaStreamQuery(stream);
        if (error != cudaErrorNotReady) return call.status(function, error);
        if (seconds() >= deadline) {
            const Lock lock(&group.lock);
            break_late(group, "the stream", timeout);
        }
        pause(round);
    }
}

void nccl_abort(void *comm)
{
    Group &group = of(comm);
    const DeviceCall call(group.ordinal);
    const Lock lock(&group.lock);
    break_group(group, "cumoe_ep_abort", "this rank has aborted", "");
}

void free_group(Group *group)
{
    pthread_mutex_destroy(&group->lock);
    free(group);
}

/* What is enqueued comes to its end first. */
void nccl_destroy(void *comm)
{
    Group &group = of(comm);
    if (!group.borrowed && !group.broken) {
        const DeviceCall call(group.ordinal);
        const NcclResult result = group.nccl.ncclCommFinalize(group.comm);
        if (failed(result)) break_by(group, "ncclCommFinalize", result);
        settle(group, "ncclCommFinalize");
        if (!group.broken) (void)group.nccl.ncclCommDestroy(group.comm);
    }
    free_group(&group);
}

constexpr cumoe_comm_ops_t kOps = {nccl_destroy, nccl_abort, nccl_exchange, nccl_sum, nccl_wait};

/* What NCCL knows of a communicator of the caller's. */
cumoe_status_t borrow(const char *function, Group *group, void *comm)
{
    const Nccl &nccl = group->nccl;
    group->comm = static_cast<NcclComm>(comm);
    group->borrowed = true;
    int rank = -1, num_ranks = -1, ordinal = -1;
    CUMOE_TRY(nccl_status(function, nccl, "ncclCommUserRank", nccl.ncclCommUserRank(group->comm, &rank)));
    CUMOE_TRY(nccl_status(function, nccl, "ncclCommCount", nccl.ncclCommCount(group->comm, &num_ranks)));
    CUMOE_TRY(nccl_status(function, nccl, "ncclCommCuDevice", nccl.ncclCommCuDevice(group->comm, &ordinal)));
    CUMOE_REQUIRE(num_ranks >= 1 && num_ranks <= CUMOE_EP_MAX_RANKS, INVALID_ARGUMENT,
                  "%s: args.nccl_comm has %d ranks, but must have 1..%d", function, num_ranks, CUMOE_EP_MAX_RANKS);
    CUMOE_REQUIRE(ordinal == group->ordinal, INVALID_ARGUMENT,
                  "%s: args.nccl_comm is on CUDA device %d, but must be on the handle's, %d", function, ordinal,
                  group->ordinal);
    group->ep.rank = rank;
    group->ep.num_ranks = num_ranks;
    return CUMOE_SUCCESS;
}

cumoe_status_t make(const char *function, Group *group, const cumoe_ep_args_t &args)
{
    NcclConfig config;
    group->ep.rank = args.rank;
    group->ep.num_ranks = args.num_ranks;
    const NcclResult result =
        group->nccl.ncclCommInitRankConfig(&group->comm, args.num_ranks, *args.id, args.rank, &config);
    if (failed(result)) break_by(*group, "ncclCommInitRankConfig", result);
    settle(*group, "ncclCommInitRankConfig");
    return status_of(*group, function);
}

} // namespace

cumoe_status_t group_id(const char *function, cumoe_ep_id_t *id)
{
    Nccl nccl;
    CUMOE_TRY(nccl_load(function, true, &nccl));
    return id ? nccl_status(function, nccl, "ncclGetUniqueId", nccl.ncclGetUniqueId(id)) : CUMOE_SUCCESS;
}

cumoe_status_t group_join(const char *function, const cumoe_handle_t *handle, const cumoe_ep_args_t *args,
                          cumoe_ep_t **ep)
{
    Nccl nccl;
    CUMOE_TRY(nccl_load(function, !args->nccl_comm, &nccl));
    const DeviceCall call(static_cast<const Device *>(handle->device)->ordinal);
    CUMOE_TRY(call.status(function, call.error()));
    Group *group = static_cast<Group *>(calloc(1, sizeof *group));
    CUMOE_REQUIRE(group, OUT_OF_MEMORY, "%s: no host memory for the group", function);
    pthread_mutex_init(&group->lock, nullptr);
    group->nccl = nccl;
    group->ordinal = static_cast<const Device *>(handle->device)->ordinal;
    group->ep.ops = &kOps;
    group->ep.comm = group;
    group->ep.handle = handle;
    group->ep.timeout = args->timeout;
    const cumoe_status_t status =
        args->nccl_comm ? borrow(function, group, args->nccl_comm) : make(function, group, *args);
    if (status != CUMOE_SUCCESS) {
        free_group(group);
        return status;
    }
    *ep = &group->ep;
    return CUMOE_SUCCESS;
}

} // namespace cumoe
