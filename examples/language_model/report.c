#include "report.h"

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <string.h>

static FILE *open_file(const char *name, const char *suffix)
{
    char path[64];
    snprintf(path, sizeof path, "%s.%s", name, suffix);
    FILE *file = fopen(path, "w");
    if (!file) die("cannot write %s: %s", path, strerror(errno));
    return file;
}

void range_add(range_t *range, double value)
{
    const int n = range->seeds++;
    if (n == 0 || value < range->least) range->least = value;
    if (n == 0 || value > range->most) range->most = value;
    range->mean += (value - range->mean) / (n + 1);
}

void say(report_t *report, const char *format, ...)
{
    va_list list, again;
    va_start(list, format);
    va_copy(again, list);
    vprintf(format, list);
    vfprintf(report->markdown, format, again);
    va_end(again);
    va_end(list);
    fflush(stdout);
}

void show_picture(report_t *report, const char *title, const char *file)
{
    if (report->pictures) fprintf(report->markdown, "![%s](%s)\n\n", title, file);
}

void note(report_t *report, const char *table, const char *row, const char *column, double value)
{
    fprintf(report->table, "%s\t%s\t%s\t%.9g\n", table, row, column, value);
}

static void say_text(report_t *report, const text_t *text, int64_t stride)
{
    say(report, "Text: ");
    for (int i = 0; i < text->num_texts; i++)
        say(report, "%s%s (%lld characters)", i ? ", " : "", text->name[i],
            (long long)(text->start[i + 1] - text->start[i]));
    say(report,
        "; %d different characters.\nOf every %d blocks of %d characters one is held out: %lld to train on, %lld "
        "held out",
        text->symbols, HELD_OUT_EVERY, BLOCK, (long long)text->num_train, (long long)text->num_held_out);
    if (stride > 1) say(report, ", one in %lld used", (long long)stride);
    say(report, ".\n");
}

static void say_training(report_t *report, const options_t *options, const text_t *text, const schedule_t *schedule)
{
    say(report, "Training: %lld steps of %d characters (%.2f epochs) with %s;\n", (long long)schedule->steps,
        schedule->batch, (double)schedule->steps / (double)steps_per_epoch(text, schedule->batch),
        options->optimizer == CUMOE_OPTIMIZER_ADAM ? "Adam" : "Adam, factored for the experts");
    say(report, "the learning rate, %g at most, %s;\n", schedule->rate, schedule_text(schedule->kind));
    if (options->experiment != EXPERIMENT_TABLE6)
        say(report, "importance loss and load loss with weight %g each; ", (double)LOSS_WEIGHT);
    say(report, "%d seed%s. ", options->seeds, options->seeds > 1 ? "s" : "");
}

const char *experiment_name(experiment_t experiment)
{
    static const char *const names[] = {"demo", "table6", "balanced", "ranks"};
    return names[experiment];
}

protocol_t protocol_of(const options_t *options, const text_t *text, const schedule_t *schedule)
{
    return (protocol_t){{"steps", "batch", "learning_rate", "schedule", "optimizer", "held_out_stride", "symbols",
                         "train_characters", "held_out_characters"},
                        {(double)schedule->steps, schedule->batch, schedule->rate, schedule->kind,
                         options->optimizer, (double)schedule->held_out_stride, text->symbols,
                         (double)text->num_train, (double)text->num_held_out}};
}

void training_name(char *row, size_t size, const kind_t *kind, uint64_t seed)
{
    snprintf(row, size, "%s, seed %d", kind->name, (int)seed);
}

void report_open(report_t *report, const options_t *options, const text_t *text, const schedule_t *schedule,
                 const device_t *device)
{
    static const char *const titles[] = {"Character language models: a dense layer and mixtures of experts",
                                         "The two balancing losses: table 6 of the paper in small",
                                         "Strict balance: appendix F of the paper in small",
                                         "Expert parallelism: section 3.1 of the paper in small"};
    const char *name = experiment_name(options->experiment);
    *report = (report_t){.name = name, .markdown = open_file(name, "md"), .table = open_file(name, "tsv")};
    fprintf(report->table, "table\trow\tcolumn\tvalue\n");
    say(report, "# %s\n\n", titles[options->experiment]);
    say_text(report, text, schedule->held_out_stride);
    say(report, "Model: the last %d characters, a table each, summed to x (H = %d); x + layer(x); softmax.\n",
        WINDOW, WIDTH);
    if (options->experiment == EXPERIMENT_BALANCED)
        say(report,
            "Layers: MoE-32, ReLU experts with I = %d: a noisy top-%d gate, and the strictly balanced one.\n",
            INTERMEDIATE, TOP_K);
    else if (options->experiment == EXPERIMENT_TABLE6)
        say(report, "Layer: MoE-64, a noisy top-%d gate and %d ReLU experts with I = %d.\n", TOP_K, TABLE6_EXPERTS,
            INTERMEDIATE);
    else if (options->experiment == EXPERIMENT_RANKS)
        say(report, "Layer: MoE-32, a noisy top-%d gate and ReLU experts with I = %d.\n", TOP_K, INTERMEDIATE);
    else
        say(report, "Mixtures: noisy top-%d gate, ReLU experts with I = %d; the dense layer has I = %d.\n", TOP_K,
            INTERMEDIATE, DENSE_INTERMEDIATE);
    say_training(report, options, text, schedule);
    say(report, "Machine: %s.\n\n", cumoe_handle_description(device->handle));
    fflush(report->markdown);
    const protocol_t protocol = protocol_of(options, text, schedule);
    for (int i = 0; i < NUM_PROTOCOL; i++) note(report, "protocol", "all", protocol.name[i], protocol.value[i]);
    note(report, "protocol", "all", "seeds", options->seeds);
}

