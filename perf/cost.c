/* cumoe-cost: what a configuration of the layer costs, by counting. */
#include "cost.h"
#include "command_line.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

typedef struct options {
    model_t sizes;
    int groups, top_k_groups, dtype, recompute;
    int tokens, timesteps, ranks;
    int shape; /* index, or -1 */
    int list, paper;
    const char *json;
} options_t;

/* Given a shape, its sizes replace the defaults: they take effect first, and other options change them. */
static void read_options(options_t *o, int argc, char **argv)
{
    const char *names[MODELS + 1];
    models_names(names);
    const option_t table[] = {
        {"shape", "one layer of a published model, bf16", .choice = &o->shape, .words = names},
        {"hidden", "H, width of the model", .number = &o->sizes.hidden, .min = 1, .max = CUMOE_MAX_WIDTH},
        {"intermediate", "I, width inside an expert", .number = &o->sizes.intermediate, .min = 1,
         .max = CUMOE_MAX_WIDTH},
        {"experts", "E, number of experts", .number = &o->sizes.experts, .min = 1, .max = CUMOE_MAX_EXPERTS},
        {"top-k", "K, experts per token; softmax: 0 for all", .number = &o->sizes.top_k, .min = 0,
         .max = CUMOE_MAX_EXPERTS},
        {"groups", "G, groups of the hierarchical gate", .number = &o->groups, .min = 0, .max = CUMOE_MAX_EXPERTS},
        {"top-k-groups", "K1, groups per token", .number = &o->top_k_groups, .min = 0, .max = CUMOE_MAX_TOP_K},
        {"gate", "the gate", .choice = &o->sizes.gate, .words = gate_words},
        {"activation", "inside an expert", .choice = &o->sizes.activation, .words = activation_words},
        {"dtype", "of tokens and experts", .choice = &o->dtype, .words = dtype_words},
        {"bias", "experts have biases", .flag = &o->sizes.bias},
        {"recompute", "the backward pass computes pre-activations again", .flag = &o->recompute},
        {"tokens", "T, tokens of a time step on a rank", .number = &o->tokens, .min = 1, .max = INT_MAX},
        {"timesteps", "time steps that one call takes together", .number = &o->timesteps, .min = 1, .max = INT_MAX},
        {"ranks", "devices that share the experts", .number = &o->ranks, .min = 1, .max = INT_MAX},
        {"json", "FILE: write the figures to it as well; - = to stdout, instead of the table", .string = &o->json},
        {"list", "the shapes that --shape knows", .flag = &o->list},
        {"paper", "tables 7 and 8 of Shazeer et al. 2017, counted", .flag = &o->paper},
    };
    const program_t program = {"cumoe-cost",
                               "parameters, operations, bytes and memory of one MoE layer, by counting\n\n"
                               "Prints a Markdown table. The formulas stand in cumoe/cost.h.",
                               table, sizeof table / sizeof *table};
    command_line_read(&program, argc, argv);
    if (o->shape < 0) return;
    o->sizes = models[o->shape];
    o->dtype = CUMOE_BF16 - CUMOE_F64;
    command_line_read(&program, argc, argv);
}

static subject_t subject_of(const options_t *o)
{
    subject_t s = {.shape = o->shape < 0 ? NULL : models[o->shape].name,
                   .tokens = o->tokens,
                   .timesteps = o->timesteps,
                   .ranks = o->ranks,
                   .cost = {.struct_size = sizeof s.cost}};
    cost_check(cumoe_config_init(&s.config));
    s.config.hidden_size = o->sizes.hidden;
    s.config.intermediate_size = o->sizes.intermediate;
    s.config.num_experts = o->sizes.experts;
    s.config.top_k = o->sizes.top_k;
    s.config.dtype = (cumoe_dtype_t)(CUMOE_F64 + o->dtype);
    s.config.activation = (cumoe_activation_t)o->sizes.activation;
    s.config.expert_bias = o->sizes.bias;
    s.config.recompute = o->recompute;
    s.config.gate = (cumoe_gate_kind_t)o->sizes.gate;
    s.config.num_groups = o->groups;
    s.config.top_k_groups = o->top_k_groups;
    cost_check(cumoe_config_cost(&s.config, s.tokens, s.timesteps, s.ranks, &s.cost));
    return s;
}

void cost_check(cumoe_status_t status)
{
    if (status == CUMOE_SUCCESS) return;
    fprintf(stderr, "%s\n", cumoe_last_error());
    exit(2);
}

static void write_json(const subject_t *subject, const char *name)
{
    FILE *file = fopen(name, "w");
    if (file) cost_json(subject, file);
    if (!file || ferror(file) || fclose(file) != 0) {
        fprintf(stderr, "cumoe-cost: --json %s: %s\n", name, strerror(errno));
        exit(2);
    }
}

int main(int argc, char **argv)
{
    options_t o = {.sizes = {.hidden = 512, .intermediate = 1024, .experts = 256, .top_k = 4},
                   .dtype = CUMOE_F32 - CUMOE_F64,
                   .tokens = 4096,
                   .timesteps = 1,
                   .ranks = 1,
                   .shape = -1};
    read_options(&o, argc, argv);
    if (o.list) {
        models_list();
    } else if (o.paper) {
        cost_paper();
    } else {
        const subject_t subject = subject_of(&o);
        const int json_only = o.json && strcmp(o.json, "-") == 0;
        if (json_only) {
            cost_json(&subject, stdout);
        } else {
            cost_table(&subject);
        }
        if (o.json && !json_only) write_json(&subject, o.json);
    }
    return fflush(stdout) == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
