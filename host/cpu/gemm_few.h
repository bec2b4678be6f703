/* Few rows times lines that are contiguous along the depth, without packing these, a template: a part of
 * gemm_pack.h.
 *
 * Packing reads, turns and writes a line for rows that then take as long to be multiplied as it took. Here LANES
 * lines are turned in registers, LANES words at a time, and multiplied at once. A word is as wide as a SCALAR: one
 * depth, or two of 16 bits. Each sum has the chain of fma that it has in a tile. */
#define WORD_DEPTHS ((int)(sizeof(SCALAR) / sizeof(SOURCE)))

/* Four indices into each quad, of two vectors; and those of a whole quad. */
#if VECTOR_QUADS == 4
#define EACH(a, b, c, d)                                                                                           \
    a, b, c, d, (a) + 4, (b) + 4, (c) + 4, (d) + 4, (a) + 8, (b) + 8, (c) + 8, (d) + 8, (a) + 12, (b) + 12,        \
        (c) + 12, (d) + 12
#elif VECTOR_QUADS == 2
#define EACH(a, b, c, d) a, b, c, d, (a) + 4, (b) + 4, (c) + 4, (d) + 4
#else
#define EACH(a, b, c, d) a, b, c, d
#endif
#define QUAD(q) 4 * (q), 4 * (q) + 1, 4 * (q) + 2, 4 * (q) + 3

typedef SCALAR PACK(source_vector) __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(SOURCE)), may_alias));

/* turned[k][i] = word k of line i, from element AT on. First inside the quads of a vector, then quads as wholes. */
TARGET ALWAYS_INLINE void PACK(turn)(const SOURCE *const line[], int64_t at, NAME(vector) turned[])
{
    NAME(vector) part[VECTOR_QUADS][4]; /* element 4 q + i of part [g][c]: word 4 q + c of line 4 g + i */
#pragma GCC unroll 4
    for (int g = 0; g < VECTOR_QUADS; g++) {
        NAME(vector) r[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) r[i] = *(const PACK(source_vector) *)(line[4 * g + i] + at);
        const NAME(vector) low01 = __builtin_shufflevector(r[0], r[1], EACH(0, LANES, 1, LANES + 1));
        const NAME(vector) low23 = __builtin_shufflevector(r[2], r[3], EACH(0, LANES, 1, LANES + 1));
        const NAME(vector) high01 = __builtin_shufflevector(r[0], r[1], EACH(2, LANES + 2, 3, LANES + 3));
        const NAME(vector) high23 = __builtin_shufflevector(r[2], r[3], EACH(2, LANES + 2, 3, LANES + 3));
        part[g][0] = __builtin_shufflevector(low01, low23, EACH(0, 1, LANES, LANES + 1));
        part[g][1] = __builtin_shufflevector(low01, low23, EACH(2, 3, LANES + 2, LANES + 3));
        part[g][2] = __builtin_shufflevector(high01, high23, EACH(0, 1, LANES, LANES + 1));
        part[g][3] = __builtin_shufflevector(high01, high23, EACH(2, 3, LANES + 2, LANES + 3));
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
#if VECTOR_QUADS == 4
        const NAME(vector) a = part[0][c], b = part[1][c], d = part[2][c], e = part[3][c];
        const NAME(vector) low_ab = __builtin_shufflevector(a, b, QUAD(0), QUAD(1), QUAD(4), QUAD(5));
        const NAME(vector) low_de = __builtin_shufflevector(d, e, QUAD(0), QUAD(1), QUAD(4), QUAD(5));
        const NAME(vector) high_ab = __builtin_shufflevector(a, b, QUAD(2), QUAD(3), QUAD(6), QUAD(7));
        const NAME(vector) high_de = __builtin_shufflevector(d, e, QUAD(2), QUAD(3), QUAD(6), QUAD(7));
        turned[c] = __builtin_shufflevector(low_ab, low_de, QUAD(0), QUAD(2), QUAD(4), QUAD(6));
        turned[4 + c] = __builtin_shufflevector(low_ab, low_de, QUAD(1), QUAD(3), QUAD(5), QUAD(7));
        turned[8 + c] = __builtin_shufflevector(high_ab, high_de, QUAD(0), QUAD(2), QUAD(4), QUAD(6));
        turned[12 + c] = __builtin_shufflevector(high_ab, high_de, QUAD(1), QUAD(3), QUAD(5), QUAD(7));
#elif VECTOR_QUADS == 2
        turned[c] = __builtin_shufflevector(part[0][c], part[1][c], QUAD(0), QUAD(2));
        turned[4 + c] = __builtin_shufflevector(part[0][c], part[1][c], QUAD(1), QUAD(3));
#else
        turned[c] = part[0][c];
#endif
    }
}

