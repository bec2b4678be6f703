/* Stores past the caches, for arrays so large that nothing of them would be found there again. An ordinary store
 * first reads the line that it is about to overwrite; these do not, which doubles the rate. A thread that has made
 * some calls cumoe__stream_end() before others may read. */
#ifndef CUMOE_CPU_STREAM_H
#define CUMOE_CPU_STREAM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef __x86_64__
#include <emmintrin.h>
#endif

enum {
    CUMOE_STREAM_LINE = 64,       /* bytes; a part of one costs as much as several */
    CUMOE_STREAM_SIZE = 32 << 20, /* bytes of an array that few caches would still have when it is read */
};

static inline bool cumoe__on_lines(const void *data, size_t stride)
{
    return ((uintptr_t)data | stride) % CUMOE_STREAM_LINE == 0;
}

/* Lines, both sides aligned to them. */
static inline void cumoe__stream_copy(void *to, const void *from, size_t size)
{
#ifdef __x86_64__
    for (size_t i = 0; i < size; i += sizeof(__m128i))
        _mm_stream_si128((__m128i *)((char *)to + i), _mm_load_si128((const __m128i *)((const char *)from + i)));
#else
    memcpy(to, from, size);
#endif
}

/* Any bytes. */
static inline void cumoe__stream_zeros(void *to, size_t size)
{
#ifdef __x86_64__
    const size_t skew = -(uintptr_t)to % CUMOE_STREAM_LINE, head = skew < size ? skew : size;
    const size_t lines = (size - head) / CUMOE_STREAM_LINE * CUMOE_STREAM_LINE;
    memset(to, 0, head);
    char *line = (char *)to + head;
    for (size_t i = 0; i < lines; i += sizeof(__m128i))
        _mm_stream_si128((__m128i *)(line + i), _mm_setzero_si128());
    memset(line + lines, 0, size - head - lines);
#else
    memset(to, 0, size);
#endif
}

static inline void cumoe__stream_end(void)
{
#ifdef __x86_64__
    _mm_sfence();
#endif
}

#endif
