/* The packed products of the CPU: every element is one chain of fma in the order of k, rounded once, whatever
 * stands around it.
 *
 * A case draws random types and a random layout, keeps an image of all of C (gaps and guards included), computes
 * what the image must be with plain loops, and compares every byte. */
#include "gemm_problem.h"

#include "tests/support/compare.h"
#include "tests/support/random.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static const cumoe_cpu_isa_t isas[] = {CUMOE_CPU_ISA_PORTABLE, CUMOE_CPU_ISA_AVX2, CUMOE_CPU_ISA_AVX512};

#define COUNT(array) ((int)(sizeof(array) / sizeof(array)[0]))

/* The vector instruction sets have fma, the machine's baseline may not. */
static bool is_fused(cumoe_cpu_isa_t isa)
{
#if defined(__FMA__) || defined(__aarch64__)
    (void)isa;
    return true;
#else
    return isa != CUMOE_CPU_ISA_PORTABLE;
#endif
}

/* Run in a poisoned workspace of just the right size; false if the machine lacks the instructions. */
static bool run(cumoe_cpu_isa_t isa, const cumoe_cpu_gemm_t *gemm, int threads)
{
    const size_t size = cumoe__cpu_gemm_workspace(threads);
    unsigned char *workspace = allocate(size + 64, 0xFF);
    const bool ran = cumoe__cpu_gemm_with(isa, gemm, threads, workspace);
    for (int i = 0; i < 64; i++) cr_assert_eq(workspace[size + (size_t)i], 0xFF, "written behind the workspace");
    free(workspace);
    return ran;
}

static void check_problem(problem_t *p, int threads)
{
    for (int i = 0; i < COUNT(isas); i++) {
        if (i == 0 || is_fused(isas[i]) != is_fused(isas[i - 1])) {
            cr_assert(fill_expected(p, is_fused(isas[i])), "the chain itself is off: %s", p->text);
        }
        memcpy(p->c, p->initial, p->c_size);
        if (!run(isas[i], &p->gemm, threads)) continue;
        cr_assert(memcmp(p->c, p->expected, p->c_size) == 0, "isa %d, %d threads: %s", i, threads, p->text);
    }
}

static void check_shape(const shape_t *shape, uint64_t seed, int threads)
{
    problem_t p;
    make_problem(&p, shape, seed);
    check_problem(&p, threads);
    free_problem(&p);
}

/* One group of F32, everything contiguous. */
static cumoe_cpu_gemm_t plain_product(int64_t m, int64_t n, int64_t k, const float *a, const float *b, void *c)
{
    return (cumoe_cpu_gemm_t){
        .groups = 1,
        .m = m,
        .n = n,
        .k = k,
        .parts = 1,
        .terms = 1,
        .a = {{.data = a, .dtype = CUMOE_F32, .line_stride = k, .depth_stride = 1}},
        .b = {{.data = b, .dtype = CUMOE_F32, .line_stride = k, .depth_stride = 1}},
        .c = {c},
        .c_dtype = CUMOE_F32,
        .c_row_stride = n,
        .c_col_stride = 1,
    };
}

/* Sizes around the edges of all tiles (4, 6, 14 rows; 4, 8, 16, 32 columns), blocks and copies. */
static const int64_t edges[] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  11, 12, 13, 14, 15,
                                16, 17, 18, 27, 28, 29, 31, 32, 33, 41, 42, 43, 63, 64, 65};

static const cumoe_dtype_t dtypes[] = {CUMOE_F64, CUMOE_F32, CUMOE_DTYPE_DEFAULT};

Test(gemm, edges)
{
    for (int i = 0; i < COUNT(edges); i++) {
        for (int other = 0; other < 3; other++) {
            for (int type = 0; type < COUNT(dtypes); type++) {
                shape_t s = {.groups = 1, .m = 15, .n = 35, .k = 9, .dtype = dtypes[type], .add = other & 1};
                *(other == 0 ? &s.m : other == 1 ? &s.n : &s.k) = edges[i];
                check_shape(&s, (uint64_t)(3 * i + other), 1 + type % 2);
            }
        }
    }
}

Test(gemm, every_kind_and_layout)
{
    random_state_t r = random_start(2017);
    for (uint64_t seed = 1000; seed < 1800; seed++) {
        const int kind = (int)random_below(&r, 3); /* one product, two with one A, one of two terms */
        const shape_t s = {.groups = 1 + random_below(&r, 6),
                           .m = edges[random_below(&r, COUNT(edges))],
                           .n = edges[random_below(&r, COUNT(edges))],
                           .k = edges[random_below(&r, COUNT(edges))],
                           .ragged = (cumoe_cpu_ragged_t)random_below(&r, 3),
                           .parts = 1 + (kind == 1),
                           .terms = 1 + (kind == 2),
                           .dtype = dtypes[random_below(&r, 2) ? 2 : random_below(&r, 2)],
                           .add = random_below(&r, 2),
                           .epilogue = random_below(&r, 2)};
        check_shape(&s, seed, 1 + (int)random_below(&r, 3));
    }
}

