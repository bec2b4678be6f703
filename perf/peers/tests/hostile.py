"""peers.py with something that misbehaves in it, which HOSTILE in the environment names."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import contestants
import peers
import runner


def off_by_little(p, x, index, weight, w_up, w_down):
    return 1.01 * contestants.loop(p, x, index, weight, w_up, w_down)


def wrong_gradient(p, x, index, weight, w_up, w_down):
    return contestants.loop(p, x, index, weight.detach(), w_up, w_down) + 0 * weight.sum()


def unwritten(p, x, index, weight, w_up, w_down):
    y = contestants.loop(p, x, index, weight, w_up, w_down)
    return torch.where(torch.arange(len(y))[:, None] == 5, torch.nan, y)


def second_best(p, x, w_gate):
    values, index = torch.topk(x @ w_gate.T, p.shape.K + 1)
    return index[:, 1:], values[:, 1:].softmax(-1)


def too_large(p, x, index, weight, w_up, w_down):
    raise torch.OutOfMemoryError("tried to allocate 5 TiB")


def broken(p, x, index, weight, w_up, w_down):
    raise RuntimeError("no kernel\nfor this")


LAYERS = {"off": off_by_little, "gradient": wrong_gradient, "nan": unwritten, "memory": too_large, "broken": broken}
kind = os.environ["HOSTILE"]
if kind == "gate":
    contestants.START["grouped_mm"] = contestants.torch_runs(contestants.grouped_mm, second_best)
elif kind == "lost":  # the device, after the first contestant; the run starts again in a fresh process
    runner.lost_device = lambda device: "--resume" not in sys.argv
else:
    contestants.START["grouped_mm"] = contestants.torch_runs(LAYERS[kind])
sys.exit(peers.main())
