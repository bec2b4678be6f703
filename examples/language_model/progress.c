#include "progress.h"

#include <stdio.h>
#include <time.h>
#include <unistd.h>

double seconds_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

void progress_start(progress_t *progress, double total_work, bool lines)
{
    const bool terminal = isatty(STDERR_FILENO);
    *progress = (progress_t){.visible = terminal || lines,
                             .lines = lines && !terminal,
                             .start = seconds_now(),
                             .shown = seconds_now(),
                             .total_work = total_work};
}

void progress_show(progress_t *progress, double work, const char *name, double perplexity, double rate)
{
    const double now = seconds_now(), done = progress->work + work;
    if (!progress->visible || now - progress->shown < (progress->lines ? 10 : 0.25) || done <= 0) return;
    progress->shown = now;
    const int left = (int)((now - progress->start) * (progress->total_work - done) / done);
    fprintf(stderr, "%s%3.0f %%  %-18s perplexity %6.3f  %4.0f thousand characters/s  %d:%02d left%s",
            progress->lines ? "" : "\r\033[K", 100 * done / progress->total_work, name, perplexity, 1e-3 * rate,
            left / 60, left % 60, progress->lines ? "\n" : "");
    fflush(stderr);
}

void progress_advance(progress_t *progress, double work)
{
    progress->work += work;
}

void progress_clear(const progress_t *progress)
{
    if (progress->visible && !progress->lines) fputs("\r\033[K", stderr);
}