/* Every pair of types of the factors, every type of C, and each of these by ADD. */
Test(gemm, every_mix_of_types)
{
    bool seen[8][8][8][2] = {0};
    int left = 3 * 3 * 3 * 2;
    for (uint64_t seed = 5000; left > 0; seed++) {
        const shape_t s = {.groups = 2, .m = 19, .n = 37, .k = 50, .add = seed & 1};
        problem_t p;
        make_problem(&p, &s, seed);
        bool *mix = &seen[p.gemm.a[0].dtype][p.gemm.b[0].dtype][p.gemm.c_dtype][p.gemm.add];
        if (!*mix) {
            *mix = true;
            left--;
            check_problem(&p, 1);
        }
        free_problem(&p);
    }
}

/* Several blocks of rows, of columns and of the depth: sums are put away and taken up again, in F32 whatever C is.
 */
Test(gemm, large_sizes)
{
    for (uint64_t seed = 0; seed < 6; seed++) {
        const cumoe_dtype_t dtype = dtypes[seed % 3];
        const shape_t deep = {.groups = 2, .m = 9, .n = 37, .k = 1700, .dtype = dtype, .add = seed & 2};
        check_shape(&deep, seed, 2);
        const shape_t tall = {
            .groups = 1, .m = 1300, .n = 33, .k = 17, .parts = 2, .dtype = dtype, .add = seed & 2};
        check_shape(&tall, seed, 2);
    }
}

Test(gemm, wide_and_deep)
{
    static const shape_t shapes[] = {
        {.groups = 1, .m = 3, .n = 1100, .k = 3100},
        {.groups = 1, .m = 3, .n = 700, .k = 2500, .parts = 2, .epilogue = true},
        {.groups = 1, .m = 3, .n = 700, .k = 1900, .terms = 2, .add = true},
        {.groups = 3, .m = 3, .n = 650, .k = 1500, .ragged = CUMOE_CPU_RAGGED_DEPTH, .add = true},
        {.groups = 3, .m = 3, .n = 650, .k = 2100, .ragged = CUMOE_CPU_RAGGED_ROWS, .terms = 2, .epilogue = true},
    };
    for (int i = 0; i < COUNT(shapes); i++)
        for (uint64_t seed = 0; seed < 3; seed++) check_shape(&shapes[i], 40 + seed, 1 + (int)seed % 2);
}

static void leave_sums(const void *context, const cumoe_cpu_block_t *block)
{
    (void)context, (void)block;
}

/* More sums than a task may keep aside, for a C of 16 bits or a streamed one behind an epilogue (of 588 rows it has
 * most). Small integers: exact in any order. */
Test(gemm, large_blocks_that_stand_aside)
{
    enum { M = 588, N = 528, K = 700, TYPES = 3 };
    static const cumoe_dtype_t types[TYPES] = {CUMOE_F16, CUMOE_BF16, CUMOE_F32};
    static float a[M * K], b[2][N * K], sum[2][M * N];
    static _Alignas(64) float c[2][M * N], expected[2][M * N]; /* or 16 bits */
    for (int i = 0; i < M * K; i++) a[i] = (float)(i % 7 - 3);
    for (int i = 0; i < 2 * N * K; i++) b[i / (N * K)][i % (N * K)] = (float)(i % 5 - 2);
    for (int e = 0; e < 2 * M * N; e++) {
        const int part = e / (M * N), i = e / N % M, j = e % N;
        for (int k = 0; k < K; k++) sum[part][i * N + j] += a[i * K + k] * b[part][j * K + k];
    }
    cumoe_cpu_gemm_t g = plain_product(M, N, K, a, b[0], c[0]);
    g.b[1] = g.b[0];
    g.b[1].data = b[1];
    g.c[1] = c[1];
    for (int variant = 0; variant < 2 * TYPES * COUNT(isas); variant++) {
        const cumoe_cpu_isa_t isa = isas[variant / 2 / TYPES];
        g.parts = 1 + variant % 2;
        g.c_dtype = types[variant / 2 % TYPES];
        g.stream = g.c_dtype == CUMOE_F32;
        g.epilogue = g.stream ? leave_sums : NULL;
        const size_t size = M * N * real_size(g.c_dtype);
        memset(c, 0xFF, sizeof c);
        for (int i = 0; i < M * N; i++)
            for (int part = 0; part < 2; part++) real_set(expected[part], g.c_dtype, i, (double)sum[part][i]);
        if (!run(isa, &g, 1)) continue;
        for (int part = 0; part < g.parts; part++)
            cr_expect(memcmp(c[part], expected[part], size) == 0, "isa %d, dtype %d", isa, g.c_dtype);
    }
}

