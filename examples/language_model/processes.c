/* Ranks as the processes of mpirun. */
#include "device.h"
#include "ranks.h"

#include <cumoe/mpi.h>

#include <omp.h>
#include <time.h>
#include <unistd.h>

processes_t processes_begin(void)
{
    processes_t ours;
    int level, neighbours;
    MPI_Comm machine;
    MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &level);
    MPI_Comm_rank(MPI_COMM_WORLD, &ours.rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ours.number);
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &machine);
    MPI_Comm_rank(machine, &ours.local_rank);
    MPI_Comm_size(machine, &neighbours);
    MPI_Comm_free(&machine);
    /* Its share of the machine's processors, as far as mpirun has bound it to no fewer. */
    const int share = (int)sysconf(_SC_NPROCESSORS_ONLN) / neighbours;
    if (share < omp_get_max_threads()) omp_set_num_threads(share > 0 ? share : 1);
    return ours;
}

cumoe_ep_t *processes_group(const cumoe_handle_t *handle)
{
    MPI_Request request;
    MPI_Ibarrier(MPI_COMM_WORLD, &request);
    for (int here = 0; !here; MPI_Test(&request, &here, MPI_STATUS_IGNORE))
        nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
    cumoe_ep_t *ep;
    check(cumoe_ep_create_mpi(&ep, handle, MPI_COMM_WORLD, 60)); /* seconds that a process may be late in a step */
    return ep;
}

void processes_end(void)
{
    MPI_Finalize();
}
