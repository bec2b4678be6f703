#include "resume.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_ENTRIES = 4096, NAME = 64 };

typedef struct entry {
    char table[NAME], row[NAME], column[NAME];
    double value;
} entry_t;

struct past {
    int count;
    entry_t entry[MAX_ENTRIES];
};

static const double *find(const past_t *past, const char *table, const char *row, const char *column)
{
    for (int i = 0; i < past->count; i++) {
        const entry_t *e = &past->entry[i];
        if (strcmp(e->table, table) == 0 && strcmp(e->row, row) == 0 && strcmp(e->column, column) == 0)
            return &e->value;
    }
    return NULL;
}

static past_t *read_table(const char *name)
{
    char line[512];
    FILE *file = fopen(name, "r");
    if (!file) return NULL;
    past_t *past = host_alloc(1, sizeof *past);
    past->count = 0;
    /* A line that was cut off, and the heading, are not four fields that end with a number. */
    while (past->count < MAX_ENTRIES && fgets(line, sizeof line, file)) {
        entry_t *e = &past->entry[past->count];
        if (strchr(line, '\n') &&
            sscanf(line, "%63[^\t]\t%63[^\t]\t%63[^\t]\t%lf", e->table, e->row, e->column, &e->value) == 4)
            past->count++;
    }
    fclose(file);
    return past;
}

past_t *past_read(const options_t *options, const text_t *text, const schedule_t *schedule)
{
    char name[NAME];
    snprintf(name, sizeof name, "%s.tsv", experiment_name(options->experiment));
    past_t *past = read_table(name);
    if (!past) return NULL;
    protocol_t protocol = protocol_of(options, text, schedule);
    for (int i = 0; i < NUM_PROTOCOL; i++) {
        const double *value = find(past, "protocol", "all", protocol.name[i]);
        char now[32], then[32];
        snprintf(now, sizeof now, "%.9g", protocol.value[i]); /* as note() writes it */
        snprintf(then, sizeof then, "%.9g", value ? *value : -1);
        if (!value) die("--resume: %s does not say its %s; take another folder", name, protocol.name[i]);
        if (strcmp(now, then) != 0)
            die("--resume: in %s %s is %s, and now %s; take another folder, or the same options", name,
                protocol.name[i], then, now);
    }
    return past;
}

bool past_find(const past_t *past, const kind_t *kind, uint64_t seed, result_t *result, balance_t *balance)
{
    if (!past) return false;
    *result = (result_t){0};
    *balance = (balance_t){0};
    const struct {
        const char *column;
        double *value;
    } wanted[] = {{"perplexity", &result->perplexity}, {"characters_per_second", &result->rate},
                  {"seconds", &result->seconds},       {"cv_importance", &balance->cv_importance},
                  {"cv_load", &balance->cv_load},      {"max_over_mean_load", &balance->max_over_mean_load}};
    char row[NAME];
    training_name(row, sizeof row, kind, seed);
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        const double *value = find(past, "training", row, wanted[i].column);
        if (!value) return false;
        *wanted[i].value = *value;
    }
    const double *characters = find(past, "training", row, "balance_characters");
    if (characters) balance->characters = (int64_t)*characters;
    return characters != NULL;
}

void past_free(past_t *past)
{
    free(past);
}
