"""What a layer computes: the fields of the C interface's cumoe_config_t, with names for its kinds."""

import dataclasses

import torch

GATES = ("noisy_topk", "softmax", "external", "hierarchical", "balanced", "softmax_topk", "sigmoid_topk")
ACTIVATIONS = ("relu", "swiglu", "gelu", "gelu_tanh", "silu", "relu2", "geglu", "swiglu_clamped", "identity")
PLACEMENTS = ("separate", "first", "last", "interleaved")
COMPUTES = ("exact", "tf32")
LOSS_WEIGHTS = {"importance": 0.1, "load": 0.1, "switch": 0.0, "z": 0.0, "threshold": 1.0}  # unless others are given
LOSSES = tuple(LOSS_WEIGHTS)
DTYPES = {torch.float64: 1, torch.float32: 2, torch.bfloat16: 3, torch.float16: 4}

GLU = ("swiglu", "geglu", "swiglu_clamped")
NOISY = ("noisy_topk", "hierarchical")


def gate_dtype(dtype):
    """The type of logits, losses and weights of experts."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def number_of(names, name, what):
    """The number that the C interface has for a name."""
    if name not in names:
        raise ValueError(f"cumoe: {what} = {name!r}, but must be one of {', '.join(names)}")
    return names.index(name)


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
    recompute: bool = False
    compute: str = "exact"
    max_sms: int = 0

    def __post_init__(self):
        object.__setattr__(self, "numbers", self._numbers())
        object.__setattr__(self, "reals", (self.swiglu_limit, self.swiglu_alpha, self.noise_epsilon))

    def __reduce__(self):
        """Fields alone travel: the order of numbers is that of a version."""
        return _make, ({field.name: getattr(self, field.name) for field in dataclasses.fields(self)},)

    def _numbers(self):
        """As the operators take them; ops.cc has the same order."""
        return (number_of(GATES, self.gate, "gate"), number_of(ACTIVATIONS, self.activation, "activation"),
                number_of(PLACEMENTS, self.glu, "glu"), self.top_k, self.num_groups, self.top_k_groups,
                int(self.renormalize), self.noise_stream, self.max_rows, int(self.recompute),
                number_of(COMPUTES, self.compute, "compute"), self.max_sms)

    def check(self, dtype=torch.float32):
        """Raise ValueError with the library's sentence if no CPU layer can have this configuration."""
        if dtype not in DTYPES:
            raise ValueError(f"cumoe: dtype = {dtype}, but must be one of {', '.join(map(str, DTYPES))}")
        if self.compute == "tf32":  # a matter of the device
            return dataclasses.replace(self, compute="exact").check(dtype)
        numbers, reals = self.numbers, self.reals
        sizes = [self.hidden_size, self.intermediate_size, self.num_experts, int(self.bias)]
        try:
            torch.ops.cumoe.saved_bound(numbers, reals, sizes, DTYPES[dtype], -1)
        except RuntimeError as error:
            raise ValueError(str(error).splitlines()[0]) from None
