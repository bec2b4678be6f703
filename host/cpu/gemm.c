/* The driver of the packed micro-kernel: cuts the groups into tasks, packs, multiplies.
 *
 *   task          rows of one group (at most BLOCK_ROWS) x a range of columns
 *   depth block   at most block_depth of k; C carries the sums from one to the next, so k stays in order
 *   panel         32 columns of B, packed, against all packed rows of A of the task
 *
 * The packed panel (64 KiB) stays in the second-level cache while the packed rows of A stream past it, 2 bytes a
 * cycle, which any cache delivers. So a block has many rows: every block packs the panels of B anew. Nothing is
 * shared between threads but the task counter. */
#include "host/cpu/gemm.h"

#include <omp.h>
#include <stdatomic.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define ALWAYS_INLINE static inline __attribute__((always_inline))

enum {
    PANEL = CUMOE_CPU_GEMM_COLUMNS,
    BLOCK_ROWS = 588,         /* a multiple of every MR */
    BLOCK_DEPTH_BYTES = 2560, /* of a packed line */
    SCRATCH = (BLOCK_ROWS + PANEL) * BLOCK_DEPTH_BYTES,
    COPY_DEPTHS = 8,                   /* depths that a copying pack takes along at a time */
    COPY_AHEAD = 16,                   /* depths ahead that it asks for */
    TRANSPOSE_AHEAD = 2,               /* cache lines ahead that a transposing pack asks for */
    TASKS_PER_THREAD = 8,              /* that many, if columns allow, so that threads end together */
    SERIAL_MULTIPLY_ADDS = 256 * 1024, /* below, waking threads costs more than it brings */
};

