/* Each stage alone, on what the reference says the stages before have left there. */
#include "tests/support/stages.h"

#include "tests/support/stage_buffers.h"

#include <math.h>

static void check_units(const problem_t *p, const char *what, int64_t n, const int64_t *actual,
                        const double *expected, report_t *report)
{
    const int bits = CUMOE_FIXED_POINT_BITS(p->options.dtype);
    const double room = problem_sum_limit(p) * (double)(1 + p->tokens);
    for (int64_t i = 0; i < n; i++) {
        const double value = ldexp((double)actual[i], -bits);
        if (fabs(value - expected[i]) > room)
            report_fail(report, "%s[%d] is %g in fixed point, expected %g", what, (int)i, value, expected[i]);
    }
}

static void check_integers(const char *what, int64_t n, const int32_t *actual, const int64_t *expected,
                           report_t *report)
{
    for (int64_t i = 0; i < n; i++)
        if (actual[i] != expected[i])
            report_fail(report, "%s[%d] is %d, expected %d", what, (int)i, actual[i], (int)expected[i]);
}

/* The first level; the slots say nothing of groups that were chosen in vain. */
static void check_primary(problem_t *p, const cumoe_routing_t *routing, report_t *report)
{
    const cumoe_routing_t expected = stage_routing(p);
    const int64_t choices = p->tokens * p->top_k_groups;
    compare_bits(report, "primary_group", routing->primary_group, expected.primary_group,
                 (size_t)choices * sizeof(int32_t));
    compare_vector(report, "primary_weight", routing->primary_weight, p->gate_type, choices,
                   p->expected.primary_weight, problem_gate_limit(p));
    check_units(p, "primary_load", p->groups, routing->primary_load, p->expected.primary_load, report);
    check_integers("primary_count", p->groups, routing->primary_count, p->expected.primary_count, report);
}

/* The fixed-point sums, and the numbers of the call as all later stages read them. */
static void check_routing(problem_t *p, const cumoe_routing_t *routing, report_t *report)
{
    check_units(p, "importance", p->experts, routing->importance, p->expected.importance, report);
    check_units(p, "load", p->experts, routing->load, p->expected.level_load, report);
    report_check(report, *routing->tokens == p->expected.statistics.tokens);
    report_check(report, routing->call->seed == p->options.seed);
    report_check(report, routing->call->offset == (p->call ? p->call->offset : p->forward.offset));
    report_check(report, routing->call->first_token == p->layer_case.first_token);
    report_check(report, routing->call->live_tokens == p->live_tokens);
    if (routing->primary_group) check_primary(p, routing, report);
    if (!routing->token_slot) return;
    compare_bits(report, "token_slot", routing->token_slot, p->expected.token_slot,
                 (size_t)(p->tokens + 1) * sizeof(int32_t));
    compare_bits(report, "slot_token", routing->slot_token, p->expected.slot_token,
                 (size_t)problem_num_slots(p) * sizeof(int32_t));
    if (p->options.variant.training)
        check_integers("excess", p->experts, routing->excess, p->expected.excess, report);
}

cumoe_gate_args_t stage_gate_args(problem_t *p, report_t *report)
{
    const cumoe_forward_args_t *f = &p->forward;
    cumoe_gate_args_t a = {
        .struct_size = sizeof a,
        .num_tokens = f->num_tokens,
        .weights = f->weights,
        .x = f->x,
        .x_stride = f->x_stride,
        .token_mask = f->token_mask,
        .training = f->training,
        .seed = f->seed,
        .offset = f->offset,
        .first_token = f->first_token,
        .call = f->call,
        .index = f->index,
        .index_dtype = f->index_dtype,
        .index_weight = f->index_weight,
        .index_weight_dtype = f->index_weight_dtype,
        .routing = stage_empty_routing(p),
        .expert_count = f->expert_count,
        .importance = f->importance,
        .load = f->load,
        .batch_threshold = f->batch_threshold,
        .losses = f->losses,
        .statistics = f->statistics,
    };
    a.workspace = stage_workspace(p, CUMOE_STAGE_GATE, &a.workspace_size, report);
    return a;
}

