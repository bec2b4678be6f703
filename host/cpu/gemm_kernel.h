/* The micro-kernel, a template: gemm_tile.c includes this once per type and instruction set, with
 *
 *   SCALAR        float or double
 *   VECTOR_BYTES  of a vector register
 *   VECTOR_QUADS  four SCALARs are so many times in it
 *   FMA(a, b, c)  a b + c for vectors
 *   STREAM(p, v)  stores a vector past the caches; not where two vectors are less than a cache line
 *   MR            rows of a tile; its columns are NR, two vectors
 *   NAME(x)       x with the suffix of this instance
 *   TARGET        the attribute that lets the compiler use the instructions
 *   WIDEN_F16(h)  float only: a vector of four f16, widened; the instance then takes 16-bit factors too
 *   WIDEN_ALL(h)  likewise as many as a vector has floats
 *
 * A tile of MR x NR sums stays in registers over the whole depth: every step loads two vectors of B and broadcasts
 * MR elements of A. Tiles with fewer rows are the same code with a smaller constant, so that no tile computes rows
 * that nobody wants, and the chain of fma of an element is the same in all of them. */

#define LANES ((int)(VECTOR_BYTES / sizeof(SCALAR)))
#define NR    (2 * LANES)

typedef SCALAR NAME(quad) __attribute__((vector_size(4 * sizeof(SCALAR))));
typedef SCALAR NAME(loose_quad)
    __attribute__((vector_size(4 * sizeof(SCALAR)), aligned(sizeof(SCALAR)), may_alias));

typedef SCALAR NAME(vector) __attribute__((vector_size(VECTOR_BYTES)));
typedef SCALAR NAME(loose_vector) __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(SCALAR)), may_alias));
#ifdef WIDEN_F16
typedef uint32_t NAME(words) __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t NAME(halves) __attribute__((vector_size(VECTOR_BYTES / 2)));
#endif

#define SOURCE        SCALAR
#define WIDEN(x)      (x)
#define WIDEN4(p)     (*(const NAME(loose_quad) *)(p))
#define WIDEN_LOW(v)  (v)
#define WIDEN_HIGH(v) (v)
#define FIRST(v)      (v)
#define SECOND(v)     (v)
#define PACK(x)       NAME(x)
#include "host/cpu/gemm_pack.h"

#ifdef WIDEN_F16
#define SOURCE        uint16_t
#define WIDEN(x)      bf16_to_f32(x)
#define WIDEN4(p)     ((NAME(quad))(__builtin_convertvector(*(const loose_halves_t *)(p), words_t) << 16))
#define WIDEN_LOW(v)  ((NAME(quad))((words_t)(v) << 16))
#define WIDEN_HIGH(v) ((NAME(quad))((words_t)(v)&0xffff0000))
#define FIRST(v)      ((NAME(vector))((NAME(words))(v) << 16))
#define SECOND(v)     ((NAME(vector))((NAME(words))(v)&0xffff0000))
#define PACK(x)       NAME(x##_bf16)
#include "host/cpu/gemm_pack.h"

#define SOURCE        uint16_t
#define WIDEN(x)      f16_to_f32(x)
#define WIDEN4(p)     WIDEN_F16(*(const loose_halves_t *)(p))
#define WIDEN_LOW(v)  WIDEN_F16(__builtin_convertvector((words_t)(v), halves_t))
#define WIDEN_HIGH(v) WIDEN_F16(__builtin_convertvector((words_t)(v) >> 16, halves_t))
#define FIRST(v)      WIDEN_ALL(__builtin_convertvector((NAME(words))(v), NAME(halves)))
#define SECOND(v)     WIDEN_ALL(__builtin_convertvector((NAME(words))(v) >> 16, NAME(halves)))
#define PACK(x)       NAME(x##_f16)
#include "host/cpu/gemm_pack.h"
#endif

/* c[rows, NR] = (accumulate ? c : 0) + a b,  a [depth, rows], b [depth, NR]; c is a part of the block's. */
TARGET ALWAYS_INLINE void NAME(tile)(const int rows, const block_t *block, const SCALAR *restrict a,
                                     const SCALAR *restrict b, SCALAR *restrict c)
{
    const int64_t depth = block->depth, c_stride = block->row_stride;
    NAME(vector) sum[MR][2];
#pragma GCC unroll 14
    for (int i = 0; i < rows; i++) sum[i][0] = sum[i][1] = (NAME(vector)){0};
    if (block->accumulate) {
#pragma GCC unroll 14
        for (int i = 0; i < rows; i++) {
            sum[i][0] = *(const NAME(loose_vector) *)(c + i * c_stride);
            sum[i][1] = *(const NAME(loose_vector) *)(c + i * c_stride + LANES);
        }
    }
    for (int64_t k = 0; k < depth; k++) {
        const NAME(vector) b0 = *(const NAME(vector) *)(b + k * NR);
        const NAME(vector) b1 = *(const NAME(vector) *)(b + k * NR + LANES);
#pragma GCC unroll 14
        for (int i = 0; i < rows; i++) {
            const NAME(vector) ai = a[k * rows + i] - (NAME(vector)){0}; /* broadcast */
            sum[i][0] = FMA(ai, b0, sum[i][0]);
            sum[i][1] = FMA(ai, b1, sum[i][1]);
        }
    }
#ifdef STREAM
    if (block->stream) {
#pragma GCC unroll 14
        for (int i = 0; i < rows; i++) {
            STREAM(c + i * c_stride, sum[i][0]);
            STREAM(c + i * c_stride + LANES, sum[i][1]);
        }
        return;
    }
#endif
#pragma GCC unroll 14
    for (int i = 0; i < rows; i++) {
        *(NAME(loose_vector) *)(c + i * c_stride) = sum[i][0];
        *(NAME(loose_vector) *)(c + i * c_stride + LANES) = sum[i][1];
    }
}

