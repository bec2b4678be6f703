"""Who computes the layer. A contestant is a function (p, x, index, weight, w_up, w_down) -> y of torch tensors; the
gradients come from autograd. JAX has its own tensors and stands at the end.

To add one: write the function, name it in START and in plan.py.
"""

import os
from types import SimpleNamespace

import torch
import torch.nn.functional as F


def sort_by_expert(p, index):
    """order [T K]: the choices by expert; offsets [E]: where each expert's rows end."""
    experts, order = index.reshape(-1).sort(stable=True)
    offsets = torch.searchsorted(experts, torch.arange(p.shape.E, device=experts.device), right=True)
    return order, offsets.to(torch.int32)


def through_experts(p, x, index, weight, experts):
    """Gathers the rows in the order of their experts, has them computed by experts(rows, offsets), and adds them up.
    By index_select, as the gradient of x[token] would be sorted."""
    order, offsets = sort_by_expert(p, index)
    token, weight = order // p.shape.K, weight.reshape(-1).index_select(0, order)
    return combine(x, token, experts(x.index_select(0, token), offsets) * weight[:, None])


def combine(x, token, rows):
    return torch.zeros_like(x).index_add_(0, token, rows)


def loop(p, x, index, weight, w_up, w_down):
    def experts(rows, offsets):
        counts = offsets.diff(prepend=offsets.new_zeros(1)).tolist()
        groups = zip(rows.split(counts), w_up.unbind(), w_down.unbind())
        return torch.cat([p.act(rows @ up.T) @ down.T for rows, up, down in groups])

    return through_experts(p, x, index, weight, experts)


def torch_grouped_mm(rows, matrices, offsets):
    if hasattr(F, "grouped_mm"):
        return F.grouped_mm(rows, matrices, offs=offsets)
    return torch._grouped_mm(rows, matrices, offs=offsets)


def grouped_mm(p, x, index, weight, w_up, w_down):
    def experts(rows, offsets):
        hidden = p.act(torch_grouped_mm(rows, w_up.transpose(1, 2), offsets))
        return torch_grouped_mm(hidden, w_down.transpose(1, 2), offsets)

    return through_experts(p, x, index, weight, experts)


def dense(p, x, index, weight, w_up, w_down):
    """No contestant but the yardstick: as many operations in products of full size. All tokens go to the experts
    0..K-1, with weight 1; that is how it is checked."""
    K, H, I = p.shape.K, p.shape.H, p.shape.I  # noqa: E741
    z = x @ w_up[:K].reshape(-1, H).T
    hidden = p.act(z.view(-1, K, w_up.shape[1])).reshape(-1, K * I)
    return hidden @ w_down[:K].transpose(0, 1).reshape(H, K * I).T


def torch_gate(p, x, w_gate):
    values, index = torch.topk((x @ w_gate.T).float(), p.shape.K)
    return index, values.softmax(-1).to(x.dtype)


def experts_module(p, w_up, w_down):
    """What the functions of transformers read of a module of experts."""
    module = SimpleNamespace(num_experts=p.shape.E, has_bias=False, is_transposed=False, down_proj=w_down)
    if p.activation == "relu":
        module.has_gate, module.up_proj, module.act_fn = False, w_up, F.relu
    else:
        module.has_gate, module.gate_up_proj, module.act_fn = True, w_up, F.silu
        module._apply_gate = p.act
    return module


def transformers_eager(p, x, index, weight, w_up, w_down):
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    return MixtralExperts.forward.__wrapped__(experts_module(p, w_up, w_down), x, index, weight)


def transformers_grouped_mm(p, x, index, weight, w_up, w_down):
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return ALL_EXPERTS_FUNCTIONS["grouped_mm"](experts_module(p, w_up, w_down), x, index, weight)


def transformers_gate(p, x, w_gate):
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

    router = SimpleNamespace(hidden_dim=p.shape.H, weight=w_gate, top_k=p.shape.K)
    _, weight, index = MixtralTopKRouter.forward(router, x)
    return index, weight.to(x.dtype)


def scattermoe(p, x, index, weight, w_up, w_down):
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    routing = flatten_sort_count(index, num_experts=p.shape.E)
    z = parallel_linear(x, w_up.transpose(1, 2), p.shape.K, *routing, grouped_out=True)
    return parallel_linear(p.act(z), w_down.transpose(1, 2), 1, *routing, grouped_in=True, gates=weight)


def cumoe_experts(p, x, index, weight, w_up, w_down):
    from cumoe.functional import experts

    glu = "first" if p.activation == "swiglu" else "separate"
    return experts(x, index, weight, w_up, w_down, activation=p.activation, glu=glu)


RESULTS = ("y", "dx", "dweight", "dw_up", "dw_down")


