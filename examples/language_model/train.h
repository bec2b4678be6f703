/* The training loop, and the perplexity on what was held out. */
#ifndef TRAIN_H
#define TRAIN_H

#include "model.h"
#include "progress.h"
#include "schedule.h"

typedef struct result {
    double perplexity; /* of the held-out characters: exp of the mean of -ln(probability) */
    double rate;       /* training characters per second */
    double seconds;    /* training and evaluation */
} result_t;

typedef struct schedule {
    int batch; /* characters in a step */
    int64_t steps;
    double rate;             /* the highest learning rate */
    schedule_kind_t kind;    /* how it changes */
    int64_t held_out_stride; /* one in so many held-out characters is looked at */
} schedule_t;

/* Steps in one pass over the training characters; what is left over waits for the next shuffle. */
int64_t steps_per_epoch(const text_t *text, int batch);

/* Train from scratch; the seed decides initial values, order of the batches and noise. */
result_t train_model(model_t *model, const text_t *text, const schedule_t *schedule, progress_t *progress);

/* How long a training takes, in any unit: for the time left. */
double training_work(const kind_t *kind, const schedule_t *schedule);

/* Every held-out character once, without noise. visit is called after every batch, and may be NULL. */
typedef void (*visit_t)(void *context, const model_t *model, const int32_t *position, int64_t size);
double held_out_perplexity(model_t *model, const text_t *text, int64_t stride, visit_t visit, void *context);

#endif
