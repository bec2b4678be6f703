/* Ranks that share the experts: threads of this process, processes of mpirun, or GPUs over NCCL. */
#ifndef CUMOE_PERF_RANKS_H
#define CUMOE_PERF_RANKS_H

#include "perf.h"

enum { LOCAL, MPI, NCCL };
extern const char *const transport_names[];

/* What this process knows of them. */
typedef struct ranks {
    int transport;
    int32_t number, count; /* of this process' rank, and of all; LOCAL: 0, as many as a subject asks for */
    int32_t local;         /* of those on this machine, this one's number, which says which GPU it has */
    int32_t beside;        /* that share its memory; LOCAL: 0, all of them */
    device_t *device;
    cumoe_ep_t *ep; /* not LOCAL */
} ranks_t;

/* One of them. */
typedef struct rank {
    cumoe_ep_t *ep;
    device_t device; /* with a stream and a clock of its own */
    int32_t number, count, beside;
    void *told, *heard; /* [count, MOST_TOLD] bytes of device memory */
} rank_t;

/* Before there is a device. transport NULL or a list of numbers: LOCAL. Ends the program where there are none. */
void ranks_begin(ranks_t *ranks, const char *transport, int argc, char **argv);
/* The group of this process' rank, if it has but one. */
void ranks_join(ranks_t *ranks, device_t *device);
/* BODY on so many ranks, with contexts of its own for each: context + number * size. */
void ranks_run(const ranks_t *ranks, int32_t count, void (*body)(rank_t *, void *), void *context);
/* End the program. */
_Noreturn void ranks_end(ranks_t *ranks, int status);

/* ---- what a rank and all others do together ---- */

enum { MOST_TOLD = 64 };
/* all: [count, size] what each told the others, size bytes, MOST_TOLD at most. */
void rank_tell(rank_t *rank, const void *mine, size_t size, void *all);
/* The largest over all ranks of each of some values, MOST_TOLD / 8 at most. Ranks leave it at the same time. */
void rank_max(rank_t *rank, double *values, int count);
/* Whether all are content; else a sentence of whoever is not: of rank 0 in why, of others on stderr as well. */
bool rank_agree(rank_t *rank, bool content, char *why, size_t why_size);
/* Rows for all ranks, and what comes: cumoe_ep_exchange(). */
void rank_exchange(rank_t *rank, const void *send, const int64_t *sent, void *recv, const int64_t *received,
                   size_t row_size);

#endif
