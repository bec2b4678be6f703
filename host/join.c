/* How a group of GPUs comes about: from a communicator, an id, or the environment of a launcher. What carries its
 * messages is the backend's. */
#include "host/bootstrap.h"
#include "host/comm.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static const char FUNCTION[] = "cumoe_ep_create";

/* A number of the environment; absent = refused. */
static cumoe_status_t read_number(const char *name, int32_t low, int32_t high, int32_t *value)
{
    const char *text = getenv(name);
    CUMOE_REQUIRE(text, INVALID_ARGUMENT,
                  "%s: %s is not in the environment, but without args.nccl_comm and args.id a launcher must set it",
                  FUNCTION, name);
    char *end;
    errno = 0;
    const long number = strtol(text, &end, 10);
    CUMOE_REQUIRE(end != text && *end == '\0' && errno == 0 && number >= low && number <= high, INVALID_ARGUMENT,
                  "%s: the environment's %s = \"%.40s\", but must be %d..%d", FUNCTION, name, text, low, high);
    *value = (int32_t)number;
    return CUMOE_SUCCESS;
}

static cumoe_status_t read_port(int32_t *port)
{
    if (getenv("CUMOE_MASTER_PORT")) return read_number("CUMOE_MASTER_PORT", 1, 65535, port);
    CUMOE_TRY(read_number("MASTER_PORT", 1, 65534, port)); /* the launcher's own store listens there */
    ++*port;
    return CUMOE_SUCCESS;
}

cumoe_status_t cumoe__meeting_read(cumoe_meeting_t *meeting)
{
    const bool slurm = !getenv("RANK") && !getenv("WORLD_SIZE") && getenv("SLURM_PROCID");
    CUMOE_TRY(read_number(slurm ? "SLURM_NTASKS" : "WORLD_SIZE", 1, CUMOE_EP_MAX_RANKS, &meeting->num_ranks));
    CUMOE_TRY(read_number(slurm ? "SLURM_PROCID" : "RANK", 0, meeting->num_ranks - 1, &meeting->rank));
    meeting->function = FUNCTION;
    if (meeting->num_ranks == 1) return CUMOE_SUCCESS; /* nobody to meet */
    meeting->address = getenv("MASTER_ADDR");
    CUMOE_REQUIRE(meeting->address && *meeting->address, INVALID_ARGUMENT,
                  "%s: MASTER_ADDR is not in the environment, but must name the machine of rank 0", FUNCTION);
    return read_port(&meeting->port);
}

/* Ranks that have no NCCL say so at once, and not when their time is over. */
static cumoe_status_t meet(const cumoe_backend_ops_t *ops, cumoe_ep_args_t *args, cumoe_ep_id_t *id)
{
    cumoe_meeting_t meeting = {.timeout = args->timeout};
    CUMOE_TRY(cumoe__meeting_read(&meeting));
    CUMOE_TRY(ops->group_id(FUNCTION, meeting.rank == 0 ? id : NULL));
    CUMOE_TRY(cumoe__bootstrap(&meeting, id, sizeof *id));
    args->id = id;
    args->rank = meeting.rank;
    args->num_ranks = meeting.num_ranks;
    return CUMOE_SUCCESS;
}

static cumoe_status_t read_args(const cumoe_ep_args_t *theirs, cumoe_ep_args_t *ours)
{
    *ours = (cumoe_ep_args_t){.struct_size = sizeof *ours};
    if (theirs) CUMOE_TRY(cumoe__struct_read(FUNCTION, "args", theirs, sizeof *ours, ours, sizeof *ours));
    CUMOE_TRY(cumoe__check_timeout(FUNCTION, &ours->timeout));
    CUMOE_REQUIRE(!ours->nccl_comm || !ours->id, INVALID_ARGUMENT,
                  "%s: args.id = %p, but with args.nccl_comm must be NULL", FUNCTION, (const void *)ours->id);
    if (ours->id) {
        CUMOE_REQUIRE(ours->num_ranks >= 1 && ours->num_ranks <= CUMOE_EP_MAX_RANKS, INVALID_ARGUMENT,
                      "%s: args.num_ranks = %d, but must be 1..%d", FUNCTION, ours->num_ranks, CUMOE_EP_MAX_RANKS);
        CUMOE_REQUIRE(ours->rank >= 0 && ours->rank < ours->num_ranks, INVALID_ARGUMENT,
                      "%s: args.rank = %d, but must be 0..%d (num_ranks - 1)", FUNCTION, ours->rank,
                      ours->num_ranks - 1);
        return CUMOE_SUCCESS;
    }
    const char *from = ours->nccl_comm ? "args.nccl_comm knows it" : "without args.id the environment has it";
    CUMOE_REQUIRE(ours->rank == 0, INVALID_ARGUMENT, "%s: args.rank = %d, but must be 0: %s", FUNCTION, ours->rank,
                  from);
    CUMOE_REQUIRE(ours->num_ranks == 0, INVALID_ARGUMENT, "%s: args.num_ranks = %d, but must be 0: %s", FUNCTION,
                  ours->num_ranks, from);
    return CUMOE_SUCCESS;
}

cumoe_status_t cumoe_ep_create(cumoe_ep_t **ep, const cumoe_handle_t *handle, const cumoe_ep_args_t *args)
{
    CUMOE_REQUIRE(ep, INVALID_ARGUMENT, "%s: ep = NULL, but the result needs a place", FUNCTION);
    CUMOE_REQUIRE(handle, INVALID_ARGUMENT, "%s: handle = NULL, but must come from cumoe_handle_create()",
                  FUNCTION);
    CUMOE_REQUIRE(handle->ops->group_join, UNSUPPORTED_DEVICE,
                  "%s: handle is the CPU, but NCCL is for CUDA: cumoe_ep_create_local() makes a group of threads, "
                  "cumoe_ep_create_mpi() of cumoe/mpi.h one of processes",
                  FUNCTION);
    cumoe_ep_args_t ours;
    cumoe_ep_id_t id;
    CUMOE_TRY(read_args(args, &ours));
    if (!ours.nccl_comm && !ours.id) CUMOE_TRY(meet(handle->ops, &ours, &id));
    return handle->ops->group_join(FUNCTION, handle, &ours, ep);
}

cumoe_status_t cumoe_ep_id_create(cumoe_ep_id_t *id)
{
    const char *function = "cumoe_ep_id_create";
    CUMOE_REQUIRE(id, INVALID_ARGUMENT, "%s: id = NULL, but the result needs a place", function);
    const cumoe_backend_ops_t *ops = cumoe__backend_ops(CUMOE_BACKEND_CUDA);
    CUMOE_REQUIRE(ops, UNSUPPORTED_DEVICE,
                  "%s: an id is NCCL's, but this library was built without CUDA: cumoe_ep_create_local() makes a "
                  "group of threads, cumoe_ep_create_mpi() of cumoe/mpi.h one of processes",
                  function);
    return ops->group_id(function, id);
}
