"""The layer that all contestants compute: its tensors, and what it is in float64.

    z    = x[t] w_up[e]^T,  hidden = act(z)       w_up [E, U, H]: U = 2 I with SwiGLU, glu first; U = I with ReLU
    y[t] = sum over k of weight[t, k] * (hidden w_down[e]^T),  e = index[t, k]
"""

import torch
import torch.nn.functional as F

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
# Of a result, relative to its norm: some roundings of the type, K of them where sums are made in the type itself.
TOLERANCE = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9, torch.float32: 1e-5}


class Problem:
    """The tensors of one shape. Values are normal random numbers, in matrices scaled to keep the variance."""

    def __init__(self, shape, activation, dtype, device):
        self.shape, self.activation = shape, activation
        T, H, I, E, K = shape.T, shape.H, shape.I, shape.E, shape.K  # noqa: E741
        generator = torch.Generator(device).manual_seed(1)

        def normal(*sizes):
            return torch.empty(sizes, dtype=dtype, device=device).normal_(generator=generator)

        self.x = normal(T, H)
        self.dy = normal(T, H)
        self.w_gate = normal(E, H).mul_(H**-0.5)
        self.w_up = normal(E, 2 * I if activation == "swiglu" else I, H).mul_(H**-0.5)
        self.w_down = normal(E, H, I).mul_(I**-0.5)
        values, self.index = torch.topk(self.x.float() @ self.w_gate.float().T, K)  # [T, K] each
        self.weight = values.softmax(-1).to(dtype)
        for tensor in (self.x, self.w_gate, self.w_up, self.w_down, self.weight):
            tensor.requires_grad_()

    def act(self, z):
        if self.activation == "relu":
            return F.relu(z)
        glu, up = z.chunk(2, dim=-1)
        return F.silu(glu) * up

    def dense_routing(self):
        """All tokens to the experts 0..K-1, with weight 1: a dense layer."""
        index = torch.arange(self.shape.K, device=self.x.device).expand(self.shape.T, -1).contiguous()
        return index, torch.ones_like(self.weight)

    def work(self):
        """Of each pass the useful operations, and the least of bytes: operands read and results written once."""
        flops = 2 * self.shape.T * self.shape.K * self.shape.H * (self.w_up.shape[1] + self.shape.I)
        size = self.x.element_size()
        matrices, tokens = (self.w_up.numel() + self.w_down.numel()) * size, self.x.numel() * size
        return {"forward": (flops, matrices + 2 * tokens), "backward": (2 * flops, 2 * matrices + 3 * tokens)}


class Statement:
    """The layer in float64 under a given routing: for a sample of tokens y and the gradients of their rows, for the
    busiest and the idlest expert the gradients of the matrices. Small shapes are taken whole."""

    def __init__(self, p, index, weight):
        self.p, self.index, self.weight = p, index, weight.detach()
        sample = torch.randperm(p.shape.T, generator=torch.Generator().manual_seed(2))[:256]
        by_rows = torch.bincount(index.reshape(-1), minlength=p.shape.E).argsort().tolist()
        self.tokens = sample.to(index.device)
        self.experts = by_rows if p.shape.E <= 32 else [by_rows[0], by_rows[-1]]
        self.want = {**self._rows(), **self._matrices()}

    def _expert(self, e, tokens, choices, names):
        """What expert e adds to y for tokens that chose it, and the gradients of the named operands."""
        p = self.p
        operands = dict(x=p.x[tokens], weight=self.weight[tokens, choices], w_up=p.w_up[e], w_down=p.w_down[e])
        operands = {name: t.detach().double().requires_grad_(name in names) for name, t in operands.items()}
        hidden = p.act(operands["x"] @ operands["w_up"].T)
        y = operands["weight"][:, None] * (hidden @ operands["w_down"].T)
        return y.detach(), torch.autograd.grad(y, [operands[name] for name in names], p.dy[tokens].double())

    def _rows(self):
        index = self.index[self.tokens]  # [sample, K]
        y, dx = (torch.zeros(len(index), self.p.shape.H, dtype=torch.double, device=index.device) for _ in range(2))
        dweight = torch.zeros(index.shape, dtype=torch.double, device=index.device)
        for e in index.unique().tolist():
            t, k = torch.where(index == e)
            added, (dx_rows, dweight[t, k]) = self._expert(e, self.tokens[t], k, ("x", "weight"))
            y.index_add_(0, t, added)
            dx.index_add_(0, t, dx_rows)
        return {"y": y, "dx": dx, "dweight": dweight}

    def _matrices(self):
        gradients = [self._expert(e, *torch.where(self.index == e), ("w_up", "w_down"))[1] for e in self.experts]
        dw_up, dw_down = (torch.stack(each) for each in zip(*gradients))
        return {"dw_up": dw_up, "dw_down": dw_down}

    def error(self, results):
        """The largest relative error of results, a dict of some of y, dx, dweight, dw_up and dw_down."""
        rows = {"dw_up": self.experts, "dw_down": self.experts}
        return max(relative_error(t[rows.get(name, self.tokens)], self.want[name]) for name, t in results.items())


def relative_error(got, want):
    """Infinite where NaN or Inf is in it."""
    error = ((got.detach().double() - want).norm() / want.norm().clamp_min(1e-300)).item()
    return error if error == error else float("inf")


def gate_error(p, index, weight):
    """How far, in float64, the least chosen logit is below the K-th largest one, or a weight is from the softmax of
    the chosen ones. Rounded logits may choose otherwise among near equals."""
    logits = p.x.detach().double() @ p.w_gate.detach().double().T
    chosen = logits.gather(1, index)
    missed = (logits.topk(p.shape.K)[0][:, -1:] - chosen).max()
    repeated = (index.sort(dim=1)[0].diff(dim=1) == 0).any()
    off = (weight.double() - chosen.softmax(-1)).abs().max()
    return float("inf") if repeated else max(missed.item(), off.item())
