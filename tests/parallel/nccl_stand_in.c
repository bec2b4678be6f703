#include "tests/parallel/nccl_stand_in.h"

#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MAX_RANKS = 8, MAX_COMMS = 64, MAX_OPS = 256 };
enum { SUCCESS = 0, SYSTEM_ERROR = 2, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, REMOTE_ERROR = 6, IN_PROGRESS = 7 };

typedef struct id {
    char bytes[128];
} id_t_; /* POSIX has an id_t */

typedef struct config {
    size_t size;
    unsigned magic, version;
    int blocking;
} config_t;

typedef enum kind { SEND, RECV, SUM } kind_t;

typedef struct op {
    kind_t kind;
    const void *from;
    void *to;
    size_t size; /* in bytes */
    int type, peer;
    cudaStream_t stream;
} op_t;

/* What one rank has for another; a sum sends to all. */
typedef struct message {
    struct message *next;
    op_t op;
    char data[];
} message_t;

typedef struct world world_t;

typedef struct comm {
    world_t *world;
    int rank, ordinal;
    bool blocking;
    int state, polls; /* how often it says that it is not done */
    op_t ops[MAX_OPS];
    int num_ops, done;
} comm_t;

struct world {
    id_t_ id;
    int num_ranks, joined, left;
    comm_t *comms[MAX_RANKS];
    message_t *first[MAX_RANKS][MAX_RANKS], *last[MAX_RANKS][MAX_RANKS]; /* [from, to] */
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static comm_t *live[MAX_COMMS];
static int misuse, version = 22899, alone, next_id;
static char fail_name[40], last_error[80];
static int fail_call, failed;

static __thread int depth;
static __thread comm_t *group_comm;
static __thread op_t group_ops[MAX_OPS];
static __thread int num_group_ops;

/* ---- knobs ---- */

void stand_in_fail(const char *name, int call)
{
    pthread_mutex_lock(&lock);
    snprintf(fail_name, sizeof fail_name, "%s", name ? name : "");
    fail_call = call;
    failed = 0;
    pthread_mutex_unlock(&lock);
}

int stand_in_failed(void)
{
    return failed;
}

int stand_in_live(void)
{
    int count = 0;
    for (int i = 0; i < MAX_COMMS; i++) count += live[i] != NULL;
    return count;
}

int stand_in_misuse(void)
{
    return misuse;
}

void stand_in_version(int number)
{
    version = number;
}

static void *watched;
static int elsewhere;

int stand_in_elsewhere(void *stream)
{
    const int found = elsewhere;
    watched = stream;
    elsewhere = 0;
    return found;
}

void stand_in_alone(int on)
{
    alone = on;
}

/* The lock is held, as below. */
static bool told(const char *name)
{
    if (fail_call == 0 || strcmp(name, fail_name) != 0 || --fail_call > 0) return false;
    failed = 1;
    snprintf(last_error, sizeof last_error, STAND_IN_TEXT);
    return true;
}

static bool is_live(const comm_t *comm)
{
    for (int i = 0; comm && i < MAX_COMMS; i++)
        if (live[i] == comm) return true;
    return false;
}

/* What every function with a communicator begins with. */
static int enter(comm_t *comm, const char *name)
{
    int device = -1;
    pthread_mutex_lock(&lock);
    if (!is_live(comm)) {
        misuse++;
        return INVALID_ARGUMENT;
    }
    cudaGetDevice(&device);
    if (device != comm->ordinal) misuse++;
    return told(name) ? SYSTEM_ERROR : SUCCESS;
}

static int leave(int result)
{
    pthread_mutex_unlock(&lock);
    return result;
}

/* ---- communicators ---- */

int ncclGetVersion(int *number)
{
    pthread_mutex_lock(&lock);
    *number = version;
    return leave(told(__func__) ? SYSTEM_ERROR : SUCCESS);
}

const char *ncclGetErrorString(int result)
{
    static const char *const texts[] = {"no error",       "unhandled cuda error", "unhandled system error",
                                        "internal error", "invalid argument",     "invalid usage",
                                        "remote error",   "in progress"};
    return result >= 0 && result <= IN_PROGRESS ? texts[result] : "unknown result";
}

const char *ncclGetLastError(comm_t *comm)
{
    (void)comm;
    return last_error;
}

int ncclGetUniqueId(id_t_ *id)
{
    pthread_mutex_lock(&lock);
    if (told(__func__)) return leave(SYSTEM_ERROR);
    memset(id, 0x5a, sizeof *id);
    snprintf(id->bytes, sizeof id->bytes, "stand-in %d of %d", next_id++, (int)getpid());
    return leave(SUCCESS);
}

static comm_t *find_comm(const id_t_ *id)
{
    for (int i = 0; i < MAX_COMMS; i++)
        if (live[i] && memcmp(&live[i]->world->id, id, sizeof *id) == 0) return live[i];
    return NULL;
}

static int join(comm_t *comm, int num_ranks, const id_t_ *id, int rank)
{
    const comm_t *other = find_comm(id);
    world_t *world = other ? other->world : calloc(1, sizeof *world);
    if (!other) {
        world->id = *id;
        world->num_ranks = num_ranks;
    }
    if (world->num_ranks != num_ranks || rank < 0 || rank >= num_ranks || world->comms[rank]) {
        misuse++;
        if (!other) free(world);
        return INVALID_USAGE;
    }
    comm->world = world;
    world->comms[rank] = comm;
    world->joined++;
    for (int i = 0; i < MAX_COMMS; i++) {
        if (live[i]) continue;
        live[i] = comm;
        return SUCCESS;
    }
    abort();
}

static void pop(world_t *world, int from, int to)
{
    message_t *message = world->first[from][to];
    world->first[from][to] = message->next;
    free(message);
}

static void free_comm(comm_t *comm)
{
    world_t *world = comm->world;
    for (int i = 0; i < MAX_COMMS; i++)
        if (live[i] == comm) live[i] = NULL;
    world->comms[comm->rank] = NULL;
    free(comm);
    if (++world->left < world->joined) return;
    for (int from = 0; from < MAX_RANKS; from++)
        for (int to = 0; to < MAX_RANKS; to++)
            while (world->first[from][to]) pop(world, from, to);
    free(world);
}

/* ---- groups of calls ---- */

static int push(comm_t *comm, const op_t *op, int to)
{
    world_t *world = comm->world;
    message_t *message = malloc(sizeof *message + op->size);
    message->next = NULL;
    message->op = *op;
    if (world->first[comm->rank][to])
        world->last[comm->rank][to]->next = message;
    else
        world->first[comm->rank][to] = message;
    world->last[comm->rank][to] = message;
    return cudaMemcpy(message->data, op->from, op->size, cudaMemcpyDeviceToHost) == cudaSuccess ? SUCCESS
                                                                                                : INVALID_USAGE;
}

/* What is sent is taken at once, and what is received when it is there. */
static int post(comm_t *comm)
{
    comm->num_ops = comm->done = 0;
    for (int i = 0; i < num_group_ops; i++) {
        const op_t *op = &group_ops[i];
        if (cudaStreamSynchronize(op->stream) != cudaSuccess) return INVALID_USAGE;
        for (int r = 0; r < comm->world->num_ranks; r++)
            if ((op->kind == SUM || (op->kind == SEND && op->peer == r)) && push(comm, op, r) != SUCCESS)
                return INVALID_USAGE;
        if (op->kind != SEND) comm->ops[comm->num_ops++] = *op;
    }
    return SUCCESS;
}

static void add(char *total, const char *more, size_t size, int type)
{
    for (size_t i = 0; i < size; i += type == 2 || type == 7 ? 4 : 8) {
        if (type == 2) *(uint32_t *)(void *)(total + i) += *(const uint32_t *)(const void *)(more + i);
        if (type == 4) *(uint64_t *)(void *)(total + i) += *(const uint64_t *)(const void *)(more + i);
        if (type == 7) *(float *)(void *)(total + i) += *(const float *)(const void *)(more + i);
        if (type == 8) *(double *)(void *)(total + i) += *(const double *)(const void *)(more + i);
    }
}

/* The message that OP waits for from a rank; NULL and SUCCESS: it is not there. */
static int look(const comm_t *comm, const op_t *op, int from, const message_t **message)
{
    *message = comm->world->first[from][comm->rank];
    if (!*message) return SUCCESS;
    const op_t *sent = &(*message)->op;
    const bool fits = (sent->kind == SUM) == (op->kind == SUM) && sent->size == op->size && sent->type == op->type;
    return fits ? SUCCESS : INVALID_USAGE;
}

/* IN_PROGRESS: a message is missing. */
static int receive(comm_t *comm, const op_t *op)
{
    const int first = op->kind == SUM ? 0 : op->peer, end = op->kind == SUM ? comm->world->num_ranks : first + 1;
    const message_t *message;
    for (int r = first; r < end; r++) {
        const int result = look(comm, op, r, &message);
        if (result != SUCCESS) return result;
        if (!message) return IN_PROGRESS;
    }
    char *total = calloc(1, op->size);
    for (int r = first; r < end; r++) {
        look(comm, op, r, &message);
        if (op->kind == SUM)
            add(total, message->data, op->size, op->type);
        else
            memcpy(total, message->data, op->size);
        pop(comm->world, r, comm->rank);
    }
    const bool copied = cudaMemcpy(op->to, total, op->size, cudaMemcpyHostToDevice) == cudaSuccess;
    free(total);
    return copied ? SUCCESS : INVALID_USAGE;
}

/* A step on the way from IN_PROGRESS to a result. */
static void progress(comm_t *comm)
{
    if (comm->state != IN_PROGRESS || comm->polls-- > 0) return;
    if (!alone && comm->world->joined < comm->world->num_ranks) return;
    int result = SUCCESS;
    while (result == SUCCESS && comm->done < comm->num_ops) {
        result = receive(comm, &comm->ops[comm->done]);
        comm->done += result == SUCCESS;
    }
    comm->state = result;
}

static int finish(comm_t *comm)
{
    if (!comm->blocking) return leave(IN_PROGRESS);
    while (progress(comm), comm->state == IN_PROGRESS) {
        pthread_mutex_unlock(&lock);
        usleep(100);
        pthread_mutex_lock(&lock);
    }
    return leave(comm->state);
}

int ncclCommInitRankConfig(comm_t **comm, int num_ranks, id_t_ id, int rank, config_t *config)
{
    *comm = NULL;
    pthread_mutex_lock(&lock);
    if (told(__func__)) return leave(SYSTEM_ERROR);
    if (config->magic != 0xcafebeef || config->version < 21400 || config->size < sizeof *config)
        return leave(INVALID_ARGUMENT);
    comm_t *made = calloc(1, sizeof *made);
    made->rank = rank;
    made->blocking = config->blocking;
    made->state = IN_PROGRESS;
    made->polls = 2;
    cudaGetDevice(&made->ordinal);
    const int result = join(made, num_ranks, &id, rank);
    if (result != SUCCESS) {
        free(made);
        return leave(result);
    }
    *comm = made;
    return finish(made);
}

void *stand_in_blocking(void)
{
    config_t config = {sizeof config, 0xcafebeef, 21400, 1};
    id_t_ id;
    comm_t *comm;
    return ncclGetUniqueId(&id) == SUCCESS && ncclCommInitRankConfig(&comm, 1, id, 0, &config) == SUCCESS ? comm
                                                                                                          : NULL;
}

int ncclCommUserRank(comm_t *comm, int *rank)
{
    const int result = enter(comm, __func__);
    if (result == SUCCESS) *rank = comm->rank;
    return leave(result);
}

int ncclCommCount(comm_t *comm, int *num_ranks)
{
    const int result = enter(comm, __func__);
    if (result == SUCCESS) *num_ranks = comm->world->num_ranks;
    return leave(result);
}

int ncclCommCuDevice(comm_t *comm, int *ordinal)
{
    pthread_mutex_lock(&lock); /* any device may be the current one */
    if (!is_live(comm)) misuse++;
    if (told(__func__)) return leave(SYSTEM_ERROR);
    *ordinal = comm->ordinal;
    return leave(SUCCESS);
}

int ncclCommGetAsyncError(comm_t *comm, int *error)
{
    const int result = enter(comm, __func__);
    if (result != SUCCESS) return leave(result);
    progress(comm);
    *error = told("asynchronous") ? REMOTE_ERROR : comm->state;
    return leave(SUCCESS);
}

int ncclCommFinalize(comm_t *comm)
{
    const int result = enter(comm, __func__);
    if (result != SUCCESS) return leave(result);
    if (comm->state != SUCCESS) misuse++;
    comm->state = IN_PROGRESS;
    comm->polls = 1;
    return finish(comm);
}

int ncclCommDestroy(comm_t *comm)
{
    const int result = enter(comm, __func__);
    if (is_live(comm)) {
        if (comm->state != SUCCESS) misuse++;
        free_comm(comm);
    }
    return leave(result);
}

int ncclCommAbort(comm_t *comm)
{
    const int result = enter(comm, __func__);
    if (is_live(comm)) free_comm(comm);
    return leave(result);
}

/* ---- calls ---- */

int ncclGroupStart(void)
{
    pthread_mutex_lock(&lock);
    if (told(__func__)) return leave(SYSTEM_ERROR);
    if (depth++ == 0) {
        group_comm = NULL;
        num_group_ops = 0;
    }
    return leave(SUCCESS);
}

/* A rank of one: enqueued, so that it can be captured. */
static int copy_to_itself(void)
{
    int receive = 0;
    for (int send = 0; send < num_group_ops; send++) {
        const op_t *from = &group_ops[send];
        if (from->kind != SEND) continue;
        while (receive < num_group_ops && group_ops[receive].kind != RECV) receive++;
        const op_t *to = &group_ops[receive++];
        if (receive > num_group_ops || to->size != from->size ||
            cudaMemcpyAsync(to->to, from->from, to->size, cudaMemcpyDeviceToDevice, to->stream) != cudaSuccess)
            return INVALID_USAGE;
    }
    return SUCCESS;
}

int ncclGroupEnd(void)
{
    pthread_mutex_lock(&lock);
    const bool refused = told(__func__);
    comm_t *comm = group_comm;
    if (depth-- != 1) {
        misuse++;
        return leave(INVALID_USAGE);
    }
    if (refused) return leave(SYSTEM_ERROR);
    if (num_group_ops == 0) return leave(SUCCESS);
    if (comm->state != SUCCESS) misuse++;
    const int result = comm->world->num_ranks > 1 ? post(comm) : copy_to_itself();
    if (result != SUCCESS) return leave(result);
    comm->state = IN_PROGRESS;
    comm->polls = 1;
    return finish(comm);
}

static int append(comm_t *comm, const char *name, op_t op)
{
    const int result = enter(comm, name);
    if (result != SUCCESS) return leave(result);
    if (depth != 1 || num_group_ops == MAX_OPS || (group_comm && group_comm != comm)) {
        misuse++;
        return leave(INVALID_USAGE);
    }
    group_comm = comm;
    group_ops[num_group_ops++] = op;
    elsewhere += op.stream != watched;
    return leave(SUCCESS);
}

static size_t type_size(int type)
{
    return type == 1 ? 1 : type == 2 || type == 7 ? 4 : 8;
}

int ncclSend(const void *data, size_t count, int type, int to, comm_t *comm, cudaStream_t stream)
{
    return append(comm, __func__, (op_t){SEND, data, NULL, count * type_size(type), type, to, stream});
}

int ncclRecv(void *data, size_t count, int type, int from, comm_t *comm, cudaStream_t stream)
{
    return append(comm, __func__, (op_t){RECV, NULL, data, count * type_size(type), type, from, stream});
}

int ncclAllReduce(const void *send, void *recv, size_t count, int type, int operation, comm_t *comm,
                  cudaStream_t stream)
{
    if (operation != 0) return INVALID_ARGUMENT;
    return append(comm, __func__, (op_t){SUM, send, recv, count * type_size(type), type, -1, stream});
}
