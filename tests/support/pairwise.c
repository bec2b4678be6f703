#include "tests/support/pairwise.h"

/* Of kinds with several variants those that differ most. */
static const int GATES[] = {VARIANT_NOISY,        VARIANT_NOISY_INFERENCE,    VARIANT_SOFTMAX,
                            VARIANT_EXTERNAL,     VARIANT_SOFTMAX_TOPK_PLAIN, VARIANT_SIGMOID,
                            VARIANT_HIERARCHICAL, VARIANT_BALANCED,           VARIANT_BALANCED_FEW_ROWS};

static const int LEVELS[NUM_FACTORS] = {
    [FACTOR_ACTIVATION] = CUMOE_NUM_ACTIVATIONS,
    [FACTOR_DTYPE] = 4,
    [FACTOR_GATE] = sizeof GATES / sizeof *GATES,
    [FACTOR_GLU] = 4,
    [FACTOR_LAYOUT] = 3,
    [FACTOR_BIAS] = 2,
    [FACTOR_RECOMPUTE] = 2,
    [FACTOR_MODE] = 2,
    [FACTOR_GATE_DTYPE] = 2,
    [FACTOR_GRADIENT_DTYPE] = 2,
};

static const cumoe_dtype_t DTYPES[] = {CUMOE_F64, CUMOE_F32, CUMOE_BF16, CUMOE_F16};

/* Plain activations have no glu to place, and F32 and F64 no second type. */
static bool admissible(const int *row)
{
    const int activation = row[FACTOR_ACTIVATION];
    const bool glu = activation == CUMOE_ACTIVATION_SWIGLU || activation == CUMOE_ACTIVATION_GEGLU ||
                     activation == CUMOE_ACTIVATION_SWIGLU_CLAMPED || activation == CUMOE_ACTIVATION_GEGLU_TANH;
    const cumoe_dtype_t dtype = DTYPES[row[FACTOR_DTYPE]];
    const bool wide = dtype == CUMOE_F64 || dtype == CUMOE_F32;
    return (glu || row[FACTOR_GLU] == CUMOE_GLU_SEPARATE) &&
           (!wide || (row[FACTOR_GATE_DTYPE] == 0 && row[FACTOR_GRADIENT_DTYPE] == 0));
}

const pairs_t PAIRWISE = {.factors = NUM_FACTORS, .levels = LEVELS, .admissible = admissible};

void pairwise_case(int i, int n, uint64_t seed, layer_case_t *layer_case, problem_options_t *options)
{
    static const layer_case_t sizes[] = {
        {"pairwise", 53, 37, 19, 9, 2, .pattern = PATTERN_RANDOM},
        {"pairwise, deep experts", 19, 23, 701, 5, 3, .pattern = PATTERN_RANDOM},
        {"pairwise, deep rows", 23, 701, 21, 6, 2, .pattern = PATTERN_RANDOM},
        {"pairwise, many tokens", 101, 23, 53, 15, 3, .pattern = PATTERN_RANDOM},
    };
    int row[NUM_FACTORS];
    pairs_combination(&PAIRWISE, i, row);
    const cumoe_dtype_t dtype = DTYPES[row[FACTOR_DTYPE]];
    *layer_case = sizes[n % 4];
    layer_case->mask_period = n % 3 == 0 ? 5 : 0;
    layer_case->dead_tokens = n % 5 == 0 ? 6 : 0;
    layer_case->stride_gap = n % 7 == 0 ? 3 : 0;
    layer_case->wide_index = n % 2;
    layer_case->plain_gradients = n % 3 == 1;
    layer_case->mode = (cumoe_gradient_mode_t)row[FACTOR_MODE];
    layer_case->glu = (cumoe_glu_placement_t)row[FACTOR_GLU];
    layer_case->layout = (case_layout_t)row[FACTOR_LAYOUT];
    *options = (problem_options_t){
        .dtype = dtype,
        .gate_dtype = row[FACTOR_GATE_DTYPE] ? dtype : CUMOE_DTYPE_DEFAULT,
        .index_weight_dtype = row[FACTOR_GATE_DTYPE] ? dtype : CUMOE_DTYPE_DEFAULT,
        .gradient_dtype = row[FACTOR_GRADIENT_DTYPE] ? CUMOE_F32 : CUMOE_DTYPE_DEFAULT,
        .activation = (cumoe_activation_t)row[FACTOR_ACTIVATION],
        .bias = row[FACTOR_BIAS],
        .variant = GATE_VARIANTS[GATES[row[FACTOR_GATE]]],
        .seed = seed + (uint64_t)n,
        .recompute = row[FACTOR_RECOMPUTE],
    };
}
