#include "host/objects.h"

#include <stdlib.h>
#include <string.h>

static const cumoe_backend_ops_t *const backends[] = {
    [CUMOE_BACKEND_CPU] = &cumoe__backend_cpu,
#ifdef CUMOE_WITH_CUDA
    [CUMOE_BACKEND_CUDA] = &cumoe__backend_cuda,
#else
    [CUMOE_BACKEND_CUDA] = NULL,
#endif
};

const cumoe_backend_ops_t *cumoe__backend_ops(cumoe_backend_t backend)
{
    return backends[backend];
}

static cumoe_status_t open_backend(cumoe_handle_t *handle, cumoe_backend_t backend, int32_t ordinal)
{
    handle->ops = backends[backend];
    CUMOE_REQUIRE(handle->ops, UNSUPPORTED_DEVICE,
                  "cumoe_handle_create: backend = CUMOE_BACKEND_CUDA, but this library was built without it: build "
                  "cumoe where a CUDA toolkit 13.0 or later is found, or with -DCUMOE_CUDA=wheels");
    handle->backend = backend;
    return handle->ops->open(ordinal, &handle->device, handle->description, sizeof handle->description);
}

/* CUDA where it can be used, else the CPU. A machine without a GPU is no failure: its sentence is taken back. Of an
 * ordinal that the CPU has not either, CUDA's sentence says more. */
static cumoe_status_t open_any(cumoe_handle_t *handle, int32_t ordinal)
{
    if (backends[CUMOE_BACKEND_CUDA]) {
        const size_t size = strlen(cumoe_last_error()) + 1;
        char *before = malloc(size);
        CUMOE_REQUIRE(before, OUT_OF_MEMORY, "cumoe_handle_create: no host memory for a sentence");
        memcpy(before, cumoe_last_error(), size);
        const cumoe_status_t status = open_backend(handle, CUMOE_BACKEND_CUDA, ordinal);
        const bool other = status == CUMOE_UNSUPPORTED_DEVICE && ordinal == 0;
        if (other) cumoe__fail(status, "%s", before);
        free(before);
        if (!other) return status;
    }
    return open_backend(handle, CUMOE_BACKEND_CPU, ordinal);
}

cumoe_status_t cumoe_handle_create(cumoe_handle_t **handle, cumoe_backend_t backend, int32_t ordinal)
{
    CUMOE_REQUIRE(handle, INVALID_ARGUMENT, "cumoe_handle_create: handle = NULL, but the result needs a place");
    CUMOE_REQUIRE((unsigned)backend <= CUMOE_BACKEND_CUDA, INVALID_ARGUMENT,
                  "cumoe_handle_create: backend = %d, but must be AUTO (0), CPU (1) or CUDA (2)", (int)backend);
    CUMOE_REQUIRE(ordinal >= 0, INVALID_ARGUMENT, "cumoe_handle_create: ordinal = %d, but must be >= 0", ordinal);
    cumoe_handle_t *made = calloc(1, sizeof *made);
    CUMOE_REQUIRE(made, OUT_OF_MEMORY, "cumoe_handle_create: no host memory for the handle");

    const cumoe_status_t status =
        backend == CUMOE_BACKEND_AUTO ? open_any(made, ordinal) : open_backend(made, backend, ordinal);
    if (status != CUMOE_SUCCESS) {
        free(made);
        return status;
    }
    *handle = made;
    return CUMOE_SUCCESS;
}

void cumoe_handle_destroy(cumoe_handle_t *handle)
{
    if (!handle) return;
    handle->ops->close(handle->device);
    free(handle);
}

cumoe_backend_t cumoe_handle_backend(const cumoe_handle_t *handle)
{
    return handle ? handle->backend : CUMOE_BACKEND_AUTO;
}

const char *cumoe_handle_description(const cumoe_handle_t *handle)
{
    return handle ? handle->description : "";
}

#define REQUIRE_HANDLE(function)                                                                                   \
    CUMOE_REQUIRE(handle, INVALID_ARGUMENT, function ": handle = NULL, but must come from cumoe_handle_create()")

cumoe_status_t cumoe_memory_alloc(const cumoe_handle_t *handle, size_t size, void **ptr)
{
    REQUIRE_HANDLE("cumoe_memory_alloc");
    CUMOE_REQUIRE(ptr, INVALID_ARGUMENT, "cumoe_memory_alloc: ptr = NULL, but the result needs a place");
    if (size == 0) {
        *ptr = NULL;
        return CUMOE_SUCCESS;
    }
    return handle->ops->memory_alloc(handle->device, size, ptr);
}

void cumoe_memory_free(const cumoe_handle_t *handle, void *ptr)
{
    if (handle && ptr) handle->ops->memory_free(handle->device, ptr);
}

cumoe_status_t cumoe_memory_copy(const cumoe_handle_t *handle, void *dst, const void *src, size_t size,
                                 cumoe_copy_t kind, cumoe_stream_t stream)
{
    REQUIRE_HANDLE("cumoe_memory_copy");
    CUMOE_REQUIRE((unsigned)kind <= CUMOE_COPY_ON_DEVICE, INVALID_ARGUMENT,
                  "cumoe_memory_copy: kind = %d, but must be TO_DEVICE (0), TO_HOST (1) or ON_DEVICE (2)",
                  (int)kind);
    CUMOE_TRY(cumoe__check_stream("cumoe_memory_copy", handle, stream));
    if (size == 0) return CUMOE_SUCCESS;
    CUMOE_TRY(cumoe__check_array("cumoe_memory_copy", "dst", dst, 1, true));
    CUMOE_TRY(cumoe__check_array("cumoe_memory_copy", "src", src, 1, true));
    return handle->ops->memory_copy(handle->device, dst, src, size, kind, stream);
}

cumoe_status_t cumoe_memory_set(const cumoe_handle_t *handle, void *ptr, int value, size_t size,
                                cumoe_stream_t stream)
{
    REQUIRE_HANDLE("cumoe_memory_set");
    CUMOE_REQUIRE(value >= 0 && value <= 255, INVALID_ARGUMENT,
                  "cumoe_memory_set: value = %d, but must be a byte, 0..255", value);
    CUMOE_TRY(cumoe__check_stream("cumoe_memory_set", handle, stream));
    if (size == 0) return CUMOE_SUCCESS;
    CUMOE_TRY(cumoe__check_array("cumoe_memory_set", "ptr", ptr, 1, true));
    return handle->ops->memory_set(handle->device, ptr, value, size, stream);
}

cumoe_status_t cumoe_stream_create(const cumoe_handle_t *handle, cumoe_stream_t *stream)
{
    REQUIRE_HANDLE("cumoe_stream_create");
    CUMOE_REQUIRE(stream, INVALID_ARGUMENT, "cumoe_stream_create: stream = NULL, but the result needs a place");
    return handle->ops->stream_create(handle->device, stream);
}

void cumoe_stream_destroy(const cumoe_handle_t *handle, cumoe_stream_t stream)
{
    if (handle && stream) handle->ops->stream_destroy(handle->device, stream);
}

cumoe_status_t cumoe_stream_synchronize(const cumoe_handle_t *handle, cumoe_stream_t stream)
{
    REQUIRE_HANDLE("cumoe_stream_synchronize");
    CUMOE_TRY(cumoe__check_stream("cumoe_stream_synchronize", handle, stream));
    return handle->ops->stream_synchronize(handle->device, stream);
}
