/* A handle is one device. It is not changed after creation: any number of threads and layers share it.
 * Beside it stand the few memory and stream calls that a C program needs, so that the same source runs on
 * the CPU and on a GPU. The caller's current CUDA device is restored by every call. */
#ifndef CUMOE_HANDLE_H
#define CUMOE_HANDLE_H

#include <cumoe/status.h>
#include <cumoe/types.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum cumoe_backend {
    CUMOE_BACKEND_AUTO = 0, /* CUDA if the device can be used, else the CPU */
    CUMOE_BACKEND_CPU = 1,
    CUMOE_BACKEND_CUDA = 2
} cumoe_backend_t;

typedef enum cumoe_copy { CUMOE_COPY_TO_DEVICE = 0, CUMOE_COPY_TO_HOST = 1, CUMOE_COPY_ON_DEVICE = 2 } cumoe_copy_t;

/* Open a device.
 *
 * handle   out: the handle; unchanged on failure
 * backend  which kind of device
 * ordinal  which of them, from 0; the CPU has only 0
 *
 * CUMOE_INVALID_ARGUMENT    handle is NULL, backend unknown, ordinal negative
 * CUMOE_UNSUPPORTED_DEVICE  no such device, no driver, a GPU that is full or taken by others or older than sm_80,
 * or the library was built without this backend CUMOE_OUT_OF_MEMORY       host memory
 *
 * Allocates: yes.  Synchronizes: may.  Capturable: no.  Thread-safe: yes. */
CUMOE_API CUMOE_NODISCARD cumoe_status_t cumoe_handle_create(cumoe_handle_t **handle, cumoe_backend_t backend,
                                                             int32_t ordinal);

/* Close a device. NULL is ignored. Layers and memory of the handle must be gone.
 *
 * Allocates: no.  Synchronizes: may.  Capturable: no.  Thread-safe: yes. */
CUMOE_API void cumoe_handle_destroy(cumoe_handle_t *handle);

/* The backend behind the handle, CPU or CUDA, never AUTO; AUTO for NULL.
 *
 * Allocates: no.  Synchronizes: no.  Capturable: yes.  Thread-safe: yes. */
CUMOE_API cumoe_backend_t cumoe_handle_backend(const cumoe_handle_t *handle);

/* A line for people: the device and what is used of it ("CPU, avx512, 2 threads"). "" for NULL; lives as
 * long as the handle.
 *
 * Allocates: no.  Synchronizes: no.  Capturable: yes.  Thread-safe: yes. */
CUMOE_API const char *cumoe_handle_description(const cumoe_handle_t *handle);

/* Allocate size bytes of device memory, 256-byte aligned, contents undefined. size = 0 gives NULL.
 *
 * CUMOE_INVALID_ARGUMENT  handle or ptr is NULL
 * CUMOE_OUT_OF_MEMORY     not to be had; *ptr is unchanged
 *
 * Allocates: yes.  Synchronizes: may.  Capturable: no.  Thread-safe: yes. */
CUMOE_API CUMOE_NODISCARD cumoe_status_t cumoe_memory_alloc(const cumoe_handle_t *handle, size_t size, void **ptr);

/* Give memory of cumoe_memory_alloc() back. NULL is ignored.
 *
 * Allocates: no.  Synchronizes: may.  Capturable: no.  Thread-safe: yes. */
CUMOE_API void cumoe_memory_free(const cumoe_handle_t *handle, void *ptr);

/* Copy size bytes; enqueued on the stream, done at once on the CPU. Host memory must stay valid until the
 * stream has passed. Any alignment; the ranges must not overlap.
 *
 * CUMOE_INVALID_ARGUMENT  a pointer is NULL while size > 0, kind unknown, a stream on the CPU
 * CUMOE_CUDA_ERROR        the copy could not be enqueued
 *
 * Allocates: no.  Synchronizes: with pageable host memory, may.  Capturable: yes.  Thread-safe: yes. */
CUMOE_API CUMOE_NODISCARD cumoe_status_t cumoe_memory_copy(const cumoe_handle_t *handle, void *dst, const void *src,
                                                           size_t size, cumoe_copy_t kind, cumoe_stream_t stream);

/* Set size bytes of device memory to value (0..255); enqueued on the stream. Errors as cumoe_memory_copy().
 *
 * Allocates: no.  Synchronizes: no.  Capturable: yes.  Thread-safe: yes. */
CUMOE_API CUMOE_NODISCARD cumoe_status_t cumoe_memory_set(const cumoe_handle_t *handle, void *ptr, int value,
                                                          size_t size, cumoe_stream_t stream);

/* Make a stream of the handle's device; on the CPU *stream is NULL. A host's own cudaStream_t serves as well.
 *
 * CUMOE_INVALID_ARGUMENT  handle or stream is NULL
 * CUMOE_CUDA_ERROR        CUDA refused
 *
 * Allocates: yes.  Synchronizes: no.  Capturable: no.  Thread-safe: yes. */
CUMOE_API CUMOE_NODISCARD cumoe_status_t cumoe_stream_create(const cumoe_handle_t *handle, cumoe_stream_t *stream);

/* NULL is ignored.
 *
 * Allocates: no.  Synchronizes: no.  Capturable: no.  Thread-safe: yes. */
CUMOE_API void cumoe_stream_destroy(const cumoe_handle_t *handle, cumoe_stream_t stream);

/* Wait until everything enqueued on the stream is done; faults of kernels come back here.
 *
 * CUMOE_INVALID_ARGUMENT  handle is NULL, a stream on the CPU
 * CUMOE_CUDA_ERROR        something on the stream failed
 *
 * Allocates: no.  Synchronizes: yes.  Capturable: no.  Thread-safe: yes. */
CUMOE_API CUMOE_NODISCARD cumoe_status_t cumoe_stream_synchronize(const cumoe_handle_t *handle,
                                                                  cumoe_stream_t stream);

#ifdef __cplusplus
}
#endif
#endif
