/* Programs whose ranks may be the processes of mpirun, cumoe-check and cumoe-perf: no part of the library. Each is
 * built twice: NAME-mpi with MPI and processes.c, and NAME, for machines without, with processes_none.c, which
 * turns into the other where it is asked for processes. */
#ifndef CUMOE_MPI_PROCESSES_H
#define CUMOE_MPI_PROCESSES_H

#include <cumoe/parallel.h>
#include <stdbool.h>

typedef struct processes {
    int32_t rank, count;             /* of this process, and of all */
    int32_t local_rank, local_count; /* of those on this machine */
} processes_t;

/* false, with a sentence on stderr: there are none. All but rank 0 have no stdout from here on. */
bool processes_begin(int argc, char **argv, processes_t *processes);
/* The group of all of them; as cumoe_ep_create_mpi(). */
cumoe_status_t processes_group(cumoe_ep_t **ep, const cumoe_handle_t *handle, double timeout);
/* The sum over all processes. */
uint64_t processes_sum(uint64_t number);
/* The end of a process, with an exit status; whether all are alive, which MPI would wait for. */
void processes_end(int status, bool all_alive) __attribute__((noreturn));

#endif