#define TILE(rows)                                                                                                 \
    TARGET static void NAME(tile_##rows)(const block_t *block, const SCALAR *a, const SCALAR *b, SCALAR *c)        \
    {                                                                                                              \
        NAME(tile)(rows, block, a, b, c);                                                                          \
    }
TILE(1)
TILE(2)
TILE(3)
TILE(4)
#if MR > 4
TILE(5)
TILE(6)
#endif
#if MR > 6
TILE(7)
TILE(8)
TILE(9)
TILE(10)
TILE(11)
TILE(12)
TILE(13)
TILE(14)
#endif
#undef TILE

static void (*const NAME(tiles)[MR])(const block_t *, const SCALAR *, const SCALAR *, SCALAR *) = {
    NAME(tile_1),  NAME(tile_2),  NAME(tile_3),  NAME(tile_4),
#if MR > 4
    NAME(tile_5),  NAME(tile_6),
#endif
#if MR > 6
    NAME(tile_7),  NAME(tile_8),  NAME(tile_9),  NAME(tile_10),
    NAME(tile_11), NAME(tile_12), NAME(tile_13), NAME(tile_14),
#endif
};

/* A tile that is narrower than NR or whose columns are apart: computed aside. */
TARGET static void NAME(rim_tile)(const block_t *block, int rows, int64_t cols, const SCALAR *a, const SCALAR *b,
                                  SCALAR *c)
{
    SCALAR aside[MR * NR] = {0};
    const block_t whole = {.depth = block->depth, .row_stride = NR, .accumulate = block->accumulate};
    if (block->accumulate) {
        for (int i = 0; i < rows; i++) {
            for (int64_t j = 0; j < cols; j++) aside[i * NR + j] = c[i * block->row_stride + j * block->col_stride];
        }
    }
    NAME(tiles)[rows - 1](&whole, a, b, aside);
    for (int i = 0; i < rows; i++) {
        for (int64_t j = 0; j < cols; j++) c[i * block->row_stride + j * block->col_stride] = aside[i * NR + j];
    }
}

/* One packed block of A times one packed panel of B. */
TARGET static void NAME(block)(const block_t *block)
{
    for (int64_t j = 0; j < block->cols; j += NR) {
        const int64_t cols = min64(NR, block->cols - j);
        const SCALAR *b = (const SCALAR *)block->b + j * block->depth;
        for (int64_t i = 0; i < block->rows; i += MR) {
            const int rows = (int)min64(MR, block->rows - i);
            const SCALAR *a = (const SCALAR *)block->a + i * block->depth;
            SCALAR *c = (SCALAR *)block->c + i * block->row_stride + j * block->col_stride;
            if (cols == NR && block->col_stride == 1) {
                NAME(tiles)[rows - 1](block, a, b, c);
            } else {
                NAME(rim_tile)(block, rows, cols, a, b, c);
            }
        }
    }
}

static const kernel_t NAME(kernel) = {
    .element = sizeof(SCALAR),
    .mr = MR,
    .lanes = LANES,
    .block = NAME(block),
#ifdef WIDEN_F16
    .pack_a = {NAME(pack_a), NAME(pack_a_bf16), NAME(pack_a_f16)},
    .pack_b = {NAME(pack_b), NAME(pack_b_bf16), NAME(pack_b_f16)},
    .few = {NAME(few), NAME(few_bf16), NAME(few_f16)},
#elif VECTOR_QUADS > 0
    .few = {NAME(few)},
    .pack_a = {NAME(pack_a)},
    .pack_b = {NAME(pack_b)},
#else
    .pack_a = {NAME(pack_a)},
    .pack_b = {NAME(pack_b)},
#endif
};

#undef LANES
#undef NR
#undef SCALAR
#undef VECTOR_BYTES
#undef VECTOR_QUADS
#undef FMA
#undef STREAM
#undef MR
#undef NAME
#undef TARGET
#undef WIDEN_F16
#undef WIDEN_ALL
