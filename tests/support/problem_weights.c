/* Layouts of weights: where element (expert, row, column) of a matrix stands. */
#include "tests/support/problem.h"

#include <stdlib.h>

const char *const PROBLEM_MATRIX_NAMES[NUM_MATRICES] = {"w_gate", "w_noise", "w_up", "w_glu", "w_down"};

static bool has_glu(const problem_t *problem)
{
    return problem->options.activation == CUMOE_ACTIVATION_SWIGLU;
}

bool problem_has_matrix(const problem_t *problem, problem_matrix_t matrix)
{
    switch (matrix) {
    case MATRIX_GATE:
        return problem->options.variant.gate != CUMOE_GATE_EXTERNAL;
    case MATRIX_NOISE:
        return problem->options.variant.gate == CUMOE_GATE_NOISY_TOPK;
    case MATRIX_GLU:
        return has_glu(problem);
    default:
        return true;
    }
}

void *const *problem_matrix_pointer(const cumoe_weights_t *weights, problem_matrix_t matrix)
{
    switch (matrix) {
    case MATRIX_GATE:
        return &weights->w_gate;
    case MATRIX_NOISE:
        return &weights->w_noise;
    case MATRIX_UP:
        return &weights->w_up;
    case MATRIX_GLU:
        return weights->glu == CUMOE_GLU_SEPARATE ? &weights->w_glu : &weights->w_up;
    default:
        return &weights->w_down;
    }
}

/* Rows 0, 1, ... of up or glu inside the array w_up [E, 2I, H]: first row, and distance in rows. */
static void placed_rows(const problem_t *problem, cumoe_glu_placement_t glu, problem_matrix_t matrix,
                        int64_t *first, int64_t *step)
{
    const int64_t I = problem->intermediate_size;
    const bool is_glu = matrix == MATRIX_GLU;
    *step = glu == CUMOE_GLU_INTERLEAVED ? 2 : 1;
    *first = glu == CUMOE_GLU_FIRST         ? (is_glu ? 0 : I)
             : glu == CUMOE_GLU_LAST        ? (is_glu ? I : 0)
             : glu == CUMOE_GLU_INTERLEAVED ? (is_glu ? 0 : 1)
                                            : 0;
}

static int64_t stored_rows(const problem_t *problem, cumoe_glu_placement_t glu)
{
    return problem->intermediate_size * (glu == CUMOE_GLU_SEPARATE ? 1 : 2);
}

static int64_t or_default(int64_t stride, int64_t fallback)
{
    return stride ? stride : fallback;
}

real_view_t problem_matrix_view(const problem_t *problem, const cumoe_weights_t *weights, problem_matrix_t matrix,
                                int64_t expert)
{
    const int64_t H = problem->hidden_size, I = problem->intermediate_size;
    real_view_t view = {.data = *problem_matrix_pointer(weights, matrix), .dtype = problem->options.dtype};
    int64_t offset;
    if (matrix == MATRIX_GATE || matrix == MATRIX_NOISE) {
        view.rows = 1, view.cols = H, view.row_stride = H, view.col_stride = 1;
        offset = expert * H;
    } else if (matrix == MATRIX_DOWN) {
        view.rows = H, view.cols = I;
        view.col_stride = or_default(weights->down_col_stride, 1);
        view.row_stride = or_default(weights->down_row_stride, I);
        offset = expert * or_default(weights->down_expert_stride, H * I);
    } else {
        int64_t first, step;
        placed_rows(problem, weights->glu, matrix, &first, &step);
        const int64_t row_stride = or_default(weights->up_row_stride, H);
        view.rows = I, view.cols = H;
        view.col_stride = or_default(weights->up_col_stride, 1);
        view.row_stride = step * row_stride;
        offset = expert * or_default(weights->up_expert_stride, stored_rows(problem, weights->glu) * H) +
                 first * row_stride;
    }
    if (view.data) view.data = (char *)view.data + (size_t)offset * real_size(view.dtype);
    return view;
}

void problem_weights_layout(problem_t *problem, cumoe_weights_t *weights, cumoe_glu_placement_t glu,
                            case_layout_t layout, size_t *bytes)
{
    const int64_t H = problem->hidden_size, I = problem->intermediate_size, E = problem->experts;
    *weights =
        (cumoe_weights_t){.struct_size = sizeof *weights, .glu = has_glu(problem) ? glu : CUMOE_GLU_SEPARATE};
    const int64_t rows = stored_rows(problem, weights->glu);
    int64_t up_elements = E * rows * H, down_elements = E * H * I;
    if (layout == LAYOUT_PADDED) {
        weights->up_row_stride = H + 3;
        weights->up_expert_stride = rows * (H + 3) + 7;
        weights->down_row_stride = I + 2;
        weights->down_expert_stride = H * (I + 2) + 5;
        up_elements = E * weights->up_expert_stride;
        down_elements = E * weights->down_expert_stride;
    } else if (layout == LAYOUT_TRANSPOSED) {
        weights->up_row_stride = 1;
        weights->up_col_stride = rows;
        weights->down_row_stride = 1;
        weights->down_col_stride = H;
    }
    const int64_t elements[NUM_MATRICES] = {E * H, E * H, up_elements, up_elements, down_elements};
    for (int m = 0; m < NUM_MATRICES; m++) {
        const bool inside_up = m == MATRIX_GLU && weights->glu != CUMOE_GLU_SEPARATE;
        bytes[m] = problem_has_matrix(problem, m) && !inside_up
                       ? (size_t)elements[m] * real_size(problem->options.dtype)
                       : 0;
        if (bytes[m]) *(void **)problem_matrix_pointer(weights, m) = buffer_get(&problem->buffers, bytes[m]);
    }
}

int64_t problem_matrix_elements(const problem_t *problem, problem_matrix_t matrix)
{
    const bool gate = matrix == MATRIX_GATE || matrix == MATRIX_NOISE;
    return problem->experts * problem->hidden_size * (gate ? 1 : problem->intermediate_size);
}

void problem_matrix_set(const problem_t *problem, const cumoe_weights_t *weights, problem_matrix_t matrix,
                        const double *values)
{
    for (int64_t e = 0; e < problem->experts; e++) {
        const real_view_t view = problem_matrix_view(problem, weights, matrix, e);
        real_scatter(view, values + e * view.rows * view.cols);
    }
}

void problem_matrix_get(const problem_t *problem, const cumoe_weights_t *weights, problem_matrix_t matrix,
                        double *values)
{
    for (int64_t e = 0; e < problem->experts; e++) {
        const real_view_t view = problem_matrix_view(problem, weights, matrix, e);
        real_gather(view, values + e * view.rows * view.cols);
    }
}
