/* Ranks as threads of one process: each shows the others what it calls, and takes what is for it. */
#define _POSIX_C_SOURCE 200809L /* clocks of conditions */
#include "host/comm.h"
#include "host/kinds.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { PIECE = 1 << 18 }; /* bytes of an array that are summed at a time */

typedef enum call_kind { CALL_EXCHANGE, CALL_SUM } call_kind_t;

typedef struct call {
    call_kind_t kind;
    const void *list; /* [count] of transfers or sums, on the caller's stack */
    int count;
} call_t;

typedef struct group {
    pthread_mutex_t lock;
    pthread_cond_t moved;
    int32_t num_ranks, members, arrived;
    int32_t busy;     /* ranks that may look into the memory of others */
    uint64_t meeting; /* a number that grows when all have arrived */
    bool broken, differ;
    bool left; /* somebody has: who waits for all waits in vain */
    char reason[160];
    bool *here;   /* [W] has arrived at this meeting */
    bool *inside; /* [W] is in a call */
    call_t *call; /* [W] what a rank calls */
    char *piece;  /* [W, PIECE] */
    char *total;  /* [W, PIECE] */
} group_t;

typedef struct member {
    cumoe_ep_t ep;
    group_t *group;
} member_t;

/* The first reason is the one that counts. The lock is held. */
static void set_reason(group_t *group, const char *reason, int32_t rank)
{
    if (!group->broken && !group->left) snprintf(group->reason, sizeof group->reason, reason, rank);
    pthread_cond_broadcast(&group->moved);
}

static void break_group(group_t *group, const char *reason, int32_t rank)
{
    set_reason(group, reason, rank);
    group->broken = true;
}

static struct timespec deadline_of(double timeout)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    const double end = (double)now.tv_nsec * 1e-9 + timeout, whole = (double)(int64_t)end;
    now.tv_sec += (time_t)whole;
    now.tv_nsec = (long)((end - whole) * 1e9);
    return now;
}

/* Wait for all ranks. */
static cumoe_status_t meet(const member_t *member)
{
    group_t *group = member->group;
    const struct timespec deadline = deadline_of(member->ep.timeout);
    pthread_mutex_lock(&group->lock);
    const uint64_t meeting = group->meeting;
    group->here[member->ep.rank] = true;
    if (!group->broken && !group->left && ++group->arrived == group->num_ranks) {
        group->arrived = 0;
        group->busy = group->num_ranks;
        group->meeting++;
        memset(group->here, 0, (size_t)group->num_ranks * sizeof *group->here);
        pthread_cond_broadcast(&group->moved);
    }
    while (group->meeting == meeting && !group->broken && !group->left) {
        const bool in_time = pthread_cond_timedwait(&group->moved, &group->lock, &deadline) == 0;
        if (in_time || group->meeting != meeting || group->broken || group->left) continue;
        int32_t late = 0;
        while (group->here[late]) late++;
        break_group(group, "rank %d did not come in time", late);
    }
    const bool met = group->meeting != meeting;
    group->broken = group->broken || !met;
    pthread_mutex_unlock(&group->lock);
    CUMOE_REQUIRE(met, COMM_ERROR, "cumoe: rank %d of a local group of %d: %s", member->ep.rank, group->num_ranks,
                  group->reason);
    return CUMOE_SUCCESS;
}

/* Show a call to the others. From here to part() they may look into this rank's memory, and it into theirs. */
static cumoe_status_t show(const member_t *member, call_kind_t kind, const void *list, int count)
{
    member->group->call[member->ep.rank] = (call_t){kind, list, count};
    return meet(member);
}

/* Wait until nobody looks into the memory of others. DIFFERS: a rank whose call is unlike this one's, or -1. Nobody
 * is late here: what is done between show() and part() comes to an end. */
