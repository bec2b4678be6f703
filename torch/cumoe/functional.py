"""The layer without parameters of its own. Arrays have the names, shapes and meaning of cumoe/weights.h."""

import functools

import torch
from torch.autograd import forward_ad

from . import ops
from .config import (ACTIVATIONS, COMPUTES, GATES, LOSS_WEIGHTS, PLACEMENTS, SAVED_LAYOUT, gate_dtype, number_of,
                     numbers_of_ranks)
from .output import MoEOutput

_EXTERNAL = number_of(GATES, "external", "gate")
_ALONE = numbers_of_ranks(None, 0, 0, 0)


def _cast(dtype, tensors):
    return [tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype) for tensor in tensors]


def _autocast(x, arrays):
    """Under autocast tokens and expert arrays have its type; gates stay as they are."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x, arrays
    dtype = torch.get_autocast_dtype(device)
    return _cast(dtype, [x])[0], _cast(dtype, arrays)


def _needs_gradient(*tensors):
    if forward_ad._current_level >= 0:  # there may be tangents, which autograd.Function refuses
        return True
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _rows(x, columns):
    if x.dim() == 0 or x.size(-1) != columns:
        raise ValueError(f"cumoe: x has shape {list(x.shape)}, but its last size must be {columns}")
    return x if x.dim() == 2 else x.reshape(-1, columns)


def load_parallel():
    """Not before somebody has ranks, as it brings PyTorch's compiler along."""
    from . import parallel

    return parallel


def experts(x, index, weight, w_up, w_down, *, w_glu=None, b_up=None, b_glu=None, b_down=None, activation="relu",
            glu="separate", swiglu_limit=7.0, swiglu_alpha=1.702, swiglu_offset=1.0, recompute=False, compute="exact",
            max_sms=0, ep=None, num_experts=0, exchange_capacity=0, exchange_chunks=0):
    """y[t] = sum over j of weight[t, j] * expert index[t, j] of x[t].

    x       [..., H] float64 (CPU), float32, bfloat16 or float16
    index   [..., K] int32 or int64; an id outside 0..E-1 contributes nothing, forward or backward
    weight  [..., K] float32 (float64 with float64) or the type of x
    w_up    [E, I, H], or [E, 2I, H] as glu says, in any strides: a transposed view is not copied. None for "identity"
    w_down  [E, H, I] likewise; the type of x, as all expert arrays
    glu     where the gate half of a gated linear unit stands: "separate" (w_glu), "first", "last", "interleaved"

    recompute: the backward pass computes the pre-activations again, which saves the memory to keep them.

    With ranks (ep, an ExpertParallel), E = num_experts, arrays have this rank's share of the experts, and rows beyond
    exchange_capacity (0 = as many as there are) from one rank to another are dropped. exchange_chunks: as in MoE.
    """
    alone = ep is None and not (exchange_capacity or exchange_chunks)
    ranks = _ALONE if alone else numbers_of_ranks(ep, num_experts, exchange_capacity, exchange_chunks)
    numbers = (_EXTERNAL, number_of(ACTIVATIONS, activation, "activation"), number_of(PLACEMENTS, glu, "glu"), 0.0, 0.0,
               0.0, 0.0, 0.0, 0.0, float(recompute), number_of(COMPUTES, compute, "compute"), float(max_sms),
               float(swiglu_limit), float(swiglu_alpha), float(swiglu_offset), 0.0, SAVED_LAYOUT) + ranks
    return apply_experts(x, index, weight, (w_up, w_glu, w_down, b_up, b_glu, b_down), numbers, ep)


