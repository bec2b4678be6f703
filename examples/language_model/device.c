#include "device.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

void check(cumoe_status_t status)
{
    if (status != CUMOE_SUCCESS) die("%s: %s", cumoe_status_name(status), cumoe_last_error());
}

void die(const char *format, ...)
{
    va_list list;
    va_start(list, format);
    fputs("cumoe-language-model: ", stderr);
    vfprintf(stderr, format, list);
    fputc('\n', stderr);
    va_end(list);
    exit(EXIT_FAILURE);
}

void *host_alloc(size_t count, size_t size)
{
    void *memory = calloc(count ? count : 1, size);
    if (!memory) die("out of memory: %zu times %zu bytes", count, size);
    return memory;
}

void device_open(device_t *device, cumoe_backend_t backend, bool copy, int ordinal)
{
    if (backend == CUMOE_BACKEND_CPU || ordinal == 0 ||
        cumoe_handle_create(&device->handle, CUMOE_BACKEND_CUDA, ordinal) != CUMOE_SUCCESS)
        check(cumoe_handle_create(&device->handle, backend, 0));
    device->shared = cumoe_handle_backend(device->handle) == CUMOE_BACKEND_CPU && !copy;
}

void device_close(device_t *device)
{
    cumoe_handle_destroy(device->handle);
}

mirror_t mirror_create(const device_t *device, size_t size)
{
    mirror_t mirror = {.size = size};
    check(cumoe_memory_alloc(device->handle, size, &mirror.device));
    mirror.host = device->shared ? mirror.device : host_alloc(size, 1);
    return mirror;
}

void mirror_destroy(const device_t *device, mirror_t *mirror)
{
    if (!device->shared) free(mirror->host);
    cumoe_memory_free(device->handle, mirror->device);
    *mirror = (mirror_t){0};
}

void mirror_to_device(const device_t *device, const mirror_t *mirror)
{
    if (device->shared) return;
    check(
        cumoe_memory_copy(device->handle, mirror->device, mirror->host, mirror->size, CUMOE_COPY_TO_DEVICE, NULL));
}

void mirror_to_host(const device_t *device, const mirror_t *mirror)
{
    if (device->shared || mirror->size == 0) return;
    check(cumoe_memory_copy(device->handle, mirror->host, mirror->device, mirror->size, CUMOE_COPY_TO_HOST, NULL));
    check(cumoe_stream_synchronize(device->handle, NULL));
}