static cumoe_status_t part(const member_t *member, int32_t differs)
{
    group_t *group = member->group;
    pthread_mutex_lock(&group->lock);
    if (differs >= 0) {
        break_group(group, "rank %d makes another call, or with other sizes", differs);
        group->differ = true;
    }
    if (--group->busy == 0) pthread_cond_broadcast(&group->moved);
    while (group->busy > 0) pthread_cond_wait(&group->moved, &group->lock);
    const bool differ = group->differ;
    pthread_mutex_unlock(&group->lock);
    CUMOE_REQUIRE(!differ, COMM_ERROR, "cumoe: rank %d of a local group of %d: %s", member->ep.rank,
                  group->num_ranks, group->reason);
    return CUMOE_SUCCESS;
}

static cumoe_status_t synchronize(const cumoe_ep_t *ep, cumoe_stream_t stream)
{
    return ep->handle->ops->stream_synchronize(ep->handle->device, stream);
}

/* Whether the call of rank R is an exchange whose rows for this one are what it waits for. */
static bool agrees(const member_t *member, int32_t r, const cumoe_transfer_t *mine, int count)
{
    const call_t *call = &member->group->call[r];
    if (call->kind != CALL_EXCHANGE || call->count != count) return false;
    const cumoe_transfer_t *theirs = call->list;
    for (int i = 0; i < count; i++)
        if (theirs[i].row_size != mine[i].row_size ||
            theirs[i].sent.count[member->ep.rank] != mine[i].received.count[r])
            return false;
    return true;
}

/* Fetch what rank R has for this one. */
static cumoe_status_t fetch(const member_t *member, int32_t r, const cumoe_transfer_t *mine, int count,
                            cumoe_stream_t stream)
{
    const cumoe_handle_t *handle = member->ep.handle;
    const cumoe_transfer_t *theirs = member->group->call[r].list;
    for (int i = 0; i < count; i++) {
        const size_t row = mine[i].row_size, size = (size_t)mine[i].received.count[r] * row;
        if (size == 0) continue;
        CUMOE_TRY(handle->ops->memory_copy(
            handle->device, (char *)mine[i].recv + (size_t)mine[i].received.begin[r] * row,
            (const char *)theirs[i].send + (size_t)theirs[i].sent.begin[member->ep.rank] * row, size,
            CUMOE_COPY_ON_DEVICE, stream));
    }
    return CUMOE_SUCCESS;
}

static cumoe_status_t exchange(const member_t *member, const cumoe_transfer_t *transfers, int count,
                               cumoe_stream_t stream)
{
    CUMOE_TRY(synchronize(&member->ep, stream));
    CUMOE_TRY(show(member, CALL_EXCHANGE, transfers, count));
    int32_t differs = -1;
    cumoe_status_t status = CUMOE_SUCCESS;
    for (int32_t r = 0; differs < 0 && status == CUMOE_SUCCESS && r < member->group->num_ranks; r++) {
        if (agrees(member, r, transfers, count))
            status = fetch(member, r, transfers, count, stream);
        else
            differs = r;
    }
    if (status == CUMOE_SUCCESS) status = synchronize(&member->ep, stream);
    const cumoe_status_t parted = part(member, differs);
    return status != CUMOE_SUCCESS ? status : parted;
}

#define ADD(type)                                                                                                  \
    for (size_t i = 0; i < size / sizeof(type); i++)                                                               \
    ((type *)to)[i] = (type)(((type *)to)[i] + ((const type *)from)[i])

void cumoe__comm_add(void *restrict to, const void *restrict from, size_t size, cumoe_dtype_t dtype)
{
    if (dtype == CUMOE_F64)
        ADD(double);
    else if (dtype == CUMOE_F32)
        ADD(float);
    else if (dtype == CUMOE_I64)
        ADD(uint64_t);
    else
        ADD(uint32_t);
}
#undef ADD

