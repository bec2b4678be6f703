/* All pairs: of all combinations of some factors a few, so chosen that every two values of any two factors meet in
 * one of them, if they can meet at all. */
#ifndef CUMOE_TESTS_PAIRS_H
#define CUMOE_TESTS_PAIRS_H

#include <stdbool.h>

enum { PAIRS_MAX_FACTORS = 16 };

typedef struct pairs {
    int factors;                        /* at most PAIRS_MAX_FACTORS */
    const int *levels;                  /* [factors] a factor takes the values 0 .. levels - 1 */
    bool (*admissible)(const int *row); /* [factors] can this combination be? */
} pairs_t;

/* How many combinations there are, admissible or not, and combination number i of them. */
int pairs_combinations(const pairs_t *pairs);
void pairs_combination(const pairs_t *pairs, int i, int *row);

/* Write the numbers of the chosen combinations and give back how many they are; -1: more than max_chosen, or no
 * memory. Greedy and always the same: each is the first of those that bring the most new pairs. */
int pairs_choose(const pairs_t *pairs, int max_chosen, int *chosen);

#endif
