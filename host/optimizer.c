/* The optimizer step: check the call, list the arrays of parameters with their places in the state. */
#include "host/arena.h"
#include "host/kinds.h"
#include "host/objects.h"

#include <float.h>
#include <math.h>

/* The arrays of a layer, and the state that is dealt out to them. */
typedef struct inventory {
    const cumoe_config_t *config;
    int64_t own_experts; /* of this rank */
    cumoe_optimizer_t optimizer;
    cumoe_arena_t state;
    cumoe_parameter_t parameters[11]; /* gates: 5 at most; up, glu and down, matrices and biases: 6 */
    int count;
} inventory_t;

/* As many elements as an array has. Large arrays are followed by a gap: their sizes are often powers of two, and
 * without it the elements that a step works on together would compete for the same lines of a cache. */
static void *take_values(inventory_t *list, size_t size)
{
    const size_t large = (size_t)1 << 20, gap = 1024;
    return cumoe__take(&list->state, size < large ? size : size + gap);
}

/* Appends an array whose values, gradient and sizes are known. */
static void add_array(inventory_t *list, cumoe_parameter_t p, bool factored)
{
    const size_t size = cumoe__dtype_size(cumoe__gate_dtype(list->config));
    const size_t rows = (size_t)(p.experts * p.rows), cols = (size_t)(p.experts * p.cols);
    const size_t values = rows * (size_t)p.cols;
    if (p.value.dtype == CUMOE_BF16 || p.value.dtype == CUMOE_F16) p.master = take_values(list, values * size);
    if (factored) {
        p.row_mean = cumoe__take(&list->state, rows * size);
        p.col_mean = cumoe__take(&list->state, cols * size);
        p.average = cumoe__take(&list->state, (size_t)p.experts * size);
    } else {
        p.moment1 = take_values(list, values * size);
        p.moment2 = take_values(list, values * size);
    }
    list->parameters[list->count++] = p;
}

static void add_gate(inventory_t *list, const cumoe_weights_t *w, const cumoe_weights_t *g)
{
    const cumoe_config_t *c = list->config;
    const int64_t E = c->num_experts, G = c->num_groups, H = c->hidden_size;
    const cumoe_dtype_t wide = cumoe__gate_dtype(c);
    const bool groups = c->gate == CUMOE_GATE_HIERARCHICAL;
    const struct {
        bool present;
        void *value, *gradient;
        cumoe_dtype_t dtype;
        int64_t rows, cols;
    } arrays[] = {
        {c->gate != CUMOE_GATE_EXTERNAL, w->w_gate, g->w_gate, w->gate_dtype, E, H},
        {cumoe__is_noisy(c->gate), w->w_noise, g->w_noise, w->gate_dtype, E, H},
        {groups, w->w_gate_primary, g->w_gate_primary, w->gate_dtype, G, H},
        {groups, w->w_noise_primary, g->w_noise_primary, w->gate_dtype, G, H},
        {c->gate == CUMOE_GATE_BALANCED, w->thresholds, g->thresholds, wide, 1, E},
    };
    for (size_t i = 0; i < sizeof arrays / sizeof arrays[0]; i++) {
        if (!arrays[i].present) continue;
        const int64_t rows = arrays[i].rows, cols = arrays[i].cols;
        add_array(list,
                  (cumoe_parameter_t){.value = {arrays[i].value, arrays[i].dtype, rows * cols, cols, 1},
                                      .gradient = {arrays[i].gradient, wide, rows * cols, cols, 1},
                                      .experts = 1,
                                      .rows = rows,
                                      .cols = cols},
                  false);
    }
}

static void add_matrix(inventory_t *list, cumoe_matrix_t value, cumoe_matrix_t gradient, int64_t rows, int64_t cols)
{
    const cumoe_parameter_t p = {
        .value = value, .gradient = gradient, .experts = list->own_experts, .rows = rows, .cols = cols};
    add_array(list, p, list->optimizer == CUMOE_OPTIMIZER_FACTORED_ADAM);
}

static void add_bias(inventory_t *list, cumoe_matrix_t value, cumoe_matrix_t gradient, int64_t cols)
{
    const cumoe_parameter_t p = {
        .value = value, .gradient = gradient, .experts = list->own_experts, .rows = 1, .cols = cols};
    add_array(list, p, false);
}

