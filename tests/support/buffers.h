/* Buffers that tell on those who misuse them: filled with 0xFF (NaN in every float type, -1 in every integer) or
 * with zeros, a guard zone in front and behind, 16-byte aligned and no better. All buffers of a test live in one
 * list and are checked and freed together. */
#ifndef CUMOE_TESTS_BUFFERS_H
#define CUMOE_TESTS_BUFFERS_H

#include <stdbool.h>
#include <stddef.h>

enum { BUFFER_POISON = 0xff };

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

/* Fill with poison; is every byte still poison? */
void buffer_poison(void *data, size_t size);
bool buffer_is_poison(const void *data, size_t size);

#endif
