#include "tests/unit/allocation.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>

static atomic_long count, live, countdown;
static atomic_int failed;

void *__real_malloc(size_t size);
void *__real_calloc(size_t number, size_t size);
void *__real_realloc(void *old, size_t size);
void *__real_aligned_alloc(size_t alignment, size_t size);
int __real_posix_memalign(void **ptr, size_t alignment, size_t size);
void __real_free(void *ptr);

long allocation_count(void)
{
    return atomic_exchange(&count, 0);
}

long allocation_live(void)
{
    return atomic_load(&live);
}

void allocation_fail(long n)
{
    atomic_store(&countdown, n);
    atomic_store(&failed, 0);
}

int allocation_failed(void)
{
    return atomic_load(&failed);
}

static int refuse(void)
{
    atomic_fetch_add(&count, 1);
    if (atomic_load(&countdown) == 0 || atomic_fetch_sub(&countdown, 1) != 1) return 0;
    atomic_store(&failed, 1);
    return 1;
}

static void *counted(void *ptr)
{
    if (ptr) atomic_fetch_add(&live, 1);
    return ptr;
}

void *__wrap_malloc(size_t size)
{
    return refuse() ? NULL : counted(__real_malloc(size));
}

void *__wrap_calloc(size_t number, size_t size)
{
    return refuse() ? NULL : counted(__real_calloc(number, size));
}

void *__wrap_realloc(void *old, size_t size)
{
    if (refuse()) return NULL;
    void *ptr = __real_realloc(old, size);
    return old ? ptr : counted(ptr);
}

void *__wrap_aligned_alloc(size_t alignment, size_t size)
{
    return refuse() ? NULL : counted(__real_aligned_alloc(alignment, size));
}

int __wrap_posix_memalign(void **ptr, size_t alignment, size_t size)
{
    if (refuse()) return ENOMEM;
    const int error = __real_posix_memalign(ptr, alignment, size);
    if (error == 0) counted(*ptr);
    return error;
}

void __wrap_free(void *ptr)
{
    if (ptr) atomic_fetch_sub(&live, 1);
    __real_free(ptr);
}
