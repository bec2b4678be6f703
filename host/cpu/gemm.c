/* The driver of the packed micro-kernel: cuts the groups into tasks, packs, multiplies.
 *
 *   task          rows of one group (at most BLOCK_ROWS) x a range of columns
 *   depth block   at most block_depth of k; C carries the sums from one to the next, so k stays in order
 *   panel         32 columns of B, packed, against all packed rows of A of the task
 *
 * The packed panel (64 KiB) stays in the second-level cache while the packed rows of A stream past it, 2 bytes a
 * cycle, which any cache delivers. So a block has many rows: every block packs the panels of B anew. For a few rows
 * it is not worth packing, and a panel is multiplied as it stands (gemm_few.h). Nothing is
 * shared between threads but the task counter.
 *
 * Where C has 16 bits, or is streamed behind an epilogue, the sums stand aside in F32 until they are complete: for
 * one panel if the depth is one block, else for STAGE_COLUMNS of them, after which the rows of A are packed again.
 */
#include "host/cpu/gemm.h"
#include "host/cpu/cpu.h"
#include "host/cpu/float16.h"
#include "host/cpu/gemm_tile.h"
#include "host/cpu/stream.h"

#include <omp.h>
#include <stdatomic.h>
#include <string.h>

enum {
    BLOCK_ROWS = 588,         /* a multiple of every MR */
    BLOCK_DEPTH_BYTES = 2560, /* of a packed line */
    STAGE_COLUMNS = 512,      /* of both parts together */
    SCRATCH = (BLOCK_ROWS + PANEL) * BLOCK_DEPTH_BYTES + BLOCK_ROWS * STAGE_COLUMNS * (int)sizeof(float),
    TASKS_PER_THREAD = 8,              /* that many, if columns allow, so that threads end together */
    SERIAL_MULTIPLY_ADDS = 256 * 1024, /* below, waking threads costs more than it brings */
};

