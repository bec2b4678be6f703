/* The calls that are timed, and whether their results are right. */
#include "stages_bench.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

const char *const part_names[NUM_PARTS] = {
    "gate",
    "permute",
    "up",
    "down",
    "combine",
    "down_backward",
    "gate_backward",
    "up_backward",
    "permute_backward",
    "layer inference",
    "layer forward",
    "layer forward + backward",
    "optimizer step",
};

const char *bench_left_out(const bench_t *b, int part)
{
    if (part == CUMOE_STAGE_GATE_BACKWARD && b->subject.config.gate == CUMOE_GATE_EXTERNAL)
        return "the external gate has no parameters";
    if (part == OPTIMIZER && b->no_optimizer[0]) return b->no_optimizer;
    return NULL;
}

static cumoe_status_t call(bench_t *b, int part)
{
    cumoe_layer_t *layer = b->layer;
    cumoe_stream_t stream = b->stream;
    switch (part) {
    case CUMOE_STAGE_GATE:
        return cumoe_gate(layer, &b->gate, stream);
    case CUMOE_STAGE_PERMUTE:
        return cumoe_permute(layer, &b->permute, stream);
    case CUMOE_STAGE_UP:
        return cumoe_experts_up(layer, &b->up, stream);
    case CUMOE_STAGE_DOWN:
        return cumoe_experts_down(layer, &b->down, stream);
    case CUMOE_STAGE_COMBINE:
        return cumoe_combine(layer, &b->combine, stream);
    case CUMOE_STAGE_DOWN_BACKWARD:
        return cumoe_experts_down_backward(layer, &b->down_backward, stream);
    case CUMOE_STAGE_GATE_BACKWARD:
        return cumoe_gate_backward(layer, &b->gate_backward, stream);
    case CUMOE_STAGE_UP_BACKWARD:
        return cumoe_experts_up_backward(layer, &b->up_backward, stream);
    case CUMOE_STAGE_PERMUTE_BACKWARD:
        return cumoe_permute_backward(layer, &b->permute_backward, stream);
    case INFERENCE:
        return cumoe_layer_forward(layer, &b->inference, stream);
    case OPTIMIZER:
        return cumoe_optimizer_step(layer, &b->optimizer, stream);
    default:
        return cumoe_layer_forward(layer, &b->forward, stream);
    }
}

void bench_enqueue(bench_t *b, int part)
{
    stages_check(call(b, part));
    if (part == FORWARD_BACKWARD) stages_check(cumoe_layer_backward(b->layer, &b->backward, b->stream));
    if (part == OPTIMIZER) b->optimizer.values.step++;
}

void bench_wait(const bench_t *b)
{
    stages_check(cumoe_stream_synchronize(b->handle, b->stream));
}

counts_t bench_counts(const bench_t *b)
{
    return b->counts;
}

/* ---- checks ---- */

static void *download(const bench_t *b, const void *device, size_t size)
{
    void *host = malloc(size + 1);
    if (!host) abort();
    stages_check(cumoe_memory_copy(b->handle, host, device, size, CUMOE_COPY_TO_HOST, b->stream));
    bench_wait(b);
    return host;
}

static void count_rows(bench_t *b)
{
    const int32_t E = b->subject.config.num_experts;
    int32_t *offset = download(b, b->permute.rows.offset, ((size_t)E + 1) * sizeof *offset);
    b->counts = (counts_t){.rows = offset[E]};
    for (int32_t e = 0; e < E; e++) {
        const int64_t rows = offset[e + 1] - offset[e];
        b->counts.experts += rows > 0;
        if (rows > b->counts.most) b->counts.most = rows;
    }
    free(offset);
}

/* Of the first million values at most. NULL is finite. */
static bool is_finite(const bench_t *b, cumoe_dtype_t dtype, const void *device, int64_t count)
{
    if (!device) return true;
    if (count > 1 << 20) count = 1 << 20;
    const bool wide = dtype == CUMOE_F32;
    const uint32_t infinite = dtype == CUMOE_F16 ? 0x7c00 : 0x7f80; /* the exponent's bits */
    void *host = download(b, device, (size_t)count * (wide ? 4 : 2));
    bool good = true;
    for (int64_t i = 0; i < count && good; i++) {
        good =
            wide ? isfinite(((const float *)host)[i]) != 0 : (((const uint16_t *)host)[i] & infinite) != infinite;
    }
    free(host);
    return good;
}

