/* cumoe-perf-gate: what a gate costs per token on the CPU, from 8 experts to 131,072, flat and in two levels,
 * beside OpenBLAS products of the same size as its logits and nothing else, in turns. */
#include "command_line.h"
#include "yardsticks.h"

#include <cumoe/cumoe.h>

#include <cblas.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#undef I /* of complex.h */

enum { MOST_REPEATS = 100, FIRST_EXPERTS = 8 };

/* A gate in training, with everything that its stage reads and writes. */
typedef struct subject {
    cumoe_handle_t *handle;
    cumoe_layer_t *layer;
    cumoe_config_t config;
    int64_t T;
    cumoe_weights_t weights, gradients;
    cumoe_gate_args_t forward;
    cumoe_gate_backward_args_t backward;
    void *arrays[32];
    int num_arrays;
} subject_t;

typedef struct options {
    int tokens, hidden, top_k, most_experts, threads, repeat;
} options_t;

static const struct gate {
    const char *name;
    cumoe_gate_kind_t kind;
    int most_experts; /* BALANCED keeps T * E gates */
} gates[] = {{"noisy top-k", CUMOE_GATE_NOISY_TOPK, CUMOE_MAX_EXPERTS},
             {"softmax top-k", CUMOE_GATE_SOFTMAX_TOPK, CUMOE_MAX_EXPERTS},
             {"sigmoid top-k", CUMOE_GATE_SIGMOID_TOPK, CUMOE_MAX_EXPERTS},
             {"balanced", CUMOE_GATE_BALANCED, 4096},
             {"hierarchical", CUMOE_GATE_HIERARCHICAL, CUMOE_MAX_EXPERTS}};
enum { GATES = sizeof gates / sizeof *gates };

static void check(cumoe_status_t status)
{
    if (status == CUMOE_SUCCESS) return;
    fprintf(stderr, "cumoe-perf-gate: %s: %s\n", cumoe_status_name(status), cumoe_last_error());
    exit(EXIT_FAILURE);
}

static void *array(subject_t *s, int64_t count, size_t size)
{
    void *made;
    check(cumoe_memory_alloc(s->handle, (size_t)count * size + 64, &made));
    check(cumoe_memory_set(s->handle, made, 0, (size_t)count * size + 64, NULL));
    s->arrays[s->num_arrays++] = made;
    return made;
}

static void fill(float *values, int64_t count, float scale)
{
    uint32_t seed = 1;
    for (int64_t i = 0; i < count; i++) {
        seed ^= seed << 13, seed ^= seed >> 17, seed ^= seed << 5;
        values[i] = scale * ((float)(seed >> 8) * 0x1p-23F - 1);
    }
}

/* G of two levels: a power of two near the root of E, as in the paper's 16 x 16 to 256 x 512. */
static int groups_of(int experts)
{
    int groups = 1;
    while (groups * groups * 4 <= experts) groups *= 2;
    return groups;
}

static cumoe_routing_t new_routing(subject_t *s)
{
    int64_t slots;
    check(cumoe_layer_max_rows(s->layer, s->T, NULL, &slots));
    const int64_t E = s->config.num_experts, choices = s->T * s->config.top_k_groups;
    return (cumoe_routing_t){.call = array(s, 1, sizeof(cumoe_call_t)),
                             .tokens = array(s, 1, sizeof(int64_t)),
                             .expert = array(s, slots, sizeof(int32_t)),
                             .weight = array(s, slots, sizeof(float)),
                             .importance = array(s, E, sizeof(int64_t)),
                             .load = array(s, E, sizeof(int64_t)),
                             .token_slot = s->config.gate == CUMOE_GATE_BALANCED ? array(s, s->T + 1, 4) : NULL,
                             .slot_token = array(s, slots, sizeof(int32_t)),
                             .excess = array(s, E, sizeof(int32_t)),
                             .primary_group = array(s, choices, sizeof(int32_t)),
                             .primary_weight = array(s, choices, sizeof(float)),
                             .primary_load = array(s, s->config.num_groups, sizeof(int64_t)),
                             .primary_count = array(s, s->config.num_groups, sizeof(int32_t))};
}

