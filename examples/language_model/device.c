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

void device_open(device_t *device, cumoe_backend_t backend, bool copy)
{
    check(cumoe_handle_create(&device->handle, backend, 0));
    device->shared = cumoe_handle_backend(device->handle) == CUMOE_BACKEND_CPU && !copy;
}

void device_close(device_t *device)
{
    cumoe_handle_destroy(device->handle);
}

mirror_t mirror_create(const device_t *device, size_t size)
{
    void *memory;
    check(cumoe_memory_alloc(device->handle, size, &memory));
    mirror_t mirror = mirror_of(device, memory, size);
    mirror.owned = true;
    return mirror;
}

mirror_t mirror_of(const device_t *device, void *device_memory, size_t size)
{
    void *host = device->shared ? device_memory : host_alloc(size, 1);
    return (mirror_t){.device = device_memory, .host = host, .size = size};
}

void mirror_destroy(const device_t *device, mirror_t *mirror)
{
    if (!device->shared) free(mirror->host);
    if (mirror->owned) cumoe_memory_free(device->handle, mirror->device);
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
    if (device->shared) return;
    check(cumoe_memory_copy(device->handle, mirror->host, mirror->device, mirror->size, CUMOE_COPY_TO_HOST, NULL));
    check(cumoe_stream_synchronize(device->handle, NULL));
}
