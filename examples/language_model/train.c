#include "train.h"

#include <math.h>
#include <stdlib.h>

int64_t steps_per_epoch(const text_t *text, int batch)
{
    return text->num_train / batch;
}

/* Multiply-adds, and the passes over all parameters (gradients, Adam), which wait for memory: as measured on a CPU.
 */
double training_work(const kind_t *kind, const schedule_t *schedule)
{
    double products = 3.0 * schedule->batch * (double)(kind_operations(kind) + 100 * WIDTH);
    return (double)schedule->steps * (products + 200.0 * (double)kind_parameters(kind));
}

result_t train_model(model_t *model, const text_t *text, const schedule_t *schedule, progress_t *progress)
{
    const int size = schedule->batch;
    const int64_t per_epoch = steps_per_epoch(text, size), steps = schedule->steps;
    const double start = seconds_now(), work = training_work(model->kind, schedule);
    batch_t batch = batch_create(size);
    int32_t *order = NULL;
    double smooth_loss = log(model->symbols);
    for (int64_t step = 0; step < steps; step++) {
        if (step % per_epoch == 0) {
            free(order);
            order = text_shuffled(text, model->seed * 1000 + (uint64_t)(step / per_epoch));
        }
        model_fill(model, &batch, text, order + step % per_epoch * size, size);
        double rate = schedule_rate(schedule->kind, schedule->rate, step + 1, steps);
        double loss = model_train(model, &batch, step + 1, rate) / (double)batch.size;
        smooth_loss += 0.02 * (loss - smooth_loss);
        double done = (double)(step + 1);
        progress_show(progress, work * done / (double)steps, model->kind->name, exp(smooth_loss),
                      done * size / (seconds_now() - start));
    }
    const double trained = seconds_now() - start;
    free(order);
    batch_free(&batch);
    progress_advance(progress, work);

    result_t result = {.rate = (double)(steps * size) / trained};
    result.perplexity = held_out_perplexity(model, text, schedule->held_out_stride, NULL, NULL);
    result.seconds = seconds_now() - start;
    return result;
}

double held_out_perplexity(model_t *model, const text_t *text, int64_t stride, visit_t visit, void *context)
{
    batch_t batch = batch_create(BATCH);
    int32_t position[BATCH];
    double loss = 0;
    int64_t seen = 0;
    for (int64_t next = 0; next < text->num_held_out;) {
        int64_t size = 0;
        for (; size < BATCH && next < text->num_held_out; next += stride) position[size++] = text->held_out[next];
        model_fill(model, &batch, text, position, size);
        loss += model_evaluate(model, &batch);
        seen += size;
        if (visit) visit(context, model, position, size);
    }
    batch_free(&batch);
    return exp(model_sum(model, loss) / (double)seen);
}
