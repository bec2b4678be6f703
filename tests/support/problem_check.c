/* Running a problem and looking at everything that came back. */
#include "tests/support/device.h"
#include "tests/support/problem.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

double problem_gate_limit(const problem_t *p)
{
    const int64_t length = p->tokens + p->hidden_size + p->intermediate_size + p->experts;
    return 8 * sqrt((double)length) * real_rounding_unit(p->gate_type);
}

double problem_sum_limit(const problem_t *p)
{
    const double unit = ldexp(0.5, -CUMOE_FIXED_POINT_BITS(p->options.dtype));
    return problem_gate_limit(p) + 8 * sqrt((double)p->tokens) * unit;
}

static const double TF32_ROUNDING_UNIT = 0x1p-11;

/* The reference rounds to 16 bits where the library does. A sum that lies beside a boundary may still go to the
 * other side of it, two units off, and the next sum hands that on. Even if every number of all four arrays between
 * x and y (or dy and dx) did, independently, it would be sqrt(4) times two units.
 * TF32: both factors of a product are rounded, which the reference does not do. The errors of a sum are independent
 * and so relative to its norm no larger than those of one product, sqrt(2) units at most; there are four such sums.
 */
double problem_limit(const problem_t *p)
{
    const bool rounded = p->options.dtype != p->gate_type;
    const double tf32 = p->options.compute == CUMOE_COMPUTE_TF32 ? TF32_ROUNDING_UNIT : 0;
    return problem_gate_limit(p) + 4 * (rounded ? real_rounding_unit(p->options.dtype) : tf32);
}

/* ---- outputs ---- */

typedef struct output {
    const char *name;
    void *data;
    size_t size;
} output_t;

enum { MAX_OUTPUTS = 2 + NUM_MATRICES }; /* those of forward are no more */

static size_t row_bytes(const problem_t *p, int64_t stride)
{
    return (size_t)(p->tokens * stride) * real_size(p->options.dtype);
}

static int forward_outputs(const problem_t *p, output_t *outputs)
{
    const cumoe_forward_args_t *a = &p->forward;
    const size_t real = real_size(p->gate_type), E = (size_t)p->experts, slots = (size_t)p->max_slots;
    const output_t all[] = {
        {"y", a->y, row_bytes(p, a->y_stride)},
        {"chosen_expert", a->chosen_expert, slots * sizeof(int32_t)},
        {"chosen_weight", a->chosen_weight, slots * real},
        {"chosen_offset", a->chosen_offset, (size_t)(p->tokens + 1) * sizeof(int32_t)},
        {"expert_count", a->expert_count, E * sizeof(int32_t)},
        {"importance", a->importance, E * real},
        {"load", a->load, E * real},
        {"batch_threshold", a->batch_threshold, E * real},
        {"losses", a->losses, CUMOE_NUM_LOSSES * real},
        {"statistics", a->statistics, sizeof *a->statistics},
    };
    int n = 0;
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (all[i].data) outputs[n++] = all[i];
    return n;
}

static int backward_outputs(const problem_t *p, output_t *outputs)
{
    const size_t slots = (size_t)(p->tokens * p->top_k);
    int n = 0;
    outputs[n++] = (output_t){"dx", p->backward.dx, row_bytes(p, p->backward.dx_stride)};
    if (p->backward.dindex_weight)
        outputs[n++] = (output_t){"dindex_weight", p->backward.dindex_weight, slots * real_size(p->gate_type)};
    for (problem_matrix_t m = 0; m < NUM_MATRICES; m++)
        if (p->gradient_bytes[m])
            outputs[n++] = (output_t){PROBLEM_MATRIX_NAMES[m], *problem_matrix_pointer(&p->gradients, m),
                                      p->gradient_bytes[m]};
    return n;
}

static int outputs_of(const problem_t *p, bool backward, output_t *outputs)
{
    return backward ? backward_outputs(p, outputs) : forward_outputs(p, outputs);
}

