/* Without MPI: mpirun starts NAME, which becomes NAME-mpi, if that stands beside it. */
#define _POSIX_C_SOURCE 200809L
#include "processes.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

bool processes_begin(int argc, char **argv, processes_t *processes)
{
    (void)argc;
    (void)processes;
    char path[4096];
    const ssize_t length = readlink("/proc/self/exe", path, sizeof path - 8);
    if (length > 0) {
        memcpy(path + length, "-mpi", 5);
        execv(path, argv);
        fprintf(stderr, "%s: --ranks mpi needs %s, which is built where an MPI is found: ", argv[0], path);
    }
    perror(NULL);
    return false;
}

cumoe_status_t processes_group(cumoe_ep_t **ep, const cumoe_handle_t *handle, double timeout)
{
    (void)ep;
    (void)handle;
    (void)timeout;
    return CUMOE_COMM_ERROR;
}

uint64_t processes_sum(uint64_t number)
{
    return number;
}

void processes_end(int status, bool all_alive)
{
    (void)all_alive;
    exit(status);
}