static cumoe_cpu_isa_t best_isa(void)
{
    if (cumoe__cpu_gemm_kernel(CUMOE_CPU_ISA_AVX512, false)) return CUMOE_CPU_ISA_AVX512;
    if (cumoe__cpu_gemm_kernel(CUMOE_CPU_ISA_AVX2, false)) return CUMOE_CPU_ISA_AVX2;
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
    pack_form_t form_a[2], form_b[2];
    bool staged;        /* sums stand aside until they are complete */
    bool zeros_stream;  /* what is written past the caches: zeros, */
    bool sums_stream;   /* and sums */
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

/* Which of the kernel's packing functions a factor needs. */
static int source_of(const cumoe_cpu_factor_t *factor)
{
    return factor->dtype == CUMOE_BF16 ? 1 : factor->dtype == CUMOE_F16 ? 2 : 0;
}

/* Between sums [rows, cols] and C of 16 bits. */
CUMOE_CPU_CLONES static void widen_block(const uint16_t *from, int64_t row_stride, int64_t col_stride, bool bf16,
                                         int64_t rows, int64_t cols, float *to, int64_t to_stride)
{
    for (int64_t i = 0; i < rows; i++) {
        const uint16_t *row = from + i * row_stride;
        for (int64_t j = 0; j < cols; j++) {
            const uint16_t half = row[j * col_stride];
            to[i * to_stride + j] = bf16 ? bf16_to_f32(half) : f16_to_f32(half);
        }
    }
}

CUMOE_CPU_CLONES static void narrow_block(const float *from, int64_t from_stride, bool bf16, int64_t rows,
                                          int64_t cols, uint16_t *to, int64_t row_stride, int64_t col_stride,
                                          bool stream)
{
    for (int64_t i = 0; i < rows; i++) {
        const float *sum = from + i * from_stride;
        uint16_t *row = to + i * row_stride;
        _Alignas(CUMOE_STREAM_LINE) uint16_t half[PANEL]; /* all of them: what is behind cols costs nothing */
        if (bf16)
            for (int j = 0; j < PANEL; j++) half[j] = f32_to_bf16(sum[j]);
        else
            for (int j = 0; j < PANEL; j++) half[j] = f32_to_f16(sum[j]);
        if (cols == PANEL && stream)
            cumoe__stream_copy(row, half, sizeof half);
        else if (cols == PANEL && col_stride == 1)
            memcpy(row, half, sizeof half);
        else
            for (int64_t j = 0; j < cols; j++) row[j * col_stride] = half[j];
    }
}

static void stream_block(const float *from, int64_t rows, int64_t cols, float *to, int64_t row_stride)
{
    for (int64_t i = 0; i < rows; i++, from += PANEL, to += row_stride) {
        if (cols == PANEL)
            cumoe__stream_copy(to, from, PANEL * sizeof *to);
        else
            memcpy(to, from, (size_t)cols * sizeof *to);
    }
}

/* One panel of columns of a task. */
typedef struct panel {
    int64_t c; /* element of C where it begins */
    cumoe_cpu_block_t block;
} panel_t;

static int64_t first_row(const cumoe_cpu_gemm_t *gemm, const task_t *task)
{
    return task->row + (gemm->ragged == CUMOE_CPU_RAGGED_ROWS ? gemm->offset[task->group] : 0);
}

/* The element of C where a task's rows begin, from a column on. */
static int64_t first_element(const cumoe_cpu_gemm_t *gemm, const task_t *task, int64_t col)
{
    return task->group * gemm->c_group_stride + first_row(gemm, task) * gemm->c_row_stride +
           col * gemm->c_col_stride;
}

/* stage [parts][rows, PANEL]: where its sums stand aside. */
static panel_t panel_of(const plan_t *plan, const task_t *task, int64_t col, float *stage)
{
    const cumoe_cpu_gemm_t *gemm = plan->gemm;
    panel_t p = {.c = first_element(gemm, task, col),
                 .block = {.group = task->group,
                           .row = first_row(gemm, task),
                           .rows = task->rows,
                           .col = col,
                           .cols = min64(PANEL, task->col_end - col),
                           .sum_stride = plan->staged ? PANEL : gemm->c_row_stride}};
    for (int part = 0; part < gemm->parts; part++)
        p.block.sum[part] = plan->staged ? (void *)(stage + part * task->rows * PANEL)
                                         : (char *)gemm->c[part] + plan->kernel->element * p.c;
    return p;
}

/* The sums of a panel begin at the old C, of 16 bits: another does not stand aside with add. */
static void begin_panel(const plan_t *plan, const panel_t *p)
{
    const cumoe_cpu_gemm_t *gemm = plan->gemm;
    for (int part = 0; plan->staged && gemm->add && part < gemm->parts; part++)
        widen_block((const uint16_t *)gemm->c[part] + p->c, gemm->c_row_stride, gemm->c_col_stride,
                    gemm->c_dtype == CUMOE_BF16, p->block.rows, p->block.cols, p->block.sum[part], PANEL);
}

static void finish_panel(const plan_t *plan, const panel_t *p)
{
    const cumoe_cpu_gemm_t *gemm = plan->gemm;
    if (gemm->epilogue) gemm->epilogue(gemm->context, &p->block);
    for (int part = 0; plan->staged && part < gemm->parts; part++) {
        if (gemm->c_dtype == CUMOE_F32)
            stream_block(p->block.sum[part], p->block.rows, p->block.cols, (float *)gemm->c[part] + p->c,
                         gemm->c_row_stride);
        else
            narrow_block(p->block.sum[part], PANEL, gemm->c_dtype == CUMOE_BF16, p->block.rows, p->block.cols,
                         (uint16_t *)gemm->c[part] + p->c, gemm->c_row_stride, gemm->c_col_stride,
                         plan->sums_stream);
    }
}

/* A piece of the depth: of one term, at most block_depth long. */
typedef struct piece {
    int term;
    int64_t depth, depths;
    bool first, last;
} piece_t;

static void pack_rows(const plan_t *plan, const task_t *task, const piece_t *piece, void *to)
{
    const cumoe_cpu_factor_t *factor = &plan->gemm->a[piece->term];
    const pack_t pack = {.factor = factor,
                         .form = plan->form_a[piece->term],
                         .group = task->group,
                         .line = first_row(plan->gemm, task),
                         .lines = task->rows,
                         .depth = piece->depth,
                         .depths = piece->depths,
                         .to = to};
    plan->kernel->pack_a[source_of(factor)](&pack);
}

/* For few rows to pack a panel takes longer than to multiply it. */
static bool skips_packing(const plan_t *plan, const pack_t *pack, const block_t *block)
{
    return block->rows <= FEW_ROWS && pack->form == FORM_TRANSPOSE && block->col_stride == 1 &&
           block->cols % plan->kernel->lanes == 0 && plan->kernel->few[source_of(pack->factor)];
}

/* The packed rows times one panel, all parts. */
static void run_panel(const plan_t *plan, const task_t *task, const piece_t *piece, const panel_t *p, const void *a,
                      void *packed_b)
{
    const cumoe_cpu_gemm_t *gemm = plan->gemm;
    if (piece->first) begin_panel(plan, p);
    for (int part = 0; part < gemm->parts; part++) {
        const int b = part + piece->term; /* one of them is 0 */
        const pack_t pack = {.factor = &gemm->b[b],
                             .form = plan->form_b[b],
                             .group = task->group,
                             .line = p->block.col,
                             .lines = p->block.cols,
                             .depth = piece->depth,
                             .depths = piece->depths,
                             .to = packed_b};
        const block_t block = {.a = a,
                               .b = packed_b,
                               .c = p->block.sum[part],
                               .rows = task->rows,
                               .cols = p->block.cols,
                               .depth = piece->depths,
                               .row_stride = p->block.sum_stride,
                               .col_stride = plan->staged ? 1 : gemm->c_col_stride,
                               .accumulate = !piece->first || gemm->add,
                               .stream = plan->sums_stream && !plan->staged && !gemm->epilogue && piece->first &&
                                         piece->last};
        if (skips_packing(plan, &pack, &block)) {
            plan->kernel->few[source_of(pack.factor)](&pack, &block);
        } else {
            plan->kernel->pack_b[source_of(pack.factor)](&pack);
            plan->kernel->block(&block);
        }
    }
    if (piece->last) finish_panel(plan, p);
}

/* A sum of nothing: zeros, or what is there. The columns, or the rows, of a task stand side by side. */
static void run_empty_task(const plan_t *plan, const task_t *task)
{
    const cumoe_cpu_gemm_t *gemm = plan->gemm;
    const size_t element = cumoe__dtype_size(gemm->c_dtype);
    const int64_t first = first_element(gemm, task, task->col);
    const bool by_rows = gemm->c_col_stride == 1;
    const int64_t cols = task->col_end - task->col, lines = by_rows ? task->rows : cols;
    const int64_t stride = by_rows ? gemm->c_row_stride : gemm->c_col_stride;
    const size_t size = (size_t)(by_rows ? cols : task->rows) * element;
    for (int part = 0; !gemm->add && part < gemm->parts; part++)
        for (int64_t i = 0; i < lines; i++) {
            char *line = (char *)gemm->c[part] + (size_t)(first + i * stride) * element;
            if (plan->zeros_stream)
                cumoe__stream_zeros(line, size);
            else
                memset(line, 0, size);
        }
}

static void run_task(const plan_t *plan, const task_t *task, void *scratch)
{
    const cumoe_cpu_gemm_t *gemm = plan->gemm;
    const bool side_by_side = gemm->c_col_stride == 1 || gemm->c_row_stride == 1;
    if (task->depths == 0 && !gemm->epilogue && (side_by_side || gemm->add)) {
        run_empty_task(plan, task);
        return;
    }
    void *packed_b = (char *)scratch + BLOCK_ROWS * BLOCK_DEPTH_BYTES;
    float *stage = (float *)((char *)packed_b + PANEL * BLOCK_DEPTH_BYTES);
    const int64_t blocks = max64(1, ceil_div(task->depths, plan->block_depth)), pieces = blocks * gemm->terms;
    const int64_t stretch = !plan->staged ? task->col_end - task->col
                            : pieces > 1  ? STAGE_COLUMNS / gemm->parts
                                          : PANEL; /* columns between two packings of A */
    for (int64_t begin = task->col; begin < task->col_end; begin += stretch) {
        const int64_t end = min64(begin + stretch, task->col_end);
        for (int64_t i = 0; i < pieces; i++) {
            const int64_t from = i % blocks * task->depths / blocks, to = (i % blocks + 1) * task->depths / blocks;
            const piece_t piece = {.term = (int)(i / blocks),
                                   .depth = task->depth + from,
                                   .depths = to - from,
                                   .first = i == 0,
                                   .last = i == pieces - 1};
            if (begin == task->col || pieces > 1) pack_rows(plan, task, &piece, scratch);
            for (int64_t col = begin; col < end; col += PANEL) {
                const panel_t p = panel_of(plan, task, col, stage + (col - begin) * gemm->parts * task->rows);
                run_panel(plan, task, &piece, &p, scratch, packed_b);
            }
        }
    }
}

size_t cumoe__cpu_gemm_workspace(int threads)
{
    return (size_t)threads * SCRATCH;
}

/* Multiply-adds of all groups; double, since it is only an estimate and may be huge. An element of C that is
 * written takes the time of some. */
static double work(const cumoe_cpu_gemm_t *gemm)
{
    const double written = 16, parts = (double)(gemm->parts * gemm->terms) * (double)gemm->n;
    if (gemm->ragged == CUMOE_CPU_RAGGED_NONE)
        return parts * (double)gemm->groups * (double)gemm->m * (double)gemm->k;
    const double cut = (double)gemm->offset[gemm->groups] - (double)gemm->offset[0];
    if (gemm->ragged == CUMOE_CPU_RAGGED_ROWS) return parts * cut * (double)gemm->k;
    return parts * (double)gemm->m * (cut + (gemm->add ? 0 : written * (double)gemm->groups));
}

static bool sums_stream(const cumoe_cpu_gemm_t *gemm)
{
    const size_t element = cumoe__dtype_size(gemm->c_dtype);
    bool streams = gemm->stream && !gemm->add && gemm->c_col_stride == 1;
    for (int part = 0; part < gemm->parts; part++)
        streams &= cumoe__on_lines(gemm->c[part], (size_t)(gemm->c_group_stride | gemm->c_row_stride) * element);
    return streams;
}

bool cumoe__cpu_gemm_with(cumoe_cpu_isa_t isa, const cumoe_cpu_gemm_t *gemm, int threads, void *workspace)
{
    const kernel_t *kernel = cumoe__cpu_gemm_kernel(isa, gemm->c_dtype == CUMOE_F64);
    if (!kernel) return false;

    int64_t tasks = 0; /* of whole rows */
    for (int64_t g = 0; g < gemm->groups; g++) tasks += row_blocks(gemm, g);
    if (tasks == 0 || gemm->n <= 0) return true;
    if (work(gemm) < SERIAL_MULTIPLY_ADDS) threads = 1;
    const int64_t panels = ceil_div(gemm->n, PANEL);
    const bool stream = sums_stream(gemm), is_half = gemm->c_dtype == CUMOE_BF16 || gemm->c_dtype == CUMOE_F16;
    const plan_t plan = {.gemm = gemm,
                         .kernel = kernel,
                         .form_a = {choose_form(&gemm->a[0]), choose_form(&gemm->a[1])},
                         .form_b = {choose_form(&gemm->b[0]), choose_form(&gemm->b[1])},
                         .staged = is_half || (stream && gemm->epilogue && gemm->c_dtype == CUMOE_F32),
                         .zeros_stream = gemm->stream && !gemm->add,
                         .sums_stream = stream,
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
        if (gemm->stream) cumoe__stream_end();
    }
    return true;
}

void cumoe__cpu_gemm(const cumoe_cpu_gemm_t *gemm, int threads, void *workspace)
{
    (void)cumoe__cpu_gemm_with(best_isa(), gemm, threads, workspace);
}