problem_bits_t problem_outputs(const problem_t *p, bool backward)
{
    output_t outputs[MAX_OUTPUTS];
    const int n = outputs_of(p, backward, outputs);
    problem_bits_t bits = {0, NULL};
    for (int i = 0; i < n; i++) bits.size += outputs[i].size;
    bits.data = malloc(bits.size + 1);
    for (size_t i = 0, at = 0; bits.data && i < (size_t)n; at += outputs[i++].size)
        memcpy(bits.data + at, outputs[i].data, outputs[i].size);
    return bits;
}

void problem_compare_outputs(const problem_t *p, bool backward, const problem_bits_t *expected, report_t *report)
{
    output_t outputs[MAX_OUTPUTS];
    const int n = outputs_of(p, backward, outputs);
    size_t at = 0;
    for (int i = 0; i < n; at += outputs[i++].size)
        compare_bits(report, outputs[i].name, outputs[i].data, expected->data + at, outputs[i].size);
}

void problem_bits_free(problem_bits_t *bits)
{
    free(bits->data);
    *bits = (problem_bits_t){0, NULL};
}

/* ---- running ---- */

void problem_reset_gradients(problem_t *p)
{
    for (problem_matrix_t m = 0; m < NUM_MATRICES; m++)
        if (p->gradient_bytes[m]) buffer_poison(*problem_matrix_pointer(&p->gradients, m), p->gradient_bytes[m]);
    for (problem_matrix_t m = 0; m < NUM_MATRICES; m++)
        if (problem_has_gradient(p, m)) problem_matrix_set(p, &p->gradients, m, p->gradient_before[m]);
}

void problem_poison_outputs(problem_t *p, bool backward)
{
    output_t outputs[MAX_OUTPUTS];
    const int n = outputs_of(p, backward, outputs);
    for (int i = 0; i < n; i++) buffer_poison(outputs[i].data, outputs[i].size);
    if (backward) problem_reset_gradients(p);
    buffer_poison(p->forward.workspace, p->workspace_size);
    if (!backward && p->forward.saved) buffer_poison(p->forward.saved, p->saved_size);
}

static bool run(problem_t *p, bool backward, report_t *report)
{
    report->context = p->name;
    problem_poison_outputs(p, backward);
    const cumoe_status_t status = backward ? device_layer_backward(p->handle, p->layer, &p->backward)
                                           : device_layer_forward(p->handle, p->layer, &p->forward);
    if (status != CUMOE_SUCCESS) report_fail(report, "%s", cumoe_last_error());
    report_check(report, buffer_guards_intact(&p->buffers));
    report_check(report, problem_input_hash(p) == p->input_hash);
    return status == CUMOE_SUCCESS;
}

bool problem_run_forward(problem_t *p, report_t *report)
{
    return run(p, false, report);
}

bool problem_run_backward(problem_t *p, report_t *report)
{
    return run(p, true, report);
}

/* ---- comparing ---- */

static bool padding(const problem_t *p, int64_t t)
{
    return p->input.token_mask && !p->input.token_mask[t];
}

/* Rows of tokens: as expected, exactly 0 for padding, untouched beyond the live ones and between the rows. */
void problem_check_rows(const problem_t *p, const char *what, real_view_t rows, const double *expected,
                        const double *size, double limit, report_t *report)
{
    const size_t real = real_size(rows.dtype), used = (size_t)rows.cols * real;
    real_view_t live_rows = rows;
    live_rows.rows = p->live_tokens;
    if (expected) compare_view(report, what, live_rows, expected, size, limit);
    for (int64_t t = 0; t < p->tokens; t++) {
        const char *row = (const char *)rows.data + (size_t)(t * rows.row_stride) * real;
        const bool live = t < p->live_tokens;
        if (!buffer_is_poison(row + (live ? used : 0), (size_t)rows.row_stride * real - (live ? used : 0)))
            report_fail(report, "%s: written outside of live rows, near row %" PRId64, what, t);
        for (int64_t h = 0; h < rows.cols && live && padding(p, t); h++)
            if (real_get(row, rows.dtype, h) != 0)
                report_fail(report, "%s: row %" PRId64 " is padding and not 0", what, t);
    }
}

