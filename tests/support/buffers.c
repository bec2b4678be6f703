#include "tests/support/buffers.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { GUARD_SIZE = 256, GUARD_BYTE = 0xa5 };

typedef struct buffer {
    struct buffer *next;
    unsigned char *block, *data;
    size_t size;
} buffer_t;

void *buffer_get(buffer_list_t *list, size_t size)
{
    return buffer_get_aligned(list, size, 16);
}

void *buffer_get_aligned(buffer_list_t *list, size_t size, size_t alignment)
{
    const uintptr_t period = 2 * alignment;
    buffer_t *buffer = malloc(sizeof *buffer);
    unsigned char *block = malloc(size + 2 * GUARD_SIZE + period);
    if (!buffer || !block) {
        fprintf(stderr, "test buffers: no memory for %zu bytes\n", size);
        exit(EXIT_FAILURE);
    }
    unsigned char *data = block + GUARD_SIZE;
    data += (period + alignment - (uintptr_t)data % period) % period; /* an odd multiple of alignment */
    *buffer = (buffer_t){.next = list->first, .block = block, .data = data, .size = size};
    list->first = buffer;
    memset(data - GUARD_SIZE, GUARD_BYTE, GUARD_SIZE);
    memset(data, BUFFER_POISON, size);
    memset(data + size, GUARD_BYTE, GUARD_SIZE);
    return data;
}

void *buffer_get_zero(buffer_list_t *list, size_t size)
{
    return memset(buffer_get(list, size), 0, size);
}

static bool all_bytes(const unsigned char *data, size_t size, unsigned char byte)
{
    for (size_t i = 0; i < size; i++)
        if (data[i] != byte) return false;
    return true;
}

bool buffer_guards_intact(const buffer_list_t *list)
{
    for (const buffer_t *b = list->first; b; b = b->next)
        if (!all_bytes(b->data - GUARD_SIZE, GUARD_SIZE, GUARD_BYTE) ||
            !all_bytes(b->data + b->size, GUARD_SIZE, GUARD_BYTE))
            return false;
    return true;
}

void buffer_free_all(buffer_list_t *list)
{
    while (list->first) {
        buffer_t *b = list->first;
        list->first = b->next;
        free(b->block);
        free(b);
    }
}

void buffer_poison(void *data, size_t size)
{
    memset(data, BUFFER_POISON, size);
}

bool buffer_is_poison(const void *data, size_t size)
{
    return all_bytes(data, size, BUFFER_POISON);
}
