/* The cross of everything that a config, its weights and its gradients can be, as a pairwise selection. */
#ifndef CUMOE_TESTS_PAIRWISE_H
#define CUMOE_TESTS_PAIRWISE_H

#include "tests/support/pairs.h"
#include "tests/support/problem.h"

/* The factors, in the order of the values in a row. */
typedef enum pairwise_factor {
    FACTOR_ACTIVATION,
    FACTOR_DTYPE,
    FACTOR_GATE, /* one of GATE_VARIANTS of every kind */
    FACTOR_GLU,
    FACTOR_LAYOUT,
    FACTOR_BIAS,
    FACTOR_RECOMPUTE,
    FACTOR_MODE,
    FACTOR_GATE_DTYPE,     /* 1: weights of the gate, or given by the caller, have the token type */
    FACTOR_GRADIENT_DTYPE, /* 1: gradients of the experts are F32 beside tokens of 16 bits */
    NUM_FACTORS
} pairwise_factor_t;

extern const pairs_t PAIRWISE;

enum { MAX_PAIRWISE = 150 };

/* Case and options for combination number i of PAIRWISE; other sizes, masks and strides for other n. */
void pairwise_case(int i, int n, uint64_t seed, layer_case_t *layer_case, problem_options_t *options);

#endif
