/* What is used of NCCL: declared here, as the library is found at run time and its header is not needed to build.
 * Numbers and signatures are NCCL's ABI; tests/sim/nccl_abi.cc compares them with nccl.h where there is one. */
#pragma once

#include <cuda_runtime.h>
#include <cumoe/parallel.h>

namespace cumoe
{

constexpr int kOldestNccl = 21800; // 2.18.0

typedef struct NcclOpaque *NcclComm;

enum NcclResult : int {
    kNcclSuccess = 0,
    kNcclInProgress = 7,
};

enum NcclType : int {
    kNcclUint8 = 1,
    kNcclInt32 = 2,
    kNcclInt64 = 4,
    kNcclFloat32 = 7,
    kNcclFloat64 = 8,
};

enum NcclOperation : int { kNcclSum = 0 };

/* As of 2.14, which every later NCCL understands: the fields that came since have their defaults. */
struct NcclConfig {
    size_t size = sizeof(NcclConfig);
    unsigned magic = 0xcafebeef;
    unsigned version = 21400;
    int blocking = 0;
};

/* Name, arguments; all give an NcclResult. */
#define CUMOE_NCCL_FUNCTIONS(FUNCTION)                                                                             \
    FUNCTION(ncclGetVersion, int *version)                                                                         \
    FUNCTION(ncclGetUniqueId, cumoe_ep_id_t *id)                                                                   \
    FUNCTION(ncclCommInitRankConfig, NcclComm *comm, int num_ranks, cumoe_ep_id_t id, int rank,                    \
             NcclConfig *config)                                                                                   \
    FUNCTION(ncclCommUserRank, NcclComm comm, int *rank)                                                           \
    FUNCTION(ncclCommCount, NcclComm comm, int *num_ranks)                                                         \
    FUNCTION(ncclCommCuDevice, NcclComm comm, int *ordinal)                                                        \
    FUNCTION(ncclCommGetAsyncError, NcclComm comm, NcclResult *error)                                              \
    FUNCTION(ncclCommFinalize, NcclComm comm)                                                                      \
    FUNCTION(ncclCommDestroy, NcclComm comm)                                                                       \
    FUNCTION(ncclCommAbort, NcclComm comm)                                                                         \
    FUNCTION(ncclGroupStart)                                                                                       \
    FUNCTION(ncclGroupEnd)                                                                                         \
    FUNCTION(ncclSend, const void *data, size_t count, NcclType type, int to, NcclComm comm, cudaStream_t stream)  \
    FUNCTION(ncclRecv, void *data, size_t count, NcclType type, int from, NcclComm comm, cudaStream_t stream)      \
    FUNCTION(ncclAllReduce, const void *send, void *recv, size_t count, NcclType type, NcclOperation operation,    \
             NcclComm comm, cudaStream_t stream)

struct Nccl {
#define CUMOE_NCCL_POINTER(name, ...) NcclResult (*name)(__VA_ARGS__);
    CUMOE_NCCL_FUNCTIONS(CUMOE_NCCL_POINTER)
#undef CUMOE_NCCL_POINTER
    const char *(*ncclGetErrorString)(NcclResult result);
    const char *(*ncclGetLastError)(NcclComm comm);
};

/* The library that the environment's CUMOE_NCCL names; else the one that is in the process; else libnccl.so.2, if
 * ANY will do: a communicator belongs to the NCCL that made it. It is never unloaded, as it has threads. */
cumoe_status_t nccl_load(const char *function, bool any, Nccl *nccl);

/* The status of what NAME gave, with a sentence for the public FUNCTION. */
cumoe_status_t nccl_status(const char *function, const Nccl &nccl, const char *name, NcclResult result);

} // namespace cumoe
