"""Modules: the functional forms with parameters."""

import math

import torch
from torch import nn

from . import functional
from .config import GLU, LOSS_WEIGHTS, NOISY, Config


class _ExpertArrays(nn.Module):
    """w_up, w_glu, w_down and biases, as parameters; those that the layer does not have are None."""

    default = Config(0, 0, 0, 0)  # for repr()

    def __init__(self, config, device, dtype):
        super().__init__()
        self.config = config
        H, I = config.hidden_size, config.intermediate_size
        if config.glu != "separate" and config.activation not in GLU:
            raise ValueError(f"cumoe: glu = {config.glu!r}, but {config.activation!r} is no gated linear unit: must "
                             "be 'separate'")
        self.own_experts = config.own_experts(dtype or torch.get_default_dtype())  # all but with ranks
        E = len(self.own_experts)
        identity = config.activation == "identity"
        I = H if identity else I  # as the library does
        up = I if config.glu == "separate" else 2 * I
        separate = config.activation in GLU and config.glu == "separate"
        kind = dict(device=device, dtype=dtype)
        self._add("w_up", not identity, E, up, H, **kind)
        self._add("w_glu", separate, E, I, H, **kind)
        self._add("w_down", True, E, H, I, **kind)
        self._add("b_up", config.bias and not identity, E, up, **kind)
        self._add("b_glu", config.bias and separate, E, I, **kind)
        self._add("b_down", config.bias, E, H, **kind)
        self._mark()

    def _mark(self):
        """With ranks, experts' parameters, for those who would take them for the same on all."""
        for name in self.expert_names() if self.config.ep is not None else ():
            getattr(self, name).cumoe_of_one_rank = True

    def __setstate__(self, state):  # of deepcopy(), which loses marks
        super().__setstate__(state)
        self._mark()

    def _add(self, name, there, *size, device, dtype):
        """A parameter, or None where the layer does not have it."""
        value = nn.Parameter(torch.empty(*size, device=device, dtype=dtype)) if there else None
        self.register_parameter(name, value)

    def reset_parameters(self):
        """Matrices N(0, 1 / columns), biases 0. With ranks a call of all of them: rank 0 draws a seed, from which the
        values of each expert follow, whatever the number of ranks."""
        seed = self._draw_seed()
        for place, matrix in enumerate((self.w_up, self.w_glu, self.w_down)):
            if matrix is not None:
                self._draw(matrix, 1 / math.sqrt(matrix.size(2)), seed, place)
        for bias in self.b_up, self.b_glu, self.b_down:
            if bias is not None:
                nn.init.zeros_(bias)

    def _draw_seed(self):
        ep = self.config.ep
        return None if ep is None or self.w_down.is_meta else ep.draw_seed()

    @torch.no_grad()
    def _draw(self, values, std, seed, place):
        """N(0, std^2). With ranks, of each expert by itself, or of all of a gate alike on every rank."""
        if seed is None:
            nn.init.normal_(values, std=std)
            return
        generator = torch.Generator(values.device)
        parts = zip(self.own_experts, values) if values.dim() == 3 else [(self.config.num_experts, values)]
        for expert, part in parts:
            nn.init.normal_(part, std=std, generator=generator.manual_seed(seed + 8 * expert + place))

    def expert_names(self):
        """Of the parameters that belong to experts: with ranks, to this one alone."""
        return [name for name, value in self.named_parameters() if name[:2] == "b_" or value.dim() == 3]

    def extra_repr(self):
        """What is not as it is by default."""
        c, default = self.config, self.default
        changed = (name for name in Config.__dataclass_fields__ if getattr(c, name) != getattr(default, name))
        named = (f"{name}={getattr(c, name)!r}" for name in changed if name not in ("hidden_size", "intermediate_size"))
        return ", ".join((str(c.hidden_size), str(c.intermediate_size), *named))


