/* The tables of cases, in plain C: the same rows serve every suite and every backend. */
#ifndef CUMOE_TESTS_CASES_H
#define CUMOE_TESTS_CASES_H

#include <cumoe/layer.h>

/* What the numbers of a case look like. */
typedef enum case_pattern {
    PATTERN_RANDOM,               /* everything normal */
    PATTERN_ONE_EXPERT,           /* the last expert is every token's first choice */
    PATTERN_EMPTY_EXPERTS,        /* the first and the last expert get no token */
    PATTERN_TIES,                 /* all logits equal: w_gate = 0 */
    PATTERN_ZERO_X,               /* x = 0: logits 0, pre-activations on the kink */
    PATTERN_NONFINITE_WEIGHTS,    /* gate rows of experts with NaN, +Inf, -Inf in them */
    PATTERN_NONFINITE_TOKENS,     /* every third row of x is NaN */
    PATTERN_ALL_REFUSED,          /* logits are all +Inf for one half of the tokens, all -Inf for the other;
                                     HIERARCHICAL: those inside the groups */
    PATTERN_PRIMARY_REFUSED,      /* HIERARCHICAL: the same for the groups */
    PATTERN_LOW_THRESHOLDS,       /* BALANCED: all -1, every expert takes whom it can */
    PATTERN_HIGH_THRESHOLDS,      /* BALANCED: all 2, nobody is taken */
    PATTERN_NONFINITE_THRESHOLDS, /* BALANCED: NaN, +Inf, -Inf among them */
    PATTERN_TWINS,                /* tokens 2i and 2i + 1 are equal */
    PATTERN_SENTINELS,            /* EXTERNAL: -1, E, far outside, whole tokens without an expert */
    PATTERN_DUPLICATES,           /* EXTERNAL: the same expert in every slot of a token */
    PATTERN_LARGE,                /* EXTERNAL: rows of x up to a million times as large */
    PATTERN_INTEGERS              /* EXTERNAL: small integers times powers of two, see problem_numbers.c */
} case_pattern_t;

typedef enum case_layout {
    LAYOUT_PLAIN,
    LAYOUT_PADDED,    /* gaps between rows and between experts */
    LAYOUT_TRANSPOSED /* row stride 1 */
} case_layout_t;

typedef struct layer_case {
    const char *name;
    int32_t tokens, hidden_size, intermediate_size, experts, top_k;
    case_pattern_t pattern;
    int32_t mask_period; /* every n-th token is padding; 1 = all; 0 = no mask */
    int32_t
        dead_tokens; /* the numbers come by cumoe_call_t, and so many tokens at the end are not live; 0 = no call */
    int32_t stride_gap; /* stride of x, y, dx, dy is H + so much */
    cumoe_gradient_mode_t mode;
    cumoe_glu_placement_t glu; /* where the activation has one */
    case_layout_t layout;
    int32_t plain_gradients; /* gradients PLAIN and SEPARATE whatever the weights are */
    int32_t wide_index;      /* EXTERNAL: int64 indices */
    int64_t first_token;
    int32_t groups, top_k_groups; /* HIERARCHICAL; 0 = those of case_groups() */
} layer_case_t;