real_view_t problem_rows_view(const problem_t *p, const void *data, int64_t stride)
{
    return (real_view_t){(void *)data, p->options.dtype, p->tokens, p->hidden_size, stride, 1};
}

int64_t problem_num_slots(const problem_t *p)
{
    return p->expected.token_slot[p->tokens];
}

/* Padding and tokens that are not live have no experts. */
static void check_choices(const problem_t *p, report_t *report)
{
    const int64_t slots = problem_num_slots(p);
    if (p->forward.chosen_offset) {
        const int failures = report->failures;
        compare_bits(report, "chosen_offset", p->forward.chosen_offset, p->expected.token_slot,
                     (size_t)(p->tokens + 1) * sizeof(int32_t));
        if (report->failures > failures) return;
    }
    for (int64_t s = 0; s < slots; s++)
        if (p->forward.chosen_expert[s] != p->expected.expert[s]) {
            const int32_t token = p->expected.slot_token[s];
            report_fail(report, "chosen_expert: slot %" PRId64 " of token %d is %d, expected %d",
                        s - p->expected.token_slot[token], token, p->forward.chosen_expert[s],
                        p->expected.expert[s]);
            break;
        }
    compare_vector(report, "chosen_weight", p->forward.chosen_weight, p->gate_type, slots, p->expected.weight,
                   problem_gate_limit(p));
    for (int64_t s = 0; s < slots; s++)
        if (p->expected.weight[s] == 0 && p->expected.expert[s] < 0)
            report_check(report, real_get(p->forward.chosen_weight, p->gate_type, s) == 0);
}

/* CV^2 of numbers that are off by a relative limit: CV is off by about the limit, and so is the root of the mean
 * square of Z. SWITCH is a sum of positive terms. THRESHOLD is one of terms that cancel. */
static void check_losses(const problem_t *p, report_t *report)
{
    const double limit = problem_sum_limit(p);
    for (int l = 0; l < CUMOE_NUM_LOSSES; l++) {
        const double actual = real_get(p->forward.losses, p->gate_type, l), expected = p->expected.losses[l];
        const double size =
            l == CUMOE_LOSS_THRESHOLD ? p->expected.threshold_loss_size : expected + 2 * sqrt(expected);
        const double allowed = limit * (size + limit);
        const bool as_expected = isfinite(expected) ? fabs(actual - expected) <= allowed
                                                    : actual == expected || (isnan(actual) && isnan(expected));
        if (!as_expected)
            report_fail(report, "losses[%d] = %.9g, expected %.9g +- %.3g", l, actual, expected, allowed);
    }
}

static void check_count(report_t *report, const char *what, int64_t actual, int64_t expected)
{
    if (actual != expected)
        report_fail(report, "statistics.%s = %" PRId64 ", expected %" PRId64, what, actual, expected);
}

static void check_ratio(report_t *report, const char *what, double actual, double expected, double limit)
{
    if (!(fabs(actual - expected) <= limit * (1 + expected)))
        report_fail(report, "statistics.%s = %.9g, expected %.9g", what, actual, expected);
}

static void check_statistics(const problem_t *p, report_t *report)
{
    const cumoe_statistics_t *a = p->forward.statistics, *e = &p->expected.statistics;
    const double limit = problem_sum_limit(p);
    check_count(report, "tokens", a->tokens, e->tokens);
    check_count(report, "rows", a->rows, e->rows);
    check_count(report, "nan_logits", a->nan_logits, e->nan_logits);
    check_count(report, "nan_tokens", a->nan_tokens, e->nan_tokens);
    check_count(report, "bad_indices", a->bad_indices, e->bad_indices);
    check_count(report, "dropped_rows", a->dropped_rows, e->dropped_rows);
    check_count(report, "exchange_overflow", a->exchange_overflow, 0);
    check_count(report, "max_count", a->max_count, e->max_count);
    check_ratio(report, "cv_importance", a->cv_importance, e->cv_importance, limit);
    check_ratio(report, "cv_load", a->cv_load, e->cv_load, limit);
    check_ratio(report, "max_over_mean_load", a->max_over_mean_load, e->max_over_mean_load, limit);
    check_ratio(report, "max_over_mean_count", a->max_over_mean_count, e->max_over_mean_count, limit);
}