void stage_check_gate(problem_t *p, report_t *report)
{
    report->context = p->name;
    const cumoe_gate_args_t a = stage_gate_args(p, report);
    if (!stage_succeeded(p, device_gate(p->handle, p->layer, &a), report)) return;
    p->forward.chosen_expert = a.routing.expert;
    p->forward.chosen_weight = a.routing.weight;
    p->forward.chosen_offset = a.routing.token_slot;
    problem_check_gate(p, report);
    check_routing(p, &a.routing, report);
}

/* Every row is in one tile; a tile begins where the one before is full or ends with its expert. */
static void check_tiles(const problem_t *p, const cumoe_rows_t *rows, report_t *report)
{
    const int32_t *tile = rows->tile;
    int64_t tiles = 0;
    if (!report_check(report, tile[1] >= 64)) return;
    for (int32_t e = 0; e < p->experts; e++)
        for (int32_t row = rows->offset[e]; row < rows->offset[e + 1]; row += tile[1], tiles++)
            if (tile[2 + 2 * tiles] != e || tile[3 + 2 * tiles] != row)
                report_fail(report, "tile %d is {%d, %d}, expected {%d, %d}", (int)tiles, tile[2 + 2 * tiles],
                            tile[3 + 2 * tiles], e, row);
    if (tile[0] != tiles) report_fail(report, "%d tiles, expected %d", tile[0], (int)tiles);
}

void stage_check_permute(problem_t *p, report_t *report)
{
    report->context = p->name;
    const size_t slots = (size_t)p->max_slots * sizeof(int32_t), rows = (size_t)p->max_rows * sizeof(int32_t);
    const cumoe_rows_t expected = stage_rows(p, report);
    cumoe_permute_args_t a = {
        .struct_size = sizeof a, .num_tokens = p->tokens, .routing = stage_routing(p), .rows = stage_empty_rows(p)};
    a.workspace = stage_workspace(p, CUMOE_STAGE_PERMUTE, &a.workspace_size, report);
    if (!stage_succeeded(p, device_permute(p->handle, p->layer, &a), report)) return;
    compare_bits(report, "offset", a.rows.offset, expected.offset, (size_t)(p->experts + 1) * sizeof(int32_t));
    compare_bits(report, "row_token", a.rows.row_token, expected.row_token, rows);
    compare_bits(report, "row_slot", a.rows.row_slot, expected.row_slot, rows);
    compare_bits(report, "slot_row", a.rows.slot_row, expected.slot_row, slots);
    if (a.rows.tile) check_tiles(p, &a.rows, report);
}

void stage_check_up(problem_t *p, report_t *report)
{
    report->context = p->name;
    const int64_t I = p->intermediate_size, R = stage_num_rows(p);
    const double *glu = stage_glu(p, p->expected.glu);
    const int64_t width = glu ? 2 * I : I;
    cumoe_up_args_t a = {
        .struct_size = sizeof a,
        .num_tokens = p->tokens,
        .weights = &p->weights,
        .rows = stage_rows(p, report),
        .x = p->forward.x,
        .x_stride = p->forward.x_stride,
        .z = stage_empty(p, width),
        .hidden = stage_empty(p, I),
    };
    a.workspace = stage_workspace(p, CUMOE_STAGE_UP, &a.workspace_size, report);
    if (!stage_succeeded(p, device_experts_up(p->handle, p->layer, &a), report)) return;
    stage_compare(p, &a.rows, "z", a.z, p->expected.up, glu, I, report);
    stage_compare(p, &a.rows, "hidden", a.hidden, p->expected.hidden, NULL, I, report);

    cumoe_up_args_t z_only = a;
    z_only.z = stage_empty(p, width);
    z_only.hidden = NULL;
    if (stage_succeeded(p, device_experts_up(p->handle, p->layer, &z_only), report))
        compare_bits(report, "z alone", z_only.z, a.z, (size_t)(R * width) * real_size(p->options.dtype));
    if (glu) return;

    cumoe_up_args_t in_place = a;
    in_place.z = in_place.hidden = stage_empty(p, I);
    if (stage_succeeded(p, device_experts_up(p->handle, p->layer, &in_place), report))
        compare_bits(report, "hidden in place of z", in_place.hidden, a.hidden,
                     (size_t)(R * I) * real_size(p->options.dtype));
}

