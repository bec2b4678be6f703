#include "ranks.h"

#include "mpi/processes.h"

#include <math.h>
#include <omp.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

const char *const transport_names[] = {"local", "mpi", "nccl"};

/* A number that a launcher has left in the environment. */
static int32_t number_of(const char *name, const char *other, int32_t otherwise)
{
    const char *text = getenv(name);
    if (!text) text = getenv(other);
    return text ? (int32_t)strtol(text, NULL, 10) : otherwise;
}

void ranks_begin(ranks_t *ranks, const char *transport, int argc, char **argv)
{
    *ranks = (ranks_t){.transport = LOCAL};
    if (!transport) return;
    if (strcmp(transport, "mpi") == 0) {
        processes_t p;
        if (!processes_begin(argc, argv, &p)) exit(2);
        *ranks = (ranks_t){
            .transport = MPI, .number = p.rank, .count = p.count, .local = p.local_rank, .beside = p.local_count};
    } else if (strcmp(transport, "nccl") == 0) {
        *ranks = (ranks_t){.transport = NCCL,
                           .number = number_of("RANK", "SLURM_PROCID", 0),
                           .count = number_of("WORLD_SIZE", "SLURM_NTASKS", 1),
                           .local = number_of("LOCAL_RANK", "SLURM_LOCALID", 0),
                           .beside = 1};
    }
}

/* Without a launcher it is a group of one. */
static void join_nccl(ranks_t *ranks)
{
    const bool launched = getenv("WORLD_SIZE") || getenv("SLURM_NTASKS");
    cumoe_ep_id_t id;
    cumoe_ep_args_t args = {.struct_size = sizeof args, .id = &id, .num_ranks = 1};
    if (!launched && !ranks->device->cpu) perf_check(cumoe_ep_id_create(&id));
    perf_check(cumoe_ep_create(&ranks->ep, ranks->device->handle, launched ? NULL : &args));
}

void ranks_join(ranks_t *ranks, device_t *device)
{
    ranks->device = device;
    if (ranks->transport == NCCL) join_nccl(ranks);
    if (ranks->transport == MPI) perf_check(processes_group(&ranks->ep, device->handle, 0));
    if (ranks->transport == MPI && !device->cpu) ranks->beside = device_sharers(ranks->beside);
}

_Noreturn void ranks_end(ranks_t *ranks, int status)
{
    cumoe_ep_destroy(ranks->ep);
    if (ranks->device) device_close(ranks->device);
    if (ranks->transport == MPI) processes_end(status, true);
    exit(status);
}

/* ---- a run ---- */

typedef struct thread {
    const ranks_t *ranks;
    cumoe_ep_t *ep;
    void (*body)(rank_t *, void *);
    void *context;
    pthread_t id;
} thread_t;

static void *run(void *argument)
{
    const thread_t *t = argument;
    rank_t rank = {.ep = t->ep, .number = cumoe_ep_rank(t->ep), .count = cumoe_ep_num_ranks(t->ep)};
    rank.beside = t->ranks->beside ? t->ranks->beside : rank.count;
    device_share(&rank.device, t->ranks->device);
    if (!t->ranks->ep && rank.count > 1) { /* the threads of the process are shared out */
        const int all = rank.device.threads > 0 ? rank.device.threads : omp_get_max_threads();
        rank.device.threads = all > rank.count ? all / rank.count : 1;
    }
    const size_t size = (size_t)rank.count * MOST_TOLD;
    perf_check(cumoe_memory_alloc(rank.device.handle, size, &rank.told));
    perf_check(cumoe_memory_alloc(rank.device.handle, size, &rank.heard));
    t->body(&rank, t->context);
    cumoe_memory_free(rank.device.handle, rank.told);
    cumoe_memory_free(rank.device.handle, rank.heard);
    device_unshare(&rank.device);
    return NULL;
}

void ranks_run(const ranks_t *ranks, int32_t count, void (*body)(rank_t *, void *), void *context)
{
    if (ranks->ep) {
        thread_t only = {.ranks = ranks, .ep = ranks->ep, .body = body, .context = context};
        run(&only);
        return;
    }
    cumoe_ep_t **ep = malloc((size_t)count * sizeof(cumoe_ep_t *));
    thread_t *threads = malloc((size_t)count * sizeof *threads);
    if (!ep || !threads) abort();
    perf_check(cumoe_ep_create_local(ep, ranks->device->handle, count, 0));
    for (int32_t r = count - 1; r >= 0; r--) { /* rank 0 is this thread */
        threads[r] = (thread_t){.ranks = ranks, .ep = ep[r], .body = body, .context = context};
        if (r > 0 && pthread_create(&threads[r].id, NULL, run, &threads[r]) != 0) {
            fprintf(stderr, "cumoe-perf: there is no thread for rank %d of %d\n", r, count);
            exit(EXIT_FAILURE);
        }
    }
    run(&threads[0]);
    for (int32_t r = 1; r < count; r++) pthread_join(threads[r].id, NULL);
    for (int32_t r = 0; r < count; r++) cumoe_ep_destroy(ep[r]);
    free(threads);
    free(ep);
}

/* ---- together ---- */

void rank_exchange(rank_t *rank, const void *send, const int64_t *sent, void *recv, const int64_t *received,
                   size_t row_size)
{
    const cumoe_ep_exchange_args_t args = {.struct_size = sizeof args,
                                           .send = send,
                                           .recv = recv,
                                           .sent = sent,
                                           .received = received,
                                           .row_size = row_size};
    perf_check(cumoe_ep_exchange(rank->ep, &args, rank->device.stream));
}

void rank_tell(rank_t *rank, const void *mine, size_t size, void *all)
{
    const cumoe_handle_t *handle = rank->device.handle;
    const cumoe_stream_t stream = rank->device.stream;
    int64_t *one = malloc((size_t)rank->count * sizeof *one);
    if (!one) abort();
    for (int32_t r = 0; r < rank->count; r++) {
        one[r] = 1;
        memcpy((char *)all + (size_t)r * size, mine, size);
    }
    perf_check(
        cumoe_memory_copy(handle, rank->told, all, (size_t)rank->count * size, CUMOE_COPY_TO_DEVICE, stream));
    rank_exchange(rank, rank->told, one, rank->heard, one, size);
    perf_check(cumoe_ep_wait(rank->ep, stream, 0)); /* first: a copy to the host may wait without an end */
    perf_check(cumoe_memory_copy(handle, all, rank->heard, (size_t)rank->count * size, CUMOE_COPY_TO_HOST, stream));
    device_wait(&rank->device);
    free(one);
}

void rank_max(rank_t *rank, double *values, int count)
{
    double *all = malloc((size_t)rank->count * MOST_TOLD);
    if (!all) abort();
    rank_tell(rank, values, (size_t)count * sizeof *values, all);
    for (int32_t r = 0; r < rank->count; r++)
        for (int i = 0; i < count; i++) values[i] = fmax(values[i], all[r * count + i]);
    free(all);
}

bool rank_agree(rank_t *rank, bool content, char *why, size_t why_size)
{
    double discontent = !content;
    if (!content && rank->number > 0) fprintf(stderr, "cumoe-perf: rank %d: %s\n", rank->number, why);
    rank_max(rank, &discontent, 1);
    if (content && discontent > 0) snprintf(why, why_size, "another rank says on stderr why");
    return discontent == 0;
}
