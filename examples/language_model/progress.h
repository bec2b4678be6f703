/* A line on the terminal: what is being trained, how fast, and how much time is left. Under mpirun, where stderr is
 * no terminal, a new line every ten seconds. */
#ifndef PROGRESS_H
#define PROGRESS_H

#include <stdbool.h>
#include <stdint.h>

typedef struct progress {
    bool visible, lines;     /* shown; as lines below each other */
    double start, shown;     /* seconds */
    double work, total_work; /* done before the current model; of all models; any unit */
} progress_t;

/* Seconds on a clock that does not jump. */
double seconds_now(void);

/* lines: shown as such where stderr is no terminal; else not shown there. */
void progress_start(progress_t *progress, double total_work, bool lines);

/* May be called at any time, and often. work: done in the current model. */
void progress_show(progress_t *progress, double work, const char *name, double perplexity, double rate);

/* The current model is finished; work is all that it took. */
void progress_advance(progress_t *progress, double work);
void progress_clear(const progress_t *progress);

#endif