static void add_experts(inventory_t *list, const cumoe_weights_t *w, const cumoe_weights_t *g)
{
    const cumoe_config_t *c = list->config;
    const int64_t H = c->hidden_size, I = c->intermediate_size;
    const int halves = cumoe__is_linear(c->activation) ? 0 : cumoe__is_glu(c->activation) ? 2 : 1;
    for (int glu = 0; glu < halves; glu++) {
        add_matrix(list, cumoe__matrix_up(w, c, glu), cumoe__matrix_up(g, c, glu), I, H);
        if (c->expert_bias) add_bias(list, cumoe__bias_up(w, c, glu), cumoe__bias_up(g, c, glu), I);
    }
    add_matrix(list, cumoe__matrix_down(w), cumoe__matrix_down(g), H, I);
    if (c->expert_bias) add_bias(list, cumoe__bias_down(w, c), cumoe__bias_down(g, c), H);
}

/* One function lists the arrays: the size query asks it with types alone and without a state. Offsets count from
 * the state's first byte, so that a copy of it means the same. */
static inventory_t take_inventory(const cumoe_layer_t *layer, cumoe_optimizer_t optimizer, const cumoe_weights_t *w,
                                  const cumoe_weights_t *g, void *state)
{
    inventory_t list = {.config = &layer->context.config,
                        .own_experts = layer->context.ranks.own_experts,
                        .optimizer = optimizer,
                        .state = {(uintptr_t)state, 0}};
    add_gate(&list, w, g);
    add_experts(&list, w, g);
    return list;
}

static cumoe_status_t check_optimizer(const char *function, const cumoe_layer_t *layer, cumoe_optimizer_t optimizer)
{
    CUMOE_REQUIRE(layer, INVALID_ARGUMENT, "%s: layer = NULL, but must come from cumoe_layer_create()", function);
    CUMOE_REQUIRE((unsigned)optimizer <= CUMOE_OPTIMIZER_FACTORED_ADAM, INVALID_ARGUMENT,
                  "%s: optimizer = %d, but must be ADAM (0) or FACTORED_ADAM (1)", function, (int)optimizer);
    return CUMOE_SUCCESS;
}

cumoe_status_t cumoe_optimizer_state_size(const cumoe_layer_t *layer, cumoe_optimizer_t optimizer,
                                          const cumoe_weights_t *weights, size_t *state_size)
{
    static const char function[] = "cumoe_optimizer_state_size";
    CUMOE_TRY(check_optimizer(function, layer, optimizer));
    cumoe_weights_t theirs = {0}, types;
    CUMOE_TRY(cumoe__struct_read(function, "weights", weights, sizeof theirs, &theirs, sizeof theirs));
    CUMOE_REQUIRE(state_size, INVALID_ARGUMENT, "%s: state_size = NULL, but the result needs a place", function);
    theirs =
        (cumoe_weights_t){.struct_size = sizeof theirs, .dtype = theirs.dtype, .gate_dtype = theirs.gate_dtype};
    CUMOE_TRY(cumoe__weights_read(function, "weights", layer, &theirs, CUMOE_ROLE_SOME_WEIGHTS, &types));
    *state_size = take_inventory(layer, optimizer, &types, &types, NULL).state.used;
    return CUMOE_SUCCESS;
}

static const char function[] = "cumoe_optimizer_step";

static cumoe_status_t check_at_least_zero(const char *name, double value)
{
    CUMOE_REQUIRE(isfinite(value) && value >= 0, INVALID_ARGUMENT, "%s: %s = %g, but must be finite and >= 0",
                  function, name, value);
    return CUMOE_SUCCESS;
}

/* Numbers that are used as F32, whose 0 means 0. */
static cumoe_status_t check_factor(const char *name, double value)
{
    CUMOE_TRY(check_at_least_zero(name, value));
    CUMOE_REQUIRE(value == 0 || (value >= (double)FLT_MIN && value <= (double)FLT_MAX), INVALID_ARGUMENT,
                  "%s: %s = %g, but must be 0 or 1.2e-38..3.4e38, the normal numbers of F32", function, name,
                  value);
    return CUMOE_SUCCESS;
}

static cumoe_status_t check_beta(const char *name, float *beta, float default_beta)
{
    CUMOE_REQUIRE(*beta >= 0 && *beta < 1, INVALID_ARGUMENT,
                  "%s: %s = %.9g, but must be at least 0 (which means %g) and below 1", function, name,
                  (double)*beta, (double)default_beta);
    if (*beta == 0) *beta = default_beta;
    return CUMOE_SUCCESS;
}