void report_training(report_t *report, const kind_t *kind, uint64_t seed, const result_t *result)
{
    char row[64];
    training_name(row, sizeof row, kind, seed);
    note(report, "training", row, "perplexity", result->perplexity);
    note(report, "training", row, "characters_per_second", result->rate);
    note(report, "training", row, "seconds", result->seconds);
    fflush(report->table); /* a run of many minutes may be interrupted */
}

void report_balance(report_t *report, const kind_t *kind, uint64_t seed, const balance_t *balance)
{
    char row[64];
    training_name(row, sizeof row, kind, seed);
    note(report, "training", row, "cv_importance", balance->cv_importance);
    note(report, "training", row, "cv_load", balance->cv_load);
    note(report, "training", row, "max_over_mean_load", balance->max_over_mean_load);
    note(report, "training", row, "balance_characters", (double)balance->characters);
    fflush(report->table);
}

void report_models(report_t *report, const summary_t *summary, const text_t *text)
{
    say(report, "## Perplexity on held-out text\n\n");
    say(report,
        "| layer        | perplexity (spread)    | parameters | operations per character | characters per second "
        "|\n|---|---|--:|--:|--:|\n");
    for (int i = 0; i < NUM_MODELS; i++) {
        const summary_t *s = &summary[i];
        char spread[32] = "";
        if (s->perplexity.seeds > 1)
            snprintf(spread, sizeof spread, " (%.3f to %.3f)", s->perplexity.least, s->perplexity.most);
        say(report, "| %-12s | %5.3f%-17s | %10lld | %24lld | %21.0f |\n", kinds[i].name, s->perplexity.mean,
            spread, (long long)kind_parameters(&kinds[i]), (long long)kind_operations(&kinds[i]), s->rate.mean);
        note(report, "models", kinds[i].name, "perplexity", s->perplexity.mean);
        note(report, "models", kinds[i].name, "perplexity_least", s->perplexity.least);
        note(report, "models", kinds[i].name, "perplexity_most", s->perplexity.most);
        note(report, "models", kinds[i].name, "parameters", (double)kind_parameters(&kinds[i]));
        note(report, "models", kinds[i].name, "operations", (double)kind_operations(&kinds[i]));
        note(report, "models", kinds[i].name, "characters_per_second", s->rate.mean);
    }
    say(report,
        "\nOperations are multiply-adds of the layer for one character, forward in training, with both gate "
        "matrices.\n"
        "Around each layer stand the same %d parameters of embedding and softmax. Rates are those of training.\n\n",
        (WINDOW + 1) * text->symbols * WIDTH);
    show_picture(report, "Perplexity against parameters", "perplexity.svg");
}

bool report_verdict(report_t *report, const summary_t *summary, bool quick)
{
    const range_t *dense = &summary[DENSE].perplexity, *mixture = &summary[MOE_32].perplexity;
    double spread = dense->most - dense->least, other = mixture->most - mixture->least;
    if (other > spread) spread = other;
    const bool one = dense->seeds == 1;
    const double needed = one ? MARGIN * dense->mean : spread, gain = dense->mean - mixture->mean;
    note(report, "verdict", "MoE-32", "gain", gain);
    note(report, "verdict", "MoE-32", "needed", needed);
    if (quick) {
        say(report, "A quick run: too short to judge by.\n\n");
        return true;
    }
    say(report, "MoE-32 is %s than dense by %.3f (%.1f %%); asked for: better by more than %.3f (%s). **%s.**\n\n",
        gain >= 0 ? "better" : "worse", gain >= 0 ? gain : -gain, 100 * (gain >= 0 ? gain : -gain) / dense->mean,
        needed, one ? "the margin for one seed, 3 % of dense" : "the larger spread over the seeds",
        gain > needed ? "Reached" : "Not reached");
    return gain > needed;
}