Test(gemm, threads_do_not_change_bits)
{
    static const int threads[] = {1, 2, 3, 7};
    for (int ragged = 0; ragged < 3; ragged++) {
        const shape_t s = {
            .groups = 4, .m = 70, .n = 200, .k = 90, .ragged = (cumoe_cpu_ragged_t)ragged, .parts = 2};
        for (int i = 0; i < COUNT(threads); i++) check_shape(&s, 77, threads[i]);
    }
}

/* OpenMP grants one thread inside a region of the caller. */
Test(gemm, fewer_threads_than_asked_for)
{
    const shape_t s = {.groups = 3, .m = 60, .n = 100, .k = 70, .ragged = CUMOE_CPU_RAGGED_ROWS};
    problem_t p;
    make_problem(&p, &s, 5);
#pragma omp parallel num_threads(2)
#pragma omp single
    check_problem(&p, 3);
    free_problem(&p);
}

Test(gemm, the_best_instruction_set_is_chosen)
{
    static const char *const names[] = {"portable", "avx2", "avx512"};
    const cumoe_cpu_gemm_t empty = {.parts = 1, .terms = 1, .c_dtype = CUMOE_F32};
    int best = 0;
    for (int i = 0; i < COUNT(isas); i++) best = run(isas[i], &empty, 1) ? i : best;
    cr_assert_str_eq(cumoe__cpu_gemm_isa(), names[best]);

    const shape_t s = {.groups = 1, .m = 30, .n = 40, .k = 50};
    problem_t p;
    make_problem(&p, &s, 6);
    void *workspace = allocate(cumoe__cpu_gemm_workspace(2), 0xFF);
    cumoe__cpu_gemm(&p.gemm, 2, workspace);
    cr_assert(fill_expected(&p, is_fused(isas[best])) && memcmp(p.c, p.expected, p.c_size) == 0);
    free(workspace);
    free_problem(&p);
}

/* Batch invariance: a row is the same alone, at any position, and beside rows of NaN and infinity. */
Test(gemm, a_row_does_not_depend_on_its_neighbours)
{
    enum { M = 61, N = 45, K = 70 };
    static float a[M * K], b[N * K], all[M][N], alone[N];
    random_state_t r = random_start(9);
    for (int i = 0; i < M * K; i++) a[i] = (float)random_below(&r, 2001) / 1000 - 1;
    for (int i = 0; i < N * K; i++) b[i] = (float)random_below(&r, 2001) / 1000 - 1;
    for (int k = 0; k < K; k++) a[20 * K + k] = NAN, a[33 * K + k] = INFINITY;
    cumoe_cpu_gemm_t g = plain_product(M, N, K, a, b, all);
    for (int i = 0; i < COUNT(isas); i++) {
        g.m = M;
        g.a[0].data = a;
        g.c[0] = all;
        if (!run(isas[i], &g, 1)) continue;
        g.m = 1;
        g.c[0] = alone;
        for (int row = 0; row < M; row++) {
            g.a[0].data = a + row * K;
            run(isas[i], &g, 1);
            if (row == 20 || row == 33) continue;
            cr_assert(isfinite(alone[0]));
            cr_assert(memcmp(alone, all[row], sizeof alone) == 0, "isa %d, row %d", i, row);
        }
    }
}

/* Most experts have no token: such groups may cost a look at their offsets, not more. */
Test(gemm, many_empty_groups, .timeout = 20)
{
    enum { GROUPS = 131072, ROWS = 40, N = 64, K = 128 };
    int32_t *offset = allocate((GROUPS + 1) * sizeof *offset, 0);
    for (int g = 0; g < GROUPS; g++) offset[g + 1] = offset[g] + (g % (GROUPS / ROWS) == 7 && offset[g] < ROWS);
    const int rows = offset[GROUPS];
    float *a = allocate((size_t)rows * K * sizeof *a, 0), *b = allocate(N * K * sizeof *b, 0);
    float *c = allocate((size_t)rows * N * sizeof *c, 0xFF);
    for (int i = 0; i < rows * K; i++) a[i] = (float)(i % 7);
    for (int i = 0; i < N * K; i++) b[i] = (float)(i % 5);
    cumoe_cpu_gemm_t g = plain_product(0, N, K, a, b, c);
    g.groups = GROUPS;
    g.ragged = CUMOE_CPU_RAGGED_ROWS;
    g.offset = offset;
    for (int repeat = 0; repeat < 100; repeat++) run(CUMOE_CPU_ISA_PORTABLE, &g, 3);
    for (int i = 0; i < rows * N; i++) {
        float sum = 0;
        for (int k = 0; k < K; k++) sum += a[i / N * K + k] * b[i % N * K + k];
        cr_assert_eq(c[i], sum); /* small integers: exact */
    }
    free(offset);
    free(a);
    free(b);
    free(c);
}