static void new_weights(subject_t *s)
{
    const int64_t E = s->config.num_experts, H = s->config.hidden_size, G = s->config.num_groups;
    check(cumoe_weights_create(s->layer, CUMOE_DTYPE_DEFAULT, &s->weights));
    check(cumoe_weights_create(s->layer, CUMOE_DTYPE_DEFAULT, &s->gradients));
    fill(s->weights.w_gate, E * H, 0.05F);
    if (s->weights.w_noise) fill(s->weights.w_noise, E * H, 0.05F);
    if (G > 0) fill(s->weights.w_gate_primary, G * H, 0.05F);
    if (G > 0) fill(s->weights.w_noise_primary, G * H, 0.05F);
}

static void subject_create(subject_t *s, const options_t *o, cumoe_handle_t *handle, const struct gate *gate,
                           int experts)
{
    *s = (subject_t){.handle = handle, .T = o->tokens};
    check(cumoe_config_init(&s->config));
    s->config.hidden_size = o->hidden;
    s->config.intermediate_size = 1;
    s->config.num_experts = experts;
    s->config.top_k = o->top_k;
    s->config.gate = gate->kind;
    s->config.max_threads = o->threads;
    if (gate->kind == CUMOE_GATE_HIERARCHICAL) {
        s->config.num_groups = groups_of(experts);
        s->config.top_k_groups = o->top_k % 2 == 0 && s->config.num_groups > 1 ? 2 : 1;
    }
    check(cumoe_layer_create(&s->layer, handle, &s->config));
    new_weights(s);
    float *x = array(s, s->T * o->hidden, sizeof *x), *losses = array(s, CUMOE_NUM_LOSSES, sizeof *losses);
    fill(x, s->T * o->hidden, 1);
    s->forward = (cumoe_gate_args_t){.struct_size = sizeof s->forward,
                                     .num_tokens = s->T,
                                     .weights = &s->weights,
                                     .x = x,
                                     .training = 1,
                                     .seed = 1,
                                     .routing = new_routing(s),
                                     .losses = losses};
    check(cumoe_stage_workspace_size(s->layer, CUMOE_STAGE_GATE, s->T, &s->forward.workspace_size));
    s->forward.workspace = array(s, (int64_t)s->forward.workspace_size, 1);
    int64_t slots;
    check(cumoe_layer_max_rows(s->layer, s->T, NULL, &slots));
    float *dweight = array(s, slots, sizeof *dweight);
    fill(dweight, slots, 1);
    s->backward = (cumoe_gate_backward_args_t){.struct_size = sizeof s->backward,
                                               .num_tokens = s->T,
                                               .weights = &s->weights,
                                               .x = x,
                                               .training = 1,
                                               .routing = s->forward.routing,
                                               .dweight = dweight,
                                               .dx_gate = array(s, s->T * o->hidden, sizeof(float)),
                                               .gradients = &s->gradients};
    check(cumoe_stage_workspace_size(s->layer, CUMOE_STAGE_GATE_BACKWARD, s->T, &s->backward.workspace_size));
    s->backward.workspace = array(s, (int64_t)s->backward.workspace_size, 1);
}

static void subject_destroy(subject_t *s)
{
    for (int i = 0; i < s->num_arrays; i++) cumoe_memory_free(s->handle, s->arrays[i]);
    cumoe_weights_destroy(s->layer, &s->weights);
    cumoe_weights_destroy(s->layer, &s->gradients);
    cumoe_layer_destroy(s->layer);
}

/* Columns of logits that the stage makes of a token: with noise two for an expert, with groups those of K1 of them.
 */
static int64_t columns_of(const cumoe_config_t *c)
{
    const int64_t G = c->num_groups, halves = c->gate == CUMOE_GATE_NOISY_TOPK || G > 0 ? 2 : 1;
    return halves * (G > 0 ? G + c->top_k_groups * (c->num_experts / G) : c->num_experts);
}

static int ascending(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, int count)
{
    qsort(values, (size_t)count, sizeof *values, ascending);
    return (values[(count - 1) / 2] + values[count / 2]) / 2;
}

