#include "tests/check/checks.h"

#include "tests/support/pairwise.h"
#include "tests/support/stages.h"

static void forward(problem_t *p, report_t *report)
{
    if (problem_run_forward(p, report)) problem_check_forward(p, report);
}

static void backward(problem_t *p, report_t *report)
{
    if (problem_run_forward(p, report) && problem_run_backward(p, report)) problem_check_backward(p, report);
}

typedef struct part {
    const char *name;
    check_body_t *body;
    int layer_pass;
    bool of_gate; /* not with EXTERNAL */
} part_t;

static const part_t PARTS[] = {
    {"gate", stage_check_gate, 0, false},
    {"permute", stage_check_permute, 0, false},
    {"up", stage_check_up, 0, false},
    {"down", stage_check_down, 0, false},
    {"combine", stage_check_combine, 0, false},
    {"down_backward", stage_check_down_backward, 0, false},
    {"gate_backward", stage_check_gate_backward, 0, true},
    {"up_backward", stage_check_up_backward, 0, false},
    {"permute_backward", stage_check_permute_backward, 0, false},
    {"forward", forward, 1, false},
    {"backward", backward, 2, false},
};

enum { NUM_PARTS = sizeof PARTS / sizeof *PARTS };

typedef struct visitor {
    cumoe_backend_t backend;
    uint64_t seed;
    check_visit_t *visit;
    void *context;
    int chosen[MAX_PAIRWISE], num_chosen; /* of PAIRWISE */
} visitor_t;

static bool visit(const visitor_t *v, const part_t *part, const layer_case_t *layer_case,
                  const problem_options_t *options)
{
    const check_t check = {part->name, part->body, part->layer_pass, *layer_case, *options};
    if (part->of_gate && options->variant.gate == CUMOE_GATE_EXTERNAL) return true;
    return v->visit(&check, v->context);
}

/* Every case with every gate that it means anything with, types and activations in turn. */
static bool visit_cases(const visitor_t *v, const part_t *part)
{
    for (int i = 0; i < NUM_LAYER_CASES; i++)
        for (int gate = 0; gate < NUM_GATE_VARIANTS; gate++) {
            if (!case_applies(&LAYER_CASES[i], &GATE_VARIANTS[gate])) continue;
            const problem_options_t options = {.dtype = (cumoe_dtype_t)(CUMOE_F64 + (i + gate) % 4),
                                               .activation = (cumoe_activation_t)(i % CUMOE_NUM_ACTIVATIONS),
                                               .bias = i % 5 < 3,
                                               .recompute = i % 7 < 3,
                                               .variant = GATE_VARIANTS[gate],
                                               .seed = v->seed + (uint64_t)i};
            if (!visit(v, part, &LAYER_CASES[i], &options)) return false;
        }
    return true;
}

static bool visit_pairs(const visitor_t *v, const part_t *part)
{
    for (int n = 0; n < v->num_chosen; n++) {
        layer_case_t layer_case;
        problem_options_t options;
        pairwise_case(v->chosen[n], n, v->seed, &layer_case, &options);
        if (!visit(v, part, &layer_case, &options)) return false;
    }
    return true;
}

/* Activations without a kink, beside which the rounding may choose the other side. */
static bool visit_tf32(const visitor_t *v, const part_t *part)
{
    static const cumoe_activation_t activations[] = {CUMOE_ACTIVATION_GELU, CUMOE_ACTIVATION_SWIGLU,
                                                     CUMOE_ACTIVATION_SILU, CUMOE_ACTIVATION_GEGLU,
                                                     CUMOE_ACTIVATION_IDENTITY};
    for (int i = 0; i < NUM_LAYER_CASES && v->backend == CUMOE_BACKEND_CUDA && part->layer_pass; i++) {
        const gate_variant_t *variant = &GATE_VARIANTS[i % NUM_GATE_VARIANTS];
        const problem_options_t options = {.dtype = CUMOE_F32,
                                           .compute = CUMOE_COMPUTE_TF32,
                                           .activation = activations[i % 5],
                                           .bias = i % 2,
                                           .variant = *variant,
                                           .seed = v->seed + (uint64_t)i};
        if (case_applies(&LAYER_CASES[i], variant) && !visit(v, part, &LAYER_CASES[i], &options)) return false;
    }
    return true;
}

void checks_visit(cumoe_backend_t backend, uint64_t seed, check_visit_t *function, void *context)
{
    visitor_t v = {.backend = backend, .seed = seed, .visit = function, .context = context};
    v.num_chosen = pairs_choose(&PAIRWISE, MAX_PAIRWISE, v.chosen);
    for (int i = 0; i < NUM_PARTS; i++)
        if (!visit_cases(&v, &PARTS[i]) || !visit_pairs(&v, &PARTS[i]) || !visit_tf32(&v, &PARTS[i])) return;
}
