/* A case made flesh: buffers, weights in the asked layout, argument structs ready to call, and beside them the same
 * numbers in double precision with the reference's answer. Every buffer is guarded and poisoned. */
#ifndef CUMOE_TESTS_PROBLEM_H
#define CUMOE_TESTS_PROBLEM_H

#include "tests/support/buffers.h"
#include "tests/support/cases.h"
#include "tests/support/compare.h"
#include "tests/support/random.h"
#include "tests/support/reference.h"

#include <cumoe/cumoe.h>

/* What is varied beside the case. */
typedef struct problem_options {
    cumoe_dtype_t dtype;
    cumoe_dtype_t gate_dtype;         /* of the gate's weights; default: the gate type */
    cumoe_dtype_t gradient_dtype;     /* of the experts' gradients; default: dtype */
    cumoe_dtype_t index_weight_dtype; /* default: the gate type */
    cumoe_activation_t activation;
    bool bias;
    gate_variant_t variant;
    uint64_t seed;
    int32_t recompute, max_threads, max_sms;
    cumoe_compute_t compute;
    bool without_reference; /* no expected values (large cases): margins are not looked at */
} problem_options_t;

/* The arrays of parameters in a layer. A bias is a matrix with one row, a threshold one with one element. */
typedef enum problem_matrix {
    MATRIX_GATE,
    MATRIX_NOISE,
    MATRIX_GATE_PRIMARY,
    MATRIX_NOISE_PRIMARY,
    MATRIX_THRESHOLDS,
    MATRIX_GATE_BIAS,
    MATRIX_UP,
    MATRIX_GLU,
    MATRIX_UP_BIAS,
    MATRIX_GLU_BIAS,
    MATRIX_DOWN,
    MATRIX_DOWN_BIAS,
    NUM_MATRICES
} problem_matrix_t;

extern const char *const PROBLEM_MATRIX_NAMES[NUM_MATRICES];

typedef struct problem {
    char name[200];
    layer_case_t layer_case;
    problem_options_t options;
    const cumoe_handle_t *handle;
    cumoe_config_t config;
    cumoe_layer_t *layer;
    buffer_list_t buffers;
    cumoe_dtype_t gate_type; /* F32, or F64 with F64 */
    int64_t tokens, live_tokens, hidden_size, experts;
    int64_t intermediate_size;    /* hidden_size for IDENTITY */
    int64_t top_k;                /* slots of a token, but for BALANCED */
    int64_t groups, top_k_groups; /* HIERARCHICAL, else 0 */
    int64_t max_rows, max_slots;  /* cumoe_layer_max_rows() */

    cumoe_call_t *call; /* NULL when the numbers stand in the argument struct */
    cumoe_weights_t weights, gradients;
    size_t weight_bytes[NUM_MATRICES], gradient_bytes[NUM_MATRICES]; /* 0 where there is no array */
    size_t workspace_size, saved_size;
    uint64_t input_hash; /* of x and weights: nobody may change them */
    cumoe_forward_args_t forward;
    cumoe_backward_args_t backward;

    double *values[NUM_MATRICES];          /* [blocks, rows, cols]; NULL where there is no matrix */
    double *gradient_before[NUM_MATRICES]; /* [blocks, rows, cols]: what is there before the backward call */
    reference_input_t input;
    reference_result_t expected;
} problem_t;

/* Case and options in a line. */
void problem_name(char *name, size_t size, const layer_case_t *layer_case, const problem_options_t *options);

/* false, with a line in the report: the layer could not be created. Destroy it in either case. */
bool problem_create(problem_t *problem, const cumoe_handle_t *handle, const layer_case_t *layer_case,
                    const problem_options_t *options, report_t *report);
void problem_destroy(problem_t *problem);

/* Poison what the calls write, gradients that are added to excepted: they get what is there before. */
void problem_poison_outputs(problem_t *problem, bool backward);

/* The same, then call; a status other than success goes into the report. */
bool problem_run_forward(problem_t *problem, report_t *report);
bool problem_run_backward(problem_t *problem, report_t *report);