/* clang-format off */
static const layer_case_t LAYER_CASES[] = {
    /*                           T    H   I   E   K  */
    {"small",                    8,   4,  6,  4,  2, .pattern = PATTERN_RANDOM},
    {"odd sizes",              101,  37, 53, 11,  3, .pattern = PATTERN_RANDOM},
    {"long rows",               19, 257, 67,  5,  2, .pattern = PATTERN_RANDOM},
    {"wide experts",            19,  33, 301, 3,  2, .pattern = PATTERN_RANDOM},
    {"even sizes",              96,  32, 64,  8,  2, .pattern = PATTERN_RANDOM},
    {"T = 0",                    0,   5,  7,  4,  2, .pattern = PATTERN_RANDOM},
    {"T = 1",                    1,  13, 17,  6,  2, .pattern = PATTERN_RANDOM},
    {"H = I = 1",               21,   1,  1,  3,  2, .pattern = PATTERN_RANDOM},
    {"E = 1",                   23,  11, 13,  1,  1, .pattern = PATTERN_RANDOM},
    {"K = E",                   29,  11, 13,  5,  5, .pattern = PATTERN_RANDOM},
    {"K = 1",                   31,  11, 13,  7,  1, .pattern = PATTERN_RANDOM},
    {"K = E - 1",               31,  11, 13,  5,  4, .pattern = PATTERN_RANDOM},
    {"more experts than rows",   7,  11, 13, 61,  2, .pattern = PATTERN_RANDOM},
    {"hundreds of experts",     67,   9,  5, 300, 7, .pattern = PATTERN_RANDOM},
    {"many tokens",           1500,   6,  5, 12,  2, .pattern = PATTERN_RANDOM, .mask_period = 7, .dead_tokens = 11},
    {"many choices",            17,   9, 11, 67, 33, .pattern = PATTERN_RANDOM},
    {"groups",                  43,  13, 11, 15,  4, .pattern = PATTERN_RANDOM},
    {"groups, all chosen",      23,  13, 11, 16,  8, .pattern = PATTERN_RANDOM, .mode = CUMOE_GRADIENT_ADD},
    {"one expert",              41,  15, 19,  6,  1, .pattern = PATTERN_ONE_EXPERT},
    {"one expert first",        41,  15, 19,  6,  2, .pattern = PATTERN_ONE_EXPERT},
    {"empty experts",           41,  15, 19,  7,  2, .pattern = PATTERN_EMPTY_EXPERTS},
    {"empty experts, add",      41,  15, 19,  7,  2, .pattern = PATTERN_EMPTY_EXPERTS, .mode = CUMOE_GRADIENT_ADD},
    {"ties",                    17,   9, 11,  7,  3, .pattern = PATTERN_TIES},
    {"x = 0",                   17,   9, 11,  7,  3, .pattern = PATTERN_ZERO_X},
    {"gate weights not finite", 37,   9, 11,  8,  2, .pattern = PATTERN_NONFINITE_WEIGHTS},
    {"few usable logits",       37,   9, 11,  8,  6, .pattern = PATTERN_NONFINITE_WEIGHTS},
    {"tokens not finite",       37,   9, 11,  8,  2, .pattern = PATTERN_NONFINITE_TOKENS},
    {"few usable tokens",       37,   9, 11,  8,  6, .pattern = PATTERN_NONFINITE_TOKENS},
    {"no usable logit",         37,   9, 11,  8,  2, .pattern = PATTERN_ALL_REFUSED},
    {"no usable group",         37,   9, 11,  8,  2, .pattern = PATTERN_PRIMARY_REFUSED},
    {"low thresholds",          37,   9, 11,  8,  2, .pattern = PATTERN_LOW_THRESHOLDS, .mask_period = 5,
     .dead_tokens = 3},
    {"high thresholds",         37,   9, 11,  8,  2, .pattern = PATTERN_HIGH_THRESHOLDS},
    {"thresholds not finite",   37,   9, 11,  8,  2, .pattern = PATTERN_NONFINITE_THRESHOLDS, .mask_period = 5},
    {"twins",                   38,   9, 11,  8,  2, .pattern = PATTERN_TWINS},
    {"sentinels",               37,   9, 11,  8,  3, .pattern = PATTERN_SENTINELS},
    {"sentinels, wide",         37,   9, 11,  8,  3, .pattern = PATTERN_SENTINELS, .wide_index = 1},
    {"duplicates",              37,   9, 11,  8,  3, .pattern = PATTERN_DUPLICATES},
    {"padding",                 53,  17, 19,  8,  2, .pattern = PATTERN_RANDOM, .mask_period = 3},
    {"all padding",             13,  17, 19,  8,  2, .pattern = PATTERN_RANDOM, .mask_period = 1},
    {"live tokens",             53,  17, 19,  8,  2, .pattern = PATTERN_RANDOM, .dead_tokens = 12},
    {"no live token",           11,  17, 19,  8,  2, .pattern = PATTERN_RANDOM, .dead_tokens = 11},
    {"live tokens and padding", 53,  17, 19,  8,  2, .pattern = PATTERN_RANDOM, .dead_tokens = 12, .mask_period = 4,
     .mode = CUMOE_GRADIENT_ADD, .first_token = 5},
    {"strides",                 29,  17, 19,  8,  2, .pattern = PATTERN_RANDOM, .stride_gap = 5},
    {"strides, odd bytes",      29,  16, 16,  8,  2, .pattern = PATTERN_RANDOM, .stride_gap = 1},
    {"add",                     61,  21, 23,  6,  2, .pattern = PATTERN_RANDOM, .mode = CUMOE_GRADIENT_ADD},
    {"far token",               29,  17, 19,  8,  2, .pattern = PATTERN_RANDOM, .first_token = INT64_C(1) << 40},
    {"glu first",               29,  17, 19,  5,  2, .glu = CUMOE_GLU_FIRST},
    {"glu last",                29,  17, 19,  5,  2, .glu = CUMOE_GLU_LAST, .mode = CUMOE_GRADIENT_ADD},
    {"glu interleaved",         29,  17, 19,  5,  2, .glu = CUMOE_GLU_INTERLEAVED},
    {"padded weights",          29,  17, 19,  5,  2, .layout = LAYOUT_PADDED},
    {"transposed",              29,  17, 19,  5,  2, .layout = LAYOUT_TRANSPOSED, .mode = CUMOE_GRADIENT_ADD},
    {"transposed, interleaved", 29,  17, 19,  5,  2, .layout = LAYOUT_TRANSPOSED, .glu = CUMOE_GLU_INTERLEAVED},
    {"gradients plain",         29,  17, 19,  5,  2, .layout = LAYOUT_TRANSPOSED, .glu = CUMOE_GLU_INTERLEAVED,
     .plain_gradients = 1},
    {"padded, glu first",       29,  17, 19,  5,  2, .layout = LAYOUT_PADDED, .glu = CUMOE_GLU_FIRST},
};
/* clang-format on */