static cumoe_status_t sum_piece(const member_t *member, char *data, size_t size, cumoe_dtype_t dtype,
                                cumoe_stream_t stream)
{
    const cumoe_handle_t *handle = member->ep.handle;
    char *pieces = member->group->piece;
    char *total = member->group->total + (size_t)member->ep.rank * PIECE;
    CUMOE_TRY(handle->ops->memory_copy(handle->device, pieces + (size_t)member->ep.rank * PIECE, data, size,
                                       CUMOE_COPY_TO_HOST, stream));
    CUMOE_TRY(synchronize(&member->ep, stream));
    CUMOE_TRY(meet(member));
    memcpy(total, pieces, size);
    for (int32_t r = 1; r < member->group->num_ranks; r++)
        cumoe__comm_add(total, pieces + (size_t)r * PIECE, size, dtype);
    CUMOE_TRY(meet(member)); /* the pieces are read */
    CUMOE_TRY(handle->ops->memory_copy(handle->device, data, total, size, CUMOE_COPY_TO_DEVICE, stream));
    return synchronize(&member->ep, stream);
}

static bool same_sums(const call_t *call, const cumoe_sum_t *sums, int count)
{
    if (call->kind != CALL_SUM || call->count != count) return false;
    const cumoe_sum_t *theirs = call->list;
    for (int i = 0; i < count; i++)
        if (!theirs[i].data != !sums[i].data || theirs[i].count != sums[i].count ||
            theirs[i].dtype != sums[i].dtype)
            return false;
    return true;
}

static cumoe_status_t sum(const member_t *member, const cumoe_sum_t *sums, int count, cumoe_stream_t stream)
{
    CUMOE_TRY(show(member, CALL_SUM, sums, count));
    int32_t differs = -1;
    for (int32_t r = 0; r < member->group->num_ranks; r++)
        if (!same_sums(&member->group->call[r], sums, count)) differs = r;
    CUMOE_TRY(part(member, differs));
    for (int i = 0; i < count; i++) {
        const size_t size = sums[i].data ? (size_t)sums[i].count * cumoe__dtype_size(sums[i].dtype) : 0;
        for (size_t at = 0; at < size; at += PIECE)
            CUMOE_TRY(sum_piece(member, (char *)sums[i].data + at, size - at < PIECE ? size - at : PIECE,
                                sums[i].dtype, stream));
    }
    return CUMOE_SUCCESS;
}

/* One call of a rank at a time: two of them would be taken for two ranks. */
static cumoe_status_t enter(const member_t *member)
{
    group_t *group = member->group;
    pthread_mutex_lock(&group->lock);
    const bool alone = !group->inside[member->ep.rank];
    group->inside[member->ep.rank] = true;
    if (!alone) break_group(group, "rank %d makes two calls at once", member->ep.rank);
    pthread_mutex_unlock(&group->lock);
    CUMOE_REQUIRE(alone, COMM_ERROR, "cumoe: rank %d of a local group of %d: %s", member->ep.rank, group->num_ranks,
                  group->reason);
    return CUMOE_SUCCESS;
}

static cumoe_status_t leave(const member_t *member, cumoe_status_t status)
{
    pthread_mutex_lock(&member->group->lock);
    member->group->inside[member->ep.rank] = false;
    pthread_mutex_unlock(&member->group->lock);
    return status;
}

static cumoe_status_t local_exchange(void *comm, const cumoe_transfer_t *transfers, int count,
                                     cumoe_stream_t stream)
{
    const member_t *member = comm;
    CUMOE_TRY(enter(member));
    return leave(member, exchange(member, transfers, count, stream));
}

static cumoe_status_t local_sum(void *comm, const cumoe_sum_t *sums, int count, cumoe_stream_t stream)
{
    const member_t *member = comm;
    CUMOE_TRY(enter(member));
    return leave(member, sum(member, sums, count, stream));
}

/* Whatever waits for others does so inside of a call. */
static cumoe_status_t local_wait(void *comm, cumoe_stream_t stream, double timeout)
{
    const member_t *member = comm;
    group_t *group = member->group;
    (void)timeout;
    pthread_mutex_lock(&group->lock);
    const bool broken = group->broken;
    pthread_mutex_unlock(&group->lock);
    CUMOE_REQUIRE(!broken, COMM_ERROR, "cumoe_ep_wait: rank %d of a local group of %d: %s", member->ep.rank,
                  group->num_ranks, group->reason);
    return synchronize(&member->ep, stream);
}

