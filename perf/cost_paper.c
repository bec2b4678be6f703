/* The language models of Shazeer et al. 2017, tables 7 and 8, from their sizes: the MoE layers counted by the
 * library, what stands around them counted here. */
#include "cost.h"

/* LSTM layers, and between them a layer of experts or a dense one. */
typedef struct network {
    const char *name;
    int lstms, units, width; /* an LSTM layer has width inputs and outputs */
    int projected;           /* 1: units are projected to width */
    int experts, groups;     /* 0 experts: dense; 0 groups: a flat gate */
    int intermediate;        /* of an expert or of a dense layer; 0 = neither is there */
    int hidden_layers;       /* of a dense layer */
    const char *printed_ops; /* the paper's figure where it is another: 8.65 was not rounded up */
} network_t;

enum { TOP_K = 4, TOP_K_GROUPS = 2 };

/* The branching of the last two is not in the paper; 32 is the one that fits MoE-143M. */
static const network_t table_7[] = {
    {"LSTM-512-512", 1, 512, 512, .projected = 1},
    {"LSTM-1024-512", 1, 1024, 512, .projected = 1},
    {"LSTM-2048-512", 1, 2048, 512, .projected = 1},
    {"4xLSTM-512", 4, 512, 512, .projected = 0},
    {"MoE-1-Wide", 2, 512, 512, .intermediate = 4096, .hidden_layers = 1},
    {"MoE-1-Deep", 2, 512, 512, .intermediate = 1024, .hidden_layers = 4},
    {"MoE-4", 2, 512, 512, .experts = 4, .intermediate = 1024},
    {"MoE-32", 2, 512, 512, .experts = 32, .intermediate = 1024},
    {"MoE-256", 2, 512, 512, .experts = 256, .intermediate = 1024, .printed_ops = "8.6"},
    {"MoE-256-h", 2, 512, 512, .experts = 256, .groups = 16, .intermediate = 1024},
    {"MoE-1024-h", 2, 512, 512, .experts = 1024, .groups = 16, .intermediate = 1024},
    {"MoE-4096-h", 2, 512, 512, .experts = 4096, .groups = 16, .intermediate = 1024},
    {"2xLSTM-8192-1024", 2, 8192, 1024, .projected = 1},
    {"MoE-34M", 2, 1024, 1024, .experts = 1024, .groups = 32, .intermediate = 2048},
    {"MoE-143M", 2, 4096, 1024, .projected = 1, .experts = 256, .groups = 32, .intermediate = 8192},
};

static const network_t table_8[] = {
    {"4xLSTM-512", 4, 512, 512, .projected = 0},
    {"MoE-32", 2, 512, 512, .experts = 32, .intermediate = 1024},
    {"MoE-256-h", 2, 512, 512, .experts = 256, .groups = 32, .intermediate = 1024},
    {"MoE-1024-h", 2, 512, 512, .experts = 1024, .groups = 32, .intermediate = 1024},
    {"MoE-4096-h", 2, 512, 512, .experts = 4096, .groups = 64, .intermediate = 1024},
    {"MoE-16384-h", 2, 512, 512, .experts = 16384, .groups = 128, .intermediate = 1024},
    {"MoE-65536-h", 2, 512, 512, .experts = 65536, .groups = 256, .intermediate = 1024},
    {"MoE-131072-h", 2, 512, 512, .experts = 131072, .groups = 256, .intermediate = 1024},
};

typedef struct counts {
    int64_t ops, parameters; /* per time step */
} counts_t;

/* Four gates of an LSTM see input and state. All its parameters are used in every time step. */
static counts_t count_lstms(const network_t *n)
{
    const int64_t units = n->units, width = n->width;
    const int64_t each = 4 * units * (width + width) + (n->projected ? units * width : 0);
    return (counts_t){n->lstms * each, n->lstms * each};
}

static counts_t count_dense(const network_t *n)
{
    const int64_t width = n->width, inside = n->intermediate;
    const int64_t values = inside ? 2 * width * inside + (n->hidden_layers - 1) * inside * inside : 0;
    return (counts_t){values, values};
}

static counts_t count_experts(const network_t *n)
{
    cumoe_config_t config;
    cumoe_cost_t cost = {.struct_size = sizeof cost};
    cost_check(cumoe_config_init(&config));
    config.hidden_size = n->width;
    config.intermediate_size = n->intermediate;
    config.num_experts = n->experts;
    config.top_k = TOP_K;
    if (n->groups) {
        config.gate = CUMOE_GATE_HIERARCHICAL;
        config.num_groups = n->groups;
        config.top_k_groups = TOP_K_GROUPS;
    }
    cost_check(cumoe_config_cost(&config, 1, 1, 1, &cost));
    return (counts_t){cost.ops_per_timestep, cost.parameters};
}

static void print_table(const char *title, const network_t *networks, size_t count)
{
    printf("%s\n\n| model | ops/timestep | parameters |\n|---|---:|---:|\n", title);
    for (size_t i = 0; i < count; i++) {
        const network_t *n = &networks[i];
        const counts_t around = count_lstms(n), inside = n->experts ? count_experts(n) : count_dense(n);
        printf("| %s | %.1f", n->name, 1e-6 * (double)(around.ops + inside.ops));
        if (n->printed_ops) printf(" (paper: %s)", n->printed_ops);
        printf(" | %.1f |\n", 1e-6 * (double)(around.parameters + inside.parameters));
    }
}

void cost_paper(void)
{
    puts("Multiply-adds of a token, forward, without softmax, and parameters without embedding and softmax, in\n"
         "millions. Left out are the Kneser-Ney models, which are no networks, and repeated runs of a model.\n");
    print_table("Table 7: 1 billion word benchmark", table_7, sizeof table_7 / sizeof *table_7);
    puts("");
    print_table("Table 8: 100 billion words of Google News", table_8, sizeof table_8 / sizeof *table_8);
}
