"""Expert parallelism (cumoe/parallel.h): ranks that share the experts of a layer."""

import contextlib
import itertools
import weakref

import torch
import torch.distributed as dist

from . import ops
from ._gloo import Gloo
from .config import NOISY

_ID_SIZE = 128  # bytes of a cumoe_ep_id_t
_SUMMED = (torch.float64, torch.float32, torch.int64, torch.int32)
_UNTRACED = "cumoe: calls over ranks are not traced"


class ExpertParallel:
    """A group of ranks that share the experts of layers: cumoe.MoE(..., ep=ep). To make one is a call of all ranks.

    group    a ProcessGroup; None = the default group
    timeout  seconds that a rank may be late. Then, or when one leaves or dies, calls of all others raise a
             RuntimeError that says which, and the group is of no more use
    device   of the layers: None = the current CUDA device where `group` has NCCL, else the CPU
    average  False: a rank's loss is its share of a sum, and so are gradients of gates (sum_gradients()). True: it is
             one of which the mean counts, as with DistributedDataParallel, which then averages gradients of gates

    On CUDA with NCCL its communicator is taken, which must outlive this: close() first. Elsewhere messages go through
    the host, by gloo, on connections of their own.

    A layer with `ep` is called by all ranks together, in one order, each with tokens of its own, any number, also
    none; backward likewise. On the CPU it keeps the number of threads that PyTorch has when it is made.
    """

    def __init__(self, group=None, timeout=600.0, device=None, average=False):
        group = _check_group(group)
        self.rank, self.size, self.average = group.rank(), group.size(), bool(average)
        self.device = _device_of(device, group)
        self._group = group  # its communicator may be borrowed
        ordinal, self._gloo = self.device.index if self.device.type == "cuda" else -1, None
        if ordinal >= 0 and _has_nccl(group):
            self.number = _join_nccl(group, self.device, timeout)
        else:
            self._gloo = Gloo(group)
            self.number = self._gloo.create(timeout, ordinal)
        self._closed = weakref.finalize(self, torch.ops.cumoe.group_close, self.number)
        self._closed.atexit = False
        if self._gloo:
            try:
                self._gloo.connect(timeout or 600.0)
            except RuntimeError:
                self.close()
                raise

    def close(self):
        """Leave. Not collective: others learn of it when they wait for this rank. Layers with this group, and gradients
        that they still owe, are of no more use. Before destroy_process_group() where the communicator is NCCL's."""
        self._closed()

    def abort(self):
        """Give up: this and, within the timeout, all other ranks get an error from calls that wait. From any thread."""
        torch.ops.cumoe.group_abort(self.number)

    def wait(self, timeout=0.0):
        """Wait for the current stream, as torch.cuda.synchronize(), but for no longer than `timeout` seconds (0 = the
        group's): an error where a rank failed or is late."""
        torch.ops.cumoe.group_wait(self.number, timeout)

    @contextlib.contextmanager
    def waiting(self):
        """Around calls that wait for others: an exception that came in the middle of one, as Ctrl-C does, goes on."""
        try:
            yield
        except RuntimeError:
            if not self._gloo or not self._gloo.kept:
                raise
            kept, self._gloo.kept = self._gloo.kept, None
            raise kept from None

    @torch.compiler.disable(reason=_UNTRACED)
    @torch.no_grad()
    def sum_(self, tensor):
        """Add up over all ranks, in place, in their order; it comes back. float64, float32, int64 (sums wrap) or
        int32, of one shape on all ranks."""
        with self.waiting():
            torch.ops.cumoe.group_sum(self.number, tensor)
        torch.autograd.graph.increment_version(tensor)
        return tensor

    @torch.no_grad()
    def sum_gradients(self, parameters):
        """Add up the gradients of parameters that every rank has, in one call of all ranks: after backward, once for
        each optimizer step. Where a rank has no gradient it counts as 0. 16-bit gradients are added up in float32. Not
        for parameters of experts, and not with average = True."""
        if self.average:
            raise RuntimeError("cumoe: sum_gradients(): the group has average = True, where DistributedDataParallel "
                               "averages the gradients of what every rank has")
        parameters = list(parameters)
        if any(map(_is_of_one_rank, parameters)):
            raise RuntimeError("cumoe: sum_gradients(): a parameter is of experts, which are this rank's alone and whose "
                               "gradients are whole: leave out what expert_names() or exclude_experts() names")
        for dtype, some in _by_sum_type(parameters).items():
            parts = [_gradient(parameter).reshape(-1).to(dtype) for parameter in some]
            summed = self.sum_(torch.cat(parts)).split([part.numel() for part in parts])
            for parameter, part in zip(some, summed):
                parameter.grad.copy_(part.view_as(parameter.grad))

    def draw_seed(self):
        """A number that rank 0 draws from PyTorch's generator."""
        seed = torch.randint(2**62, (1,), device="cpu").to(self.device)
        return self.sum_(seed if self.rank == 0 else seed.zero_()).item()

    def __repr__(self):
        return f"ExpertParallel(rank={self.rank}, size={self.size})"

    def __deepcopy__(self, memo):
        return self  # ranks are shared by copies of a layer

    def __reduce__(self):
        raise TypeError("cumoe: a group of ranks cannot be pickled: save the state_dict() of a layer, and make the "
                        "layer with an ExpertParallel of where it is loaded")