static void local_abort(void *comm)
{
    const member_t *member = comm;
    pthread_mutex_lock(&member->group->lock);
    break_group(member->group, "rank %d has aborted", member->ep.rank);
    pthread_mutex_unlock(&member->group->lock);
}

static void free_group(group_t *group)
{
    pthread_cond_destroy(&group->moved);
    pthread_mutex_destroy(&group->lock);
    free(group->here);
    free(group->call);
    free(group->inside);
    free(group->piece);
    free(group->total);
    free(group);
}

static void local_destroy(void *comm)
{
    member_t *member = comm;
    group_t *group = member->group;
    pthread_mutex_lock(&group->lock);
    set_reason(group, "rank %d has left", member->ep.rank);
    group->left = true;
    const bool last = --group->members == 0;
    pthread_mutex_unlock(&group->lock);
    if (last) free_group(group);
    free(member);
}

static const cumoe_comm_ops_t local_ops = {.destroy = local_destroy,
                                           .abort = local_abort,
                                           .exchange = local_exchange,
                                           .sum = local_sum,
                                           .wait = local_wait};

static group_t *make_group(int32_t num_ranks)
{
    const size_t W = (size_t)num_ranks;
    group_t *group = calloc(1, sizeof *group);
    if (!group) return NULL;
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&group->moved, &attributes);
    pthread_condattr_destroy(&attributes);
    pthread_mutex_init(&group->lock, NULL);
    group->num_ranks = group->members = num_ranks;
    group->here = calloc(W, sizeof *group->here);
    group->call = calloc(W, sizeof *group->call);
    group->inside = calloc(W, sizeof *group->inside);
    group->piece = malloc(W * PIECE);
    group->total = malloc(W * PIECE);
    if (group->here && group->call && group->inside && group->piece && group->total) return group;
    free_group(group);
    return NULL;
}

cumoe_status_t cumoe_ep_create_local(cumoe_ep_t **ep, const cumoe_handle_t *handle, int32_t num_ranks,
                                     double timeout)
{
    const char *function = "cumoe_ep_create_local";
    CUMOE_REQUIRE(ep, INVALID_ARGUMENT, "%s: ep = NULL, but the results need a place", function);
    CUMOE_REQUIRE(handle, INVALID_ARGUMENT, "%s: handle = NULL, but must come from cumoe_handle_create()",
                  function);
    CUMOE_REQUIRE(num_ranks >= 1 && num_ranks <= CUMOE_EP_MAX_RANKS, INVALID_ARGUMENT,
                  "%s: num_ranks = %d, but must be 1..%d", function, num_ranks, CUMOE_EP_MAX_RANKS);
    CUMOE_TRY(cumoe__check_timeout(function, &timeout));
    group_t *group = make_group(num_ranks);
    member_t **members = calloc((size_t)num_ranks, sizeof(member_t *));
    bool made = group && members;
    for (int32_t r = 0; made && r < num_ranks; r++) {
        members[r] = malloc(sizeof *members[r]);
        made = members[r] != NULL;
        if (made)
            *members[r] = (member_t){.ep = {.ops = &local_ops,
                                            .comm = members[r],
                                            .handle = handle,
                                            .rank = r,
                                            .num_ranks = num_ranks,
                                            .timeout = timeout},
                                     .group = group};
    }
    for (int32_t r = 0; made && r < num_ranks; r++) ep[r] = &members[r]->ep;
    for (int32_t r = 0; !made && members && r < num_ranks; r++) free(members[r]);
    free(members);
    if (!made && group) free_group(group);
    CUMOE_REQUIRE(made, OUT_OF_MEMORY, "%s: no host memory for %d ranks", function, num_ranks);
    return CUMOE_SUCCESS;
}