class Experts(_ExpertArrays):
    """Experts where something else routes: experts(x, index, weight), see functional.experts.

    activation  relu, swiglu, gelu, gelu_tanh, silu, relu2, geglu, geglu_tanh, swiglu_clamped, identity
    glu         of gated linear units: "separate" (w_glu), or halves of w_up: "first", "last", "interleaved"
    recompute   compute pre-activations again in the backward pass instead of keeping them
    compute     "exact", or "tf32": products of float32 on tensor cores
    ep          an ExpertParallel: parameters are those of this rank's experts, own_experts of 0..num_experts-1, and
                making a module is a call of all ranks
    exchange_capacity    with ep, rows from each rank to each; more are dropped and counted. 0 = as many as there are,
                which ranks tell each other in every call
    exchange_chunks      with ep, parts of a rank's experts: what one needs travels while another is computed, on CUDA.
                0 = chosen
    """

    default = Config(0, 0, 0, 1, gate="external")

    def __init__(self, hidden_size, intermediate_size, num_experts, *, activation="relu", bias=False, glu="separate",
                 swiglu_limit=7.0, swiglu_alpha=1.702, swiglu_offset=1.0, recompute=False, compute="exact", ep=None,
                 exchange_capacity=0, exchange_chunks=0, device=None, dtype=None):
        config = Config(hidden_size, intermediate_size, num_experts, 1, gate="external", activation=activation,
                        bias=bias, glu=glu, swiglu_limit=swiglu_limit, swiglu_alpha=swiglu_alpha,
                        swiglu_offset=swiglu_offset, recompute=recompute, compute=compute, ep=ep,
                        exchange_capacity=exchange_capacity, exchange_chunks=exchange_chunks)
        config.check(dtype or torch.get_default_dtype())
        super().__init__(config, device, dtype)
        self.reset_parameters()

    def forward(self, x, index, weight):
        c = self.config
        biases = (self.b_up, self.b_glu, self.b_down) if c.bias else (None, None, None)
        arrays = (self.w_up, self.w_glu, self.w_down, *biases)
        return functional.apply_experts(x, index, weight, arrays, c.numbers, c.ep)


