/* The layers that the programs of this folder know by name, and the words for kinds and types. */
#ifndef CUMOE_PERF_MODELS_H
#define CUMOE_PERF_MODELS_H

#include <cumoe/config.h>

/* One MoE layer of a published model. */
typedef struct model {
    const char *name;
    int hidden, intermediate, experts, top_k;
    int activation, gate, bias;
} model_t;

enum { MODELS = 26 };
extern const model_t models[MODELS];

/* Their names, for a command line; NULL ends them. */
void models_names(const char *names[MODELS + 1]);

/* The Markdown table of --list. */
void models_list(void);

/* Words for enumerations, by their values; NULL ends them. dtypes begins with F64 = 1. */
extern const char *const gate_words[], *const activation_words[], *const dtype_words[];

#endif
