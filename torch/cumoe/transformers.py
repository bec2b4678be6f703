"""cumoe's experts in Hugging Face models.

transformers hands the experts module itself to a registered function. Which layout, biases and gating function it
has is read from it, and what cumoe has no kernel for is refused, never computed in another way.
"""

import math
import weakref

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from . import functional
from .config import DTYPES

OLDEST_TRANSFORMERS = (5, 7)  # the first that takes names from outside

# What a module may be made of; something else would be missing in the result.
ARRAYS = {"gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias"}


def register_transformers(name="cumoe"):
    try:
        import transformers
    except ImportError as error:
        raise ImportError(_needs(f"which cannot be imported ({error})")) from error
    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < OLDEST_TRANSFORMERS:
        raise ImportError(_needs(f"but this is {transformers.__version__}"))
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(name, experts_forward)
    ALL_FP8_EXPERTS_FUNCTIONS.register(name, experts_forward)  # which says that it has no kernel, by name


def _needs(found):
    oldest = ".".join(map(str, OLDEST_TRANSFORMERS))
    return f"cumoe needs transformers {oldest} or later, {found}: pip install --upgrade transformers"


def experts_forward(module, hidden_states, top_k_index, top_k_weights):
    """hidden_states [T, H], top_k_index and top_k_weights [T, K] -> [T, H]. An index that is no expert of this
    module, as expert parallelism has them, contributes nothing."""
    gated, biased = getattr(module, "has_gate", True), getattr(module, "has_bias", False)
    up = "gate_up_proj" if gated else "up_proj"
    w_up, w_down = _array(module, up), _array(module, "down_proj")
    b_up, b_down = (_array(module, up + "_bias"), _array(module, "down_proj_bias")) if biased else (None, None)
    if getattr(module, "is_transposed", False):
        w_up, w_down = w_up.transpose(1, 2), w_down.transpose(1, 2)
    num_experts = w_up.size(0)
    if module.num_experts != num_experts:
        _refuse(type(module), f"num_experts = {module.num_experts}, but arrays of {num_experts} experts")
    formula = _traced_formula(module, w_up) if torch.compiler.is_dynamo_compiling() else _formula(module)
    if isinstance(formula, str):
        _refuse(type(module), formula)
    options = dict(zip(("activation", "glu", "swiglu_limit", "swiglu_alpha", "swiglu_offset"), formula),
                   b_up=b_up, b_down=b_down)
    x = hidden_states.to(w_up.dtype)
    if top_k_index.size(1) <= num_experts:
        y = functional.experts(x, top_k_index, top_k_weights, w_up, w_down, **options)
    else:  # a rank of expert parallelism may have fewer experts than a token chooses, but a layer does not: several
        choices = zip(top_k_index.split(num_experts, 1), top_k_weights.split(num_experts, 1))
        y = sum(functional.experts(x, index, weight, w_up, w_down, **options) for index, weight in choices)
    return y.to(hidden_states.dtype)


def _refuse(experts_class, why):
    raise NotImplementedError(f"cumoe: {experts_class.__name__} has {why}: "
                              'use experts_implementation="grouped_mm" or "eager"')


def _array(module, name):
    array = getattr(module, name, None)
    if array is None:
        _refuse(type(module), f"no {name}")
    if hasattr(array, "__tensor_flatten__"):  # a tensor made of others: DTensor, torchao's quantized ones
        _refuse(type(module), f"{name} as a {type(array).__name__}, which cumoe cannot read")
    if array.dtype not in DTYPES:
        _refuse(type(module), f"{name} of type {array.dtype}, which cumoe has no kernel for")
    return array


# Which formula a gating function is, is asked of the function itself, once for each module: it is called with
# float64 numbers of every size, and values and gradients must be those of a kernel of cumoe.

_known = weakref.WeakKeyDictionary()  # beside the modules: nothing is copied or pickled with them
_SCALARS = (bool, int, float, str, type(None))


@torch.compiler.disable  # where a compiler gave up on the caller
def _formula(module):
    """activation, glu and, of swiglu_clamped, its three numbers; or in words why there is none."""
    functions = (getattr(module, name, None) for name in ("_apply_gate", "act_fn"))
    state = [weakref.ref(getattr(f, "__func__", f)) for f in functions if f is not None]
    state += [value for value in vars(module).values() if type(value) in _SCALARS]  # limits and the like
    known = _known.get(module)
    if known is None or known[0] != state:
        with _disable_current_modes(), torch.inference_mode(False), torch.enable_grad():
            known = _known[module] = state, _identify(module)
    return known[1]


@torch.compiler.assume_constant_result
def _cumoe_formula(self):
    return _formula(self)


@torch.compiler.assume_constant_result
def _give_method(experts_class):
    if not hasattr(experts_class, _cumoe_formula.__name__):
        setattr(experts_class, _cumoe_formula.__name__, _cumoe_formula)


def _traced_formula(module, w_up):
    """Dynamo cannot trace the question and takes the answer as a constant, which it does for methods of a module.
    The gating function is traced for its guards alone, so that another module, or another limit, is asked again."""
    _give_method(type(module))
    function = module._apply_gate if getattr(module, "has_gate", True) else module.act_fn
    function(w_up.new_zeros(1, w_up.size(1)))
    return module._cumoe_formula()


