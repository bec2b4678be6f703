/* Memory that lives twice: on the device, where the layer computes, and on the host, where the rest of the model
 * does. On the CPU backend the two are one and copying costs nothing; the program is the same. */
#ifndef DEVICE_H
#define DEVICE_H

#include <cumoe/cumoe.h>

#include <stdbool.h>

typedef struct device {
    cumoe_handle_t *handle;
    bool shared; /* device memory is host memory */
} device_t;

typedef struct mirror {
    void *device, *host;
    size_t size; /* bytes */
} mirror_t;

/* End the program with the library's sentence if a call failed. */
void check(cumoe_status_t status);

/* End the program with a sentence of our own. */
_Noreturn void die(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Host memory, zeroed; ends the program when there is none. */
void *host_alloc(size_t count, size_t size);

/* copy: keep two copies on the CPU backend as well, as a GPU needs it. ordinal: of several GPUs; where there is no
 * such GPU, the first is shared. */
void device_open(device_t *device, cumoe_backend_t backend, bool copy, int ordinal);
void device_close(device_t *device);

mirror_t mirror_create(const device_t *device, size_t size);
void mirror_destroy(const device_t *device, mirror_t *mirror);
void mirror_to_device(const device_t *device, const mirror_t *mirror);
void mirror_to_host(const device_t *device, const mirror_t *mirror); /* waits for the device */

#endif
