/* Ranks as the processes of mpirun. */
#include "tests/check/ranks.h"

#include <cumoe/mpi.h>

#include <stdio.h>
#include <unistd.h>

bool processes_begin(int argc, char **argv, ranks_flags_t *flags)
{
    int level, rank;
    if (MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &level) != MPI_SUCCESS) return false;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &flags->numbers[0]);
    flags->count = 1;
    return rank == 0 || freopen("/dev/null", "w", stdout); /* one of them prints */
}

cumoe_ep_t *processes_group(const cumoe_handle_t *handle, double timeout, report_t *report)
{
    cumoe_ep_t *ep = NULL;
    if (cumoe_ep_create_mpi(&ep, handle, MPI_COMM_WORLD, timeout) != CUMOE_SUCCESS)
        report_fail(report, "%s", cumoe_last_error());
    return ep;
}

uint64_t processes_sum(uint64_t number)
{
    uint64_t sum = 0;
    MPI_Allreduce(&number, &sum, 1, MPI_UINT64_T, MPI_SUM, MPI_COMM_WORLD);
    return sum;
}

void processes_end(const ranks_flags_t *flags, int status)
{
    fflush(NULL);
    if (flags->killed < 0) MPI_Finalize(); /* it would wait for the dead */
    _exit(status);
}