void report_optimizer(report_t *report, cumoe_optimizer_t optimizer, const summary_t *summary)
{
    double bytes[NUM_KINDS];
    for (int i = 0; i < NUM_MODELS; i++) {
        bytes[i] = (double)summary[i].state_size / (double)kind_parameters(&kinds[i]);
        note(report, "models", kinds[i].name, "state_bytes_per_parameter", bytes[i]);
    }
    say(report, "%s keeps %.2f bytes of state for a parameter of the layer of MoE-256, %.2f of the dense one.\n\n",
        optimizer == CUMOE_OPTIMIZER_ADAM ? "Adam" : "Adam, factored for the experts (paper, appendix D),",
        bytes[MOE_256], bytes[DENSE]);
}

/* A context and, behind the bar, the character that follows it; readable inside a Markdown table. */
static void say_context(report_t *report, const text_t *text, int32_t position)
{
    say(report, "`");
    for (int32_t i = position - WINDOW; i <= position; i++) {
        const unsigned char c = text->alphabet[text->symbol[i]];
        if (i == position) say(report, "` `");
        if (c == '\n')
            say(report, "⏎");
        else if (c == ' ')
            say(report, "␣");
        else if (c < ' ' || c > '~' || c == '`' || c == '|')
            say(report, "?");
        else
            say(report, "%c", c);
    }
    say(report, "`");
}

static void report_expert(report_t *report, const expert_view_t *view, const text_t *text)
{
    char row[16];
    snprintf(row, sizeof row, "%d", view->expert);
    say(report, "| %3d |", view->expert);
    for (int i = 0; i < text->num_texts; i++) {
        say(report, " %5.2f %% |", 100 * view->share[i]);
        char column[32];
        snprintf(column, sizeof column, "share_of_text_%d", i);
        note(report, "experts", row, column, view->share[i]);
    }
    for (int i = 0; i < view->found; i++) {
        say(report, i ? ", " : " ");
        say_context(report, text, view->position[i]);
        say(report, " %.2f", (double)view->gate[i]);
    }
    say(report, " |\n");
}

/* Some experts that have enough contexts, from one end of the list to the other. */
static void report_some(report_t *report, const usage_t *usage, const text_t *text)
{
    const expert_view_t *busy[MAX_EXPERTS];
    int count = 0;
    for (int e = 0; e < usage->experts; e++)
        if (usage->view[e].found == HIGHEST) busy[count++] = &usage->view[e];
    const int shown = count < SHOWN_EXPERTS ? count : SHOWN_EXPERTS;
    for (int i = 0; i < shown; i++) report_expert(report, busy[i * (count - 1) / (SHOWN_EXPERTS - 1)], text);
}

void report_experts(report_t *report, const usage_t *usage, const text_t *text)
{
    say(report,
        "## What experts of MoE-256 learn\n\n"
        "The contexts with the highest gate values, the character that follows, and the gate value (no noise; of\n"
        "contexts with the same last four characters only the highest). Before them the part of each text's rows\n"
        "that comes to the expert; equal use would be %.2f %%.\n\n| expert |",
        100.0 / usage->experts);
    for (int i = 0; i < text->num_texts; i++) say(report, " %s |", text->name[i]);
    say(report, " contexts |\n|--:|");
    for (int i = 0; i < text->num_texts; i++) say(report, "--:|");
    say(report, "---|\n");
    report_some(report, usage, text);
    say(report, "\n");
    if (text->num_texts < 2) return;
    int one_sided = 0;
    for (int e = 0; e < usage->experts; e++)
        one_sided += usage->view[e].rows > 0 && fabs(preference(&usage->view[e]) - 0.5) > 0.25;
    say(report,
        "%s and %s use different experts: the total variation between the two is %.2f, and %.2f between two\n"
        "halves of %s (0 = the same use, 1 = no expert in common). %d of %d experts would get more than three\n"
        "quarters of their rows from one of the two, were they equally long.\n\n",
        text->name[0], text->name[1], usage->distance, usage->distance_within, text->name[0], one_sided,
        usage->experts);
    note(report, "experts", "all", "total_variation", usage->distance);
    note(report, "experts", "all", "total_variation_within", usage->distance_within);
    note(report, "experts", "all", "one_sided", one_sided);
    show_picture(report, "Which text an expert works for", "experts.svg");
}

void report_close(report_t *report, const char *folder, double seconds)
{
    note(report, "run", "all", "seconds", seconds);
    const bool written = !ferror(report->markdown) && !ferror(report->table);
    if (fclose(report->markdown) || fclose(report->table) || !written)
        die("cannot write to %s: %s", folder, strerror(errno));
    printf("Took %d:%02d minutes. Written to %s: %s.md (this text), %s.tsv (every figure)%s.\n", (int)seconds / 60,
           (int)seconds % 60, folder, report->name, report->name, report->pictures ? ", pictures (*.svg)" : "");
    if (!report->pictures && strcmp(report->name, "demo") == 0)
        printf("No pictures: gnuplot is missing or failed (gnuplot.log); the scripts are *.gp.\n");
}
