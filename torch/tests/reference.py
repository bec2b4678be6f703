"""The layer once more, from its formulas, in float64 PyTorch: what the extension is compared with.

Written from the paper (Shazeer et al. 2017, arXiv 1701.06538), the decisions in the design and the public headers
alone, without a look at the library. Everything is dense, every expert sees every token, and gradients come from
autograd: short enough to check by eye, and too slow for anything but tests. Discrete choices are made on detached
values; whatever they select stays differentiable.
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

IMPORTANCE, LOAD, SWITCH, Z, THRESHOLD, NUM_LOSSES = 0, 1, 2, 3, 4, 8  # types.h
FLAT, PRIMARY = 0, 1  # levels of the noise, philox.h
FLT_MIN = 2.0**-126
WORD = 0xFFFFFFFF


@dataclass
class Config:
    """The fields of config.h with its defaults, and the placement of glu; any object with these will do."""

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    activation: str = "relu"
    swiglu_limit: float = 7.0
    swiglu_alpha: float = 1.702
    swiglu_offset: float = 1.0
    gate: str = "noisy_topk"
    num_groups: int = 0
    top_k_groups: int = 0
    renormalize: bool = True
    noise_epsilon: float = 0.01
    noise_stream: int = 0
    max_rows: int = 0
    glu: str = "separate"


def single(value):
    """Numbers of the configuration are C floats, and float64 results show their rounding."""
    return float(np.float32(value))


# The noise: eps of eq. 4, a function of its name alone.


def philox(counter, key):
    """Philox4x32-10 (Salmon et al. 2011): four arrays of words in uint64, two integers -> four arrays of words."""
    a, b, c, d = counter
    key0, key1 = key
    for _ in range(10):
        p, q = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b, c, d = (q >> 32) ^ b ^ key0, q & WORD, (p >> 32) ^ d ^ key1, p & WORD
        key0, key1 = (key0 + 0x9E3779B9) & WORD, (key1 + 0xBB67AE85) & WORD
    return a, b, c, d


def noise(seed, stream, offset, tokens, level, count):
    """Standard normals [T, count] of experts 0..count-1 for these global token ids."""
    token = tokens.cpu().numpy().astype(np.uint64)[:, None]
    quad = np.arange((count + 3) // 4, dtype=np.uint64)[None, :]
    counter = (quad | level << 20 | (token >> 32 << 22) & WORD, token & WORD,  # quad 20 bits, level 2, token 42
               np.uint64(offset & WORD), np.uint64(offset >> 32 & WORD))
    words = philox(np.broadcast_arrays(*counter), (seed & WORD, (seed >> 32) + stream & WORD))
    normals = []
    for x, angle in (words[:2], words[2:]):  # Box and Muller: two words, two normals
        # u = (x/2 + 1/2) / 2^31, rounded to float as the library does it: close to 1 the radius would show it
        u = np.float32(np.float32(x >> 1) * np.float64(2.0**-31) + 2.0**-32)
        radius = np.sqrt(-2 * np.log(u.astype(np.float64)))
        turn = angle.astype(np.float64) * (2 * math.pi / 2**32)
        normals += [radius * np.cos(turn), radius * np.sin(turn)]
    return torch.from_numpy(np.stack(normals, 2).reshape(len(tokens), quad.size * 4)[:, :count].copy())


# Pieces of the gates.


def cv_squared(v):
    """(std / mean)^2, population variance, of eq. 7 and 11; 0 for a zero vector."""
    mean = v.mean()
    return ((v - mean) ** 2).mean() / mean**2 if mean != 0 else 0 * mean


def sanitize(logits):
    """-> the logits with 0 for the unusable ones, which are usable, and the tokens that NaN or +Inf left none."""
    usable = logits.isfinite()
    lost = ~usable.any(1) & (logits != -math.inf).any(1)
    return logits.masked_fill(~usable, 0), usable, lost


def largest(v, k, allowed, dim=1):
    """Mask of the k largest allowed entries, ties to the lowest index, and the order they were found in."""
    order = v.detach().masked_fill(~allowed, -math.inf).argsort(dim=dim, descending=True, stable=True)
    mask = torch.zeros_like(allowed).scatter(dim, order.narrow(dim, 0, min(k, order.shape[dim])), True)
    return mask & allowed, order


def normalize(v):
    """Rows over their sums; a row of zeros stays one."""
    total = v.sum(1, keepdim=True)
    return v / total.where(total != 0, 1)


def masked_softmax(v, mask):
    """Softmax over the entries in the mask, 0 elsewhere and in a row without any: Softmax(KeepTopK(v)), eq. 3, 5."""
    top = v.detach().masked_fill(~mask, -math.inf).amax(1, keepdim=True)
    top = top.where(top.isfinite(), 0)
    return normalize(torch.where(mask, v - top, 0).exp() * mask)


def noisy_top_k(x, w_gate, w_noise, normals, epsilon, k):
    """Eq. 3-5 and 8-9; normals = None: no noise. -> weight and chosen [T, n], probability P(x, i), lost [T]."""
    clean = x @ w_gate.T
    std = (torch.logaddexp(x @ w_noise.T, clean.new_zeros(())) + epsilon).clamp(min=FLT_MIN)  # softplus + epsilon
    if normals is None:
        std, normals = torch.ones_like(clean), torch.zeros_like(clean)
    noisy, usable, lost = sanitize(clean + normals * std)  # H, eq. 4
    clean, std = clean.masked_fill(~usable, 0), std.masked_fill(~usable, 1)
    chosen, order = largest(noisy, k, usable)
    weight = masked_softmax(noisy, chosen)
    if k == clean.shape[1]:  # nobody is left to compete with
        return SimpleNamespace(weight=weight, chosen=chosen, probability=usable.double(), lost=lost)

    # kth_excluding(H, k, i): the (k+1)-th largest for those chosen, the k-th for the others. A noisy logit of
    # another expert, with its gradient.
    rival = torch.where(chosen, order[:, k : k + 1], order[:, k - 1 : k])
    threshold, exists = noisy.gather(1, rival), usable.gather(1, rival)
    z = torch.where(exists, (clean - threshold) / std, 0)
    probability = torch.where(exists, 0.5 * torch.erfc(-z / math.sqrt(2)), 1) * usable  # no rival: P = 1
    return SimpleNamespace(weight=weight, chosen=chosen, probability=probability, lost=lost)


# The gates. Each sees the tokens that are no padding, [T, H], and says for them: weight and chosen [T, E], lost [T],
# and, where it has them, smooth load [E] and its own losses.


@dataclass
class Call:
    """What differs from one call to the next."""

    training: bool
    seed: int
    offset: int
    stream: int
    tokens: torch.Tensor  # global ids
    max_rows: int

    def draw(self, level, count):
        """The noise; None when not training."""
        return noise(self.seed, self.stream, self.offset, self.tokens, level, count) if self.training else None


def gate_noisy_topk(x, weights, config, call):
    normals, epsilon = call.draw(FLAT, config.num_experts), single(config.noise_epsilon)
    gate = noisy_top_k(x, weights["w_gate"], weights["w_noise"], normals, epsilon, config.top_k)
    if call.training:
        gate.load = gate.probability.sum(0)  # eq. 10
    return gate


def gate_hierarchical(x, weights, config, call):
    """App. B, eq. 12-14."""
    groups, size = config.num_groups, config.num_experts // config.num_groups
    inner_k, epsilon = config.top_k // config.top_k_groups, single(config.noise_epsilon)
    primary = noisy_top_k(x, weights["w_gate_primary"], weights["w_noise_primary"], call.draw(PRIMARY, groups),
                          epsilon, config.top_k_groups)
    room = (size + 3) // 4 * 4  # the noise of a group begins with four names of its own
    normals = call.draw(FLAT, groups * room)
    weight, chosen, load, lost = [], [], [], primary.lost
    for i in range(groups):
        own = slice(i * size, (i + 1) * size)
        inner = noisy_top_k(x, weights["w_gate"][own], weights["w_noise"][own],
                            normals[:, i * room : i * room + size] if call.training else None, epsilon, inner_k)
        member = primary.chosen[:, i : i + 1]  # X^(i)
        weight.append(primary.weight[:, i : i + 1] * inner.weight)  # eq. 12, 13
        chosen.append(member & inner.chosen)
        lost = lost | member[:, 0] & inner.lost
        inner_load = (inner.probability * member).sum(0)
        load.append(primary.probability[:, i].sum() * inner_load / member.sum().clamp(min=1))  # eq. 14
    gate = SimpleNamespace(weight=torch.cat(weight, 1), chosen=torch.cat(chosen, 1))
    gate.lost = lost & ~gate.chosen.any(1)
    if call.training:
        gate.load = torch.cat(load)
    return gate


def gate_softmax(x, weights, config, call):
    """Eq. 2."""
    logits, usable, lost = sanitize(x @ weights["w_gate"].T)
    return SimpleNamespace(weight=masked_softmax(logits, usable), chosen=usable, lost=lost)


def gate_balanced(x, weights, config, call):
    """App. F, eq. 15-20. The masks are constants."""
    logits, usable, lost = sanitize(x @ weights["w_gate"].T)
    g, thresholds = masked_softmax(logits, usable), weights["thresholds"]
    above = (g.detach() > thresholds.detach()) & usable  # eq. 19
    gate = SimpleNamespace(lost=lost)
    if call.training:
        m = max(1, config.top_k * len(x) // config.num_experts)
        gate.chosen, _ = largest(g, m, usable, dim=0)  # eq. 18
        excess = above.double() - gate.chosen.double()
        gate.losses = {THRESHOLD: (excess * (g.detach() - thresholds)).sum()}  # eq. 20
        none = g.new_full((1, g.shape[1]), math.inf)  # also where there are no tokens at all
        lowest = torch.cat([g.detach().masked_fill(~gate.chosen, math.inf), none]).amin(0)
        gate.batch_threshold = lowest.where(lowest.isfinite(), 0)
    else:  # of too many rows those with the lowest g are dropped
        kept, _ = largest(g.flatten(), call.max_rows, above.flatten(), dim=0)
        gate.chosen = kept.view_as(above)
    gate.weight = normalize(g * gate.chosen)  # eq. 16
    return gate


def auxiliary(logits, usable, share, chosen):
    """The Switch loss E sum_e f_e p_e, in which only p has a gradient, and the z-loss."""
    tokens, some = max(len(logits), 1), usable.any(1)
    f, p = chosen.to(share.dtype).sum(0) / tokens, share.sum(0) / tokens
    log_sum = logits[some].masked_fill(~usable[some], -math.inf).logsumexp(1)
    return {SWITCH: logits.shape[1] * (f * p).sum(), Z: (log_sum**2).sum() / tokens}


def gate_softmax_topk(x, weights, config, call):
    logits, usable, lost = sanitize(x @ weights["w_gate"].T)
    p = masked_softmax(logits, usable)
    chosen, _ = largest(logits, config.top_k, usable)  # in the order of p, without its rounding
    weight = masked_softmax(logits, chosen) if config.renormalize else p * chosen
    return SimpleNamespace(weight=weight, chosen=chosen, lost=lost, losses=auxiliary(logits, usable, p, chosen))


def gate_sigmoid_topk(x, weights, config, call):
    logits, usable, lost = sanitize(x @ weights["w_gate"].T)
    s, bias = logits.sigmoid() * usable, weights.get("gate_bias")
    chosen, _ = largest(s if bias is None else s + bias, config.top_k, usable)  # the bias selects, no more
    weight = s * chosen
    if config.renormalize:
        weight = weight / (weight.sum(1, keepdim=True) + 1e-20)
    losses = auxiliary(logits, usable, normalize(s), chosen)
    return SimpleNamespace(weight=weight, chosen=chosen, lost=lost, losses=losses)


def gate_external(x, index, index_weight, num_experts):
    """The caller's experts [T, K]: outside 0..E-1 is none, and one may come twice."""
    valid = (index >= 0) & (index < num_experts)
    place, zeros = index.clamp(0, num_experts - 1).long(), x.new_zeros(len(x), num_experts)
    rows = zeros.scatter_add(1, place, valid.to(x.dtype))
    weight = zeros.scatter_add(1, place, index_weight.to(x.dtype).masked_fill(~valid, 0))
    return SimpleNamespace(weight=weight, chosen=rows > 0, rows=rows, lost=torch.zeros(len(x), dtype=torch.bool))


