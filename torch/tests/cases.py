"""What the tests share: every gate with a small layer, and equality within a type's rounding."""

import pytest
import torch

import cumoe

GATES = {
    "noisy_topk": dict(top_k=2),
    "noisy_topk_all": dict(gate="noisy_topk", top_k=8),
    "softmax": dict(top_k=0),
    "hierarchical": dict(top_k=4, num_groups=4, top_k_groups=2),
    "balanced": dict(top_k=2),
    "softmax_topk": dict(top_k=3),
    "softmax_topk_raw": dict(gate="softmax_topk", top_k=3, renormalize=False),
    "sigmoid_topk": dict(top_k=3),
}
every_gate = pytest.mark.parametrize("gate", GATES)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def make_moe(gate, dtype=torch.float64, hidden=10, inner=12, **options):
    """A layer whose gates have an opinion, with 8 experts."""
    kind = dict(gate=gate, activation="swiglu", loss_weights=dict.fromkeys(cumoe.config.LOSSES, 0.1)) | GATES[gate]
    torch.manual_seed(7)
    moe = cumoe.MoE(hidden, inner, 8, dtype=dtype, **kind | options)
    for name, parameter in moe.named_parameters():
        if parameter.dim() == 2 and name.startswith("w_"):
            torch.nn.init.normal_(parameter, std=0.5)
        if name.startswith("b_"):
            torch.nn.init.normal_(parameter)
    if moe.thresholds is not None:
        torch.nn.init.uniform_(moe.thresholds, 0.05, 0.2)
    return moe


def gradients(module):
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


def assert_same_bits(a, b):
    assert a.shape == b.shape and a.dtype == b.dtype
    assert torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))
