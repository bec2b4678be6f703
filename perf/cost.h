/* The parts of the program cumoe-cost. */
#ifndef CUMOE_PERF_COST_H
#define CUMOE_PERF_COST_H

#include "models.h"

#include <cumoe/cost.h>
#include <stdio.h>

/* What a report is about. */
typedef struct subject {
    const char *shape; /* NULL = sizes given by hand */
    cumoe_config_t config;
    int tokens, timesteps, ranks;
    cumoe_cost_t cost;
} subject_t;

void cost_table(const subject_t *subject);
void cost_json(const subject_t *subject, FILE *file);

/* Ops and parameters of the paper's tables 7 and 8, counted. */
void cost_paper(void);

/* End the program with the library's sentence. */
void cost_check(cumoe_status_t status);

#endif
