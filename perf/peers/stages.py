"""Single stages of the layer as PyTorch does them, each alone: what a kernel of ours is compared with."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

import contestants
from layer import gate_error, relative_error


@dataclass
class Stage:
    name: str
    run: Callable  # puts the work on the device and returns its result
    error: Callable  # of that result, against float64
    bytes: int  # every operand read and every result written once
    flops: int = 0


def movement_stages(p):
    T, H, E, K = p.shape.T, p.shape.H, p.shape.E, p.shape.K
    x, w_gate, weight = p.x.detach(), p.w_gate.detach(), p.weight.detach()
    order, _ = contestants.sort_by_expert(p, p.index)
    token, place = order // K, order.argsort()  # [T K]: token of a row; row of a choice
    rows = x[token]  # [T K, H]
    logits = (x @ w_gate.T).float()  # [T, E]
    row = H * x.element_size()

    def sort_error(result):
        by_rows = p.index.reshape(-1)[result[0]]
        ends = torch.bincount(p.index.reshape(-1), minlength=E).cumsum(0)
        return 0.0 if (by_rows.diff() >= 0).all() and torch.equal(result[1].long(), ends) else float("inf")

    def topk_error(result):
        return relative_error(result[0], logits.double().sort(dim=1, descending=True)[0][:, :K])

    def gather_error(got):
        return relative_error(got[:256], x[token[:256]].double())

    def combine_error(y):
        return relative_error(y[:256], (rows[place].view(T, K, H)[:256].double() * weight[:256, :, None]).sum(1))

    def combine_by_index_add():
        return contestants.combine(x, token, rows * weight.reshape(-1)[order, None])

    def combine_by_sum():
        return (rows[place].view(T, K, H) * weight[:, :, None]).sum(1)

    gate = Stage("gate", lambda: contestants.torch_gate(p, x, w_gate), lambda result: gate_error(p, *result),
                 row * (T + E) + 12 * T * K, 2 * T * H * E)
    return [
        gate,
        Stage("topk", lambda: torch.topk(logits, K), topk_error, 4 * T * E + 12 * T * K),
        Stage("sort", lambda: contestants.sort_by_expert(p, p.index), sort_error, 16 * T * K),
        Stage("gather", lambda: x.index_select(0, token), gather_error, 2 * T * K * row),
        Stage("combine by index_add", combine_by_index_add, combine_error, (T * K + T) * row),
        Stage("combine by gather and sum", combine_by_sum, combine_error, (T * K + T) * row),
    ]


def product_stages(p, which):
    """The products of w_up or w_down on rows that are in order already."""
    E, rows = p.shape.E, p.shape.T * p.shape.K
    w = {"up": p.w_up, "down": p.w_down}[which].detach()  # [E, n, k]
    n, k = w.shape[1:]
    a, d = (torch.empty(rows, width, dtype=w.dtype, device=w.device).normal_() for width in (k, n))
    _, offsets = contestants.sort_by_expert(p, p.index)
    busiest = int(offsets.diff(prepend=offsets.new_zeros(1)).argmax())
    its = slice(int(offsets[busiest - 1]) if busiest else 0, int(offsets[busiest]))

    def stage(name, run, part, left, right, matrices=E):
        """part of the result is the product of left and right."""

        def error(result):
            return relative_error(result[part], left.double() @ right.double())

        moved = (rows * (n + k) + matrices * n * k) * w.element_size()
        return Stage(f"{which}: {name}", run, error, moved, 2 * rows * n * k)

    grouped = contestants.torch_grouped_mm
    stages = [
        stage("grouped_mm", lambda: grouped(a, w.transpose(1, 2), offsets), its, a[its], w[busiest].T),
        stage("grouped_mm, gradient of rows", lambda: grouped(d, w, offsets), its, d[its], w[busiest]),
        stage("grouped_mm, gradient of matrices", lambda: grouped(d.T, a, offsets), busiest, d[its].T, a[its]),
        stage("one matrix for all rows", lambda: a @ w[0].T, slice(256), a[:256], w[0].T, 1),
    ]
    if rows % E == 0:
        equal = a.view(E, -1, k)
        stages.append(stage("bmm, equal groups", lambda: torch.bmm(equal, w.transpose(1, 2)), 0, equal[0], w[0].T))
    return stages


def stages_of(p):
    """One list after the other, so that only one list's tensors are held."""
    yield from movement_stages(p)
    yield from product_stages(p, "up")
    yield from product_stages(p, "down")
