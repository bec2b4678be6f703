/* Layouts of weights: where element (expert, row, column) of a matrix stands. */
#include "tests/support/device.h"
#include "tests/support/problem.h"

const char *const PROBLEM_MATRIX_NAMES[NUM_MATRICES] = {
    "w_gate", "w_noise", "w_gate_primary", "w_noise_primary", "thresholds", "gate_bias",
    "w_up",   "w_glu",   "b_up",           "b_glu",           "w_down",     "b_down"};

bool problem_has_glu(const problem_t *problem)
{
    const cumoe_activation_t activation = problem->options.activation;
    return activation == CUMOE_ACTIVATION_SWIGLU || activation == CUMOE_ACTIVATION_GEGLU ||
           activation == CUMOE_ACTIVATION_SWIGLU_CLAMPED || activation == CUMOE_ACTIVATION_GEGLU_TANH;
}

bool problem_has_matrix(const problem_t *problem, problem_matrix_t matrix)
{
    const bool has_up = problem->options.activation != CUMOE_ACTIVATION_IDENTITY, bias = problem->options.bias;
    const cumoe_gate_kind_t gate = problem->options.variant.gate;
    switch (matrix) {
    case MATRIX_GATE:
        return gate != CUMOE_GATE_EXTERNAL;
    case MATRIX_NOISE:
        return gate == CUMOE_GATE_NOISY_TOPK || gate == CUMOE_GATE_HIERARCHICAL;
    case MATRIX_GATE_PRIMARY:
    case MATRIX_NOISE_PRIMARY:
        return gate == CUMOE_GATE_HIERARCHICAL;
    case MATRIX_THRESHOLDS:
        return gate == CUMOE_GATE_BALANCED;
    case MATRIX_GATE_BIAS:
        return gate == CUMOE_GATE_SIGMOID_TOPK && problem->options.variant.gate_bias;
    case MATRIX_UP:
        return has_up;
    case MATRIX_UP_BIAS:
        return has_up && bias;
    case MATRIX_GLU:
        return problem_has_glu(problem);
    case MATRIX_GLU_BIAS:
        return problem_has_glu(problem) && bias;
    case MATRIX_DOWN_BIAS:
        return bias;
    default:
        return true;
    }
}

bool problem_has_gradient(const problem_t *problem, problem_matrix_t matrix)
{
    return problem_has_matrix(problem, matrix) && matrix != MATRIX_GATE_BIAS;
}

int64_t problem_matrix_blocks(const problem_t *problem, problem_matrix_t matrix)
{
    const bool of_groups = matrix == MATRIX_GATE_PRIMARY || matrix == MATRIX_NOISE_PRIMARY;
    return of_groups ? problem->groups : problem->experts;
}

/* Which half of a combined array is meant. */
static bool is_glu(problem_matrix_t matrix)
{
    return matrix == MATRIX_GLU || matrix == MATRIX_GLU_BIAS;
}

void *const *problem_matrix_pointer(const cumoe_weights_t *weights, problem_matrix_t matrix)
{
    const bool combined = weights->glu != CUMOE_GLU_SEPARATE;
    void *const *const pointers[NUM_MATRICES] = {
        &weights->w_gate,         &weights->w_noise,
        &weights->w_gate_primary, &weights->w_noise_primary,
        &weights->thresholds,     &weights->gate_bias,
        &weights->w_up,           combined ? &weights->w_up : &weights->w_glu,
        &weights->b_up,           combined ? &weights->b_up : &weights->b_glu,
        &weights->w_down,         &weights->b_down,
    };
    return pointers[matrix];
}

/* Rows 0, 1, ... of up or glu inside the array w_up [E, 2I, H], and of biases inside b_up [E, 2I]: the first, and
 * the distance. */
