#include "cost.h"

#include <math.h>
#include <string.h>

typedef struct figure {
    const char *key, *text, *unit;
    double value;
} figure_t;

enum { FIGURES = 20 };

static void list_figures(const cumoe_cost_t *c, figure_t figures[FIGURES])
{
    const figure_t list[FIGURES] = {
        {"parameters", "parameters", "", (double)c->parameters},
        {"expert_parameters", "of them in experts", "", (double)c->expert_parameters},
        {"gate_parameters", "of them in gates", "", (double)c->gate_parameters},
        {"ops_per_timestep", "ops/timestep: multiply-adds of a token, forward", "", (double)c->ops_per_timestep},
        {"compute_to_traffic", "multiply-adds per element in or out of an expert", "", c->compute_to_traffic},
        {"forward_flop", "work forward", "FLOP", c->forward_flop},
        {"backward_flop", "work backward", "FLOP", c->backward_flop},
        {"forward_bytes", "bytes moved forward, at least", "B", c->forward_bytes},
        {"backward_bytes", "bytes moved backward, at least", "B", c->backward_bytes},
        {"forward_intensity", "work per byte forward", "FLOP/B", c->forward_flop / c->forward_bytes},
        {"backward_intensity", "work per byte backward", "FLOP/B", c->backward_flop / c->backward_bytes},
        {"weights_size", "weights", "B", (double)c->weights_size},
        {"gradients_size", "gradients", "B", (double)c->gradients_size},
        {"adam_state_size", "state of Adam", "B", (double)c->adam_state_size},
        {"factored_state_size", "state of factored Adam", "B", (double)c->factored_state_size},
        {"saved_size", "saved from forward to backward", "B", (double)c->saved_size},
        {"saved_size_recomputing", "saved, pre-activations being recomputed", "B",
         (double)c->saved_size_recomputing},
        {"rows_per_expert", "rows per expert: one rank, one time step", "", c->rows_per_expert},
        {"rows_per_expert_ranks", "rows per expert: all ranks, one time step", "", c->rows_per_expert_ranks},
        {"rows_per_expert_timesteps", "rows per expert: all ranks, all time steps", "",
         c->rows_per_expert_timesteps},
    };
    memcpy(figures, list, sizeof list);
}

/* Three digits and a decimal prefix: "4.30 G". */
static void print_short(double value, const char *unit)
{
    static const char *const prefixes[] = {"", "k", "M", "G", "T", "P", "E", "Z"};
    int prefix = 0;
    while (value >= 999.5 && prefix < 7) {
        value /= 1000;
        prefix++;
    }
    const int digits = value >= 99.95 || value == floor(value) ? 0 : value >= 9.995 ? 1 : 2;
    const char *space = *prefixes[prefix] || *unit ? " " : "";
    printf("%.*f%s%s%s", digits, value, space, prefixes[prefix], unit);
}

void cost_table(const subject_t *s)
{
    const cumoe_config_t *c = &s->config;
    figure_t figures[FIGURES];
    list_figures(&s->cost, figures);
    printf("%s%sH = %d, I = %d, E = %d, K = %d, %s, %s gate, %s%s%s\n", s->shape ? s->shape : "",
           s->shape ? ": " : "", c->hidden_size, c->intermediate_size, c->num_experts, c->top_k,
           activation_words[c->activation], gate_words[c->gate], dtype_words[c->dtype - CUMOE_F64],
           c->expert_bias ? ", biases" : "", c->recompute ? ", recomputing" : "");
    if (c->gate == CUMOE_GATE_HIERARCHICAL)
        printf("%d groups, %d of them per token\n", c->num_groups, c->top_k_groups);
    printf("A call takes %d token%s x %d time step%s; %d rank%s. Work, bytes and memory are those of one rank.\n\n",
           s->tokens, s->tokens == 1 ? "" : "s", s->timesteps, s->timesteps == 1 ? "" : "s", s->ranks,
           s->ranks == 1 ? "" : "s");
    puts("| figure | | exactly |\n|---|---:|---:|");
    for (int i = 0; i < FIGURES; i++) {
        printf("| %s | ", figures[i].text);
        print_short(figures[i].value, figures[i].unit);
        const double value = figures[i].value;
        printf(value == floor(value) ? " | %.0f |\n" : " | %.10g |\n", value);
    }
}

void cost_json(const subject_t *s, FILE *file)
{
    const cumoe_config_t *c = &s->config;
    figure_t figures[FIGURES];
    list_figures(&s->cost, figures);
    fprintf(file,
            "{\"shape\": %s%s%s, \"hidden\": %d, \"intermediate\": %d, \"experts\": %d, \"top_k\": %d,\n"
            " \"groups\": %d, \"top_k_groups\": %d, \"gate\": \"%s\", \"activation\": \"%s\", \"dtype\": \"%s\",\n"
            " \"bias\": %d, \"recompute\": %d, \"tokens\": %d, \"timesteps\": %d, \"ranks\": %d",
            s->shape ? "\"" : "", s->shape ? s->shape : "null", s->shape ? "\"" : "", c->hidden_size,
            c->intermediate_size, c->num_experts, c->top_k, c->num_groups, c->top_k_groups, gate_words[c->gate],
            activation_words[c->activation], dtype_words[c->dtype - CUMOE_F64], c->expert_bias, c->recompute,
            s->tokens, s->timesteps, s->ranks);
    for (int i = 0; i < FIGURES; i++) fprintf(file, ",\n \"%s\": %.17g", figures[i].key, figures[i].value);
    fputs("}\n", file);
}