void stage_check_down(problem_t *p, report_t *report)
{
    report->context = p->name;
    const cumoe_rows_t rows = stage_rows(p, report);
    cumoe_down_args_t a = {
        .struct_size = sizeof a,
        .num_tokens = p->tokens,
        .weights = &p->weights,
        .rows = rows,
        .hidden = stage_pack(p, &rows, p->expected.hidden, NULL, p->intermediate_size),
        .output = stage_empty(p, p->hidden_size),
    };
    a.workspace = stage_workspace(p, CUMOE_STAGE_DOWN, &a.workspace_size, report);
    if (!stage_succeeded(p, device_experts_down(p->handle, p->layer, &a), report)) return;
    stage_compare(p, &rows, "output", a.output, p->expected.output, NULL, p->hidden_size, report);
}

void stage_check_combine(problem_t *p, report_t *report)
{
    report->context = p->name;
    const cumoe_rows_t rows = stage_rows(p, report);
    const cumoe_combine_args_t a = {
        .struct_size = sizeof a,
        .num_tokens = p->tokens,
        .routing = stage_routing(p),
        .rows = rows,
        .output = stage_pack(p, &rows, p->expected.output, NULL, p->hidden_size),
        .y = p->forward.y,
        .y_stride = p->forward.y_stride,
    };
    if (!stage_succeeded(p, device_combine(p->handle, p->layer, &a), report)) return;
    problem_check_rows(p, "y", problem_rows_view(p, a.y, a.y_stride), p->expected.y, NULL, problem_limit(p),
                       report);
}

void stage_check_down_backward(problem_t *p, report_t *report)
{
    report->context = p->name;
    const cumoe_rows_t rows = stage_rows(p, report);
    const int64_t I = p->intermediate_size, slots = p->max_slots;
    const double *glu = stage_glu(p, p->expected.glu);
    cumoe_down_backward_args_t a = {
        .struct_size = sizeof a,
        .num_tokens = p->tokens,
        .weights = &p->weights,
        .routing = stage_routing(p),
        .rows = rows,
        .z = stage_pack(p, &rows, p->expected.up, glu, I),
        .dy = p->backward.dy,
        .dy_stride = p->backward.dy_stride,
        .dz = stage_empty(p, glu ? 2 * I : I),
        .dweight = buffer_get(&p->buffers, (size_t)slots * real_size(p->gate_type)),
        .gradients = &p->gradients,
        .gradient_mode = p->layer_case.mode,
    };
    a.workspace = stage_workspace(p, CUMOE_STAGE_DOWN_BACKWARD, &a.workspace_size, report);
    problem_reset_gradients(p);
    if (!stage_succeeded(p, device_experts_down_backward(p->handle, p->layer, &a), report)) return;
    stage_compare(p, &rows, "dz", a.dz, p->expected.dup, stage_glu(p, p->expected.dglu), I, report);
    compare_vector(report, "dweight", a.dweight, p->gate_type, slots, p->expected.dweight, stage_sum_limit(p));
    problem_check_gradients(p, MATRIX_DOWN, MATRIX_DOWN_BIAS, report);
}