# How a group comes about.


def _check_group(group):
    if not dist.is_initialized():
        raise RuntimeError("cumoe: ExpertParallel: there is no process group yet: "
                           "torch.distributed.init_process_group() comes before it")
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"cumoe: ExpertParallel: group = {group!r}, but must be a ProcessGroup that this rank is in")
    return group


def _has_nccl(group):
    return "cuda:nccl" in dist.get_backend_config(group).split(",")


def _device_of(device, group):
    if device is None:
        device = "cuda" if _has_nccl(group) else "cpu"
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"cumoe: ExpertParallel: device = {str(device)!r}, but must be the CPU or a CUDA device")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device if device.type == "cuda" else torch.device("cpu")


def _on(tensor, device):
    return tensor.to(device)


def _join_nccl(group, device, timeout):
    """The number of a group on PyTorch's communicator; where PyTorch does not give that away, on one of its own."""
    with torch.cuda.device(device):
        dist.all_reduce(_on(torch.zeros(1), device), group=group)  # PyTorch makes it at the first call
        pointer = getattr(group._get_backend(device), "_comm_ptr", int)()
    unique = torch.zeros(_ID_SIZE, dtype=torch.uint8)
    if not pointer:
        unique = _id_of_first(group, device)
    return torch.ops.cumoe.group_create(pointer, unique, group.rank(), group.size(), timeout, device.index)


def _id_of_first(group, device):
    """The id that rank 0 makes. A last byte says that it could: nobody waits for what does not come."""
    unique, error = torch.zeros(_ID_SIZE + 1, dtype=torch.uint8), None
    if group.rank() == 0:
        try:
            torch.ops.cumoe.group_id(unique[:_ID_SIZE])
            unique[_ID_SIZE] = 1
        except RuntimeError as of_library:
            error = of_library
    unique = _on(unique, device)
    dist.broadcast(unique, group=group, group_src=0)
    unique = unique.cpu()
    if not unique[_ID_SIZE]:
        raise error or RuntimeError("cumoe: ExpertParallel: rank 0 could not make NCCL's id")
    return unique[:_ID_SIZE].clone()


# Gradients.


def _gradient(parameter):
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _by_sum_type(parameters):
    found = {}
    for parameter in parameters:
        if parameter.requires_grad:
            dtype = parameter.dtype if parameter.dtype in _SUMMED else torch.float32
            found.setdefault(dtype, []).append(parameter)
    return found


def _is_of_one_rank(parameter):
    """As modules mark those of experts."""
    return getattr(parameter, "cumoe_of_one_rank", False)


_checked = weakref.WeakSet()


def _refuse_ddp():
    """Where DistributedDataParallel, which this call is in, would make experts of all ranks one."""
    ddp = torch.nn.parallel.DistributedDataParallel._get_active_ddp_module()
    if ddp is None or ddp in _checked:
        return
    if any(map(_is_of_one_rank, ddp._module_parameters)):
        raise RuntimeError("cumoe: DistributedDataParallel has the experts of this rank among its parameters, and has "
                           "given them the values of rank 0: call exclude_experts(model) before it is made")
    _checked.add(ddp)


def exclude_experts(model):
    """Keep DistributedDataParallel, which is to be made of `model`, from the experts of layers with ranks: every rank
    has its own. Names of their parameters come back."""
    names = []
    for name, module in model.named_modules():
        if hasattr(module, "expert_names") and module.config.ep is not None:
            names += [f"{name}.{own}" if name else own for own in module.expert_names()]
    kept = getattr(model, "_ddp_params_and_buffers_to_ignore", [])
    torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*kept, *names])
    return names


# Calls. What a call has beside its configuration stands in the tuple of numbers that goes with it to backward.


