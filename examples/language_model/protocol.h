/* What is trained, and how: fixed before the run, the same for every model. */
#ifndef PROTOCOL_H
#define PROTOCOL_H

#include <stdbool.h>

enum {
    BATCH = 1024,       /* T: characters in a step */
    TOP_K = 4,          /* K: experts per character */
    INTERMEDIATE = 128, /* I: of an expert */
    DENSE_INTERMEDIATE = TOP_K * INTERMEDIATE,
    MAX_EXPERTS = 256,
    /* Both gate matrices of MoE-256 are 2 * 256 * H multiply-adds a character, as much as 256 columns more of I. */
    WIDE_INTERMEDIATE = DENSE_INTERMEDIATE + MAX_EXPERTS,
    QUICK_STEPS = 120,   /* --quick: too few to judge by */
    QUICK_HELD_OUT = 10, /* --quick: one in so many of the held-out characters is looked at */
    NOISY_BATCHES = 16,  /* the balance is measured over so many training batches */
};

#define LEARNING_RATE 1e-2 /* Adam; the highest of the schedule */
#define LOSS_WEIGHT   0.1F /* of the importance loss and of the load loss (paper, section 5.1) */
/* With one seed MoE-32 must be better than dense by this part of dense's perplexity. Seeds differ by 0.3 %. */
#define MARGIN 0.03

typedef struct kind {
    const char *name;
    int experts;      /* E; 1 = dense */
    int intermediate; /* I */
    bool losses;      /* the two balancing losses are part of the training loss */
} kind_t;

typedef enum kind_index { DENSE, DENSE_WIDE, MOE_4, MOE_32, MOE_256, MOE_256_FREE, NUM_KINDS } kind_index_t;

static const kind_t kinds[NUM_KINDS] = {
    [DENSE] = {"dense", 1, DENSE_INTERMEDIATE, false},
    [DENSE_WIDE] = {"dense, wider", 1, WIDE_INTERMEDIATE, false},
    [MOE_4] = {"MoE-4", 4, INTERMEDIATE, true},
    [MOE_32] = {"MoE-32", 32, INTERMEDIATE, true},
    [MOE_256] = {"MoE-256", 256, INTERMEDIATE, true},
    [MOE_256_FREE] = {"MoE-256, no losses", 256, INTERMEDIATE, false},
};

#endif
