"""What a layer computes: the fields of the C interface's cumoe_config_t, with names for its kinds."""

import dataclasses
import itertools
import zlib

import torch

GATES = ("noisy_topk", "softmax", "external", "hierarchical", "balanced", "softmax_topk", "sigmoid_topk")
ACTIVATIONS = ("relu", "swiglu", "gelu", "gelu_tanh", "silu", "relu2", "geglu", "swiglu_clamped", "identity",
               "geglu_tanh")
PLACEMENTS = ("separate", "first", "last", "interleaved")
COMPUTES = ("exact", "tf32")
LOSS_WEIGHTS = {"importance": 0.1, "load": 0.1, "switch": 0.0, "z": 0.0, "threshold": 1.0}  # unless others are given
LOSSES = tuple(LOSS_WEIGHTS)
DTYPES = {torch.float64: 1, torch.float32: 2, torch.bfloat16: 3, torch.float16: 4}

GLU = ("swiglu", "geglu", "swiglu_clamped", "geglu_tanh")
NOISY = ("noisy_topk", "hierarchical")


def gate_dtype(dtype):
    """The type of logits, losses and weights of experts."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def number_of(names, name, what):
    """The number that the C interface has for a name, as the operators take all numbers."""
    if name not in names:
        raise ValueError(f"cumoe: {what} = {name!r}, but must be one of {', '.join(names)}")
    return float(names.index(name))


def numbers_of_ranks(ep, num_experts, exchange_capacity, exchange_chunks):
    """The last of Config.numbers: group, experts of all ranks, capacity, chunks, and place for a plan."""
    group = getattr(ep, "number", None) if ep is not None else 0
    if group is None:
        raise ValueError(f"cumoe: ep = {ep!r}, but must be an ExpertParallel")
    return float(group), float(num_experts), float(exchange_capacity), float(exchange_chunks), 0.0


def _make(fields):
    return Config(**fields)


@dataclasses.dataclass(frozen=True)
class Config:
    """Immutable and hashable. Ranges are those of cumoe/config.h; `check()` asks the library."""

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    gate: str = "noisy_topk"
    activation: str = "relu"
    bias: bool = False
    glu: str = "separate"
    num_groups: int = 0
    top_k_groups: int = 0
    renormalize: bool = True
    noise_epsilon: float = 1e-2
    noise_stream: int = 0
    max_rows: int = 0
    swiglu_limit: float = 7.0
    swiglu_alpha: float = 1.702
    swiglu_offset: float = 1.0
    recompute: bool = False
    compute: str = "exact"
    max_sms: int = 0
    ep: object = None  # an ExpertParallel
    exchange_capacity: int = 0
    exchange_chunks: int = 0

    def __post_init__(self):
        object.__setattr__(self, "numbers", tuple(float(number) for number in self._numbers()))

    def __reduce__(self):
        """Fields alone travel: the order of numbers is that of a version."""
        return _make, ({field.name: getattr(self, field.name) for field in dataclasses.fields(self)},)

    def _numbers(self):
        """As the operators take them; call.h has the same order."""
        return (number_of(GATES, self.gate, "gate"), number_of(ACTIVATIONS, self.activation, "activation"),
                number_of(PLACEMENTS, self.glu, "glu"), self.top_k, self.num_groups, self.top_k_groups,
                self.renormalize, self.noise_stream, self.max_rows, self.recompute,
                number_of(COMPUTES, self.compute, "compute"), self.max_sms, self.swiglu_limit, self.swiglu_alpha,
                self.swiglu_offset, self.noise_epsilon, SAVED_LAYOUT,
                *numbers_of_ranks(self.ep, self.num_experts, self.exchange_capacity, self.exchange_chunks))

    def check(self, dtype=torch.float32):
        """Raise ValueError with the library's sentence if no CPU layer can have this configuration. With ranks, a call
        of all of them: for the device of the group, and if they differ."""
        if dtype not in DTYPES:
            raise ValueError(f"cumoe: dtype = {dtype}, but must be one of {', '.join(map(str, DTYPES))}")
        if self.compute == "tf32" and self.ep is None:  # a matter of the device
            return dataclasses.replace(self, compute="exact").check(dtype)
        try:
            self.saved_bound(dtype) if self.ep is None else self.own_experts(dtype)
        except RuntimeError as error:
            if str(error).startswith(("cumoe: rank ", "cumoe: the group of ranks ")):  # which failed, or is closed
                raise
            raise ValueError(str(error).splitlines()[0]) from None

    def own_experts(self, dtype):
        """Those whose parameters this rank has."""
        if self.ep is None:
            return range(self.num_experts)
        with self.ep.waiting():
            first, count = torch.ops.cumoe.experts_of_rank(self.numbers, self._sizes(), DTYPES[dtype], self.ep.rank)
        return range(first, first + count)

    def saved_bound(self, dtype):
        """What forward keeps for backward on the CPU: base, per_token, from (call.h)."""
        return torch.ops.cumoe.saved_bound(self.numbers, self._sizes(), DTYPES[dtype], -1)

    def _sizes(self):
        return [self.hidden_size, self.intermediate_size, self.num_experts, int(self.bias)]


def _saved_layout():
    """A number that another library has when it keeps more or less for backward. Traced graphs have it among their
    constants, so that what a compiler stored on disk is not taken for another library."""
    bounds = []
    for gate, activation, recompute in itertools.product(GATES, ACTIVATIONS, (False, True)):
        own = {"hierarchical": dict(num_groups=4, top_k_groups=2), "softmax": dict(top_k=0)}.get(gate, {})
        kind = dict(hidden_size=16, intermediate_size=16, num_experts=8, top_k=4) | own
        config = Config(**kind, gate=gate, activation=activation, recompute=recompute)
        bounds += [config.saved_bound(dtype) for dtype in DTYPES]
    return float(zlib.crc32(repr(bounds).encode()))


SAVED_LAYOUT = 0.0  # while it is computed
SAVED_LAYOUT = _saved_layout()