class _Plan:
    """The plan of a call in flight, for as long as anything may go backward."""

    _numbers = itertools.count(1)

    def __init__(self, ep):
        self.group, self.number = ep.number, next(self._numbers)

    def end(self):
        """After a backward call that frees its graph, of which outputs may live on."""
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            self.__del__()

    def __del__(self):
        if torch is not None and torch.ops is not None:  # else Python is at its end
            torch.ops.cumoe.plan_forget(self.group, self.number)


class _Numbers(tuple):
    """Config.numbers of one call; `ep`, `plan`."""


def _numbers_of_call(ep, numbers):
    if torch.compiler.is_exporting():
        raise RuntimeError("cumoe: a layer over ranks cannot be exported")
    plan = None if numbers[ops.EXCHANGE_CAPACITY] else _Plan(ep)
    made = _Numbers((*numbers[:ops.PLAN], float(plan.number if plan else 0)))
    made.ep, made.plan = ep, plan
    return made


def _check_call(ep, x, call):
    """Before a sum, from which the others would learn nothing."""
    if x.device != ep.device:
        raise RuntimeError(f"cumoe: x is on {x.device}, but the group of ranks is of {ep.device}")
    if call is not None and (call.device != ep.device or call.dtype != torch.int64 or not 2 <= call.numel() <= 4):
        raise RuntimeError(f"cumoe: call is {call.dtype} with {call.numel()} elements on {call.device}, but must be "
                           f"int64 with 2, 3 or 4, on the device of the group of ranks, {ep.device}")


def _call_of_all(ep, call, tokens):
    """Seed and offset of rank 0, and this rank's first token among those of all: one sum of a number a rank and two, on
    the device."""
    numbers = torch.zeros(ep.size + 2, dtype=torch.int64, device=ep.device)
    numbers[ep.rank] = tokens
    if ep.rank == 0 and call is not None:
        numbers[ep.size:] = call.reshape(-1)
    ep.sum_(numbers)
    return torch.cat((numbers[ep.size:], numbers[:ep.rank].sum().view(1)))


@torch.compiler.disable(reason=_UNTRACED)
def moe(ep, gate, arguments, keep):
    """What the operator moe gives. `arguments` are its own but for the last."""
    x, *arrays, token_mask, call, numbers, training = arguments
    _check_call(ep, x, call)
    _refuse_ddp()
    numbers = _numbers_of_call(ep, numbers)
    if training and gate in NOISY and (call is None or call.numel() == 2):
        call = _call_of_all(ep, call, x.size(0))
    operator = _Moe.apply if keep else torch.ops.cumoe.moe_forward
    with ep.waiting():
        return operator(x, *arrays, token_mask, call, numbers, training, keep)


@torch.compiler.disable(reason=_UNTRACED)
def experts(ep, arguments, keep):
    """y of the operator experts, likewise."""
    *tensors, numbers = arguments
    _check_call(ep, tensors[0], None)
    _refuse_ddp()
    numbers = _numbers_of_call(ep, numbers)
    with ep.waiting():
        if keep:
            return _Experts.apply(*tensors, numbers, True)
        return torch.ops.cumoe.experts_forward(*tensors, numbers, False)[0]


def _averaged(ep, gradients, first):
    """Experts have the gradient of the sum of all ranks' losses, whole: of the mean it is a part."""
    if not ep.average:
        return gradients
    last = first + ops.NUM_ARRAYS - ops.NUM_GATES
    parts = (g if g is None else g / ep.size for g in gradients[first:last])
    return (*gradients[:first], *parts, *gradients[last:])


def _backward(backward, ctx, *gradients):
    numbers = ctx.rest[0]
    with numbers.ep.waiting():
        found = backward(ctx, *gradients)
    if numbers.plan:
        numbers.plan.end()
    return found


class _Moe(torch.autograd.Function):
    forward = staticmethod(ops.Moe.forward)
    jvp = staticmethod(ops.Moe.jvp)

    @staticmethod
    def backward(ctx, dy, dlosses, *others):
        ep = ctx.rest[0].ep
        if ep.average and dlosses is not None:
            dlosses = dlosses * ep.size  # each rank's loss has them: all together
        return _averaged(ep, _backward(ops.Moe.backward, ctx, dy, dlosses, *others), 1 + ops.NUM_GATES)


class _Experts(torch.autograd.Function):
    forward = staticmethod(ops.Experts.forward)
    jvp = staticmethod(ops.Experts.jvp)

    @staticmethod
    def backward(ctx, dy, *others):
        return _averaged(ctx.rest[0].ep, _backward(ops.Experts.backward, ctx, dy, *others), 3)
