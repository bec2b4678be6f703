/* NCCL is loaded when somebody wants a group, from wherever it is. */
#include "cuda/nccl.cuh"

#include "host/error.h"

#include <dlfcn.h>
#include <stdlib.h>

namespace cumoe
{

namespace
{

constexpr char kName[] = "libnccl.so.2";

/* Errors of the loader, in place of NULL. */
const char *loader_error()
{
    const char *error = dlerror();
    return error ? error : "no reason given";
}

cumoe_status_t open_library(const char *function, bool any, void **library)
{
    const char *path = getenv("CUMOE_NCCL");
    if (path && *path) {
        *library = dlopen(path, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
        CUMOE_REQUIRE(*library, COMM_ERROR, "%s: the environment's CUMOE_NCCL cannot be loaded: %s", function,
                      loader_error());
        return CUMOE_SUCCESS;
    }
    *library = RTLD_DEFAULT;
    if (dlsym(RTLD_DEFAULT, "ncclGetVersion")) return CUMOE_SUCCESS;
    *library = dlopen(kName, RTLD_NOW | RTLD_NOLOAD | RTLD_NODELETE);
    if (*library) return CUMOE_SUCCESS;
    CUMOE_REQUIRE(
        any, COMM_ERROR,
        "%s: args.nccl_comm is given, but no NCCL is in this process: CUMOE_NCCL in the environment names "
        "the library that it comes from",
        function);
    *library = dlopen(kName, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    CUMOE_REQUIRE(*library, COMM_ERROR,
                  "%s: NCCL is not found: %s. It is looked for in the process and on the path of the loader; "
                  "CUMOE_NCCL in the environment names another place",
                  function, loader_error());
    return CUMOE_SUCCESS;
}

cumoe_status_t check_version(const char *function, const Nccl &nccl)
{
    int version = 0;
    CUMOE_TRY(nccl_status(function, nccl, "ncclGetVersion", nccl.ncclGetVersion(&version)));
    CUMOE_REQUIRE(version >= kOldestNccl, COMM_ERROR, "%s: NCCL has version %d.%d.%d, but must have %d.%d or later",
                  function, version / 10000, version / 100 % 100, version % 100, kOldestNccl / 10000,
                  kOldestNccl / 100 % 100);
    return CUMOE_SUCCESS;
}

} // namespace

cumoe_status_t nccl_load(const char *function, bool any, Nccl *nccl)
{
    void *library;
    CUMOE_TRY(open_library(function, any, &library));
    const char *missing = nullptr;
#define CUMOE_NCCL_FIND(name, ...)                                                                                 \
    nccl->name = reinterpret_cast<decltype(nccl->name)>(dlsym(library, #name));                                    \
    if (!nccl->name && !missing) missing = #name;
    CUMOE_NCCL_FUNCTIONS(CUMOE_NCCL_FIND)
    CUMOE_NCCL_FIND(ncclGetErrorString)
    CUMOE_NCCL_FIND(ncclGetLastError)
#undef CUMOE_NCCL_FIND
    if (library != RTLD_DEFAULT) dlclose(library);
    CUMOE_REQUIRE(!missing, COMM_ERROR, "%s: NCCL has no %s, but must have version %d.%d or later", function,
                  missing, kOldestNccl / 10000, kOldestNccl / 100 % 100);
    return check_version(function, *nccl);
}

cumoe_status_t nccl_status(const char *function, const Nccl &nccl, const char *name, NcclResult result)
{
    if (result == kNcclSuccess) return CUMOE_SUCCESS;
    const char *more = nccl.ncclGetLastError(nullptr);
    return cumoe__fail(CUMOE_COMM_ERROR, "%s: %s: %s%s%s", function, name, nccl.ncclGetErrorString(result),
                       more && *more ? ": " : "", more ? more : "");
}

} // namespace cumoe
