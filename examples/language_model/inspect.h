/* What a trained mixture does with its experts: how evenly it uses them, and for what. */
#ifndef INSPECT_H
#define INSPECT_H

#include "train.h"

/* Paper table 6, of a mixture: means over NOISY_BATCHES batches of training characters, with noise. */
typedef struct balance {
    double cv_importance, cv_load, max_over_mean_load;
    int64_t characters;       /* in a batch */
    double load[MAX_EXPERTS]; /* [E] relative to the mean, descending */
} balance_t;

/* characters: in a batch, at most; a short text has less. */
balance_t measure_balance(model_t *model, const text_t *text, int64_t characters);

enum { HIGHEST = 4, SHOWN_EXPERTS = 6 };

/* Paper table 9: one expert, and the contexts to which it gives the highest gate values. */
typedef struct expert_view {
    int expert;
    double rows;             /* held-out characters sent to it */
    double share[MAX_TEXTS]; /* part of the routed rows of a text that comes here */
    int found;
    int32_t position[HIGHEST]; /* of the character to predict */
    float gate[HIGHEST];       /* descending; contexts that end in the same characters count once */
} expert_view_t;

typedef struct usage {
    int experts;
    expert_view_t view[MAX_EXPERTS]; /* by the part of first-text rows among all, descending (see preference) */
    double distance;                 /* total variation between the experts used by the first two texts: 0..1 */
    double distance_within;          /* the same between two halves of the first text: what chance and topic make */
} usage_t;

/* Without noise, over the held-out characters. */
void inspect_experts(model_t *model, const text_t *text, int64_t stride, usage_t *usage);

/* How an expert's rows would divide between the first two texts if these were equally long: 1 = all from the first.
 */
double preference(const expert_view_t *view);

#endif
