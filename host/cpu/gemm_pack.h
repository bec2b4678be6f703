/* Packing, a template: gemm_kernel.h includes this once per type in memory, with SCALAR, NAME, TARGET, MR and NR,
 * and
 *
 *   SOURCE       the type in memory
 *   WIDEN(x)     one of them as a SCALAR
 *   WIDEN4(p)    four of them, from p on, as a NAME(quad)
 *   WIDEN_LOW(v), WIDEN_HIGH(v)   16 bits: the first, the second of every pair in a NAME(quad)
 *   FIRST(v), SECOND(v)           the same in a NAME(vector)
 *   PACK(x)      x with the suffix of this instance
 *
 * The lines of a factor become strips of MR (factor A) or NR (factor B) lines, each strip [depth, lines of the
 * strip], so that the micro-kernel reads one stream forward. A short last strip of A keeps just its lines; one of B
 * is filled up with zeros to NR. */

/* to[k][i] = line[i][at + k] for four lines and QUAD_DEPTHS depths: a transposition of elements as wide as SCALAR,
 * which are one depth of a line, or two of 16 bits. */
#define QUAD_DEPTHS ((int64_t)(4 * sizeof(SCALAR) / sizeof(SOURCE)))
typedef SCALAR PACK(source_quad)
    __attribute__((vector_size(4 * sizeof(SCALAR)), aligned(sizeof(SOURCE)), may_alias));
TARGET ALWAYS_INLINE void PACK(transpose_quad)(const SOURCE *const line[], int64_t at, SCALAR *to, int64_t stride)
{
    NAME(quad) r0 = *(const PACK(source_quad) *)(line[0] + at), r1 = *(const PACK(source_quad) *)(line[1] + at);
    NAME(quad) r2 = *(const PACK(source_quad) *)(line[2] + at), r3 = *(const PACK(source_quad) *)(line[3] + at);
    NAME(quad) low01 = __builtin_shufflevector(r0, r1, 0, 4, 1, 5);
    NAME(quad) low23 = __builtin_shufflevector(r2, r3, 0, 4, 1, 5);
    NAME(quad) high01 = __builtin_shufflevector(r0, r1, 2, 6, 3, 7);
    NAME(quad) high23 = __builtin_shufflevector(r2, r3, 2, 6, 3, 7);
    const NAME(quad) column[4] = {
        __builtin_shufflevector(low01, low23, 0, 1, 4, 5), __builtin_shufflevector(low01, low23, 2, 3, 6, 7),
        __builtin_shufflevector(high01, high23, 0, 1, 4, 5), __builtin_shufflevector(high01, high23, 2, 3, 6, 7)};
    for (int k = 0; k < 4; k++) {
        if (sizeof(SOURCE) == sizeof(SCALAR)) {
            *(NAME(loose_quad) *)(to + k * stride) = column[k];
        } else {
            *(NAME(loose_quad) *)(to + 2 * k * stride) = WIDEN_LOW(column[k]);
            *(NAME(loose_quad) *)(to + (2 * k + 1) * stride) = WIDEN_HIGH(column[k]);
        }
    }
}

/* Lines that are contiguous along the depth. A cache line of every source line is used up before the next one:
 * with a power-of-two distance between lines they would push each other out. */
TARGET ALWAYS_INLINE void PACK(pack_transposed)(const SOURCE *const line[], int64_t count, int64_t depth,
                                                SCALAR *to, int64_t stride)
{
    const int64_t quads = count >= 4 ? depth / QUAD_DEPTHS * QUAD_DEPTHS : 0, chunk = 64 / sizeof(SOURCE);
    for (int64_t begin = 0; begin < quads; begin += chunk) {
        const int64_t end = min64(begin + chunk, quads);
        for (int64_t i = 0; i < count; i += 4) {
            const int64_t first = min64(i, count - 4); /* the last four may overlap the ones before */
            for (int64_t j = first; j < first + 4; j++)
                __builtin_prefetch(line[j] + begin + TRANSPOSE_AHEAD * chunk);
            for (int64_t k = begin; k < end; k += QUAD_DEPTHS) {
                PACK(transpose_quad)(line + first, k, to + k * stride + first, stride);
            }
        }
    }
    for (int64_t k = quads; k < depth; k++) {
        for (int64_t i = 0; i < count; i++) to[k * stride + i] = WIDEN(line[i][k]);
    }
}

