#include "tests/support/buffers.h"

#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { GUARD_SIZE = BUFFER_GUARD, GUARD_BYTE = 0xa5 };

/* All buffers of all lists: a pointer in an argument struct does not say which list it comes from. */
static buffer_t *newest;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

static void enter(buffer_t *buffer)
{
    pthread_mutex_lock(&mutex);
    buffer->older = newest;
    if (newest) newest->newer = buffer;
    newest = buffer;
    pthread_mutex_unlock(&mutex);
}

static void leave(buffer_t *buffer)
{
    pthread_mutex_lock(&mutex);
    if (buffer->older) buffer->older->newer = buffer->newer;
    if (buffer->newer)
        buffer->newer->older = buffer->older;
    else
        newest = buffer->older;
    pthread_mutex_unlock(&mutex);
}

buffer_t *buffer_find(const void *address)
{
    const uintptr_t at = (uintptr_t)address;
    pthread_mutex_lock(&mutex);
    buffer_t *b = newest;
    while (b && (at < (uintptr_t)b->data - GUARD_SIZE || at >= (uintptr_t)b->data + b->size + GUARD_SIZE))
        b = b->older;
    pthread_mutex_unlock(&mutex);
    return b;
}

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
    enter(buffer);
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
        leave(b);
        if (b->twin_block) cumoe_memory_free(b->handle, b->twin_block);
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
