/* Buffers that tell on those who misuse them: filled with 0xFF (NaN in every float type, -1 in every integer) or
 * with zeros, a guard zone in front and behind, 16-byte aligned and no better. All buffers of a test live in one
 * list and are checked and freed together. */
#ifndef CUMOE_TESTS_BUFFERS_H
#define CUMOE_TESTS_BUFFERS_H

#include <cumoe/handle.h>

#include <stdbool.h>

enum { BUFFER_POISON = 0xff, BUFFER_GUARD = 256 };

typedef struct buffer {
    struct buffer *next;              /* in its list */
    struct buffer *newer, *older;     /* of all buffers */
    unsigned char *block, *data;      /* block[0] is the first byte of the guard zone in front or lies before it */
    size_t size;                      /* of data */
    const cumoe_handle_t *handle;     /* the twin's, NULL = there is none; see device.h */
    unsigned char *twin;              /* where data stands on the device */
    void *twin_block;                 /* the allocation, NULL = not the buffer's own */
    size_t twin_front, twin_back;     /* bytes of guard zones that the twin has */
    const struct device_call *in_use; /* the call that has translated a pointer into it */
} buffer_t;

typedef struct buffer_list {
    struct buffer *first;
} buffer_list_t;

/* size bytes (0 is allowed: the guard zones touch), poisoned, 16-byte aligned. Ends the process when memory is
 * exhausted. */
void *buffer_get(buffer_list_t *list, size_t size);

/* The same with another alignment, a power of two. */
void *buffer_get_aligned(buffer_list_t *list, size_t size, size_t alignment);

/* The same, set to zero. */
void *buffer_get_zero(buffer_list_t *list, size_t size);

/* False when something was written in front of a buffer or behind it. */
bool buffer_guards_intact(const buffer_list_t *list);

void buffer_free_all(buffer_list_t *list);

/* The buffer that an address lies in, guard zones and the end included; NULL = none. */
buffer_t *buffer_find(const void *address);

/* Fill with poison; is every byte still poison? */
void buffer_poison(void *data, size_t size);
bool buffer_is_poison(const void *data, size_t size);

#endif