void stage_check_gate_backward(problem_t *p, report_t *report)
{
    report->context = p->name;
    const size_t real = real_size(p->gate_type), slots = (size_t)p->max_slots;
    void *dweight = buffer_get(&p->buffers, slots * real);
    void *dx_gate = buffer_get(&p->buffers, (size_t)(p->tokens * p->hidden_size) * real);
    for (size_t s = 0; s < slots; s++) real_set(dweight, p->gate_type, (int64_t)s, p->expected.dweight[s]);
    cumoe_gate_backward_args_t a = {
        .struct_size = sizeof a,
        .num_tokens = p->tokens,
        .weights = &p->weights,
        .x = p->backward.x,
        .x_stride = p->backward.x_stride,
        .token_mask = p->backward.token_mask,
        .training = p->backward.training,
        .routing = stage_routing(p),
        .dweight = dweight,
        .loss_gradient = p->backward.loss_gradient,
        .dx_gate = dx_gate,
        .gradients = &p->gradients,
        .gradient_mode = p->layer_case.mode,
    };
    a.workspace = stage_workspace(p, CUMOE_STAGE_GATE_BACKWARD, &a.workspace_size, report);
    problem_reset_gradients(p);
    if (!stage_succeeded(p, device_gate_backward(p->handle, p->layer, &a), report)) return;
    real_view_t rows = problem_rows_view(p, dx_gate, p->hidden_size);
    rows.dtype = p->gate_type;
    problem_check_rows(p, "dx_gate", rows, problem_expected_dx(p, p->expected.dx_gate), p->expected.dx_gate_size,
                       problem_sum_limit(p), report);
    problem_check_gradients(p, MATRIX_GATE, MATRIX_GATE_BIAS, report);
}

void stage_check_up_backward(problem_t *p, report_t *report)
{
    report->context = p->name;
    const cumoe_rows_t rows = stage_rows(p, report);
    cumoe_up_backward_args_t a = {
        .struct_size = sizeof a,
        .num_tokens = p->tokens,
        .weights = &p->weights,
        .rows = rows,
        .x = p->backward.x,
        .x_stride = p->backward.x_stride,
        .dz = stage_pack(p, &rows, p->expected.dup, stage_glu(p, p->expected.dglu), p->intermediate_size),
        .drows = stage_empty(p, p->hidden_size),
        .gradients = &p->gradients,
        .gradient_mode = p->layer_case.mode,
    };
    a.workspace = stage_workspace(p, CUMOE_STAGE_UP_BACKWARD, &a.workspace_size, report);
    problem_reset_gradients(p);
    if (!stage_succeeded(p, device_experts_up_backward(p->handle, p->layer, &a), report)) return;
    stage_compare(p, &rows, "drows", a.drows, p->expected.drows, NULL, p->hidden_size, report);
    problem_check_gradients(p, MATRIX_UP, MATRIX_GLU_BIAS, report);

    a.drows = NULL;
    problem_reset_gradients(p);
    if (stage_succeeded(p, device_experts_up_backward(p->handle, p->layer, &a), report))
        problem_check_gradients(p, MATRIX_UP, MATRIX_GLU_BIAS, report);
}

void stage_check_permute_backward(problem_t *p, report_t *report)
{
    report->context = p->name;
    const cumoe_rows_t rows = stage_rows(p, report);
    const bool gated = p->options.variant.gate != CUMOE_GATE_EXTERNAL;
    const int64_t elements = p->tokens * p->hidden_size;
    void *dx_gate = buffer_get(&p->buffers, (size_t)elements * real_size(p->gate_type));
    for (int64_t i = 0; i < p->live_tokens * p->hidden_size; i++)
        real_set(dx_gate, p->gate_type, i, p->expected.dx_gate[i]);
    const cumoe_permute_backward_args_t a = {
        .struct_size = sizeof a,
        .num_tokens = p->tokens,
        .routing = stage_routing(p),
        .rows = rows,
        .drows = stage_pack(p, &rows, p->expected.drows, NULL, p->hidden_size),
        .dx_gate = gated ? dx_gate : NULL,
        .dx = p->backward.dx,
        .dx_stride = p->backward.dx_stride,
    };
    if (!stage_succeeded(p, device_permute_backward(p->handle, p->layer, &a), report)) return;
    problem_check_rows(p, "dx", problem_rows_view(p, a.dx, a.dx_stride), problem_expected_dx(p, p->expected.dx),
                       p->expected.dx_size, problem_limit(p), report);
}