enum { NUM_LAYER_CASES = sizeof LAYER_CASES / sizeof *LAYER_CASES };

/* The gates that a case runs with. */
typedef struct gate_variant {
    const char *name;
    cumoe_gate_kind_t gate;
    int32_t training;
    int32_t renormalize; /* SOFTMAX_TOPK, SIGMOID_TOPK */
    int32_t gate_bias;   /* SIGMOID_TOPK: there is one */
    int32_t max_rows;    /* BALANCED: config.max_rows in percent of T * K; 0 = 0 */
} gate_variant_t;

enum {
    VARIANT_NOISY,
    VARIANT_NOISY_INFERENCE,
    VARIANT_SOFTMAX,
    VARIANT_EXTERNAL,
    VARIANT_SOFTMAX_TOPK,
    VARIANT_SOFTMAX_TOPK_PLAIN,
    VARIANT_SIGMOID,
    VARIANT_SIGMOID_PLAIN,
    VARIANT_HIERARCHICAL,
    VARIANT_HIERARCHICAL_INFERENCE,
    VARIANT_BALANCED,
    VARIANT_BALANCED_INFERENCE,
    VARIANT_BALANCED_FEW_ROWS,
    NUM_GATE_VARIANTS
};

static const gate_variant_t GATE_VARIANTS[NUM_GATE_VARIANTS] = {
    {"noisy top-k, training", CUMOE_GATE_NOISY_TOPK, .training = 1},
    {"noisy top-k, inference", CUMOE_GATE_NOISY_TOPK, .training = 0},
    {"softmax", CUMOE_GATE_SOFTMAX, .training = 1},
    {"external", CUMOE_GATE_EXTERNAL, .training = 1},
    {"softmax top-k, renormalized", CUMOE_GATE_SOFTMAX_TOPK, .training = 1, .renormalize = 1},
    {"softmax top-k", CUMOE_GATE_SOFTMAX_TOPK, .training = 0},
    {"sigmoid top-k, renormalized", CUMOE_GATE_SIGMOID_TOPK, .training = 1, .renormalize = 1, .gate_bias = 1},
    {"sigmoid top-k", CUMOE_GATE_SIGMOID_TOPK, .training = 0},
    {"hierarchical, training", CUMOE_GATE_HIERARCHICAL, .training = 1},
    {"hierarchical, inference", CUMOE_GATE_HIERARCHICAL, .training = 0},
    {"balanced, training", CUMOE_GATE_BALANCED, .training = 1, .max_rows = 150},
    {"balanced, inference", CUMOE_GATE_BALANCED, .training = 0},
    {"balanced, few rows", CUMOE_GATE_BALANCED, .training = 0, .max_rows = 60},
};

