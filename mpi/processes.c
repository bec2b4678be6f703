/* Ranks as the processes of mpirun. */
#define _POSIX_C_SOURCE 200809L
#include "processes.h"

#include <cumoe/mpi.h>
#include <stdio.h>
#include <unistd.h>

bool processes_begin(int argc, char **argv, processes_t *p)
{
    int level;
    MPI_Comm machine;
    if (MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &level) != MPI_SUCCESS) return false;
    MPI_Comm_rank(MPI_COMM_WORLD, &p->rank);
    MPI_Comm_size(MPI_COMM_WORLD, &p->count);
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, p->rank, MPI_INFO_NULL, &machine);
    MPI_Comm_rank(machine, &p->local_rank);
    MPI_Comm_size(machine, &p->local_count);
    MPI_Comm_free(&machine);
    return p->rank == 0 || freopen("/dev/null", "w", stdout); /* one of them prints */
}

cumoe_status_t processes_group(cumoe_ep_t **ep, const cumoe_handle_t *handle, double timeout)
{
    return cumoe_ep_create_mpi(ep, handle, MPI_COMM_WORLD, timeout);
}

uint64_t processes_sum(uint64_t number)
{
    uint64_t sum = 0;
    MPI_Allreduce(&number, &sum, 1, MPI_UINT64_T, MPI_SUM, MPI_COMM_WORLD);
    return sum;
}

void processes_end(int status, bool all_alive)
{
    fflush(NULL);
    if (all_alive) MPI_Finalize();
    _exit(status);
}
