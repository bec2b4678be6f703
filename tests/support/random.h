/* Random numbers for tests: splitmix64. A seed is printed by the test that asks for it, and the environment
 * variable CUMOE_TEST_SEED replaces it, so that a failure seen once can be seen again. */
#ifndef CUMOE_TESTS_RANDOM_H
#define CUMOE_TESTS_RANDOM_H

#include <stdint.h>

typedef struct random_state {
    uint64_t value;
} random_state_t;

/* The seed of a test: CUMOE_TEST_SEED if set, else fallback. Printed to stderr with the test's name. */
uint64_t random_seed(const char *test, uint64_t fallback);

random_state_t random_start(uint64_t seed);
uint64_t random_bits(random_state_t *state);

/* 0 .. n - 1, n >= 1 */
int64_t random_below(random_state_t *state, int64_t n);

/* (0, 1) */
double random_uniform(random_state_t *state);

/* Standard normal (Box-Muller), rounded to float: exact in either precision. */
double random_normal(random_state_t *state);

/* A permutation of 0 .. n - 1. */
void random_permutation(random_state_t *state, int64_t n, int64_t *permutation);

#endif