void problem_check_gate(problem_t *p, report_t *report)
{
    report->context = p->name;
    check_choices(p, report);
    for (int64_t e = 0; e < p->experts; e++)
        if (p->forward.expert_count[e] != p->expected.count[e])
            report_fail(report, "expert_count[%" PRId64 "] = %d, expected %" PRId64, e, p->forward.expert_count[e],
                        p->expected.count[e]);
    compare_vector(report, "importance", p->forward.importance, p->gate_type, p->experts, p->expected.importance,
                   problem_sum_limit(p));
    compare_vector(report, "load", p->forward.load, p->gate_type, p->experts, p->expected.load,
                   problem_sum_limit(p));
    if (p->forward.batch_threshold)
        compare_vector(report, "batch_threshold", p->forward.batch_threshold, p->gate_type, p->experts,
                       p->expected.batch_threshold, problem_gate_limit(p));
    check_losses(p, report);
    check_statistics(p, report);
}

/* Of what experts give: nothing at all where every sum is exact. */
static double experts_limit(const problem_t *p)
{
    return p->layer_case.pattern == PATTERN_INTEGERS ? 0 : problem_limit(p);
}

/* Of what the gate has a part in: it gets the gradients of its weights from the experts. */
static double gate_gradient_limit(const problem_t *p)
{
    return fmax(experts_limit(p), p->options.variant.gate == CUMOE_GATE_EXTERNAL ? 0 : problem_sum_limit(p));
}

void problem_check_forward(problem_t *p, report_t *report)
{
    report->context = p->name;
    problem_check_rows(p, "y", problem_rows_view(p, p->forward.y, p->forward.y_stride), p->expected.y, NULL,
                       experts_limit(p), report);
    problem_check_gate(p, report);
}

static const double *expected_gradient(const problem_t *p, problem_matrix_t matrix)
{
    const reference_result_t *r = &p->expected;
    const double *const gradients[NUM_MATRICES] = {
        r->dw_gate, r->dw_noise, r->dw_gate_primary, r->dw_noise_primary, r->dthresholds, NULL,
        r->dw_up,   r->dw_glu,   r->db_up,           r->db_glu,           r->dw_down,     r->db_down};
    return gradients[matrix];
}

/* How large its terms are before they cancel. */
static const double *gradient_terms(const problem_t *p, problem_matrix_t matrix)
{
    const reference_result_t *r = &p->expected;
    const double *const terms[] = {r->dw_gate_size, r->dw_noise_size, r->dw_gate_primary_size,
                                   r->dw_noise_primary_size};
    return matrix < MATRIX_THRESHOLDS ? terms[matrix] : expected_gradient(p, matrix);
}

/* An expert without rows: zeros with WRITE, nothing happened with ADD. */
static void check_idle_experts(const problem_t *p, problem_matrix_t matrix, const double *actual, report_t *report)
{
    const int64_t elements = problem_matrix_elements(p, matrix) / p->experts;
    if (matrix < MATRIX_UP) return;
    for (int64_t e = 0; e < p->experts; e++) {
        if (p->expected.count[e] > 0) continue;
        for (int64_t i = e * elements; i < (e + 1) * elements; i++) {
            const double wanted = p->layer_case.mode == CUMOE_GRADIENT_ADD ? p->gradient_before[matrix][i] : 0;
            if (actual[i] == wanted) continue;
            report_fail(report, "%s: expert %" PRId64 " has no rows, but its gradient is %g, not %g",
                        PROBLEM_MATRIX_NAMES[matrix], e, actual[i], wanted);
            break;
        }
    }
}

