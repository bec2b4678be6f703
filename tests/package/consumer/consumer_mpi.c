/* A program of another project that is a group of MPI processes. */
#include <cumoe/cumoe.h>
#include <cumoe/mpi.h>

#include <stdio.h>

int main(int argc, char **argv)
{
    cumoe_handle_t *handle;
    cumoe_ep_t *ep;
    int num_ranks = 0;
    MPI_Init(&argc, &argv);
    MPI_Comm_size(MPI_COMM_WORLD, &num_ranks);
    if (cumoe_handle_create(&handle, CUMOE_BACKEND_CPU, 0) != CUMOE_SUCCESS ||
        cumoe_ep_create_mpi(&ep, handle, MPI_COMM_WORLD, 0) != CUMOE_SUCCESS)
        return fprintf(stderr, "%s\n", cumoe_last_error()), 1;
    const int right = cumoe_ep_num_ranks(ep) == num_ranks;
    cumoe_ep_destroy(ep);
    cumoe_handle_destroy(handle);
    MPI_Finalize();
    return right ? 0 : 1;
}