static bool all_finite(const bench_t *b, char *why, size_t why_size)
{
    const cumoe_config_t *c = &b->subject.config;
    const int64_t T = b->subject.num_tokens, E = c->num_experts, H = c->hidden_size;
    const int64_t matrix = E * H * c->intermediate_size;
    const struct {
        const char *name;
        cumoe_dtype_t dtype;
        const void *values;
        int64_t count;
    } outputs[] = {
        {"y", c->dtype, b->layer_y, T * H},
        {"dx", c->dtype, b->layer_dx, T * H},
        {"the gradient of w_up", c->dtype, b->gradients.w_up, matrix},
        {"the gradient of w_glu", c->dtype, b->gradients.w_glu, matrix},
        {"the gradient of w_down", c->dtype, b->gradients.w_down, matrix},
        {"the gradient of w_gate", CUMOE_F32, b->gradients.w_gate, E * H},
        {"w_down after the optimizer", c->dtype, b->weights.w_down, matrix},
    };
    for (size_t i = 0; i < sizeof outputs / sizeof *outputs; i++) {
        if (is_finite(b, outputs[i].dtype, outputs[i].values, outputs[i].count)) continue;
        snprintf(why, why_size, "WRONG: %s is not finite", outputs[i].name);
        return false;
    }
    return true;
}

static bool same_bits(const bench_t *b, const char *name, const char *who, const void *layer, const void *stages,
                      char *why, size_t why_size)
{
    const size_t size = (size_t)b->subject.num_tokens * (size_t)b->subject.config.hidden_size * token_size(b);
    void *ours = download(b, layer, size), *theirs = download(b, stages, size);
    const bool same = memcmp(ours, theirs, size) == 0;
    if (!same) snprintf(why, why_size, "WRONG: %s by %s has not the bits of the layer's", name, who);
    free(ours);
    free(theirs);
    return same;
}

/* The layer once more: on a few multiprocessors and another stream. Into the stages' y and dx, which are compared
 * by then. */
static void run_elsewhere(bench_t *b)
{
    cumoe_config_t config = b->subject.config;
    cumoe_layer_t *layer;
    cumoe_stream_t stream;
    size_t workspace_size;
    config.max_sms = 3;
    stages_check(cumoe_layer_create(&layer, b->handle, &config));
    stages_check(cumoe_stream_create(b->handle, &stream));
    stages_check(cumoe_layer_buffer_sizes(layer, b->subject.num_tokens, &workspace_size, NULL));
    if (workspace_size <= b->forward.workspace_size) {
        cumoe_forward_args_t forward = b->forward;
        cumoe_backward_args_t backward = b->backward;
        forward.y = b->stages_y;
        backward.dx = b->stages_dx;
        bench_wait(b);
        stages_check(cumoe_layer_forward(layer, &forward, stream));
        stages_check(cumoe_layer_backward(layer, &backward, stream));
        stages_check(cumoe_stream_synchronize(b->handle, stream));
    }
    cumoe_stream_destroy(b->handle, stream);
    cumoe_layer_destroy(layer);
}

static bool y_and_dx_agree(bench_t *b, const char *who, char *why, size_t why_size)
{
    return same_bits(b, "y", who, b->layer_y, b->stages_y, why, why_size) &&
           same_bits(b, "dx", who, b->layer_dx, b->stages_dx, why, why_size);
}

bool bench_check(bench_t *b, char *why, size_t why_size)
{
    for (int part = 0; part < NUM_PARTS; part++) { /* FORWARD after INFERENCE, whose y is another */
        if (!bench_left_out(b, part)) bench_enqueue(b, part);
    }
    count_rows(b);
    if (!all_finite(b, why, why_size) || !y_and_dx_agree(b, "the stages", why, why_size)) return false;
    run_elsewhere(b);
    return y_and_dx_agree(b, "three multiprocessors", why, why_size);
}