static void placed_rows(const problem_t *problem, cumoe_glu_placement_t glu, problem_matrix_t matrix,
                        int64_t *first, int64_t *step)
{
    const int64_t I = problem->intermediate_size;
    *step = glu == CUMOE_GLU_INTERLEAVED ? 2 : 1;
    *first = glu == CUMOE_GLU_FIRST         ? (is_glu(matrix) ? 0 : I)
             : glu == CUMOE_GLU_LAST        ? (is_glu(matrix) ? I : 0)
             : glu == CUMOE_GLU_INTERLEAVED ? (is_glu(matrix) ? 0 : 1)
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

static bool of_gate(problem_matrix_t matrix)
{
    return matrix < MATRIX_THRESHOLDS;
}

static bool one_number(problem_matrix_t matrix)
{
    return matrix == MATRIX_THRESHOLDS || matrix == MATRIX_GATE_BIAS;
}

static cumoe_dtype_t matrix_dtype(const problem_t *problem, const cumoe_weights_t *weights, problem_matrix_t matrix)
{
    if (of_gate(matrix)) return weights->gate_dtype ? weights->gate_dtype : problem->gate_type;
    if (one_number(matrix)) return problem->gate_type;
    return weights->dtype ? weights->dtype : problem->options.dtype;
}

/* A matrix with one row, col_step elements between its columns. */
static real_view_t one_row(int64_t cols, int64_t col_step)
{
    return (real_view_t){.rows = 1, .cols = cols, .row_stride = cols * col_step, .col_stride = col_step};
}

real_view_t problem_matrix_view(const problem_t *problem, const cumoe_weights_t *weights, problem_matrix_t matrix,
                                int64_t block)
{
    const int64_t H = problem->hidden_size, I = problem->intermediate_size,
                  rows = stored_rows(problem, weights->glu);
    int64_t first, step, offset;
    real_view_t view;
    placed_rows(problem, weights->glu, matrix, &first, &step);
    if (of_gate(matrix) || matrix == MATRIX_DOWN_BIAS) {
        view = one_row(H, 1);
        offset = block * H;
    } else if (one_number(matrix)) {
        view = one_row(1, 1);
        offset = block;
    } else if (matrix == MATRIX_UP_BIAS || matrix == MATRIX_GLU_BIAS) {
        view = one_row(I, step);
        offset = block * rows + first;
    } else if (matrix == MATRIX_DOWN) {
        view = (real_view_t){.rows = H,
                             .cols = I,
                             .row_stride = or_default(weights->down_row_stride, I),
                             .col_stride = or_default(weights->down_col_stride, 1)};
        offset = block * or_default(weights->down_expert_stride, H * I);
    } else {
        const int64_t row_stride = or_default(weights->up_row_stride, H);
        view = (real_view_t){.rows = I,
                             .cols = H,
                             .row_stride = step * row_stride,
                             .col_stride = or_default(weights->up_col_stride, 1)};
        offset = block * or_default(weights->up_expert_stride, rows * H) + first * row_stride;
    }
    view.dtype = matrix_dtype(problem, weights, matrix);
    view.data = *problem_matrix_pointer(weights, matrix);
    if (view.data) view.data = (char *)view.data + (size_t)offset * real_size(view.dtype);
    return view;
}

void problem_weights_layout(problem_t *problem, cumoe_weights_t *weights, cumoe_glu_placement_t glu,
                            case_layout_t layout, size_t *bytes)
{
    const int64_t H = problem->hidden_size, I = problem->intermediate_size, E = problem->experts;
    weights->struct_size = sizeof *weights;
    weights->glu = problem_has_glu(problem) ? glu : CUMOE_GLU_SEPARATE;
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
    const int64_t G = problem->groups;
    const int64_t elements[NUM_MATRICES] = {E * H,       E * H,    G * H,    G * H,         E,    E, up_elements,
                                            up_elements, E * rows, E * rows, down_elements, E * H};
    for (problem_matrix_t m = 0; m < NUM_MATRICES; m++) {
        const bool inside_up = is_glu(m) && weights->glu != CUMOE_GLU_SEPARATE;
        bytes[m] = problem_has_matrix(problem, m) && !inside_up
                       ? (size_t)elements[m] * real_size(matrix_dtype(problem, weights, m))
                       : 0;
        if (bytes[m]) *(void **)problem_matrix_pointer(weights, m) = buffer_get(&problem->buffers, bytes[m]);
    }
}

cumoe_weights_t problem_adopt_weights(problem_t *problem, const cumoe_weights_t *created)
{
    cumoe_weights_t adopted = *created;
    for (problem_matrix_t m = 0; m < NUM_MATRICES; m++) {
        void **pointer = (void **)problem_matrix_pointer(&adopted, m);
        const size_t size =
            (size_t)problem_matrix_elements(problem, m) * real_size(matrix_dtype(problem, created, m));
        *pointer = device_adopt(&problem->buffers, problem->handle, *pointer, size);
    }
    return adopted;
}

int64_t problem_matrix_elements(const problem_t *problem, problem_matrix_t matrix)
{
    const real_view_t view = problem_matrix_view(problem, &problem->weights, matrix, 0);
    return problem_matrix_blocks(problem, matrix) * view.rows * view.cols;
}

void problem_matrix_set(const problem_t *problem, const cumoe_weights_t *weights, problem_matrix_t matrix,
                        const double *values)
{
    for (int64_t b = 0; b < problem_matrix_blocks(problem, matrix); b++) {
        const real_view_t view = problem_matrix_view(problem, weights, matrix, b);
        real_scatter(view, values + b * view.rows * view.cols);
    }
}

void problem_matrix_get(const problem_t *problem, const cumoe_weights_t *weights, problem_matrix_t matrix,
                        double *values)
{
    for (int64_t b = 0; b < problem_matrix_blocks(problem, matrix); b++) {
        const real_view_t view = problem_matrix_view(problem, weights, matrix, b);
        real_gather(view, values + b * view.rows * view.cols);
    }
}
