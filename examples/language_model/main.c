/* A character language model whose middle layer is cumoe's: the claim of the paper in small, on real text.
 *
 *   protocol.h  what is trained, and how       text.c     characters, split, batches
 *   model.c     where the library is called    dense.c    embedding, softmax, Adam
 *   train.c     loop and evaluation            inspect.c  balance, and what experts learn
 *   report.c    tables                         pictures.c gnuplot
 *   table6.c    the paper's table 6            balanced.c its appendix F
 *   schedule.c  learning rates                 resume.c   what an interrupted run has done
 *   ranks.c     several ranks train one model:
 *               threads, or processes (processes.c) */
#include "balanced.h"
#include "options.h"
#include "pictures.h"
#include "ranks.h"
#include "resume.h"
#include "table6.h"

#include <errno.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

typedef struct run {
    options_t options;
    device_t device;
    text_t text;
    schedule_t schedule;
    past_t *past; /* --resume */
    double past_seconds;
    progress_t progress;
    report_t report;
    summary_t summary[NUM_KINDS];
    table6_t table6;
    balance_t balance[NUM_KINDS]; /* first seed */
    usage_t usage;
    agreement_t before, after; /* of the masks of the strictly balanced gate, around its training */
} run_t;

/* Make the folder, its parents too, and go there. */
static void enter_folder(const char *path)
{
    char *part = strdup(path);
    if (!part) die("out of memory");
    for (char *slash = part; *slash && (slash = strchr(slash + 1, '/'));) {
        *slash = 0;
        mkdir(part, 0777); /* what matters is whether chdir() succeeds */
        *slash = '/';
    }
    mkdir(part, 0777);
    if (chdir(path)) die("cannot use the folder --out %s: %s", path, strerror(errno));
    free(part);
}

static void add_result(summary_t *summary, const result_t *result)
{
    range_add(&summary->perplexity, result->perplexity);
    range_add(&summary->rate, result->rate);
}

static void add_balance(run_t *run, kind_index_t index, uint64_t seed, double perplexity, const balance_t *balance)
{
    report_balance(&run->report, &kinds[index], seed, balance);
    table6_add(&run->table6, index, perplexity, balance);
    if (seed == 1) run->balance[index] = *balance;
}

/* What is asked of the largest mixtures alone. In the demo the first seed is enough. */
static void look_into(run_t *run, kind_index_t index, model_t *model, double perplexity)
{
    const bool demo = run->options.experiment == EXPERIMENT_DEMO;
    if (model->seed == 1 && index == MOE_256 && demo)
        inspect_experts(model, &run->text, run->schedule.held_out_stride, &run->usage);
    if (model->seed > 1 && demo) return;
    const balance_t balance =
        measure_balance(model, &run->text, run->options.quick ? QUICK_NOISY_CHARACTERS : NOISY_CHARACTERS);
    add_balance(run, index, model->seed, perplexity, &balance);
}

/* Whether an interrupted run has done this training; then it counts. */
static bool was_trained(run_t *run, kind_index_t index, uint64_t seed)
{
    result_t result;
    balance_t balance;
    if (!past_find(run->past, &kinds[index], seed, &result, &balance)) return false;
    progress_advance(&run->progress, training_work(&kinds[index], &run->schedule));
    run->past_seconds += result.seconds;
    report_training(&run->report, &kinds[index], seed, &result);
    add_result(&run->summary[index], &result);
    add_balance(run, index, seed, result.perplexity, &balance);
    return true;
}

/* A model as train_model() and train_on_ranks() take it. */
static model_t describe_model(const run_t *run, kind_index_t index, uint64_t seed)
{
    return (model_t){.device = &run->device,
                     .kind = &kinds[index],
                     .symbols = run->text.symbols,
                     .batch = run->schedule.batch > BATCH ? run->schedule.batch : BATCH,
                     .seed = seed,
                     .optimizer = run->options.optimizer};
}

static void train_kind(run_t *run, kind_index_t index, uint64_t seed)
{
    if (was_trained(run, index, seed)) return;
    const kind_t *kind = &kinds[index];
    model_t model = describe_model(run, index, seed);
    if (index == MOE_32_RANKS) {
        const result_t result = train_on_ranks(&model, &run->options, &run->text, &run->schedule, &run->progress);
        report_training(&run->report, kind, seed, &result);
        add_result(&run->summary[index], &result);
        return;
    }
    model_create(&model);
    if (kind->balanced) {
        start_thresholds(&model, &run->text);
        run->before = measure_agreement(&model, &run->text);
    }
    result_t result = train_model(&model, &run->text, &run->schedule, &run->progress);
    report_training(&run->report, kind, seed, &result);
    add_result(&run->summary[index], &result);
    run->summary[index].state_size = model.state_size;
    if (kind->balanced) run->after = measure_agreement(&model, &run->text);
    if (kind->experts >= TABLE6_EXPERTS) look_into(run, index, &model, result.perplexity);
    model_destroy(&model);
}