/* Everything that the call wrote, and that it wrote nothing else. */
void problem_check_forward(problem_t *problem, report_t *report);
void problem_check_backward(problem_t *problem, report_t *report);

/* Parts of these: what the gate gives beside y; gradients of the matrices first to last; rows of tokens, [T, H],
 * which are as expected (NULL = anything), exactly 0 for padding, untouched beyond the live ones and between the
 * rows. */
void problem_check_gate(problem_t *problem, report_t *report);
void problem_check_gradients(problem_t *problem, problem_matrix_t first, problem_matrix_t last, report_t *report);
void problem_check_rows(const problem_t *problem, const char *what, real_view_t rows, const double *expected,
                        const double *size, double limit, report_t *report);

real_view_t problem_rows_view(const problem_t *problem, const void *data, int64_t stride);

/* expected, or NULL where a product of 0 with a weight or token that is not finite may make it NaN: those gradients
 * promise nothing. */
const double *problem_expected_dx(const problem_t *problem, const double *expected);

/* Poison gradients, and put in what is there before a backward call. */
void problem_reset_gradients(problem_t *problem);

/* Of x, dy and weights as they stand now. */
uint64_t problem_input_hash(const problem_t *problem);

/* What a result of F32 (F64) arithmetic may be off, relative to its norm: independent roundings add up with the
 * square root of their number. */
double problem_gate_limit(const problem_t *problem);

/* The same for what importance and load have a part in: those are sums in fixed point. */
double problem_sum_limit(const problem_t *problem);

/* The same for what comes through arrays of the token type. */
double problem_limit(const problem_t *problem);

bool problem_has_matrix(const problem_t *problem, problem_matrix_t matrix);

/* gate_bias has none. */
bool problem_has_gradient(const problem_t *problem, problem_matrix_t matrix);

/* How many matrices there are: one for each expert, or for each group. */
int64_t problem_matrix_blocks(const problem_t *problem, problem_matrix_t matrix);

/* The slots that the expected choices fill: the rest is nobody's. */
int64_t problem_num_slots(const problem_t *problem);

bool problem_has_glu(const problem_t *problem);

/* Draw the numbers of a case, and find the reference's answer to them. */
void problem_draw_numbers(problem_t *problem, random_state_t *random);
bool problem_find_answer(problem_t *problem, random_state_t *random, report_t *report);

/* Where a matrix of one expert or group stands inside weights or gradients. */
real_view_t problem_matrix_view(const problem_t *problem, const cumoe_weights_t *weights, problem_matrix_t matrix,
                                int64_t block);

/* Give weights a layout and buffers; bytes[] takes the size of every array. */
void problem_weights_layout(problem_t *problem, cumoe_weights_t *weights, cumoe_glu_placement_t glu,
                            case_layout_t layout, size_t *bytes);

/* Between a matrix of all experts as the reference has it, [blocks, rows, cols], and as the library has it. */
void problem_matrix_set(const problem_t *problem, const cumoe_weights_t *weights, problem_matrix_t matrix,
                        const double *values);
void problem_matrix_get(const problem_t *problem, const cumoe_weights_t *weights, problem_matrix_t matrix,
                        double *values);
/* Weights that cumoe_weights_create() made, as buffers of the problem. */
cumoe_weights_t problem_adopt_weights(problem_t *problem, const cumoe_weights_t *created);

int64_t problem_matrix_elements(const problem_t *problem, problem_matrix_t matrix);
void *const *problem_matrix_pointer(const cumoe_weights_t *weights, problem_matrix_t matrix);

/* Every output of a run, copied into one block, to compare two runs bit for bit. */
typedef struct problem_bits {
    size_t size;
    unsigned char *data;
} problem_bits_t;

problem_bits_t problem_outputs(const problem_t *problem, bool backward);
/* The same bits as those? */
void problem_compare_outputs(const problem_t *problem, bool backward, const problem_bits_t *expected,
                             report_t *report);
void problem_bits_free(problem_bits_t *bits);

#endif
