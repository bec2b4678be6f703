/* Packing, a template: gemm_kernel.h includes this with SCALAR, NAME, TARGET, MR and NR defined.
 *
 * The lines of a factor become strips of MR (factor A) or NR (factor B) lines, each strip [depth, lines of the
 * strip], so that the micro-kernel reads one stream forward. A short last strip of A keeps just its lines; one of B
 * is filled up with zeros to NR. SOURCE, the type in memory, is SCALAR so far: another type needs its own
 * load and store here and nothing elsewhere. */

typedef SCALAR NAME(quad) __attribute__((vector_size(4 * sizeof(SCALAR))));
typedef SCALAR NAME(loose_quad)
    __attribute__((vector_size(4 * sizeof(SCALAR)), aligned(sizeof(SCALAR)), may_alias));

/* to[k][i] = line[i][at + k] for four lines and four depths. */
TARGET ALWAYS_INLINE void NAME(transpose_quad)(const SCALAR *const line[], int64_t at, SCALAR *to, int64_t stride)
{
    NAME(quad) r0 = *(const NAME(loose_quad) *)(line[0] + at), r1 = *(const NAME(loose_quad) *)(line[1] + at);
    NAME(quad) r2 = *(const NAME(loose_quad) *)(line[2] + at), r3 = *(const NAME(loose_quad) *)(line[3] + at);
    NAME(quad) low01 = __builtin_shufflevector(r0, r1, 0, 4, 1, 5);
    NAME(quad) low23 = __builtin_shufflevector(r2, r3, 0, 4, 1, 5);
    NAME(quad) high01 = __builtin_shufflevector(r0, r1, 2, 6, 3, 7);
    NAME(quad) high23 = __builtin_shufflevector(r2, r3, 2, 6, 3, 7);
    *(NAME(loose_quad) *)(to + 0 * stride) = __builtin_shufflevector(low01, low23, 0, 1, 4, 5);
    *(NAME(loose_quad) *)(to + 1 * stride) = __builtin_shufflevector(low01, low23, 2, 3, 6, 7);
    *(NAME(loose_quad) *)(to + 2 * stride) = __builtin_shufflevector(high01, high23, 0, 1, 4, 5);
    *(NAME(loose_quad) *)(to + 3 * stride) = __builtin_shufflevector(high01, high23, 2, 3, 6, 7);
}

/* Lines that are contiguous along the depth. A cache line of every source line is used up before the next one:
 * with a power-of-two distance between lines they would push each other out. */
TARGET ALWAYS_INLINE void NAME(pack_transposed)(const SCALAR *const line[], int64_t count, int64_t depth,
                                                SCALAR *to, int64_t stride)
{
    const int64_t quads = count >= 4 ? depth / 4 * 4 : 0, chunk = 64 / sizeof(SCALAR);
    for (int64_t begin = 0; begin < quads; begin += chunk) {
        const int64_t end = min64(begin + chunk, quads);
        for (int64_t i = 0; i < count; i += 4) {
            const int64_t first = min64(i, count - 4); /* the last four may overlap the ones before */
            for (int64_t j = first; j < first + 4; j++)
                __builtin_prefetch(line[j] + begin + TRANSPOSE_AHEAD * chunk);
            for (int64_t k = begin; k < end; k += 4) {
                NAME(transpose_quad)(line + first, k, to + k * stride + first, stride);
            }
        }
    }
    for (int64_t k = quads; k < depth; k++) {
        for (int64_t i = 0; i < count; i++) to[k * stride + i] = line[i][k];
    }
}

/* One piece of one strip: count lines from the given one, at depths depth .. depth+depths-1. */
TARGET ALWAYS_INLINE void NAME(pack_piece)(const pack_t *p, int64_t line, int64_t count, int64_t depth,
                                           int64_t depths, SCALAR *to, int64_t stride)
{
    const cumoe_cpu_factor_t *f = p->factor;
    const SCALAR *data = (const SCALAR *)f->data + p->group * f->group_stride;
    if (p->form == FORM_COPY) {
        const int64_t last = p->depth + p->depths - 1;
        for (int64_t k = depth; k < depth + depths; k++, to += stride) {
            const int64_t ahead = min64(k + COPY_AHEAD, last);
            const SCALAR *next = data + (f->depth_index ? f->depth_index[ahead] : ahead) * f->depth_stride + line;
            const SCALAR *from = data + (f->depth_index ? f->depth_index[k] : k) * f->depth_stride + line;
            for (int64_t i = 0; i < count; i += 64 / (int64_t)sizeof(SCALAR)) __builtin_prefetch(next + i);
            memcpy(to, from, (size_t)count * sizeof(SCALAR));
        }
        return;
    }
    const SCALAR *lines[NR > MR ? NR : MR];
    for (int64_t i = 0; i < count; i++) {
        lines[i] = data + (f->line_index ? f->line_index[line + i] : line + i) * f->line_stride;
    }
    if (p->form == FORM_TRANSPOSE) {
        for (int64_t i = 0; i < count; i++) lines[i] += depth;
        NAME(pack_transposed)(lines, count, depths, to, stride);
        return;
    }
    for (int64_t k = 0; k < depths; k++) {
        const int64_t d = (f->depth_index ? f->depth_index[depth + k] : depth + k) * f->depth_stride;
        for (int64_t i = 0; i < count; i++) to[k * stride + i] = lines[i][d];
    }
}

/* All strips of a block. The copying form takes a few depths of all strips at a time: a row of the source is read
 * along, not once per strip. */
TARGET ALWAYS_INLINE void NAME(pack)(const pack_t *p, const int64_t width, bool fill)
{
    SCALAR *to = p->to;
    const int64_t step = p->form == FORM_COPY ? COPY_DEPTHS : max64(p->depths, 1);
    for (int64_t k = 0; k < p->depths; k += step) {
        const int64_t depths = min64(step, p->depths - k);
        for (int64_t i = 0; i < p->lines; i += width) {
            const int64_t count = min64(width, p->lines - i), stride = fill ? width : count;
            SCALAR *strip = to + i * p->depths + k * stride;
            if (count == width) { /* constants for the compiler */
                NAME(pack_piece)(p, p->line + i, width, p->depth + k, depths, strip, width);
                continue;
            }
            NAME(pack_piece)(p, p->line + i, count, p->depth + k, depths, strip, stride);
            for (int64_t d = 0; d < depths && stride > count; d++) {
                memset(strip + d * stride + count, 0, (size_t)(stride - count) * sizeof(SCALAR));
            }
        }
    }
}

TARGET static void NAME(pack_a)(const pack_t *p)
{
    NAME(pack)(p, MR, false);
}

TARGET static void NAME(pack_b)(const pack_t *p)
{
    NAME(pack)(p, NR, true);
}