/* What the experiments train: kinds from every seed, and one more from the first alone. */
static const struct {
    kind_index_t kinds[NUM_KINDS]; /* NUM_KINDS ends them */
    kind_index_t last;             /* NUM_KINDS = none */
} plans[] = {
    [EXPERIMENT_DEMO] = {{DENSE, DENSE_WIDE, MOE_4, MOE_32, MOE_256, NUM_KINDS}, MOE_256_FREE},
    [EXPERIMENT_TABLE6] = {{MOE_64, MOE_64_FREE, MOE_64_IMPORTANCE, MOE_64_LOAD, MOE_64_WEAK, MOE_64_STRONG,
                            NUM_KINDS},
                           NUM_KINDS},
    [EXPERIMENT_BALANCED] = {{MOE_32, MOE_32_BALANCED, NUM_KINDS}, NUM_KINDS},
    [EXPERIMENT_RANKS] = {{MOE_32, MOE_32_RANKS, NUM_KINDS}, NUM_KINDS},
};

static void train_all(run_t *run)
{
    const kind_index_t *const kind = plans[run->options.experiment].kinds,
                              last = plans[run->options.experiment].last;
    const int seeds = run->options.seeds;
    double work = last < NUM_KINDS ? training_work(&kinds[last], &run->schedule) : 0;
    for (int i = 0; kind[i] < NUM_KINDS; i++) work += seeds * training_work(&kinds[kind[i]], &run->schedule);
    progress_start(&run->progress, work, run->options.processes);
    for (int seed = 1; seed <= seeds; seed++)
        for (int i = 0; kind[i] < NUM_KINDS; i++) train_kind(run, kind[i], (uint64_t)seed);
    if (last < NUM_KINDS) train_kind(run, last, 1);
    progress_clear(&run->progress);
}

static schedule_t make_schedule(const options_t *options, const text_t *text)
{
    schedule_t schedule = {.batch = options->batch,
                           .steps = (int64_t)(options->epochs * (double)steps_per_epoch(text, options->batch)),
                           .rate = options->rate,
                           .kind = options->schedule,
                           .held_out_stride = 1};
    if (options->quick) schedule.steps = QUICK_STEPS, schedule.held_out_stride = QUICK_HELD_OUT;
    if (options->steps) schedule.steps = options->steps;
    if (schedule.steps < 1) schedule.steps = 1;
    return schedule;
}

/* The demo's tables. */
static bool report_demo(run_t *run)
{
    run->report.pictures = draw_pictures(run->summary, run->balance, &run->usage, &run->text);
    report_models(&run->report, run->summary, &run->text);
    const bool good = report_verdict(&run->report, run->summary, run->options.quick);
    report_optimizer(&run->report, run->options.optimizer, run->summary);
    say(&run->report, "## Balance of MoE-256\n\n");
    report_table6(&run->report, &run->table6);
    show_picture(&run->report, "Load of every expert, with and without the losses", "load.svg");
    report_experts(&run->report, &run->usage, &run->text);
    return good;
}

static bool report_all_rows(run_t *run)
{
    report_table6(&run->report, &run->table6);
    return report_table6_verdict(&run->report, &run->table6, run->options.quick);
}

static bool report_masks(run_t *run)
{
    report_agreement(&run->report, &run->before, &run->after);
    return report_balanced_verdict(&run->report, run->summary, &run->before, &run->after, run->options.quick);
}

static bool report_all_ranks(run_t *run)
{
    report_ranks(&run->report, &run->options, run->summary);
    return report_ranks_verdict(&run->report, &run->options, run->summary);
}

/* All of it, but for what other processes do. */
static bool train_and_report(run_t *run)
{
    enter_folder(run->options.out);
    if (run->options.resume) run->past = past_read(&run->options, &run->text, &run->schedule);
    report_open(&run->report, &run->options, &run->text, &run->schedule, &run->device);
    train_all(run);
    bool (*const reports[])(run_t *) = {report_demo, report_all_rows, report_masks, report_all_ranks};
    const bool good = reports[run->options.experiment](run);
    report_close(&run->report, run->options.out, seconds_now() - run->progress.start + run->past_seconds);
    past_free(run->past);
    return good;
}

/* Processes behind the first are of the same model, and say nothing of it. */
static bool train_along(const run_t *run)
{
    progress_t silent = {0};
    for (int seed = 1; seed <= run->options.seeds; seed++) {
        const model_t model = describe_model(run, MOE_32_RANKS, (uint64_t)seed);
        train_on_ranks(&model, &run->options, &run->text, &run->schedule, &silent);
    }
    return true;
}

int main(int argc, char **argv)
{
    static run_t run;
    processes_t processes = {0};
    options_read(&run.options, argc, argv);
    if (run.options.processes) {
        processes = processes_begin();
        run.options.ranks = processes.number;
    }
    if (run.options.threads) omp_set_num_threads(run.options.threads);
    text_load(&run.text, run.options.num_texts, run.options.text);
    device_open(&run.device, run.options.backend, run.options.copy, processes.local_rank);
    run.schedule = make_schedule(&run.options, &run.text);
    const bool good = processes.rank == 0 ? train_and_report(&run) : train_along(&run);
    device_close(&run.device);
    text_free(&run.text);
    if (run.options.processes) processes_end();
    return good ? EXIT_SUCCESS : 2;
}
