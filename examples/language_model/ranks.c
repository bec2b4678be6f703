#include "ranks.h"

#include <math.h>
#include <omp.h>
#include <pthread.h>

typedef struct member {
    model_t model;
    const text_t *text;
    const schedule_t *schedule;
    progress_t progress;
    int threads;
    result_t result;
} member_t;

static void *train_member(void *argument)
{
    member_t *member = argument;
    omp_set_num_threads(member->threads); /* of this thread's calls */
    model_create(&member->model);
    member->result = train_model(&member->model, member->text, member->schedule, &member->progress);
    model_destroy(&member->model);
    return NULL;
}

/* The first member with the others, each a thread. */
static void train_on_threads(member_t *first, int num_ranks)
{
    cumoe_ep_t *ep[MAX_RANKS];
    member_t member[MAX_RANKS];
    pthread_t thread[MAX_RANKS];
    const int share = first->threads / num_ranks;
    check(cumoe_ep_create_local(ep, first->model.device->handle, num_ranks, 0));
    for (int r = 0; r < num_ranks; r++) {
        member[r] = *first;
        member[r].threads = share > 0 ? share : 1;
        member[r].model.ep = ep[r];
        if (r > 0) member[r].progress.visible = false;
        if (pthread_create(&thread[r], NULL, train_member, &member[r])) die("no thread for rank %d", r);
    }
    for (int r = 0; r < num_ranks; r++) pthread_join(thread[r], NULL);
    for (int r = 0; r < num_ranks; r++) cumoe_ep_destroy(ep[r]);
    *first = member[0];
}

/* The member that this process is. */
static void train_in_process(member_t *member)
{
    cumoe_ep_t *ep = processes_group(member->model.device->handle);
    member->model.ep = ep;
    train_member(member);
    cumoe_ep_destroy(ep);
}

result_t train_on_ranks(const model_t *model, const options_t *options, const text_t *text,
                        const schedule_t *schedule, progress_t *progress)
{
    member_t member = {.model = *model,
                       .text = text,
                       .schedule = schedule,
                       .progress = *progress,
                       .threads = omp_get_max_threads()};
    if (options->processes)
        train_in_process(&member);
    else
        train_on_threads(&member, options->ranks);
    *progress = member.progress;
    return member.result;
}

void report_ranks(report_t *report, const options_t *options, const summary_t *summary)
{
    static const kind_index_t rows[] = {MOE_32, MOE_32_RANKS};
    say(report, "## Perplexity on held-out text\n\n");
    say(report, "| ranks | experts of a rank | perplexity | characters per second |\n|--:|--:|--:|--:|\n");
    for (int i = 0; i < 2; i++) {
        const summary_t *s = &summary[rows[i]];
        const int ranks = i ? options->ranks : 1, most = (kinds[rows[i]].experts + ranks - 1) / ranks;
        char row[16];
        snprintf(row, sizeof row, "%d", ranks);
        say(report, "| %5d | %17d | %10.4f | %21.0f |\n", ranks, most, s->perplexity.mean, s->rate.mean);
        note(report, "ranks", row, "perplexity", s->perplexity.mean);
        note(report, "ranks", row, "characters_per_second", s->rate.mean);
    }
    say(report, "\nMeans over the seeds. The ranks are %s.\n\n",
        options->processes ? "processes of MPI" : "threads of one process and share its processors");
}

bool report_ranks_verdict(report_t *report, const options_t *options, const summary_t *summary)
{
    const double one = summary[MOE_32].perplexity.mean, several = summary[MOE_32_RANKS].perplexity.mean;
    const double part = fabs(several - one) / one;
    const bool good = part <= RANKS_AGREE;
    note(report, "verdict", "all", "part_of_perplexity", part);
    if (options->quick)
        say(report, "Too short to judge.\n");
    else
        say(report, "%s: the perplexity of %d ranks is %.2f %% off that of one; %.1f %% is what rounding may do.\n",
            good ? "Good" : "NOT GOOD", options->ranks, 100 * part, 100 * RANKS_AGREE);
    return good || options->quick;
}
