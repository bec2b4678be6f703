"""The layer against the float64 statement of the paper's formulas (reference.py), whose gradients are autograd's."""

import pytest
import torch

import cumoe
import reference
from cases import GATES, every_gate, make_moe
from cumoe import functional as F

T, H = 33, 10
SEED, OFFSET = 2**61 + 12345, 2**40 + 7
ARRAYS = cumoe.ops.ARRAYS
# Sums of gates and loads are fixed point in units of 2^-40; noise is float32, and its normals are ours to 1e-6.
CLOSE = dict(atol=1e-9, rtol=1e-9)
NOISY = dict(atol=3e-5, rtol=3e-5)


def run(moe, x, mask, training):
    """Ours and the reference's: results and gradients of a sum in which every output and loss has its own weight."""
    arrays = {name: getattr(moe, name) for name in ARRAYS if getattr(moe, name) is not None}
    torch.manual_seed(5)
    dy, dlosses = torch.randn(T, H, dtype=torch.float64), torch.rand(8, dtype=torch.float64)
    both = []
    for ours in True, False:
        leaves = {name: array.detach().clone().requires_grad_(name != "gate_bias") for name, array in arrays.items()}
        value = x.clone().requires_grad_()
        if ours:
            call = torch.tensor([SEED, OFFSET]) if moe.config.gate in cumoe.config.NOISY else None
            out = F.moe(value, moe.config, token_mask=mask, call=call, training=training, **leaves)
            sums = out.importance, out.load, out.expert_count.double()
        else:
            out = reference.moe(value, leaves, moe.config, training=training, seed=SEED, offset=OFFSET, token_mask=mask)
            sums = out.importance, out.load, out.expert_count.double()
        wanted = {"x": value} | {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        total = (out.y * dy).sum() + (out.losses * dlosses).sum()
        gradients = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
        results = dict(zip(("y", "losses", "importance", "load", "count"), (out.y, out.losses, *sums)))
        results |= {f"d{name}": torch.zeros_like(leaf) if gradient is None else gradient
                    for (name, leaf), gradient in zip(wanted.items(), gradients)}
        both.append({name: result.detach() for name, result in results.items()})
    return both


@every_gate
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_gate(gate, training, masked):
    moe = make_moe(gate, bias=True)
    if moe.gate_bias is not None:
        torch.nn.init.normal_(moe.gate_bias, std=0.3)
    torch.manual_seed(3)
    x = torch.randn(T, H, dtype=torch.float64)
    mask = torch.rand(T) < 0.7 if masked else None
    ours, theirs = run(moe, x, mask, training)
    assert torch.equal(ours["count"], theirs["count"])
    tolerance = NOISY if training and moe.config.gate in cumoe.config.NOISY else CLOSE
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], msg=lambda text: f"{name}: {text}", **tolerance)


KINDS = [(activation, glu) for activation in cumoe.config.ACTIVATIONS for glu in cumoe.config.PLACEMENTS
         if glu == "separate" or activation in cumoe.config.GLU]


@pytest.mark.parametrize("activation, glu", KINDS)
@pytest.mark.parametrize("bias", [False, True])
def test_experts(activation, glu, bias):
    options = dict(activation=activation, bias=bias, glu=glu, swiglu_limit=0.6, swiglu_alpha=1.3, swiglu_offset=0.4)
    torch.manual_seed(1)
    moe = cumoe.MoE(H, H if activation == "identity" else 12, 8, 2, gate="softmax_topk", dtype=torch.float64, **options)
    for name, parameter in moe.named_parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    ours, theirs = run(moe, torch.randn(T, H, dtype=torch.float64), None, True)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], msg=lambda text: f"{name}: {text}", **CLOSE)


@pytest.mark.parametrize("num_experts, top_k", [(1, 1), (7, 3), (30, 5), (9, 9)])
@pytest.mark.parametrize("gate", ["noisy_topk", "balanced", "sigmoid_topk", "softmax"])
def test_odd_sizes(gate, num_experts, top_k):
    torch.manual_seed(2)
    moe = cumoe.MoE(H, 13, num_experts, 0 if gate == "softmax" else top_k, gate=gate, activation="geglu", bias=True,
                    dtype=torch.float64)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    if gate == "balanced":
        torch.nn.init.uniform_(moe.thresholds, 0, 0.1)
    ours, theirs = run(moe, torch.randn(T, H, dtype=torch.float64), None, True)
    tolerance = NOISY if gate == "noisy_topk" else CLOSE
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], msg=lambda text: f"{name}: {text}", **tolerance)


@every_gate
def test_tokens_without_a_usable_logit(gate):
    """NaN in one token: its y is NaN, all others are as without it."""
    moe = make_moe(gate)
    torch.manual_seed(3)
    x = torch.randn(T, H, dtype=torch.float64)
    x[4] = float("nan")
    if gate == "balanced":
        moe.eval()
    ours, theirs = run(moe, x, None, False)
    torch.testing.assert_close(ours["y"], theirs["y"], equal_nan=True, **CLOSE)
    assert ours["y"][4].isnan().all() and torch.equal(ours["count"], theirs["count"])