class MoE(_ExpertArrays):
    """The layer of Shazeer et al. (2017) and its relatives: moe(x) is an MoEOutput.

    top_k        experts per token; of all levels together with gate="hierarchical"; on average with "balanced"
    gate         noisy_topk, softmax (dense), hierarchical, balanced, softmax_topk, sigmoid_topk
    num_groups, top_k_groups    hierarchical: groups, and how many of them a token uses
    renormalize  softmax_topk, sigmoid_topk: the weights of a token sum to 1
    noise_epsilon, noise_stream    of noisy gates: the least standard deviation; a number for each layer of a model is
                 not needed here, as every call draws a seed of its own
    max_rows     balanced at inference: room for so many rows; 0 = top_k a token
    loss_weights {"importance": 0.1, "load": 0.1, "switch": 0, "z": 0, "threshold": 1}, or some of these
    gate_dtype   of w_gate, w_noise and the primary pair: float32 unless given (float64 with float64)
    Everything else is as in Experts. Noise is on in training mode and follows torch.manual_seed().
    """

    def __init__(self, hidden_size, intermediate_size, num_experts, top_k, *, gate="noisy_topk", activation="relu",
                 bias=False, glu="separate", num_groups=0, top_k_groups=0, renormalize=True, noise_epsilon=1e-2,
                 noise_stream=0, max_rows=0, loss_weights=None, swiglu_limit=7.0, swiglu_alpha=1.702,
                 swiglu_offset=1.0, recompute=False, compute="exact", ep=None, exchange_capacity=0,
                 exchange_chunks=0, gate_dtype=None, device=None, dtype=None):
        config = Config(hidden_size, intermediate_size, num_experts, top_k, gate, activation, bias, glu, num_groups,
                        top_k_groups, renormalize, noise_epsilon, noise_stream, max_rows, swiglu_limit, swiglu_alpha,
                        swiglu_offset, recompute, compute, ep=ep, exchange_capacity=exchange_capacity,
                        exchange_chunks=exchange_chunks)
        dtype = dtype or torch.get_default_dtype()
        if gate == "external":
            raise ValueError("cumoe: gate = 'external', but where something else routes the module is Experts")
        config.check(dtype)
        super().__init__(config, device, dtype)
        self.loss_weights = _loss_weights(loss_weights)
        numbers = torch.float64 if dtype == torch.float64 else torch.float32  # the library's gate type
        E, G, H = num_experts, num_groups, hidden_size
        kind = dict(device=device, dtype=gate_dtype or numbers)
        self._add("w_gate", True, E, H, **kind)
        self._add("w_noise", gate in NOISY, E, H, **kind)
        self._add("w_gate_primary", gate == "hierarchical", G, H, **kind)
        self._add("w_noise_primary", gate == "hierarchical", G, H, **kind)
        self._add("thresholds", gate == "balanced", E, device=device, dtype=numbers)
        selects = gate == "sigmoid_topk"
        self.register_buffer("gate_bias", torch.empty(E, device=device, dtype=numbers) if selects else None)
        self.reset_parameters()

    def reset_parameters(self):
        """Experts as in Experts; gates of noisy kinds 0 (App. A: no signal, some noise), others N(0, 0.02^2);
        thresholds and selection bias 0."""
        super().reset_parameters()
        noisy, seed = self.config.gate in NOISY, self._draw_seed()
        for place, gate in enumerate(self._gates()):
            nn.init.zeros_(gate) if noisy else self._draw(gate, 0.02, seed, place)
        for numbers in self.thresholds, self.gate_bias:
            if numbers is not None:
                nn.init.zeros_(numbers)

    def _apply(self, function, recurse=True):
        """The selection bias keeps its type: in 16 bits the small steps of update_gate_bias() would be lost."""
        kept = self.gate_bias
        super()._apply(function, recurse)
        if kept is not None and self.gate_bias.dtype != kept.dtype:
            self.gate_bias = kept.to(self.gate_bias.device)
        return self

    def forward(self, x, token_mask=None, call=None):
        """x [..., hidden_size]; token_mask [...], False = padding; call: see functional.moe, drawn if it is None."""
        if call is None and self.training and self.config.gate in NOISY:
            call = torch.randint(2**63 - 1, (2,), device=x.device)
        return functional.moe(x, self.config, w_down=self.w_down, w_up=self.w_up, w_glu=self.w_glu, b_up=self.b_up,
                              b_glu=self.b_glu, b_down=self.b_down, w_gate=self.w_gate, w_noise=self.w_noise,
                              w_gate_primary=self.w_gate_primary, w_noise_primary=self.w_noise_primary,
                              thresholds=self.thresholds, gate_bias=self.gate_bias, token_mask=token_mask, call=call,
                              training=self.training, loss_weights=self.loss_weights)

    def _gates(self):
        gates = self.w_gate, self.w_noise, self.w_gate_primary, self.w_noise_primary
        return [gate for gate in gates if gate is not None]

    def sum_gradients(self):
        """With ranks: add up the gradients of the gates, which are each rank's share, over all of them. Once, after the
        last backward call before an optimizer step; of several layers, ep.sum_gradients() does it in one call."""
        ep = self.config.ep
        if ep is None:
            raise RuntimeError("cumoe: sum_gradients(): the layer has no ranks, and its gradients are whole")
        ep.sum_gradients(self._gates())

    @torch.no_grad()
    def start_thresholds(self, x, token_mask=None):
        """Balanced: set the thresholds to the lowest gate values that the experts take of this batch. Once, before
        the first step (App. F)."""
        if self.thresholds is None:
            raise RuntimeError(f"cumoe: start_thresholds(): gate is {self.config.gate!r}, but only 'balanced' has some")
        training = self.training
        try:
            self.train()
            self.thresholds.copy_(self(x, token_mask).batch_threshold)
        finally:
            self.train(training)

    @torch.no_grad()
    def update_gate_bias(self, expert_count, rate=0.001):
        """sigmoid_topk: move the selection bias towards balance, as DeepSeek-V3 does once per step. expert_count is
        that of an output, or the sum of several."""
        if self.gate_bias is None:
            raise RuntimeError(f"cumoe: update_gate_bias(): gate is {self.config.gate!r}, but only 'sigmoid_topk' has "
                               "a selection bias")
        torch.ops.cumoe.gate_bias_update(self.gate_bias, expert_count.to(torch.int32), rate)

    def extra_repr(self):
        weights = zip(LOSS_WEIGHTS, self.loss_weights)
        changed = {name: weight for name, weight in weights if weight != LOSS_WEIGHTS[name]}
        return super().extra_repr() + (f", loss_weights={changed}" if changed else "")


def _loss_weights(given):
    weights = dict(LOSS_WEIGHTS)
    for name, weight in (given or {}).items():
        if name not in weights:
            raise ValueError(f"cumoe: loss_weights has {name!r}, but knows {', '.join(weights)} alone")
        weights[name] = float(weight)
    return tuple(weights.values())
