#include "tests/support/stage_buffers.h"

#include <math.h>
#include <stdlib.h>

int64_t stage_num_rows(const problem_t *p)
{
    return p->expected.statistics.rows;
}

static int32_t *integers(problem_t *p, int64_t n)
{
    return buffer_get(&p->buffers, (size_t)n * sizeof(int32_t));
}

static int64_t *units(problem_t *p, int64_t n)
{
    return buffer_get(&p->buffers, (size_t)n * sizeof(int64_t));
}

cumoe_routing_t stage_empty_routing(problem_t *p)
{
    const size_t real = real_size(p->gate_type);
    cumoe_routing_t r = {
        .call = buffer_get(&p->buffers, sizeof(cumoe_call_t)),
        .tokens = units(p, 1),
        .expert = integers(p, p->max_slots),
        .weight = buffer_get(&p->buffers, (size_t)p->max_slots * real),
        .importance = units(p, p->experts),
        .load = units(p, p->experts),
    };
    if (p->options.variant.gate == CUMOE_GATE_BALANCED) {
        r.token_slot = integers(p, p->tokens + 1);
        r.slot_token = integers(p, p->max_slots);
        r.excess = integers(p, p->experts);
    }
    if (p->options.variant.gate == CUMOE_GATE_HIERARCHICAL) {
        r.primary_group = integers(p, p->tokens * p->top_k_groups);
        r.primary_weight = buffer_get(&p->buffers, (size_t)(p->tokens * p->top_k_groups) * real);
        r.primary_load = units(p, p->groups);
        r.primary_count = integers(p, p->groups);
    }
    return r;
}

static void fill_primary(const problem_t *p, const cumoe_routing_t *r)
{
    const int bits = CUMOE_FIXED_POINT_BITS(p->options.dtype);
    for (int64_t i = 0; i < p->tokens * p->top_k_groups; i++) {
        const bool counts = i / p->top_k_groups < p->live_tokens &&
                            (!p->input.token_mask || p->input.token_mask[i / p->top_k_groups]);
        r->primary_group[i] = counts ? p->expected.primary_group[i] : -1;
        real_set(r->primary_weight, p->gate_type, i, p->expected.primary_weight[i]);
    }
    for (int64_t g = 0; g < p->groups; g++) {
        r->primary_load[g] = llrint(ldexp(p->expected.primary_load[g], bits));
        r->primary_count[g] = (int32_t)p->expected.primary_count[g];
    }
}

cumoe_routing_t stage_routing(problem_t *p)
{
    const cumoe_routing_t r = stage_empty_routing(p);
    const int bits = CUMOE_FIXED_POINT_BITS(p->options.dtype);
    *r.call = (cumoe_call_t){
        .seed = p->options.seed, .first_token = p->layer_case.first_token, .live_tokens = p->live_tokens};
    *r.tokens = p->expected.statistics.tokens;
    r.call->offset = p->call ? p->call->offset : p->forward.offset;
    for (int64_t s = 0; s < problem_num_slots(p); s++) {
        r.expert[s] = p->expected.expert[s];
        real_set(r.weight, p->gate_type, s, p->expected.weight[s]);
        if (r.slot_token) r.slot_token[s] = p->expected.slot_token[s];
    }
    for (int64_t t = 0; r.token_slot && t <= p->tokens; t++) r.token_slot[t] = p->expected.token_slot[t];
    for (int64_t e = 0; e < p->experts; e++) {
        r.importance[e] = llrint(ldexp(p->expected.importance[e], bits));
        r.load[e] = llrint(ldexp(p->expected.level_load[e], bits));
        if (r.excess) r.excess[e] = (int32_t)p->expected.excess[e];
    }
    if (r.primary_group) fill_primary(p, &r);
    return r;
}

/* Only CUDA has tiles. */
static int32_t *tile_buffer(problem_t *p)
{
    if (cumoe_handle_backend(p->handle) != CUMOE_BACKEND_CUDA) return NULL;
    const int64_t size = cumoe_tile_size(p->max_rows, (int32_t)p->experts);
    return buffer_get(&p->buffers, (size_t)size * sizeof(int32_t));
}

cumoe_rows_t stage_empty_rows(problem_t *p)
{
    return (cumoe_rows_t){
        .tile = tile_buffer(p),
        .offset = integers(p, p->experts + 1),
        .row_token = integers(p, p->max_rows),
        .row_slot = integers(p, p->max_rows),
        .slot_row = integers(p, p->max_slots),
    };
}