static void check_gradient(problem_t *p, problem_matrix_t matrix, report_t *report)
{
    const int64_t n = problem_matrix_elements(p, matrix);
    const bool add = p->layer_case.mode == CUMOE_GRADIENT_ADD;
    const cumoe_dtype_t dtype = problem_matrix_view(p, &p->gradients, matrix, 0).dtype;
    const double *computed = expected_gradient(p, matrix), *before = p->gradient_before[matrix];
    const double *terms = gradient_terms(p, matrix);
    double *values = malloc((size_t)(3 * n) * sizeof *values);
    if (!values) {
        report_fail(report, "no memory to compare");
        return;
    }
    double *actual = values, *wanted = values + n, *size = values + 2 * n;
    problem_matrix_get(p, &p->gradients, matrix, actual);
    for (int64_t i = 0; i < n; i++) {
        wanted[i] = real_round(dtype, computed[i] + (add ? before[i] : 0));
        size[i] = fabs(terms[i]) + (add ? fabs(before[i]) : 0);
    }
    compare_scaled(report, PROBLEM_MATRIX_NAMES[matrix], n, actual, wanted, size,
                   matrix < MATRIX_UP ? gate_gradient_limit(p) : experts_limit(p));
    check_idle_experts(p, matrix, actual, report);
    free(values);
}

/* Poison all elements: what is left of the array, the gaps, must be poison already. */
static void check_gaps(problem_t *p, problem_matrix_t first, problem_matrix_t last, report_t *report)
{
    for (problem_matrix_t m = first; m <= last; m++)
        for (int64_t b = 0; b < problem_matrix_blocks(p, m) && problem_has_gradient(p, m); b++) {
            const real_view_t view = problem_matrix_view(p, &p->gradients, m, b);
            for (int64_t i = 0; i < view.rows * view.cols; i++)
                buffer_poison((char *)view.data +
                                  (size_t)(i / view.cols * view.row_stride + i % view.cols * view.col_stride) *
                                      real_size(view.dtype),
                              real_size(view.dtype));
        }
    for (problem_matrix_t m = first; m <= last; m++)
        if (p->gradient_bytes[m] &&
            !buffer_is_poison(*problem_matrix_pointer(&p->gradients, m), p->gradient_bytes[m]))
            report_fail(report, "%s: written between the rows", PROBLEM_MATRIX_NAMES[m]);
}

void problem_check_gradients(problem_t *p, problem_matrix_t first, problem_matrix_t last, report_t *report)
{
    report->context = p->name;
    const bool tokens_finite = p->layer_case.pattern != PATTERN_NONFINITE_TOKENS;
    for (problem_matrix_t m = first; m <= last; m++)
        if (problem_has_gradient(p, m) && (tokens_finite || m >= MATRIX_THRESHOLDS)) check_gradient(p, m, report);
    check_gaps(p, first, last, report);
}

const double *problem_expected_dx(const problem_t *p, const double *expected)
{
    const case_pattern_t pattern = p->layer_case.pattern;
    const bool promised = pattern != PATTERN_NONFINITE_WEIGHTS && pattern != PATTERN_ALL_REFUSED &&
                          pattern != PATTERN_PRIMARY_REFUSED && pattern != PATTERN_NONFINITE_TOKENS;
    return promised ? expected : NULL;
}

void problem_check_backward(problem_t *p, report_t *report)
{
    report->context = p->name;
    problem_check_rows(p, "dx", problem_rows_view(p, p->backward.dx, p->backward.dx_stride),
                       problem_expected_dx(p, p->expected.dx), p->expected.dx_size, gate_gradient_limit(p), report);
    if (p->backward.dindex_weight)
        compare_vector(report, "dindex_weight", p->backward.dindex_weight, p->gate_type, p->tokens * p->top_k,
                       p->expected.dweight, problem_limit(p));
    problem_check_gradients(p, MATRIX_GATE, MATRIX_DOWN_BIAS, report);
}
