#include "tests/support/pairs.h"

#include <stdlib.h>

/* The values of all factors in one line: value v of factor f is number first[f] + v of them. */
typedef struct table {
    const pairs_t *pairs;
    int first[PAIRS_MAX_FACTORS];
    int values;
    bool *open; /* [values, values] pairs that have not met yet */
} table_t;

int pairs_combinations(const pairs_t *pairs)
{
    int combinations = 1;
    for (int f = 0; f < pairs->factors; f++) combinations *= pairs->levels[f];
    return combinations;
}

void pairs_combination(const pairs_t *pairs, int i, int *row)
{
    for (int f = 0; f < pairs->factors; f++) {
        row[f] = i % pairs->levels[f];
        i /= pairs->levels[f];
    }
}

static bool *pair_of(const table_t *table, const int *row, int f, int g)
{
    return &table->open[(table->first[f] + row[f]) * table->values + table->first[g] + row[g]];
}

static void set_pairs(table_t *table, const int *row, bool open)
{
    for (int f = 0; f < table->pairs->factors; f++)
        for (int g = 0; g < f; g++) *pair_of(table, row, f, g) = open;
}

static int count_open(const table_t *table, const int *row)
{
    int count = 0;
    for (int f = 0; f < table->pairs->factors; f++)
        for (int g = 0; g < f; g++) count += *pair_of(table, row, f, g);
    return count;
}

/* -1 = no pair is open. */
static int best_combination(const table_t *table, int num_candidates, const int *candidates)
{
    int best = -1, most = 0;
    for (int c = 0; c < num_candidates; c++) {
        int row[PAIRS_MAX_FACTORS];
        pairs_combination(table->pairs, candidates[c], row);
        const int count = count_open(table, row);
        if (count > most) best = candidates[c], most = count;
    }
    return best;
}

static int choose(table_t *table, int *candidates, int max_chosen, int *chosen)
{
    int num_candidates = 0, num_chosen = 0, row[PAIRS_MAX_FACTORS];
    for (int i = 0; i < pairs_combinations(table->pairs); i++) {
        pairs_combination(table->pairs, i, row);
        if (!table->pairs->admissible(row)) continue;
        candidates[num_candidates++] = i;
        set_pairs(table, row, true);
    }
    for (int best; (best = best_combination(table, num_candidates, candidates)) >= 0;) {
        if (num_chosen == max_chosen) return -1;
        chosen[num_chosen++] = best;
        pairs_combination(table->pairs, best, row);
        set_pairs(table, row, false);
    }
    return num_chosen;
}

int pairs_choose(const pairs_t *pairs, int max_chosen, int *chosen)
{
    table_t table = {.pairs = pairs};
    for (int f = 0; f < pairs->factors; f++) {
        table.first[f] = table.values;
        table.values += pairs->levels[f];
    }
    int *candidates = calloc((size_t)pairs_combinations(pairs), sizeof *candidates);
    table.open = calloc((size_t)(table.values * table.values), sizeof *table.open);
    const int num_chosen = candidates && table.open ? choose(&table, candidates, max_chosen, chosen) : -1;
    free(candidates);
    free(table.open);
    return num_chosen;
}
