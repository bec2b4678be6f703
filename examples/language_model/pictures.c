#include "pictures.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static FILE *script(const char *name, const char *title)
{
    char path[64];
    snprintf(path, sizeof path, "%s.gp", name);
    FILE *file = fopen(path, "w");
    if (!file) die("cannot write %s: %s", path, strerror(errno));
    fprintf(file,
            "set terminal svg size 720,420 font 'sans-serif,13' background '#ffffff'\nset output '%s.svg'\n"
            "set title '%s'\nset border 3\nset tics nomirror\nset grid ytics linecolor '#dddddd'\n",
            name, title);
    return file;
}

/* Dense layers and mixtures are two series: labels of the one below its points, of the other above. */
static void draw_perplexity(const summary_t *summary)
{
    FILE *file = script("perplexity", "More experts, equal operations: held-out perplexity");
    for (int mixtures = 0; mixtures < 2; mixtures++) {
        fprintf(file, "$%s << END\n", mixtures ? "mixtures" : "dense");
        for (int i = 0; i < NUM_MODELS; i++)
            if ((kinds[i].experts > 1) == mixtures)
                fprintf(file, "%lld %.4f %.4f %.4f \"%s\"\n", (long long)kind_parameters(&kinds[i]),
                        summary[i].perplexity.mean, summary[i].perplexity.least, summary[i].perplexity.most,
                        kinds[i].name);
        fprintf(file, "END\n");
    }
    fprintf(file,
            "set logscale x\nset xlabel 'parameters of the layer'\nset ylabel 'perplexity per character'\n"
            "set xrange [3e4:1e7]\nset offsets 0, 0, graph 0.15, graph 0.15\nset format x '10^{%%T}'\nunset key\n"
            "plot $dense using 1:2:3:4 with yerrorbars pointtype 7 linecolor '#cc6677', \\\n"
            "  $dense using 1:2:5 with labels right offset 1,-1 textcolor '#cc6677', \\\n"
            "  $mixtures using 1:2 with lines linewidth 2 linecolor '#4477aa', \\\n"
            "  $mixtures using 1:2:3:4 with yerrorbars pointtype 7 linecolor '#4477aa', \\\n"
            "  $mixtures using 1:2:5 with labels offset 0,1 textcolor '#4477aa'\n");
    fclose(file);
}

static void draw_load(const balance_t *balance)
{
    FILE *file = script("load", "MoE-256: load of every expert, largest first");
    fprintf(file, "$data << END\n");
    for (int e = 0; e < MAX_EXPERTS; e++)
        fprintf(file, "%d %.5g %.5g\n", e + 1, balance[MOE_256].load[e], balance[MOE_256_FREE].load[e]);
    fprintf(file,
            "END\nset logscale y\nset yrange [0.01:100]\nset xrange [1:%d]\nset xlabel 'expert, by load'\n"
            "set ylabel 'load / mean load, over %d batches'\nset key top right\n"
            "plot $data using 1:2 with lines linewidth 3 linecolor '#4477aa' title 'with both losses', \\\n"
            "  $data using 1:3 with lines linewidth 3 linecolor '#cc6677' title 'without'\n",
            MAX_EXPERTS, NOISY_BATCHES);
    fclose(file);
}

static void draw_experts(const usage_t *usage, const text_t *text)
{
    FILE *file = script("experts", "MoE-256: which text an expert works for");
    fprintf(file, "$data << END\n");
    for (int e = 0; e < usage->experts; e++) fprintf(file, "%d %.5g\n", e + 1, 100 * preference(&usage->view[e]));
    fprintf(file,
            "END\nset xrange [1:%d]\nset yrange [0:100]\nset xlabel 'expert, by preference'\n"
            "set ylabel 'rows by text, %% (as if equally long)'\nset key outside top center horizontal\n"
            "set style fill solid noborder\n"
            "plot $data using 1:(100) with filledcurves y1=0 linecolor '#ddcc77' title '%s', \\\n"
            "  $data using 1:2 with filledcurves y1=0 linecolor '#4477aa' title '%s'\n",
            usage->experts, text->name[1], text->name[0]);
    fclose(file);
}

bool draw_pictures(const summary_t *summary, const balance_t *balance, const usage_t *usage, const text_t *text)
{
    draw_perplexity(summary);
    draw_load(balance);
    bool drawn = system("gnuplot perplexity.gp >gnuplot.log 2>&1 && gnuplot load.gp >>gnuplot.log 2>&1") == 0;
    if (text->num_texts < 2) return drawn;
    draw_experts(usage, text);
    return system("gnuplot experts.gp >>gnuplot.log 2>&1") == 0 && drawn;
}
