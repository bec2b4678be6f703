/* A buffer that is handed out from its beginning in 64-byte aligned pieces. Base 0 only counts: the code that
 * places the pieces also answers how much they take. */
#ifndef CUMOE_ARENA_H
#define CUMOE_ARENA_H

#include <stddef.h>
#include <stdint.h>

enum { CUMOE_ARENA_ALIGNMENT = 64 };

typedef struct cumoe_arena {
    uintptr_t base;
    size_t used;
} cumoe_arena_t;

static inline void *cumoe__take(cumoe_arena_t *arena, size_t size)
{
    const size_t begin = (arena->used + CUMOE_ARENA_ALIGNMENT - 1) / CUMOE_ARENA_ALIGNMENT * CUMOE_ARENA_ALIGNMENT;
    arena->used = begin + size;
    return (void *)(arena->base + begin);
}

#endif