static inline int64_t min64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static inline int64_t max64(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

static inline int64_t ceil_div(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

typedef enum pack_form {
    FORM_TRANSPOSE, /* lines contiguous along the depth */
    FORM_COPY,      /* neighbouring lines contiguous at every depth */
    FORM_STRIDED,   /* anything else, element by element */
} pack_form_t;

typedef struct pack {
    const cumoe_cpu_factor_t *factor;
    pack_form_t form;
    int64_t group;
    int64_t line, lines;   /* before line_index */
    int64_t depth, depths; /* before depth_index */
    void *to;              /* [strips][depths, width] */
} pack_t;

typedef struct block {
    const void *a;                  /* packed */
    const void *b;                  /* packed */
    void *c;                        /* [rows, cols] */
    int64_t rows, cols, depth;      /* cols <= PANEL */
    int64_t row_stride, col_stride; /* of c */
    bool accumulate;
} block_t;

/* What an instruction set offers for a type. */
typedef struct kernel {
    int64_t element; /* bytes */
    int64_t mr;
    void (*pack_a)(const pack_t *);
    void (*pack_b)(const pack_t *);
    void (*block)(const block_t *);
} kernel_t;

/* The multiply-add is spelled out: whether it is fused may not hang on how hard the compiler optimises. */
#if defined(__FMA__)
#define PORTABLE_FMA_F32(a, b, c) _mm_fmadd_ps(a, b, c)
#define PORTABLE_FMA_F64(a, b, c) _mm_fmadd_pd(a, b, c)
#elif defined(__aarch64__)
#define PORTABLE_FMA_F32(a, b, c) vfmaq_f32(c, a, b)
#define PORTABLE_FMA_F64(a, b, c) vfmaq_f64(c, a, b)
#else
#define PORTABLE_FMA_F32(a, b, c) ((a) * (b) + (c))
#define PORTABLE_FMA_F64(a, b, c) ((a) * (b) + (c))
#endif

#define SCALAR       float
#define VECTOR_BYTES 16
#define FMA          PORTABLE_FMA_F32
#define MR           4
#define NAME(x)      x##_f32_portable
#define TARGET
#include "host/cpu/gemm_kernel.h"

#define SCALAR       double
#define VECTOR_BYTES 16
#define FMA          PORTABLE_FMA_F64
#define MR           4
#define NAME(x)      x##_f64_portable
#define TARGET
#include "host/cpu/gemm_kernel.h"

#ifdef __x86_64__
#define SCALAR       float
#define VECTOR_BYTES 32
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define MR           6
#define NAME(x)      x##_f32_avx2
#define TARGET       __attribute__((target("avx2,fma")))
#include "host/cpu/gemm_kernel.h"

#define SCALAR       double
#define VECTOR_BYTES 32
#define FMA(a, b, c) _mm256_fmadd_pd(a, b, c)
#define MR           6
#define NAME(x)      x##_f64_avx2
#define TARGET       __attribute__((target("avx2,fma")))
#include "host/cpu/gemm_kernel.h"

#define SCALAR       float
#define VECTOR_BYTES 64
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define MR           14
#define NAME(x)      x##_f32_avx512
#define TARGET       __attribute__((target("avx512f,fma")))
#include "host/cpu/gemm_kernel.h"

#define SCALAR       double
#define VECTOR_BYTES 64
#define FMA(a, b, c) _mm512_fmadd_pd(a, b, c)
#define MR           14
#define NAME(x)      x##_f64_avx512
#define TARGET       __attribute__((target("avx512f,fma")))
#include "host/cpu/gemm_kernel.h"
#endif

/* NULL where the machine lacks the instructions. */
static const kernel_t *find_kernel(cumoe_cpu_isa_t isa, bool f64)
{
    switch (isa) {
    case CUMOE_CPU_ISA_PORTABLE:
        return f64 ? &kernel_f64_portable : &kernel_f32_portable;
#ifdef __x86_64__
    case CUMOE_CPU_ISA_AVX2:
        if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return NULL;
        return f64 ? &kernel_f64_avx2 : &kernel_f32_avx2;
    case CUMOE_CPU_ISA_AVX512:
        if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("fma")) return NULL;
        return f64 ? &kernel_f64_avx512 : &kernel_f32_avx512;
#endif
    default:
        return NULL;
    }
}

static cumoe_cpu_isa_t best_isa(void)
{
    if (find_kernel(CUMOE_CPU_ISA_AVX512, false)) return CUMOE_CPU_ISA_AVX512;
    if (find_kernel(CUMOE_CPU_ISA_AVX2, false)) return CUMOE_CPU_ISA_AVX2;
    return CUMOE_CPU_ISA_PORTABLE;
}

const char *cumoe__cpu_gemm_isa(void)
{
    static const char *const name[] = {"portable", "avx2", "avx512"};
    return name[best_isa()];
}

/* A product with everything that all its tasks share. */
typedef struct plan {
    const cumoe_cpu_gemm_t *gemm;
    const kernel_t *kernel;
    pack_form_t form_a, form_b[2];
    int64_t panels;     /* of all columns */
    int64_t col_ranges; /* panels are cut into so many tasks */
    int64_t block_depth;
} plan_t;

typedef struct task {
    int64_t group;
    int64_t row, rows;     /* of the group */
    int64_t depth, depths; /* before the indices; depth counts over all groups with RAGGED_DEPTH */
    int64_t col, col_end;
} task_t;

static int64_t group_rows(const cumoe_cpu_gemm_t *gemm, int64_t group)
{
    if (gemm->ragged != CUMOE_CPU_RAGGED_ROWS) return gemm->m;
    return (int64_t)gemm->offset[group + 1] - gemm->offset[group];
}

static int64_t group_depth(const cumoe_cpu_gemm_t *gemm, int64_t group)
{
    if (gemm->ragged != CUMOE_CPU_RAGGED_DEPTH) return gemm->k;
    return (int64_t)gemm->offset[group + 1] - gemm->offset[group];
}

static int64_t row_blocks(const cumoe_cpu_gemm_t *gemm, int64_t group)
{
    return ceil_div(group_rows(gemm, group), BLOCK_ROWS);
}

/* A thread's place in the list of tasks. It only moves forward, so that all tasks together cost one walk over
 * the groups, however many of them are empty. */
typedef struct cursor {
    int64_t group, first_task;
} cursor_t;

static bool find_task(const plan_t *plan, cursor_t *cursor, int64_t number, task_t *task)
{
    const cumoe_cpu_gemm_t *gemm = plan->gemm;
    int64_t blocks = 0;
    for (; cursor->group < gemm->groups; cursor->group++) {
        blocks = row_blocks(gemm, cursor->group);
        if (number < cursor->first_task + blocks * plan->col_ranges) break;
        cursor->first_task += blocks * plan->col_ranges;
    }
    if (cursor->group == gemm->groups) return false;

    /* Blocks of nearly the same number of whole tiles. */
    const int64_t mr = plan->kernel->mr, rows = group_rows(gemm, cursor->group), tiles = ceil_div(rows, mr);
    const int64_t block = (number - cursor->first_task) / plan->col_ranges;
    const int64_t range = (number - cursor->first_task) % plan->col_ranges;
    const bool ragged_depth = gemm->ragged == CUMOE_CPU_RAGGED_DEPTH;
    task->group = cursor->group;
    task->row = block * tiles / blocks * mr;
    task->rows = min64((block + 1) * tiles / blocks * mr, rows) - task->row;
    task->depth = ragged_depth ? gemm->offset[cursor->group] : 0;
    task->depths = group_depth(gemm, cursor->group);
    task->col = range * plan->panels / plan->col_ranges * PANEL;
    task->col_end = min64((range + 1) * plan->panels / plan->col_ranges * PANEL, gemm->n);
    return true;
}

static pack_form_t choose_form(const cumoe_cpu_factor_t *f)
{
    if (f->depth_stride == 1 && !f->depth_index) return FORM_TRANSPOSE;
    if (f->line_stride == 1 && !f->line_index) return FORM_COPY;
    return FORM_STRIDED;
}

/* One block of the depth; the last one finishes C. */
static void run_depth(const plan_t *plan, const task_t *task, bool first, bool last, void *scratch)
{
    const cumoe_cpu_gemm_t *gemm = plan->gemm;
    const int64_t row = task->row + (gemm->ragged == CUMOE_CPU_RAGGED_ROWS ? gemm->offset[task->group] : 0);
    void *packed_b = (char *)scratch + BLOCK_ROWS * BLOCK_DEPTH_BYTES;
    pack_t pack = {.factor = &gemm->a,
                   .form = plan->form_a,
                   .group = task->group,
                   .line = row,
                   .lines = task->rows,
                   .depth = task->depth,
                   .depths = task->depths,
                   .to = scratch};
    plan->kernel->pack_a(&pack);
    block_t block = {.a = scratch,
                     .b = packed_b,
                     .rows = task->rows,
                     .depth = task->depths,
                     .row_stride = gemm->c_row_stride,
                     .col_stride = gemm->c_col_stride,
                     .accumulate = !first || gemm->add};
    pack.to = packed_b;
    for (int64_t col = task->col; col < task->col_end; col += PANEL) {
        const int64_t c = task->group * gemm->c_group_stride + row * gemm->c_row_stride + col * gemm->c_col_stride;
        pack.line = col;
        pack.lines = block.cols = min64(PANEL, task->col_end - col);
        for (int part = 0; part < gemm->parts; part++) {
            pack.factor = &gemm->b[part];
            pack.form = plan->form_b[part];
            plan->kernel->pack_b(&pack);
            block.c = (char *)gemm->c[part] + plan->kernel->element * c;
            plan->kernel->block(&block);
        }
        if (last && gemm->epilogue) gemm->epilogue(gemm->context, task->group, row, task->rows, col, block.cols);
    }
}

static void run_task(const plan_t *plan, const task_t *task, void *scratch)
{
    const int64_t blocks = max64(1, ceil_div(task->depths, plan->block_depth));
    for (int64_t i = 0; i < blocks; i++) {
        const int64_t begin = i * task->depths / blocks, end = (i + 1) * task->depths / blocks;
        task_t part = *task;
        part.depth += begin;
        part.depths = end - begin;
        run_depth(plan, &part, i == 0, i == blocks - 1, scratch);
    }
}

size_t cumoe__cpu_gemm_workspace(int threads)
{
    return (size_t)threads * SCRATCH;
}

/* Multiply-adds of all groups; double, since it is only an estimate and may be huge. */
static double work(const cumoe_cpu_gemm_t *gemm)
{
    const double parts = (double)gemm->parts * (double)gemm->n;
    if (gemm->ragged == CUMOE_CPU_RAGGED_NONE)
        return parts * (double)gemm->groups * (double)gemm->m * (double)gemm->k;
    const double cut = (double)gemm->offset[gemm->groups] - (double)gemm->offset[0];
    return parts * cut * (double)(gemm->ragged == CUMOE_CPU_RAGGED_ROWS ? gemm->k : gemm->m);
}

bool cumoe__cpu_gemm_with(cumoe_cpu_isa_t isa, const cumoe_cpu_gemm_t *gemm, int threads, void *workspace)
{
    const kernel_t *kernel = find_kernel(isa, gemm->a.dtype == CUMOE_F64);
    if (!kernel) return false;

    int64_t tasks = 0; /* of whole rows */
    for (int64_t g = 0; g < gemm->groups; g++) tasks += row_blocks(gemm, g);
    if (tasks == 0 || gemm->n <= 0) return true;
    if (work(gemm) < SERIAL_MULTIPLY_ADDS) threads = 1;
    const int64_t panels = ceil_div(gemm->n, PANEL);
    const plan_t plan = {.gemm = gemm,
                         .kernel = kernel,
                         .form_a = choose_form(&gemm->a),
                         .form_b = {choose_form(&gemm->b[0]), choose_form(&gemm->b[1])},
                         .panels = panels,
                         .col_ranges =
                             threads == 1 ? 1 : min64(panels, ceil_div((int64_t)threads * TASKS_PER_THREAD, tasks)),
                         .block_depth = BLOCK_DEPTH_BYTES / kernel->element};

    _Atomic int64_t next = 0;
#pragma omp parallel num_threads(threads)
    {
        void *scratch = (char *)workspace + (size_t)omp_get_thread_num() * SCRATCH;
        cursor_t cursor = {0, 0};
        task_t task;
        while (find_task(&plan, &cursor, atomic_fetch_add_explicit(&next, 1, memory_order_relaxed), &task)) {
            run_task(&plan, &task, scratch);
        }
    }
    return true;
}

void cumoe__cpu_gemm(const cumoe_cpu_gemm_t *gemm, int threads, void *workspace)
{
    (void)cumoe__cpu_gemm_with(best_isa(), gemm, threads, workspace);
}