GATES = {"noisy_topk": gate_noisy_topk, "softmax": gate_softmax, "hierarchical": gate_hierarchical,
         "balanced": gate_balanced, "softmax_topk": gate_softmax_topk, "sigmoid_topk": gate_sigmoid_topk}


def gates(x, weights, config, training, seed=0, offset=0, first_token=0, token_mask=None, index=None,
          index_weight=None):
    """What every token chose: weight and chosen [T, E]; lost [T], tokens that NaN or +Inf left without a usable
    logit; expert_count, importance and load [E]; losses [8], unweighted; batch_threshold [E] or None."""
    live = torch.arange(len(x)) if token_mask is None else token_mask.nonzero().flatten()
    if config.gate == "external":
        gate = gate_external(x[live], index[live], index_weight[live], config.num_experts)
        importance = x.new_zeros(config.num_experts)
    else:
        call = Call(training, seed, offset, config.noise_stream, first_token + live,
                    config.max_rows or len(x) * config.top_k)
        gate = GATES[config.gate](x[live], weights, config, call)
        importance = gate.weight.sum(0)  # eq. 6
    rows = getattr(gate, "rows", gate.chosen).sum(0)
    load = getattr(gate, "load", rows.to(x.dtype))  # rows carry no gradient

    losses = {IMPORTANCE: cv_squared(importance), LOAD: cv_squared(load), **getattr(gate, "losses", {})}  # eq. 7, 11
    none, nothing = x.new_zeros(len(x), config.num_experts), x.new_zeros(())
    return SimpleNamespace(
        weight=none.index_copy(0, live, gate.weight), chosen=none.bool().index_copy(0, live, gate.chosen),
        lost=torch.zeros(len(x), dtype=torch.bool).index_copy(0, live, gate.lost),
        expert_count=rows.long(), importance=importance, load=load,
        losses=torch.stack([losses.get(i, nothing) for i in range(NUM_LOSSES)]),
        batch_threshold=getattr(gate, "batch_threshold", None))


