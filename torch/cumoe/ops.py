"""The operators without values: shapes for tracing, and how gradients flow. The kernels are ops.cc's."""

import re

import torch

from .config import DTYPES, GATES, gate_dtype

GATE, TOP_K, MAX_ROWS, EXCHANGE_CAPACITY, PLAN = 0, 3, 8, 19, 21  # places in Config.numbers
BALANCED, SOFTMAX = GATES.index("balanced"), GATES.index("softmax")
NUM_LOSSES = 8
STATISTICS_SIZE = 16  # int64s in a cumoe_statistics_t

# Arguments: places in the two operators, and those that may have gradients, in the order of `wanted`.
ARRAYS = ("w_gate", "w_noise", "w_gate_primary", "w_noise_primary", "thresholds", "gate_bias",
          "w_up", "w_glu", "w_down", "b_up", "b_glu", "b_down")
NUM_ARRAYS = len(ARRAYS)
NUM_GATES = ARRAYS.index("w_up")
GATE_BIAS = ARRAYS.index("gate_bias")
MATRICES = tuple(ARRAYS.index(name) for name in ("w_up", "w_glu", "w_down"))


def _saved_size(x, w_down, bias, numbers):
    """In bytes: at most linear in the number of tokens, which may be unknown."""
    sizes = [x.size(1), w_down.size(2), w_down.size(0), int(bias)]
    device = x.device.index or 0 if x.device.type == "cuda" and torch.cuda.is_available() else -1
    base, per_token, first = torch.ops.cumoe.saved_bound(numbers, sizes, DTYPES[x.dtype], device)
    return base + per_token * (torch.sym_max(0, x.size(0) - first) if first else x.size(0))


def _choices(tokens, num_experts, numbers):
    """The shape of chosen_expert: cumoe_layer_max_rows()."""
    if numbers[GATE] == SOFTMAX:
        return [tokens, num_experts]
    if numbers[GATE] != BALANCED:
        return [tokens, int(numbers[TOP_K])]
    rows = torch.sym_max(tokens * int(numbers[TOP_K]), max(num_experts, int(numbers[MAX_ROWS])))
    return [torch.sym_min(rows, tokens * num_experts) + tokens]


@torch.library.register_fake("cumoe::moe")
@torch.library.register_fake("cumoe::moe_forward")
def _moe(x, *arguments):
    arrays, (token_mask, call, numbers, training, keep) = arguments[:NUM_ARRAYS], arguments[NUM_ARRAYS:]
    w_down, b_down = arrays[ARRAYS.index("w_down")], arrays[ARRAYS.index("b_down")]
    tokens, num_experts, gate = x.size(0), w_down.size(0), gate_dtype(x.dtype)
    balanced = numbers[GATE] == BALANCED
    choices = _choices(tokens, num_experts, numbers)
    saved = _saved_size(x, w_down, b_down is not None, numbers) if keep else 0
    return (x.new_empty(x.size(0), x.size(1)), x.new_empty(NUM_LOSSES, dtype=gate),
            x.new_empty(saved, dtype=torch.uint8), x.new_empty(choices, dtype=torch.int32),
            x.new_empty(choices, dtype=gate), x.new_empty(tokens + 1 if balanced else 0, dtype=torch.int32),
            x.new_empty(num_experts, dtype=torch.int32),
            x.new_empty(3 if balanced and training else 2, (num_experts + 3) // 4 * 4, dtype=gate),
            x.new_empty(STATISTICS_SIZE, dtype=torch.int64))


def _gradients(x, arrays, gate, wanted):
    made = [x.new_empty(x.size(0), x.size(1))] if wanted[0] else []
    for i, array in enumerate(arrays):
        if not wanted[1 + i] or array is None:
            continue
        if i in MATRICES:
            made.append(torch.empty_like(array))
        else:
            made.append(array.new_empty(array.shape, dtype=gate if i < NUM_GATES else array.dtype))
    return made


@torch.library.register_fake("cumoe::moe_backward")
def _(dy, dlosses, saved, x, *arguments):
    return _gradients(x, arguments[:NUM_ARRAYS], gate_dtype(x.dtype), arguments[-1])


@torch.library.register_fake("cumoe::experts")
@torch.library.register_fake("cumoe::experts_forward")
def _experts(x, index, weight, w_up, w_glu, w_down, b_up, b_glu, b_down, numbers, keep):
    numbers = [*numbers[:TOP_K], float(int(index.size(1))), *numbers[TOP_K + 1:]]
    saved = _saved_size(x, w_down, b_down is not None, numbers) if keep else 0
    return x.new_empty(x.size(0), x.size(1)), x.new_empty(saved, dtype=torch.uint8)


@torch.library.register_fake("cumoe::experts_backward")
def _(dy, saved, x, weight, *arguments):
    wanted = arguments[-1]
    made = _gradients(x, (None,) * NUM_GATES + arguments[:NUM_ARRAYS - NUM_GATES], gate_dtype(x.dtype), wanted)
    return made + ([torch.empty_like(weight, memory_format=torch.contiguous_format)] if wanted[-1] else [])


@torch.library.register_fake("cumoe::gate_bias_update")
def _(gate_bias, expert_count, rate):
    return None


_REFUSED = re.compile(r"cumoe: PyTorch gave no tensor of (\d+) bytes on (\S+)")


def own_error(error):
    """Out of memory as PyTorch says it: its allocator is asked again, as its error does not come through the stable ABI.
    Any other error as it is."""
    refused = _REFUSED.search(str(error))
    if refused:
        try:
            torch.empty(int(refused[1]), dtype=torch.uint8, device=refused[2])
        except RuntimeError as of_pytorch:
            return of_pytorch
    return torch.OutOfMemoryError(str(error)) if str(error).startswith("cumoe: out of memory") else error


def _spread(wanted, gradients):
    """One value for each flag: the gradients where they are wanted."""
    following = iter(gradients)
    return [next(following) if flag else None for flag in wanted]


class _FirstOnly(torch.autograd.Function):
    """Gradients that have none of their own: create_graph=True must not make zeros of them."""

    @staticmethod
    def forward(ctx, anchor, *gradients):
        return gradients

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError("cumoe: a gradient of a gradient (create_graph=True) is not supported")


def _first_only(gradients, dy, *inputs):
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return gradients
    anchor = next((tensor for tensor in (dy, *inputs) if tensor is not None and tensor.requires_grad), None)
    return gradients if anchor is None or not gradients else _FirstOnly.apply(anchor, *gradients)


# Gradients: what forward keeps and what backward makes of it, for the autograd.Functions, which eager modules use, and
# for the operators moe and experts in graphs. Registered formulas alone would cost 9 us a call without gradients, and
# 60 with.


def _keep_for_moe(ctx, inputs, output):
    x, *arrays, token_mask, call, numbers, training, keep = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[2], token_mask, *arrays)
    # With four numbers some rows may not be live: their gradient, which nobody writes, is 0.
    ctx.rest = numbers, training, call is not None and call.numel() == 4
    ctx.keep = keep