/* sum[i] += a[i] b for one depth. */
TARGET ALWAYS_INLINE void PACK(add_depth)(const int rows, const SCALAR *a, NAME(vector) b, NAME(vector) sum[])
{
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++) sum[i] = FMA(a[i] - (NAME(vector)){0}, b, sum[i]);
}

/* c[rows, LANES] = (accumulate ? c : 0) + a times the lines. */
TARGET ALWAYS_INLINE void PACK(few_rows)(const int rows, const SOURCE *const line[], int64_t depth,
                                         const SCALAR *restrict a, SCALAR *restrict c, int64_t c_stride,
                                         bool accumulate)
{
    enum { DEPTHS = LANES * WORD_DEPTHS };
    NAME(vector) sum[FEW_ROWS];
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++) {
        sum[i] = (NAME(vector)){0};
        if (accumulate) sum[i] = *(const NAME(loose_vector) *)(c + i * c_stride);
    }
    int64_t k = 0;
    for (; k + DEPTHS <= depth; k += DEPTHS) {
        NAME(vector) turned[LANES];
        for (int i = 0; i < LANES; i++) __builtin_prefetch(line[i] + k + 2 * DEPTHS);
        PACK(turn)(line, k, turned);
#pragma GCC unroll 16
        for (int word = 0; word < LANES; word++) {
            const SCALAR *at = a + (k + word * WORD_DEPTHS) * rows;
            PACK(add_depth)(rows, at, FIRST(turned[word]), sum);
            if (WORD_DEPTHS == 2) PACK(add_depth)(rows, at + rows, SECOND(turned[word]), sum);
        }
    }
    for (; k < depth; k++) {
        NAME(vector) b;
        for (int i = 0; i < LANES; i++) b[i] = WIDEN(line[i][k]);
        PACK(add_depth)(rows, a + k * rows, b, sum);
    }
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++) *(NAME(loose_vector) *)(c + i * c_stride) = sum[i];
}

/* What pack_b() and block() do together, for p->form FORM_TRANSPOSE, block->rows up to FEW_ROWS and whole vectors
 * of columns side by side. */
TARGET static void PACK(few)(const pack_t *p, const block_t *block)
{
    const cumoe_cpu_factor_t *f = p->factor;
    const SOURCE *data = (const SOURCE *)f->data + p->group * f->group_stride + p->depth;
    for (int64_t j = 0; j < block->cols; j += LANES) {
        const SOURCE *line[LANES];
        for (int i = 0; i < LANES; i++) {
            const int64_t number = p->line + j + i;
            line[i] = data + (f->line_index ? f->line_index[number] : number) * f->line_stride;
        }
        SCALAR *c = (SCALAR *)block->c + j;
        switch (block->rows) {
        case 1:
            PACK(few_rows)(1, line, block->depth, block->a, c, block->row_stride, block->accumulate);
            break;
        case 2:
            PACK(few_rows)(2, line, block->depth, block->a, c, block->row_stride, block->accumulate);
            break;
        case 3:
            PACK(few_rows)(3, line, block->depth, block->a, c, block->row_stride, block->accumulate);
            break;
        default:
            PACK(few_rows)(4, line, block->depth, block->a, c, block->row_stride, block->accumulate);
        }
    }
}

#undef WORD_DEPTHS
#undef EACH
#undef QUAD