enum { COVER_ROWS = 700, COVER_COLS = 70, COVER_DEPTH = 1200 };
static atomic_int cover[COVER_ROWS][(COVER_COLS + 31) / 32];
static float cover_c[2][COVER_ROWS][COVER_COLS];

/* Counts its calls per row and block of columns, and looks whether both parts are finished. */
static void count_blocks(const void *context, const cumoe_cpu_block_t *b)
{
    const int32_t *offset = context;
    const bool in_group = b->row >= offset[b->group] && b->row + b->rows <= offset[b->group + 1];
    const bool whole = b->col % CUMOE_CPU_GEMM_COLUMNS == 0 && b->cols <= CUMOE_CPU_GEMM_COLUMNS &&
                       (b->cols == CUMOE_CPU_GEMM_COLUMNS || b->col + b->cols == COVER_COLS);
    for (int64_t i = 0; i < b->rows; i++) {
        const float *sum[2] = {(float *)b->sum[0] + i * b->sum_stride, (float *)b->sum[1] + i * b->sum_stride};
        bool finished = in_group && whole && b->sum_stride >= b->cols;
        for (int64_t j = 0; j < b->cols; j++) finished &= sum[0][j] == COVER_DEPTH && sum[1][j] == 2 * COVER_DEPTH;
        atomic_fetch_add(&cover[b->row + i][b->col / CUMOE_CPU_GEMM_COLUMNS], finished ? 1 : 1000);
    }
}

Test(gemm, the_epilogue_sees_every_block_once_and_finished)
{
    static const int32_t offset[] = {0, 3, 3, 640, COVER_ROWS};
    static float ones[COVER_ROWS * COVER_DEPTH], twos[COVER_COLS * COVER_DEPTH];
    for (int i = 0; i < COVER_ROWS * COVER_DEPTH; i++) ones[i] = 1;
    for (int i = 0; i < COVER_COLS * COVER_DEPTH; i++) twos[i] = 2;
    cumoe_cpu_gemm_t g = plain_product(0, COVER_COLS, COVER_DEPTH, ones, ones, cover_c[0]);
    g.groups = 4;
    g.ragged = CUMOE_CPU_RAGGED_ROWS;
    g.offset = offset;
    g.parts = 2;
    g.b[1] = g.b[0];
    g.b[1].data = twos;
    g.c[1] = cover_c[1];
    g.epilogue = count_blocks;
    g.context = offset;
    for (int i = 0; i < COUNT(isas); i++) {
        memset(cover, 0, sizeof cover);
        memset(cover_c, 0xFF, sizeof cover_c);
        if (!run(isas[i], &g, 3)) continue;
        for (int row = 0; row < COVER_ROWS; row++) {
            for (int block = 0; block < 3; block++) cr_assert_eq(cover[row][block], 1, "isa %d, row %d", i, row);
        }
    }
}

/* Two groups 2^31 elements apart, in a mapping of which only the touched pages exist. */
Test(gemm, offsets_beyond_32_bits)
{
    enum { M = 5, N = 6, K = 7 };
    const int64_t apart = ((int64_t)1 << 31) + 3;
    const size_t size = (size_t)(apart + 1024) * sizeof(float);
    float *far[3];
    for (int i = 0; i < 3; i++) {
        far[i] = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (far[i] == MAP_FAILED) cr_skip_test("no room for 8 GiB of addresses");
    }
    for (int g = 0; g < 2; g++) {
        for (int i = 0; i < M * K; i++) far[0][g * apart + i] = (float)(i % 5 + g);
        for (int i = 0; i < N * K; i++) far[1][g * apart + i] = (float)(i % 3 - g);
    }
    cumoe_cpu_gemm_t gemm = plain_product(M, N, K, far[0], far[1], far[2]);
    gemm.groups = 2;
    gemm.a[0].group_stride = gemm.b[0].group_stride = gemm.c_group_stride = apart;
    gemm.b[0].line_stride = 1;
    gemm.b[0].depth_stride = N;
    run(CUMOE_CPU_ISA_PORTABLE, &gemm, 2);
    for (int e = 0; e < 2 * M * N; e++) {
        const int64_t g = e / (M * N), i = e / N % M, j = e % N;
        float sum = 0;
        for (int k = 0; k < K; k++) sum += far[0][g * apart + i * K + k] * far[1][g * apart + k * N + j];
        cr_assert_eq(far[2][g * apart + i * N + j], sum);
    }
    for (int i = 0; i < 3; i++) munmap(far[i], size);
}
