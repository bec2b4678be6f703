/* The calls that are timed, and whether their results are right. */
#include "bench.h"

#include <stdlib.h>
#include <string.h>

const char *const part_names[NUM_PARTS] = {
    "gate",        "permute",          "up",        "down",    "combine",  "down_backward",      "gate_backward",
    "up_backward", "permute_backward", "inference", "forward", "backward", "forward + backward", "optimizer",
};
const char *const contestant_names[CONTESTANTS] = {"cumoe", "dense", "loop"};

const char *bench_left_out(const bench_t *b, int part)
{
    if (part < 0) return b->no_dense[0] ? b->no_dense : NULL;
    if (part == CUMOE_STAGE_GATE_BACKWARD && b->subject.config.gate == CUMOE_GATE_EXTERNAL)
        return "the external gate has no parameters";
    if (part == OPTIMIZER && b->no_optimizer[0]) return b->no_optimizer;
    return NULL;
}

bool bench_takes_part(const bench_t *b, int contestant, int part)
{
    product_t products[MOST_PRODUCTS];
    if (!has_part(&b->subject, part) || part == BOTH || bench_left_out(b, part)) return false;
    if (contestant == CUMOE) return true;
    if (contestant == LOOP) return b->loop && (part == FORWARD || part == BACKWARD);
    return b->dense && dense_products(&b->subject, part, products) > 0;
}

static cumoe_status_t call(bench_t *b, int part)
{
    cumoe_layer_t *layer = b->layer;
    cumoe_stream_t stream = b->device->stream;
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
    case BACKWARD:
        return cumoe_layer_backward(layer, &b->backward, stream);
    case OPTIMIZER:
        return cumoe_optimizer_step(layer, &b->optimizer, stream);
    default:
        return cumoe_layer_forward(layer, &b->forward, stream);
    }
}

static void call_cumoe(bench_t *b, int part)
{
    perf_check(call(b, part));
    if (part == OPTIMIZER) b->optimizer.values.step++;
}

static void call_loop(const bench_t *b, int part)
{
    const float *weight = b->gate.routing.weight;
    if (part == BACKWARD) {
        loop_backward(b->loop, b->backward.dy, weight);
    } else {
        loop_forward(b->loop, b->forward.x, b->gate.routing.expert, weight);
    }
}

void bench_enqueue(bench_t *b, int contestant, int part)
{
    if (contestant == DENSE) {
        dense_run(b->dense, part);
    } else if (contestant == LOOP) {
        call_loop(b, part);
    } else if (b->subject.launch == CALL) {
        call_cumoe(b, part);
    } else {
        if (!b->graph[part]) {
            device_start_graph(b->device);
            call_cumoe(b, part);
            b->graph[part] = device_stop_graph(b->device);
        }
        device_launch(b->device, b->graph[part]);
    }
}

const subject_t *bench_subject(const bench_t *b)
{
    return &b->subject;
}

device_t *bench_device(const bench_t *b)
{
    return b->device;
}

counts_t bench_counts(const bench_t *b)
{
    return b->counts;
}

/* ---- checks ---- */

void *bench_download(const bench_t *b, const void *device, size_t size)
{
    void *host = malloc(size + 1);
    if (!host) abort();
    perf_check(cumoe_memory_copy(b->device->handle, host, device, size, CUMOE_COPY_TO_HOST, b->device->stream));
    device_wait(b->device);
    return host;
}

static void count_rows(bench_t *b)
{
    const int32_t E = b->subject.config.num_experts;
    int32_t *offset = bench_download(b, b->permute.rows.offset, ((size_t)E + 1) * sizeof *offset);
    b->counts = (counts_t){.rows = offset[E]};
    for (int32_t e = 0; e < E; e++) {
        const int64_t rows = offset[e + 1] - offset[e];
        b->counts.experts += rows > 0;
        if (rows > b->counts.most) b->counts.most = rows;
    }
    free(offset);
}

static bool same_bits(const bench_t *b, const char *name, const char *who, const void *layer, const void *stages,
                      char *why, size_t why_size)
{
    const size_t size =
        (size_t)b->subject.num_tokens * (size_t)b->subject.config.hidden_size * token_size(&b->subject.config);
    void *ours = bench_download(b, layer, size), *theirs = bench_download(b, stages, size);
    const bool same = memcmp(ours, theirs, size) == 0;
    if (!same) snprintf(why, why_size, "wrong: %s by %s has not the bits of the layer's", name, who);
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
    perf_check(cumoe_layer_create(&layer, b->device->handle, &config));
    perf_check(cumoe_stream_create(b->device->handle, &stream));
    perf_check(cumoe_layer_buffer_sizes(layer, b->subject.num_tokens, &workspace_size, NULL));
    if (workspace_size <= b->forward.workspace_size) {
        cumoe_forward_args_t forward = b->forward;
        cumoe_backward_args_t backward = b->backward;
        forward.y = b->stages_y;
        backward.dx = b->stages_dx;
        device_wait(b->device);
        perf_check(cumoe_layer_forward(layer, &forward, stream));
        if (goes_back(b)) perf_check(cumoe_layer_backward(layer, &backward, stream));
        perf_check(cumoe_stream_synchronize(b->device->handle, stream));
    }
    cumoe_stream_destroy(b->device->handle, stream);
    cumoe_layer_destroy(layer);
}

static bool y_and_dx_agree(bench_t *b, const char *who, char *why, size_t why_size)
{
    return same_bits(b, "y", who, b->layer_y, b->stages_y, why, why_size) &&
           (!goes_back(b) || same_bits(b, "dx", who, b->layer_dx, b->stages_dx, why, why_size));
}

/* The loop follows the gate's own choice. */
static bool loop_agrees(const bench_t *b, double tolerance, char *why, size_t why_size)
{
    if (!b->loop) return true;
    const bool back = has_part(&b->subject, BACKWARD);
    call_loop(b, FORWARD);
    if (back) call_loop(b, BACKWARD);
    const double difference = loop_difference(b->loop, b->layer_y, back ? &b->gradients : NULL);
    /* A z that the two round to different sides of 0 changes the whole derivative of ReLU: rare, but not small. */
    if (difference <= (back ? 2e-3 : 2 * tolerance)) return true;
    snprintf(why, why_size, "wrong: the loop over experts and the layer differ by %.2g", difference);
    return false;
}

bool bench_check(bench_t *b, double *error, char *why, size_t why_size)
{
    for (int part = 0; part < NUM_PARTS; part++) { /* FORWARD after INFERENCE, whose y is another */
        if (part == BOTH || bench_left_out(b, part) || (!goes_back(b) && OF_BACKWARD >> part & 1)) continue;
        if (part != OPTIMIZER || has_part(&b->subject, OPTIMIZER)) call_cumoe(b, part);
    }
    count_rows(b);
    double tolerance;
    *error = check_sample(b, &tolerance);
    if (!(*error <= tolerance)) {
        snprintf(why, why_size, "wrong: the relative error is %.2g, and %.2g is allowed", *error, tolerance);
        return false;
    }
    if (!y_and_dx_agree(b, "the stages", why, why_size)) return false;
    run_elsewhere(b);
    return y_and_dx_agree(b, "three multiprocessors", why, why_size) && loop_agrees(b, tolerance, why, why_size) &&
           (!b->dense || dense_check(b->dense, why, why_size));
}