# The experts and the layer.


def split_glu(rows, placement):
    """[E, 2I, ...] -> glu and up halves, types.h."""
    if placement == "interleaved":
        return rows[:, 0::2], rows[:, 1::2]
    first, last = rows.chunk(2, 1)
    return (first, last) if placement == "first" else (last, first)


UNGATED = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "relu2": lambda z: F.relu(z) ** 2,
}


def experts(x, weights, activation, glu="separate", swiglu_limit=7.0, swiglu_alpha=1.702,
            swiglu_offset=1.0):
    """All experts on all tokens: [T, H] -> [T, E, H]. hidden = act(x w_up^T) or act(x w_glu^T) * (x w_up^T)."""
    def product(matrix, bias):
        z = torch.einsum("th,eih->tei", x, matrix)
        return z if bias is None else z + bias

    w_down, b_down = weights["w_down"], weights.get("b_down")
    if activation == "identity":
        return product(w_down, b_down)
    w_up, b_up = weights["w_up"], weights.get("b_up")
    if activation in UNGATED:
        hidden = UNGATED[activation](product(w_up, b_up))
    else:
        w_glu, b_glu = weights.get("w_glu"), weights.get("b_glu")
        if glu != "separate":
            w_glu, w_up = split_glu(w_up, glu)
            b_glu, b_up = (None, None) if b_up is None else split_glu(b_up, glu)
        g, u = product(w_glu, b_glu), product(w_up, b_up)
        if activation == "swiglu":
            hidden = F.silu(g) * u
        elif activation == "geglu":
            hidden = F.gelu(g) * u
        elif activation == "geglu_tanh":
            hidden = F.gelu(g, approximate="tanh") * u
        else:
            g, u = g.clamp(max=swiglu_limit), u.clamp(-swiglu_limit, swiglu_limit)
            hidden = g * torch.sigmoid(swiglu_alpha * g) * (u + swiglu_offset)
    y = torch.einsum("tei,ehi->teh", hidden, w_down)
    return y if b_down is None else y + b_down


def moe(x, weights, config, training=True, seed=0, offset=0, first_token=0, token_mask=None, index=None,
        index_weight=None):
    """The layer (eq. 1). Tensors on the CPU, of any floating type; weights by the names of weights.h, those the
    layer does not have missing or None. -> y [T, H] and what gates() says."""
    x = x.double()
    weights = {name: w.double() for name, w in weights.items() if w is not None}
    result = gates(x, weights, config, training, seed, offset, first_token, token_mask, index, index_weight)
    read = x.masked_fill(~result.chosen.any(1, keepdim=True), 0)  # padding may hold anything
    outputs = experts(read, weights, config.activation, config.glu, single(config.swiglu_limit),
                      single(config.swiglu_alpha), single(config.swiglu_offset))
    y = torch.einsum("te,teh->th", result.weight, outputs)
    result.y = y.masked_fill(result.lost[:, None], math.nan)
    return result
