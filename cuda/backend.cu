/* The table of the CUDA backend, and what it has kernels for. */
#include "cuda/device.cuh"
#include "cuda/stages.cuh"
#include "host/error.h"
#include "host/kinds.h"

#include <nvtx3/nvToolsExt.h>

namespace cumoe
{

namespace
{

/* A range in a profiler's picture. Free where no profiler listens. */
class Range
{
  public:
    Range(const Device &device, const char *name) : domain_(device.domain)
    {
        nvtxEventAttributes_t attributes = {};
        attributes.version = NVTX_VERSION;
        attributes.size = NVTX_EVENT_ATTRIB_STRUCT_SIZE;
        attributes.messageType = NVTX_MESSAGE_TYPE_ASCII;
        attributes.message.ascii = name;
        nvtxDomainRangePushEx(domain_, &attributes);
    }
    ~Range()
    {
        nvtxDomainRangePop(domain_);
    }
    Range(const Range &) = delete;
    Range &operator=(const Range &) = delete;

  private:
    nvtxDomainHandle_t domain_;
};

/* ENQUEUE on the context's device, as the public FUNCTION. */
template <typename Enqueue>
cumoe_status_t run(const char *function, const cumoe_context_t &context, const Enqueue &enqueue)
{
    const Device &device = device_of(context);
    const Range range(device, function);
    const DeviceCall call(device.ordinal);
    return call.status(function, call.error() != cudaSuccess ? call.error() : enqueue());
}

#define CALL(name, args_t, function)                                                                               \
    cumoe_status_t run_##name(const cumoe_context_t *context, const args_t *args, cumoe_stream_t stream)           \
    {                                                                                                              \
        return run(function, *context, [=] { return name(*context, *args, stream); });                             \
    }
#define STAGE(name, function) CALL(name, cumoe_##name##_args_t, function)
STAGE(gate, "cumoe_gate")
STAGE(permute, "cumoe_permute")
STAGE(up, "cumoe_experts_up")
STAGE(down, "cumoe_experts_down")
STAGE(combine, "cumoe_combine")
STAGE(down_backward, "cumoe_experts_down_backward")
STAGE(gate_backward, "cumoe_gate_backward")
STAGE(up_backward, "cumoe_experts_up_backward")
STAGE(permute_backward, "cumoe_permute_backward")
CALL(gate_finish, cumoe_gate_args_t, "cumoe_gate")
CALL(dispatch_mark, cumoe_dispatch_args_t, "dispatch_mark")
CALL(dispatch_count, cumoe_dispatch_args_t, "dispatch_count")
CALL(dispatch_pack, cumoe_dispatch_args_t, "dispatch_pack")
CALL(arrive_begin, cumoe_arrive_args_t, "arrive_begin")
CALL(arrive_end, cumoe_arrive_args_t, "arrive_end")
CALL(gather, cumoe_gather_args_t, "gather")
#undef STAGE
#undef CALL

int list_gate_sums(const cumoe_context_t *context, const cumoe_gate_args_t *args, cumoe_sum_t *sums)
{
    return gate_sums(*context, *args, *reinterpret_cast<cumoe_sum_t(*)[CUMOE_GATE_MAX_SUMS]>(sums));
}

cumoe_status_t run_gate_bias_update(const cumoe_context_t *context, void *gate_bias, const int32_t *expert_count,
                                    float rate, cumoe_stream_t stream)
{
    return run("cumoe_gate_bias_update", *context,
               [=] { return gate_bias_update(*context, gate_bias, expert_count, rate, stream); });
}

cumoe_status_t run_weights_init(const cumoe_context_t *context, uint64_t seed, const cumoe_weights_t *weights,
                                cumoe_stream_t stream)
{
    return run("cumoe_weights_init", *context, [=] { return weights_init(*context, seed, *weights, stream); });
}

cumoe_status_t run_optimizer_step(const cumoe_context_t *context, const cumoe_optimizer_args_t *args,
                                  const cumoe_parameter_t *parameters, int count, cumoe_stream_t stream)
{
    return run("cumoe_optimizer_step", *context,
               [=] { return optimizer_step(*context, *args, parameters, count, stream); });
}

cumoe_status_t supports(void *, cumoe_config_t *config)
{
    if (config->max_threads == 0) config->max_threads = 1;
    return CUMOE_SUCCESS;
}

size_t workspace_size(const cumoe_context_t *context, cumoe_stage_t stage, int64_t num_tokens)
{
    switch (stage) {
    case CUMOE_STAGE_GATE:
        return gate_workspace(*context, num_tokens);
    case CUMOE_STAGE_PERMUTE:
        return permute_workspace(*context, num_tokens);
    case CUMOE_STAGE_UP:
        return up_workspace(*context, num_tokens);
    case CUMOE_STAGE_DOWN:
        return down_workspace(*context, num_tokens);
    case CUMOE_STAGE_DOWN_BACKWARD:
        return down_backward_workspace(*context, num_tokens);
    case CUMOE_STAGE_GATE_BACKWARD:
        return gate_backward_workspace(*context, num_tokens);
    case CUMOE_STAGE_UP_BACKWARD:
        return up_backward_workspace(*context, num_tokens);
    default:
        return 0;
    }
}

constexpr cumoe_backend_ops_t make_table()
{
    cumoe_backend_ops_t table = {};
    table.open = device_open;
    table.close = device_close;
    table.memory_alloc = memory_alloc;
    table.memory_free = memory_free;
    table.memory_copy = memory_copy;
    table.memory_set = memory_set;
    table.stream_create = stream_create;
    table.stream_destroy = stream_destroy;
    table.stream_synchronize = stream_synchronize;
    table.lane_create = lane_create;
    table.lane_destroy = lane_destroy;
    table.mark_set = mark_set;
    table.mark_wait = mark_wait;
    table.supports = supports;
    table.row_tiles = true;
    table.workspace_size = workspace_size;
    table.gate = run_gate;
    table.permute = run_permute;
    table.up = run_up;
    table.down = run_down;
    table.combine = run_combine;
    table.down_backward = run_down_backward;
    table.gate_backward = run_gate_backward;
    table.up_backward = run_up_backward;
    table.permute_backward = run_permute_backward;
    table.group_id = group_id;
    table.group_join = group_join;
    table.gate_sums = list_gate_sums;
    table.gate_finish = run_gate_finish;
    table.dispatch_mark = run_dispatch_mark;
    table.dispatch_count = run_dispatch_count;
    table.dispatch_pack = run_dispatch_pack;
    table.arrive_begin = run_arrive_begin;
    table.arrive_end = run_arrive_end;
    table.gather = run_gather;
    table.gate_bias_update = run_gate_bias_update;
    table.weights_init = run_weights_init;
    table.optimizer_step = run_optimizer_step;
    return table;
}

} // namespace

} // namespace cumoe

extern "C" constexpr cumoe_backend_ops_t cumoe__backend_cuda = cumoe::make_table();