static cumoe_status_t check_numbers(cumoe_optimizer_args_t *a)
{
    CUMOE_TRY(check_beta("beta1", &a->beta1, 0.9F));
    CUMOE_TRY(check_beta("beta2", &a->beta2, 0.999F));
    CUMOE_TRY(check_at_least_zero("epsilon", (double)a->epsilon));
    CUMOE_TRY(check_at_least_zero("weight_decay", (double)a->weight_decay));
    if (a->epsilon == 0) a->epsilon = 1e-8F;
    if (a->call) return cumoe__check_array(function, "call", a->call, 8, true);
    CUMOE_TRY(check_factor("values.learning_rate", a->values.learning_rate));
    CUMOE_TRY(check_factor("values.gradient_scale", a->values.gradient_scale));
    CUMOE_REQUIRE(a->values.step >= 1, INVALID_ARGUMENT,
                  "%s: values.step = %lld, but must be at least 1: the first step is 1", function,
                  (long long)a->values.step);
    return CUMOE_SUCCESS;
}

cumoe_status_t cumoe_optimizer_step(const cumoe_layer_t *layer, const cumoe_optimizer_args_t *args,
                                    cumoe_stream_t stream)
{
    CUMOE_REQUIRE(layer, INVALID_ARGUMENT, "%s: layer = NULL, but must come from cumoe_layer_create()", function);
    cumoe_optimizer_args_t a = {0};
    cumoe_weights_t weights, gradients;
    CUMOE_TRY(cumoe__struct_read(function, "args", args, sizeof a, &a, sizeof a));
    CUMOE_TRY(check_optimizer(function, layer, a.optimizer));
    CUMOE_TRY(check_numbers(&a));
    CUMOE_TRY(cumoe__weights_read(function, "weights", layer, a.weights, CUMOE_ROLE_TRAINED_WEIGHTS, &weights));
    CUMOE_REQUIRE(a.gradients, INVALID_ARGUMENT, "%s: gradients = NULL, but is required", function);
    CUMOE_TRY(cumoe__weights_read(function, "gradients", layer, a.gradients, CUMOE_ROLE_GRADIENTS, &gradients));
    CUMOE_TRY(cumoe__check_stream(function, layer->handle, stream));

    const inventory_t list = take_inventory(layer, a.optimizer, &weights, &gradients, a.state);
    for (int i = 0; i < list.count; i++)
        CUMOE_REQUIRE(list.parameters[i].value.data != list.parameters[i].gradient.data, INVALID_ARGUMENT,
                      "%s: weights and gradients share the array at %p, but they are two", function,
                      list.parameters[i].value.data);
    CUMOE_REQUIRE(a.state_size >= list.state.used, BUFFER_TOO_SMALL, "%s: state_size = %zu, but %zu is needed",
                  function, a.state_size, list.state.used);
    CUMOE_TRY(cumoe__check_array(function, "state", a.state, 16, true));
    a.weights = &weights;
    a.gradients = &gradients;
    a.state_size = list.state.used;
    return layer->handle->ops->optimizer_step(&layer->context, &a, list.parameters, list.count, stream);
}

cumoe_status_t cumoe_gate_bias_update(const cumoe_layer_t *layer, void *gate_bias, const int32_t *expert_count,
                                      float rate, cumoe_stream_t stream)
{
    static const char name[] = "cumoe_gate_bias_update";
    CUMOE_REQUIRE(layer, INVALID_ARGUMENT, "%s: layer = NULL, but must come from cumoe_layer_create()", name);
    CUMOE_REQUIRE(layer->context.config.gate == CUMOE_GATE_SIGMOID_TOPK, INVALID_ARGUMENT,
                  "%s: the layer's gate is %d, but only CUMOE_GATE_SIGMOID_TOPK (6) has a bias", name,
                  (int)layer->context.config.gate);
    CUMOE_TRY(cumoe__check_array(name, "gate_bias", gate_bias, 16, true));
    CUMOE_TRY(cumoe__check_array(name, "expert_count", expert_count, 16, true));
    CUMOE_REQUIRE(isfinite(rate) && rate >= 0, INVALID_ARGUMENT, "%s: rate = %g, but must be finite and >= 0", name,
                  (double)rate);
    CUMOE_TRY(cumoe__check_stream(name, layer->handle, stream));
    return layer->handle->ops->gate_bias_update(&layer->context, gate_bias, expert_count, rate, stream);
}