/* Which rows a tile has is the library's choice, and permute makes it. */
static void fill_tiles(problem_t *p, int32_t *tile, report_t *report)
{
    cumoe_permute_args_t a = {
        .struct_size = sizeof a, .num_tokens = p->tokens, .routing = stage_routing(p), .rows = stage_empty_rows(p)};
    a.rows.tile = tile;
    a.workspace = stage_workspace(p, CUMOE_STAGE_PERMUTE, &a.workspace_size, report);
    (void)stage_succeeded(p, device_permute(p->handle, p->layer, &a), report);
}

/* By expert, inside an expert by token, then by choice. */
cumoe_rows_t stage_rows(problem_t *p, report_t *report)
{
    const cumoe_rows_t r = stage_empty_rows(p);
    const int64_t slots = problem_num_slots(p);
    int32_t row = 0;
    for (int64_t s = 0; s < p->max_slots; s++) r.slot_row[s] = -1;
    for (int64_t e = 0; e < p->experts; e++) {
        r.offset[e] = row;
        for (int64_t s = 0; s < slots; s++) {
            if (p->expected.expert[s] != e) continue;
            r.row_token[row] = p->expected.slot_token[s];
            r.row_slot[row] = (int32_t)s;
            r.slot_row[s] = row++;
        }
    }
    r.offset[p->experts] = row;
    if (r.tile) fill_tiles(p, r.tile, report);
    return r;
}

void *stage_empty(problem_t *p, int64_t width)
{
    return buffer_get(&p->buffers, (size_t)(stage_num_rows(p) * width) * real_size(p->options.dtype));
}

void *stage_pack(problem_t *p, const cumoe_rows_t *rows, const double *values, const double *second, int64_t width)
{
    const int64_t parts = second ? 2 : 1;
    void *packed = stage_empty(p, parts * width);
    for (int64_t row = 0; row < stage_num_rows(p); row++)
        for (int64_t i = 0; i < width; i++) {
            const int64_t from = rows->row_slot[row] * width + i, to = row * parts * width + i;
            real_set(packed, p->options.dtype, to, values[from]);
            if (second) real_set(packed, p->options.dtype, to + width, second[from]);
        }
    return packed;
}

/* Of one number in a hundred an F32 sum may lie so close to a boundary that 16 bits are the other neighbour's. A
 * rounding that is forgotten, or one too many, shows in a third of them. */
static const double SLIPS = 0.01;

double stage_sum_limit(const problem_t *p)
{
    const bool rounded = p->options.dtype != p->gate_type;
    return problem_gate_limit(p) + (rounded ? sqrt(SLIPS) * 2 * real_rounding_unit(p->options.dtype) : 0);
}

static void compare_roundings(const problem_t *p, const char *what, const void *actual, int64_t n,
                              const double *expected, report_t *report)
{
    int64_t slips = 0;
    for (int64_t i = 0; i < n; i++) slips += real_get(actual, p->options.dtype, i) != expected[i];
    if (p->options.dtype != p->gate_type && (double)slips > 2 + SLIPS * (double)n)
        report_fail(report, "%s: %d of %d numbers are rounded otherwise", what, (int)slips, (int)n);
}

void stage_compare(const problem_t *p, const cumoe_rows_t *rows, const char *what, const void *actual,
                   const double *expected, const double *second, int64_t width, report_t *report)
{
    const int64_t R = stage_num_rows(p), all = width * (second ? 2 : 1);
    double *wanted = malloc((size_t)(R * all) * sizeof *wanted + 1);
    if (!wanted) {
        report_fail(report, "%s: no memory to compare", what);
        return;
    }
    for (int64_t row = 0; row < R; row++)
        for (int64_t i = 0; i < width; i++) {
            wanted[row * all + i] = expected[rows->row_slot[row] * width + i];
            if (second) wanted[row * all + width + i] = second[rows->row_slot[row] * width + i];
        }
    compare_vector(report, what, actual, p->options.dtype, R * all, wanted, problem_limit(p));
    compare_roundings(p, what, actual, R * all, wanted, report);
    free(wanted);
}

void *stage_workspace(problem_t *p, cumoe_stage_t stage, size_t *size, report_t *report)
{
    if (cumoe_stage_workspace_size(p->layer, stage, p->tokens, size) != CUMOE_SUCCESS) {
        report_fail(report, "%s", cumoe_last_error());
        *size = 0;
    }
    return buffer_get_aligned(&p->buffers, *size, 64);
}

bool stage_succeeded(const problem_t *p, cumoe_status_t status, report_t *report)
{
    if (status != CUMOE_SUCCESS) report_fail(report, "%s", cumoe_last_error());
    report_check(report, buffer_guards_intact(&p->buffers));
    report_check(report, problem_input_hash(p) == p->input_hash);
    return status == CUMOE_SUCCESS;
}

const double *stage_glu(const problem_t *p, const double *values)
{
    return problem_has_glu(p) ? values : NULL;
}