def _identify(module):
    arrays = (name for part in (module.named_parameters(), module.named_buffers()) for name, _ in part)
    elsewhere = "act_fn.", "parametrizations."
    others = [name for name in arrays if name not in ARRAYS and not name.startswith(elsewhere)]
    if others:
        return f"{', '.join(others)}, which cumoe does not know"
    act = getattr(module, "act_fn", None)
    act_name = getattr(act, "__name__", type(act).__name__)
    if getattr(module, "has_gate", True):
        up, function, candidates = module.gate_up_proj, module._apply_gate, _gates
        own = getattr(function, "__name__", "") != "_default_apply_gate"
        named = "a gating function of its own, _apply_gate()," if own else f"a gate with {act_name},"
    else:
        up, function, candidates = module.up_proj, act, _activations
        named = f"the activation {act_name},"
    z = _numbers(up.size(2 if getattr(module, "is_transposed", False) else 1))
    try:
        if function(z.clone()).requires_grad:
            return f"{named} which has parameters"
        theirs = _with_gradient(function, z)
        for formula, candidate, scales in candidates(z, function):
            if _same(theirs, _with_gradient(candidate, z), scales):
                return formula
    except Exception as error:  # whatever a function of somebody else may raise
        return f"{named} which does not take float64 tensors on the CPU ({type(error).__name__}: {error})"
    return f"{named} which cumoe has no kernel for"


def _numbers(columns):
    """[rows, columns] where a gate, however its halves stand, sees all pairs, most of them in several channels."""
    sizes = [10.0**i for i in range(-3, 16, 3)] + [0.2, 0.6, 1.4, 2.3, 4.5, 6.8, 7.3, 12.0, 30.0, 200.0]
    values = torch.tensor([0.0] + sizes + [-0.97 * size for size in sizes], dtype=torch.float64, device="cpu")
    rows = max(3, 10 * len(values) ** 2 // columns)
    generator = torch.Generator("cpu").manual_seed(1)
    return values[torch.randint(len(values), (rows, columns), generator=generator, device="cpu")]


def _with_gradient(function, z):
    """function(z) and the gradient of its sum."""
    z = z.clone().requires_grad_()
    y = function(z)
    return y.detach(), torch.autograd.grad(y.sum(), z)[0]


def _same(theirs, ours, scales):
    """Within the rounding of float64, where a formula cancels as well."""
    return all(a.shape == b.shape and a.dtype == b.dtype
               and ((a - b).abs() <= 1e-9 * b.abs() + 1e-12 * scale).all().item()
               for a, b, scale in zip(theirs, ours, scales))


def _gelu_tanh(z):
    return F.gelu(z, approximate="tanh")


def _activations(z, _):
    """Kernels without a gate: formula, function, and the sizes that errors of value and gradient go with."""
    functions = {"silu": F.silu, "relu": torch.relu, "relu2": lambda z: torch.relu(z).square(), "gelu": F.gelu,
                 "gelu_tanh": _gelu_tanh}
    for name, function in functions.items():
        yield (name, "separate"), function, (1 + z.abs(), 1 + z.abs())


def _gates(z, function):
    """Kernels with a gate, in every placement."""
    splits = {"first": lambda z: z.chunk(2, -1), "interleaved": lambda z: (z[..., ::2], z[..., 1::2]),
              "last": lambda z: z.chunk(2, -1)[::-1]}
    for glu, split in splits.items():
        gate, up = split(1 + z.abs())
        of_gradient = torch.empty_like(z)
        for part, size in zip(split(of_gradient), (up, gate)):
            part.copy_(size)
        scales = gate * up, of_gradient
        for name, act in ("swiglu", F.silu), ("geglu", F.gelu), ("geglu_tanh", _gelu_tanh):
            yield (name, glu), lambda z: act(split(z)[0]) * split(z)[1], scales
        numbers = _solve_clamped(function, split, z.size(1))
        if numbers:
            yield ("swiglu_clamped", glu, *numbers), _clamped(split, *numbers), scales


def _clamped(split, limit, alpha, offset):
    def swiglu_clamped(z):
        gate, up = split(z)
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return gate * torch.sigmoid(alpha * gate) * (up + offset)

    return swiglu_clamped


def _solve_clamped(function, split, columns):
    """Limit, alpha and offset that the function has if it is swiglu_clamped: act(gate) * (up + offset)."""
    def at(gate, up):
        """Its value, and its derivative by up: act(gate) where up is not clamped."""
        z = torch.empty(1, columns, dtype=torch.float64, device="cpu")
        for part, number in zip(split(z), (gate, up)):
            part.fill_(number)
        value, gradient = _with_gradient(function, z)
        return value[0, 0].item(), split(gradient)[1][0, 0].item()

    middle, saturated = at(1e6, 0)
    if not saturated > 0:
        return None
    limit, offset = round((at(1e6, 1e6)[0] - middle) / saturated, 12), round(middle / saturated, 12)
    gate = min(limit, 1)
    share = at(gate, 0)[1] / gate if gate > 0 else 0  # sigmoid(alpha gate)
    return (limit, round(math.log(share / (1 - share)) / gate, 12), offset) if 0 < share < 1 else None