class TorchRun:
    """One contestant on one problem. forward() and backward() put the work on the device and do not wait."""

    def __init__(self, p, layer, gate=None):
        self.p, self.layer, self.gate = p, layer, gate
        self.inputs = (p.x, p.w_gate if gate else p.weight, p.w_up, p.w_down)

    def forward(self):
        p, self.y, self.gradients = self.p, None, None  # the results before need no room beside the new ones
        index, weight = self.gate(p, p.x, p.w_gate) if self.gate else (p.index, p.weight)
        self.routing, self.y = (index, weight), self.layer(p, p.x, index, weight, p.w_up, p.w_down)

    def backward(self):
        self.gradients = torch.autograd.grad(self.y, self.inputs, self.p.dy, allow_unused=True)

    def results(self):
        return dict(zip(RESULTS, (self.y, *self.gradients)))


class CumoeRun(TorchRun):
    """The gate is part of the layer, with the same choice: the K largest, softmax over these. Its losses come along."""

    def forward(self):
        if not self.gate:
            return super().forward()
        from cumoe import Config, functional

        p, self.y, self.gradients = self.p, None, None
        shape, glu = p.shape, "first" if p.activation == "swiglu" else "separate"
        config = Config(shape.H, shape.I, shape.E, shape.K, "softmax_topk", p.activation, glu=glu)
        out = functional.moe(p.x, config, w_gate=p.w_gate, w_up=p.w_up, w_down=p.w_down, training=True)
        self.routing, self.y = (out.chosen_expert, out.chosen_weight), out.y

    def results(self):
        index, weight = self.routing
        self.routing = index.long(), weight  # as the others have it; no part of the layer
        return super().results()


class JaxRun:
    """jax.lax.ragged_dot, compiled. The tensors are those of torch, shared where the device allows it."""

    def __init__(self, p, own_routing):
        import jax
        import jax.numpy as jnp

        K, E = p.shape.K, p.shape.E

        def act(z):
            if p.activation == "relu":
                return jax.nn.relu(z)
            glu, up = jnp.split(z, 2, axis=-1)
            return jax.nn.silu(glu) * up

        def experts(x, index, weight, w_up, w_down):
            order = jnp.argsort(index.reshape(-1))
            counts = jnp.bincount(index.reshape(-1), length=E)
            hidden = act(jax.lax.ragged_dot(x[order // K], w_up.transpose(0, 2, 1), counts))
            rows = jax.lax.ragged_dot(hidden, w_down.transpose(0, 2, 1), counts)
            return jnp.zeros_like(x).at[order // K].add(rows * weight.reshape(-1)[order][:, None])

        def layer(x, w_gate, weight, w_up, w_down, index):
            if own_routing:
                values, index = jax.lax.top_k((x @ w_gate.T).astype(jnp.float32), K)
                weight = jax.nn.softmax(values).astype(x.dtype)
            return experts(x, index, weight, w_up, w_down), (index, weight)

        def share(tensor):
            return jax.dlpack.from_dlpack(tensor.detach().contiguous())

        self.p, self.jax = p, jax
        self.inputs = [share(t) for t in (p.x, p.w_gate, p.weight, p.w_up, p.w_down)]
        self.index, self.dy = share(p.index.to(torch.int32)), share(p.dy)
        self._forward = jax.jit(lambda inputs, index: jax.vjp(lambda *i: layer(*i, index), *inputs, has_aux=True))
        self._backward = jax.jit(lambda pull_back, dy: pull_back(dy))

    def forward(self):
        self._y = self._gradients = None
        self._y, self._pull_back, self._routing = self._forward(self.inputs, self.index)

    def backward(self):
        self._gradients = self._backward(self._pull_back, self.dy)

    def wait(self):
        self.jax.block_until_ready(self._gradients or self._y)

    def results(self):
        self.wait()
        index, weight = (torch.from_dlpack(a) for a in self._routing)
        self.routing = index.long(), weight
        dx, _, *others = self._gradients
        return dict(zip(RESULTS, (torch.from_dlpack(a) for a in (self._y, dx, *others))))


def torch_runs(layer, gate=torch_gate):
    return lambda p, own_routing: TorchRun(p, layer, gate if own_routing else None)


os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take most of the device's memory
START = {  # name: (p, own_routing) -> a run
    "dense": torch_runs(dense),
    "loop": torch_runs(loop),
    "grouped_mm": torch_runs(grouped_mm),
    "transformers-eager": torch_runs(transformers_eager, transformers_gate),
    "transformers-grouped_mm": torch_runs(transformers_grouped_mm, transformers_gate),
    "scattermoe": torch_runs(scattermoe),
    "cumoe": lambda p, own_routing: CumoeRun(p, cumoe_experts, own_routing),
    "ragged_dot": JaxRun,
}