/* Groups for a case of HIERARCHICAL: of the divisors of E that leave room for K choices the one nearest to 2, 3 or
 * E / 2, as the number of tokens says. One group, and groups of one expert, come about where E is prime. K is
 * divided as evenly as may be, the larger half for the groups where H is odd. */
typedef struct case_groups {
    int32_t groups, top_k_groups;
} case_groups_t;

/* The most even way to choose K of E experts in G groups; 0 = there is none. */
static inline int32_t case_top_k_groups(const layer_case_t *c, int32_t groups)
{
    const int32_t K = c->top_k;
    int32_t best = 0, best_larger = K + 1;
    for (int32_t k = 1; k <= groups && k <= K; k++) {
        const int32_t larger = k > K / k ? k : K / k;
        if (K % k != 0 || K / k > c->experts / groups) continue;
        if (larger > best_larger || (larger == best_larger && c->hidden_size % 2 == 0)) continue;
        best = k;
        best_larger = larger;
    }
    return best;
}

static inline case_groups_t case_groups(const layer_case_t *c)
{
    const int32_t E = c->experts, wanted = c->tokens % 2 == 0 ? E / 2 : c->tokens % 16 == 13 ? 2 : 3;
    case_groups_t best = {c->groups, c->top_k_groups};
    if (c->groups) return best;
    for (int32_t g = 1; g <= E; g++) {
        const int32_t k = E % g == 0 ? case_top_k_groups(c, g) : 0;
        const int32_t distance = g > wanted ? g - wanted : wanted - g;
        const int32_t best_distance = best.groups > wanted ? best.groups - wanted : wanted - best.groups;
        if (k > 0 && (best.groups == 0 || distance <= best_distance)) best = (case_groups_t){g, k};
    }
    return best;
}

/* Activations far from zero: exponentials overflow and vanish there. */
static const layer_case_t LARGE_CASE = {"far from zero", 35, 9, 11, 4, 2, .pattern = PATTERN_LARGE};

/* Does the pattern mean anything with this gate? */
static inline int case_applies(const layer_case_t *layer_case, const gate_variant_t *variant)
{
    switch (layer_case->pattern) {
    case PATTERN_SENTINELS:
    case PATTERN_DUPLICATES:
    case PATTERN_LARGE:
    case PATTERN_INTEGERS:
        return variant->gate == CUMOE_GATE_EXTERNAL;
    case PATTERN_PRIMARY_REFUSED:
        return variant->gate == CUMOE_GATE_HIERARCHICAL;
    case PATTERN_LOW_THRESHOLDS:
    case PATTERN_HIGH_THRESHOLDS:
    case PATTERN_NONFINITE_THRESHOLDS:
    case PATTERN_TWINS:
        return variant->gate == CUMOE_GATE_BALANCED;
    case PATTERN_RANDOM:
    case PATTERN_ZERO_X:
    case PATTERN_ONE_EXPERT:
    case PATTERN_EMPTY_EXPERTS:
        return 1;
    default:
        return variant->gate != CUMOE_GATE_EXTERNAL;
    }
}

#endif