def apply_experts(x, index, weight, arrays, numbers, ep):
    """experts(), with a configuration as Config.numbers; the operator knows top_k by `index`."""
    x, arrays = _autocast(x, arrays)
    shape, hidden = x.shape, arrays[2].size(1)
    if weight.dtype != x.dtype and weight.dtype != gate_dtype(x.dtype):
        weight = weight.to(gate_dtype(x.dtype))
    if len(shape) != 2:
        index, weight = (tensor.reshape(-1, tensor.size(-1)) for tensor in (index, weight))
    arguments = (_rows(x, hidden), index, weight, *arrays, numbers)
    keep = _needs_gradient(x, weight, *arrays)
    try:
        if ep is not None:
            y = load_parallel().experts(ep, arguments, keep)
        elif torch.compiler.is_exporting():
            y, _ = torch.ops.cumoe.experts(*arguments, keep)
        elif keep:
            y = ops.Experts.apply(*arguments, True)
        else:
            y, _ = torch.ops.cumoe.experts_forward(*arguments, False)
    except RuntimeError as error:
        raise ops.own_error(error)
    return y if len(shape) == 2 else y.view(shape)


@functools.lru_cache(maxsize=None)  # a captured graph holds addresses alone: nothing may be thrown out
def _cached_weights(weights, dtype, device):
    with torch.inference_mode(False):
        return torch.tensor(weights, dtype=dtype, device=device)


def _loss_weights(weights, losses):
    """On the device once and for all; not what belongs to a compiler, or to tensors without values."""
    if torch.compiler.is_compiling() or type(losses) is not torch.Tensor:
        return torch.tensor(weights, dtype=losses.dtype, device=losses.device)
    return _cached_weights(weights, losses.dtype, losses.device)


def moe(x, config, *, w_down, w_up=None, w_glu=None, b_up=None, b_glu=None, b_down=None, w_gate=None, w_noise=None,
        w_gate_primary=None, w_noise_primary=None, thresholds=None, gate_bias=None, token_mask=None, call=None,
        training=False, loss_weights=tuple(LOSS_WEIGHTS.values())):
    """The whole layer with any gate but "external": an MoEOutput.

    x             [..., H]
    config        a Config
    token_mask    [...] bool: False = padding, which is not routed, in no loss, and gives 0
    call          noise, on the device of x: int64 [2] seed and offset, [3] with the first token's global number, or
                  [4] with the number of live tokens (cumoe_call_t in cumoe/types.h); None = zeros, all tokens live.
                  With ranks, None and [2] are rank 0's, and the first token is found: for noise in training, ranks
                  add up their numbers of tokens. With [3] and [4], equal seeds and right numbers are the caller's
    training      noise on, smooth loads, experts that choose (balanced)
    loss_weights  of importance, load, switch, z and threshold loss in .loss
    """
    x, (w_up, w_glu, w_down, b_up, b_glu, b_down) = _autocast(x, (w_up, w_glu, w_down, b_up, b_glu, b_down))
    arrays = (w_gate, w_noise, w_gate_primary, w_noise_primary, thresholds, gate_bias, w_up, w_glu, w_down, b_up,
              b_glu, b_down)
    if token_mask is not None:
        if token_mask.shape != x.shape[:-1]:
            raise ValueError(f"cumoe: token_mask has shape {list(token_mask.shape)}, but must have that of x without "
                             f"its last size, {list(x.shape[:-1])}")
        token_mask = token_mask.reshape(-1)
    arguments = (_rows(x, config.hidden_size), *arrays, token_mask, call, config.numbers, training)
    keep = _needs_gradient(x, *arrays)
    try:
        if config.ep is not None:
            y, losses, _, *rest = load_parallel().moe(config.ep, config.gate, arguments, keep)
        elif torch.compiler.is_exporting():
            y, losses, _, *rest = torch.ops.cumoe.moe(*arguments, keep)
        else:
            y, losses, _, *rest = (ops.Moe.apply if keep else torch.ops.cumoe.moe_forward)(*arguments, keep)
    except RuntimeError as error:
        raise ops.own_error(error)
    weights = tuple(float(weight) for weight in loss_weights) + (0.0,) * (ops.NUM_LOSSES - len(loss_weights))
    loss = torch.dot(losses, _loss_weights(weights, losses))
    return MoEOutput(y if x.dim() == 2 else y.view(x.shape), loss, losses, *rest)