/* Lines that are neighbours at a depth. */
TARGET ALWAYS_INLINE void PACK(pack_copied)(const SOURCE *from, int64_t count, SCALAR *to)
{
    if (sizeof(SOURCE) == sizeof(SCALAR)) {
        memcpy(to, from, (size_t)count * sizeof(SCALAR));
        return;
    }
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) *(NAME(loose_quad) *)(to + i) = WIDEN4(from + i);
    for (; i < count; i++) to[i] = WIDEN(from[i]);
}

/* One piece of one strip: count lines from the given one, at depths depth .. depth+depths-1. */
TARGET ALWAYS_INLINE void PACK(pack_piece)(const pack_t *p, int64_t line, int64_t count, int64_t depth,
                                           int64_t depths, SCALAR *to, int64_t stride)
{
    const cumoe_cpu_factor_t *f = p->factor;
    const SOURCE *data = (const SOURCE *)f->data + p->group * f->group_stride;
    if (p->form == FORM_COPY) {
        const int64_t last = p->depth + p->depths - 1;
        for (int64_t k = depth; k < depth + depths; k++, to += stride) {
            const int64_t ahead = min64(k + COPY_AHEAD, last);
            const SOURCE *next = data + (f->depth_index ? f->depth_index[ahead] : ahead) * f->depth_stride + line;
            const SOURCE *from = data + (f->depth_index ? f->depth_index[k] : k) * f->depth_stride + line;
            for (int64_t i = 0; i < count; i += 64 / (int64_t)sizeof(SOURCE)) __builtin_prefetch(next + i);
            PACK(pack_copied)(from, count, to);
        }
        return;
    }
    const SOURCE *lines[NR > MR ? NR : MR];
    for (int64_t i = 0; i < count; i++) {
        lines[i] = data + (f->line_index ? f->line_index[line + i] : line + i) * f->line_stride;
    }
    if (p->form == FORM_TRANSPOSE) {
        for (int64_t i = 0; i < count; i++) lines[i] += depth;
        PACK(pack_transposed)(lines, count, depths, to, stride);
        return;
    }
    for (int64_t k = 0; k < depths; k++) {
        const int64_t d = (f->depth_index ? f->depth_index[depth + k] : depth + k) * f->depth_stride;
        for (int64_t i = 0; i < count; i++) to[k * stride + i] = WIDEN(lines[i][d]);
    }
}

/* All strips of a block. The copying form takes a few depths of all strips at a time: a row of the source is read
 * along, not once per strip. */
TARGET ALWAYS_INLINE void PACK(pack)(const pack_t *p, const int64_t width, bool fill)
{
    SCALAR *to = p->to;
    const int64_t step = p->form == FORM_COPY ? COPY_DEPTHS : max64(p->depths, 1);
    for (int64_t k = 0; k < p->depths; k += step) {
        const int64_t depths = min64(step, p->depths - k);
        for (int64_t i = 0; i < p->lines; i += width) {
            const int64_t count = min64(width, p->lines - i), stride = fill ? width : count;
            SCALAR *strip = to + i * p->depths + k * stride;
            if (count == width) { /* constants for the compiler */
                PACK(pack_piece)(p, p->line + i, width, p->depth + k, depths, strip, width);
                continue;
            }
            PACK(pack_piece)(p, p->line + i, count, p->depth + k, depths, strip, stride);
            for (int64_t d = 0; d < depths && stride > count; d++) {
                memset(strip + d * stride + count, 0, (size_t)(stride - count) * sizeof(SCALAR));
            }
        }
    }
}

TARGET static void PACK(pack_a)(const pack_t *p)
{
    PACK(pack)(p, MR, false);
}

TARGET static void PACK(pack_b)(const pack_t *p)
{
    PACK(pack)(p, NR, true);
}

#if VECTOR_QUADS > 0
#include "host/cpu/gemm_few.h"
#endif

#undef SOURCE
#undef WIDEN
#undef WIDEN4
#undef WIDEN_LOW
#undef WIDEN_HIGH
#undef FIRST
#undef SECOND
#undef QUAD_DEPTHS
#undef PACK