/* A row of the table: rounds in turns, after one that is not counted. */
static void measure(const options_t *o, subject_t *s, const char *name)
{
    const int T = o->tokens, H = o->hidden, columns = (int)columns_of(&s->config);
    float *product = new_array((int64_t)T * columns, sizeof *product),
          *b = new_array((int64_t)columns * H, sizeof *b);
    double dense[MOST_REPEATS], forward[MOST_REPEATS], backward[MOST_REPEATS], ratio[MOST_REPEATS];
    fill(b, (int64_t)columns * H, 0.05F);
    for (int round = -1; round < o->repeat; round++) {
        const double start = seconds();
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, T, columns, H, 1, s->forward.x, H, b, H, 0, product,
                    columns);
        const double between = seconds();
        let_threads_sleep(o->threads);
        const double begin = seconds();
        check(cumoe_gate(s->layer, &s->forward, NULL));
        const double middle = seconds();
        check(cumoe_gate_backward(s->layer, &s->backward, NULL));
        const double end = seconds();
        if (round < 0) continue;
        dense[round] = between - start;
        forward[round] = middle - begin;
        backward[round] = end - middle;
        ratio[round] = forward[round] / dense[round];
    }
    char groups[32] = "";
    if (s->config.num_groups)
        snprintf(groups, sizeof groups, " %d x %d", s->config.num_groups,
                 s->config.num_experts / s->config.num_groups);
    const double ns = 1e9 / T;
    printf("| %d | %s%s | %.0f | %.0f | %.0f | %.2f |\n", s->config.num_experts, name, groups,
           ns * median(dense, o->repeat), ns * median(forward, o->repeat), ns * median(backward, o->repeat),
           median(ratio, o->repeat));
    fflush(stdout);
    free(product);
    free(b);
}

int main(int argc, char **argv)
{
    options_t o = {.tokens = 1024, .hidden = 512, .top_k = 4, .most_experts = 4096, .threads = 2, .repeat = 5};
    const option_t options[] = {
        {.name = "tokens", .text = "T", .number = &o.tokens, .min = 1, .max = 1 << 20},
        {.name = "hidden", .text = "H", .number = &o.hidden, .min = 1, .max = 1 << 16},
        {.name = "top-k",
         .text = "K; two levels choose 2 groups if it is even",
         .number = &o.top_k,
         .min = 1,
         .max = FIRST_EXPERTS / 2},
        {.name = "most-experts",
         .text = "the sweep goes from 8 in steps of 4 up to this",
         .number = &o.most_experts,
         .min = FIRST_EXPERTS,
         .max = CUMOE_MAX_EXPERTS},
        {.name = "threads", .text = "of both", .number = &o.threads, .min = 1, .max = 1024},
        {.name = "repeat", .text = "rounds", .number = &o.repeat, .min = 1, .max = MOST_REPEATS}};
    const program_t program = {
        "cumoe-perf-gate",
        "The cost of every gate in training, per token, beside an OpenBLAS product of the size of its\n"
        "logits: from 8 experts up.",
        options, sizeof options / sizeof *options};
    command_line_read(&program, argc, argv);
    openblas_set_num_threads(o.threads);
    cumoe_handle_t *handle;
    check(cumoe_handle_create(&handle, CUMOE_BACKEND_CPU, 0));
    printf("T = %d, H = %d, K = %d, f32, %d thread%s, median of %d rounds; ns per token\n\n%s; %s\n\n", o.tokens,
           o.hidden, o.top_k, o.threads, o.threads == 1 ? "" : "s", o.repeat, cumoe_handle_description(handle),
           openblas_get_config());
    puts("| E | gate | sgemm of its logits | forward | backward | forward / sgemm |\n|--:|---|--:|--:|--:|--:|");
    for (int64_t experts = FIRST_EXPERTS; experts <= o.most_experts; experts *= 4)
        for (int gate = 0; gate < GATES; gate++) {
            if (experts > gates[gate].most_experts) continue;
            subject_t subject;
            subject_create(&subject, &o, handle, &gates[gate], (int)experts);
            measure(&o, &subject, gates[gate].name);
            subject_destroy(&subject);
        }
    cumoe_handle_destroy(handle);
    return EXIT_SUCCESS;
}
