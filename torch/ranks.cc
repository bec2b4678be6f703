// Operators of groups of ranks (ranks.h). `group` is a group's number; `device` a CUDA ordinal, -1 = the CPU.
#include "call.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

using namespace cumoe_torch;

namespace
{

// A transport in Python (_gloo.py). An exchange has failed unless Python's last act says that it has not: the
// result of a callback is left as it was where an exception comes before its first line, as Ctrl-C does.
struct Exchange {
    const cumoe_message_t *messages;
    int32_t count, done;
    double timeout;
    char failure[256];
};

struct Python {
    void (*exchange)(Exchange *);
    void (*abort)();
    void (*destroy)();
};

cumoe_status_t python_exchange(void *context, const cumoe_message_t *messages, int32_t count, double timeout)
{
    Exchange call = {messages, count, 0, timeout, "it was interrupted"};
    static_cast<Python *>(context)->exchange(&call);
    return call.done ? CUMOE_SUCCESS : cumoe_transport_fail(CUMOE_COMM_ERROR, "%s", call.failure);
}

void python_abort(void *context)
{
    static_cast<Python *>(context)->abort();
}

void python_destroy(void *context)
{
    const std::unique_ptr<Python> python(static_cast<Python *>(context));
    python->destroy();
}

// `functions`: the addresses of those of Python above, in their order.
int64_t group_create_with(Ints functions, int64_t rank, int64_t num_ranks, double timeout, int64_t device)
{
    const Device where = device_number(device);
    const DeviceGuard guard = where.guard();
    auto python = std::make_unique<Python>();
    if (functions.size() != 3) fail("cumoe: a transport of another version of the Python files");
    std::memcpy(python.get(), functions.data(), sizeof *python);
    cumoe_transport_t transport = {};
    transport.struct_size = sizeof transport;
    transport.name = "gloo";
    transport.rank = to_int32(static_cast<double>(rank), "rank");
    transport.num_ranks = to_int32(static_cast<double>(num_ranks), "num_ranks");
    transport.context = python.get();
    transport.exchange = python_exchange;
    transport.abort = python_abort;
    transport.destroy = python_destroy;
    cumoe_ep_t *ep;
    check(cumoe_ep_create_with(&ep, find_handle(where), &transport, timeout));
    python.release();
    return Groups::all().add(std::make_shared<Group>(where, ep));
}

// `comm`: an ncclComm_t, or 0: then `id`, a tensor of its bytes in host memory, with a rank and a number of ranks.
int64_t group_create(int64_t comm, Tensor id, int64_t rank, int64_t num_ranks, double timeout, int64_t device)
{
    const Device where = device_number(device);
    const DeviceGuard guard = where.guard();
    cumoe_ep_id_t bytes;
    cumoe_ep_args_t args = {};
    args.struct_size = sizeof args;
    args.timeout = timeout;
    if (comm) {
        args.nccl_comm = reinterpret_cast<void *>(comm);
    } else {
        expect_shape(id, {static_cast<int64_t>(sizeof bytes)}, "id");
        std::memcpy(&bytes, dense(id).data_ptr(), sizeof bytes);
        args.id = &bytes;
        args.rank = to_int32(static_cast<double>(rank), "rank");
        args.num_ranks = to_int32(static_cast<double>(num_ranks), "num_ranks");
    }
    cumoe_ep_t *ep;
    check(cumoe_ep_create(&ep, find_handle(where), &args));
    return Groups::all().add(std::make_shared<Group>(where, ep));
}

// Into a tensor of so many bytes in host memory.
void group_id(Tensor id)
{
    cumoe_ep_id_t bytes;
    expect_shape(id, {static_cast<int64_t>(sizeof bytes)}, "id");
    check(cumoe_ep_id_create(&bytes));
    std::memcpy(id.data_ptr(), &bytes, sizeof bytes);
}

void group_close(int64_t group)
{
    Groups::all().remove(group);
}

void group_abort(int64_t group)
{
    cumoe_ep_abort(find_group(group)->ep);
}

void group_wait(int64_t group, double timeout)
{
    const std::shared_ptr<Group> ranks = find_group(group);
    const DeviceGuard guard = ranks->device.guard();
    check(cumoe_ep_wait(ranks->ep, current_stream(ranks->device), timeout));
}

void group_sum(int64_t group, Tensor data)
{
    const std::shared_ptr<Group> ranks = find_group(group);
    const DeviceGuard guard = ranks->device.guard();
    if (!(device_of(data) == ranks->device))
        fail("cumoe: a sum of a tensor on " + device_of(data).name() + ", but the group of ranks is of " +
             ranks->device.name());
    for (int64_t i = 0; i < data.dim(); i++)
        if (data.size(i) > 1 && data.stride(i) == 0)
            fail("cumoe: a sum of an expanded tensor, whose elements share memory: clone() it first");
    const Tensor summed = dense(data);
    check(cumoe_ep_sum(ranks->ep, address(summed), summed.numel(), dtype_of(summed.scalar_type(), "the tensor"),
                       current_stream(ranks->device)));
    if (summed.data_ptr() != data.data_ptr()) torch::stable::copy_(data, summed);
}

// How many there are.
int64_t group_plans(int64_t group)
{
    return find_group(group)->num_plans();
}

// A plan that no backward call needs any more.
void plan_forget(int64_t group, int64_t plan)
{
    if (const std::shared_ptr<Group> ranks = Groups::all().find(group)) ranks->forget(plan);
}

// First and number. A call of all ranks where there is no such layer yet.
std::tuple<int64_t, int64_t> experts_of_rank(Reals numbers, Ints sizes, int64_t type, int64_t rank)
{
    const std::shared_ptr<Group> ranks = group_of(numbers);
    if (!ranks) fail("cumoe: a configuration without ranks");
    const DeviceGuard guard = ranks->device.guard();
    cumoe_config_t config = bare_config(numbers, sizes, type, ranks.get());
    config.max_threads = num_threads(ranks->device);
    int32_t first, count;
    check(cumoe_layer_experts_of_rank(ranks->layer(config), to_int32(static_cast<double>(rank), "rank"), &first,
                                      &count));
    return {first, count};
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cumoe, m)
{
    m.def("group_create_with(int[] functions, int rank, int num_ranks, float timeout, int device) -> int");
    m.def("group_create(int comm, Tensor id, int rank, int num_ranks, float timeout, int device) -> int");
    m.def("group_id(Tensor(a!) id) -> ()");
    m.def("group_close(int group) -> ()");
    m.def("group_abort(int group) -> ()");
    m.def("group_wait(int group, float timeout) -> ()");
    m.def("group_sum(int group, Tensor(a!) data) -> ()");
    m.def("group_plans(int group) -> int");
    m.def("plan_forget(int group, int plan) -> ()");
    m.def("experts_of_rank(float[] numbers, int[] sizes, int type, int rank) -> (int, int)");
}

STABLE_TORCH_LIBRARY_IMPL(cumoe, CompositeExplicitAutograd, m)
{
    m.impl("group_create_with", TORCH_BOX(&group_create_with));
    m.impl("group_create", TORCH_BOX(&group_create));
    m.impl("group_id", TORCH_BOX(&group_id));
    m.impl("group_close", TORCH_BOX(&group_close));
    m.impl("group_abort", TORCH_BOX(&group_abort));
    m.impl("group_wait", TORCH_BOX(&group_wait));
    m.impl("group_sum", TORCH_BOX(&group_sum));
    m.impl("group_plans", TORCH_BOX(&group_plans));
    m.impl("plan_forget", TORCH_BOX(&plan_forget));
    m.impl("experts_of_rank", TORCH_BOX(&experts_of_rank));
}