def _moe_backward(ctx, dy, dlosses, *others):
    nothing = (None,) * 5
    if dy is None and dlosses is None:
        return (None,) * (1 + NUM_ARRAYS) + nothing
    _check_kept(ctx)
    x, saved, token_mask, *arrays = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wanted = [needs[0]] + [needs[1 + i] and i != GATE_BIAS for i in range(NUM_ARRAYS)]
    try:
        gradients = torch.ops.cumoe.moe_backward(torch.zeros_like(x) if dy is None else dy, dlosses, saved, x, *arrays,
                                                 token_mask, *ctx.rest, wanted + [False])
    except RuntimeError as error:
        raise own_error(error)
    spread = _spread(wanted, _first_only(gradients, dy, dlosses, x, *arrays))
    for i in range(NUM_GATES):  # gate gradients come in the gate type, whatever the parameter is
        if spread[1 + i] is not None and arrays[i].dtype != spread[1 + i].dtype:
            spread[1 + i] = spread[1 + i].to(arrays[i].dtype)
    return (*spread, *nothing)


def _keep_for_experts(ctx, inputs, output):
    x, _, weight, *arrays, numbers, keep = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], weight, *arrays)
    ctx.rest = (numbers,)
    ctx.keep = keep


def _experts_backward(ctx, dy, *others):
    nothing = (None,) * 2
    if dy is None:
        return (None,) * (3 + NUM_ARRAYS - NUM_GATES) + nothing
    _check_kept(ctx)
    x, saved, weight, *arrays = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wanted = [needs[0], *(False,) * NUM_GATES, *needs[3:3 + NUM_ARRAYS - NUM_GATES], needs[2]]
    try:
        gradients = torch.ops.cumoe.experts_backward(dy, saved, x, weight, *arrays, *ctx.rest, wanted)
    except RuntimeError as error:
        raise own_error(error)
    spread = _spread(wanted, _first_only(gradients, dy, x, weight, *arrays))
    return (spread[0], None, spread[-1], *spread[1 + NUM_GATES:-1], *nothing)


def _check_kept(ctx):
    if not ctx.keep:
        raise RuntimeError("cumoe: gradients of a call with keep = False, which kept nothing for them: export the "
                           "program with torch.enable_grad() and parameters or inputs that require gradients")


def _refuse_tangents(ctx, *tangents):
    raise RuntimeError("cumoe: forward-mode gradients are not supported")


class Moe(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        output = torch.ops.cumoe.moe_forward(*arguments)
        _keep_for_moe(ctx, arguments, output)
        return output

    backward = staticmethod(_moe_backward)
    jvp = staticmethod(_refuse_tangents)


class Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        output = torch.ops.cumoe.experts_forward(*arguments)
        _keep_for_experts(ctx, arguments, output)
        return output[0]

    backward = staticmethod(_experts_backward)
    jvp = staticmethod(_refuse_tangents)


torch.library.register_autograd("cumoe::moe", _moe_backward, setup_context=_keep_for_moe)
torch.library.register_autograd("cumoe::experts", _experts_backward, setup_context=_keep_for_experts)
