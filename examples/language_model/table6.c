#include "table6.h"

enum { ROWS = 8 };

/* In the paper's order, with its figures for words; the demo has MoE-256. */
static const struct {
    kind_index_t kind;
    const char *figures;
} rows[ROWS] = {
    {MOE_64_FREE, "39.8, 3.04, 3.01, 17.80"},
    {MOE_256_FREE, "39.8, 3.04, 3.01, 17.80"},
    {MOE_64_IMPORTANCE, "35.6, 0.06, 0.17, 1.47"},
    {MOE_64_LOAD, "35.7, 0.22, 0.04, 1.15"},
    {MOE_64, "35.6, 0.06, 0.05, 1.14"},
    {MOE_256, "35.6, 0.06, 0.05, 1.14"},
    {MOE_64_WEAK, "35.7, 0.48, 0.11, 1.37"},
    {MOE_64_STRONG, "35.7, 0.03, 0.02, 1.07"},
};

static const char *const columns[NUM_FIGURES] = {"perplexity", "cv_importance", "cv_load", "max_over_mean_load"};
static const char *const words[NUM_FIGURES] = {"perplexity", "CV(importance)", "CV(load)", "max / mean load"};

void table6_add(table6_t *table, kind_index_t kind, double perplexity, const balance_t *balance)
{
    range_t *figure = table->figure[kind];
    table->characters = balance->characters;
    range_add(&figure[PERPLEXITY], perplexity);
    range_add(&figure[CV_IMPORTANCE], balance->cv_importance);
    range_add(&figure[CV_LOAD], balance->cv_load);
    range_add(&figure[MAX_OVER_MEAN_LOAD], balance->max_over_mean_load);
}

/* Both weights. */
static const char *row_name(char *name, size_t size, kind_index_t kind)
{
    snprintf(name, size, "%g and %g", (double)kinds[kind].importance_weight, (double)kinds[kind].load_weight);
    return name;
}

static void report_row(report_t *report, const char *name, const range_t *figure, const char *paper)
{
    say(report, "| %-13s |", name);
    for (int i = 0; i < NUM_FIGURES; i++) {
        const int digits = i == PERPLEXITY ? 3 : 2;
        say(report, " %5.*f", digits, figure[i].mean);
        if (figure[i].seeds > 1) say(report, " (%.*f to %.*f)", digits, figure[i].least, digits, figure[i].most);
        say(report, " |");
        char column[32];
        note(report, "balance", name, columns[i], figure[i].mean);
        snprintf(column, sizeof column, "%s_least", columns[i]);
        note(report, "balance", name, column, figure[i].least);
        snprintf(column, sizeof column, "%s_most", columns[i]);
        note(report, "balance", name, column, figure[i].most);
    }
    say(report, " %-23s |\n", paper);
}

void report_table6(report_t *report, const table6_t *table)
{
    say(report, "| weights of importance and load loss |");
    for (int i = 0; i < NUM_FIGURES; i++) say(report, " %s |", words[i]);
    say(report, " the paper's four (words, Table 6) |\n|---|--:|--:|--:|--:|---|\n");
    int most = 0;
    for (int i = 0; i < ROWS; i++) {
        const range_t *figure = table->figure[rows[i].kind];
        if (!figure->seeds) continue;
        char name[32];
        report_row(report, row_name(name, sizeof name, rows[i].kind), figure, rows[i].figures);
        if (figure->seeds > most) most = figure->seeds;
    }
    say(report, "\nMeans over %d batches of %lld training characters, with noise, after training", NOISY_BATCHES,
        (long long)table->characters);
    if (most > 1) say(report, ", and over %d seeds, with the least and the most of these", most);
    say(report, ".\n\n");
}

/* The worst row with losses, and the worst single training with any, by a figure. */
static range_t worst_with_losses(const table6_t *table, figure_t figure)
{
    range_t worst = {0};
    for (int i = 0; i < ROWS; i++) {
        const range_t *row = &table->figure[rows[i].kind][figure];
        if (rows[i].kind == MOE_64_FREE) continue;
        if (row->mean > worst.mean) worst.mean = row->mean;
        if (row->most > worst.most) worst.most = row->most;
    }
    return worst;
}

/* The rows with losses that do not end below BALANCE_MOST from every seed. */
static void say_uneven_rows(report_t *report, const table6_t *table)
{
    bool any = false;
    for (int i = 0; i < ROWS; i++) {
        const double most = table->figure[rows[i].kind][MAX_OVER_MEAN_LOAD].most;
        if (rows[i].kind == MOE_64_FREE || most < BALANCE_MOST) continue;
        char name[32];
        say(report, "%s %s (%.2f)", any ? "," : "; missed by", row_name(name, sizeof name, rows[i].kind), most);
        any = true;
    }
}

bool report_table6_verdict(report_t *report, const table6_t *table, bool quick)
{
    double factor[NUM_FIGURES], least[NUM_FIGURES];
    const double most = worst_with_losses(table, MAX_OVER_MEAN_LOAD).most;
    bool good = most < BALANCE_MOST;
    for (int i = CV_IMPORTANCE; i < NUM_FIGURES; i++) {
        const range_t *free = &table->figure[MOE_64_FREE][i], worst = worst_with_losses(table, i);
        factor[i] = free->mean / worst.mean;
        least[i] = free->least / worst.most;
        good = good && factor[i] >= BALANCE_FACTOR;
        note(report, "verdict", words[i], "factor", factor[i]);
        note(report, "verdict", words[i], "factor_of_extremes", least[i]);
    }
    note(report, "verdict", "with losses", "max_over_mean_load", most);
    if (quick) {
        say(report, "A quick run: too short to judge by.\n\n");
        return true;
    }
    say(report,
        "The row without losses against the worst row with any: %.1f times %s, %.1f times %s,\n"
        "%.1f times %s; asked for: %g. Its best seed against the worst training of any other: %.1f, %.1f, %.1f.\n"
        "With losses max / mean load is at most %.2f from any seed; asked for: below %g",
        factor[CV_IMPORTANCE], words[CV_IMPORTANCE], factor[CV_LOAD], words[CV_LOAD], factor[MAX_OVER_MEAN_LOAD],
        words[MAX_OVER_MEAN_LOAD], BALANCE_FACTOR, least[CV_IMPORTANCE], least[CV_LOAD], least[MAX_OVER_MEAN_LOAD],
        most, BALANCE_MOST);
    say_uneven_rows(report, table);
    say(report, ".\n**%s.**\n\n", good ? "Reached" : "Not reached");
    return good;
}
