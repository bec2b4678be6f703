#!/usr/bin/env python3
"""What a call of cumoe through PyTorch costs on the host, over the same call of the C interface.

One token and the smallest experts, on the CPU with one thread, so that computing takes next to nothing: the least of
many means, in microseconds. Needs PyTorch, cumoe (pip install ./torch) and a C compiler.
"""

import argparse
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile
import time

GOAL = 15  # us over the C interface, forward without gradients
HERE = pathlib.Path(__file__).resolve().parent


def in_c(cumoe):
    """Forward, forward with saved and backward of call.c, linked with the library that PyTorch's operators use."""
    folder = pathlib.Path(cumoe.__file__).parent
    library = next(folder.glob("libcumoe.so.*"))
    with tempfile.TemporaryDirectory() as work:
        compiler = shlex.split(os.environ.get("CC", "cc"))
        subprocess.run([*compiler, "-O2", "-std=gnu17", "-I", HERE.parents[1] / "include", HERE / "call.c", "-o",
                        f"{work}/call", library, f"-Wl,-rpath,{folder}"], check=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        words = subprocess.run([f"{work}/call"], check=True, capture_output=True, text=True, env=environment).stdout
    return [float(word) for word in words.split()]


def in_python(function, calls=2000, repetitions=10):
    for _ in range(200):
        function()
    least = float("inf")
    for _ in range(repetitions):
        begin = time.perf_counter()
        for _ in range(calls):
            function()
        least = min(least, (time.perf_counter() - begin) / calls * 1e6)
    return least


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    try:
        import cumoe
        import torch
    except ImportError as error:
        print(f"skipped: {error}")
        return 77
    torch.set_num_threads(1)
    forward_c, keeping_c, backward_c = in_c(cumoe)
    experts = cumoe.Experts(16, 16, 4, activation="swiglu")
    moe = cumoe.MoE(16, 16, 4, 2, gate="softmax_topk", activation="swiglu").eval()
    x, index, weight = torch.randn(1, 16), torch.randint(0, 4, (1, 2)), torch.rand(1, 2)
    arrays = [p.detach() for p in (experts.w_up, experts.w_down, experts.w_glu)]
    kind = dict(w_glu=arrays[2], activation="swiglu")
    linear = torch.nn.Linear(16, 16)

    with torch.no_grad():
        rows = [("functional.experts", in_python(lambda: cumoe.functional.experts(x, index, weight, *arrays[:2], **kind))),
                ("Experts", in_python(lambda: experts(x, index, weight))),
                ("MoE, softmax_topk", in_python(lambda: moe(x))),
                ("torch.nn.Linear, to compare", in_python(lambda: linear(x)))]
    x.requires_grad_()
    weight.requires_grad_()
    inputs, dy = [x, weight, *experts.parameters()], torch.randn(1, 16)
    with_graph = in_python(lambda: experts(x, index, weight))
    both = in_python(lambda: torch.autograd.grad(experts(x, index, weight), inputs, dy))

    print(f"PyTorch {torch.__version__}, cumoe {cumoe.__version__}, 1 token, 1 thread, us a call\n")
    print("| call | us | over the C interface |\n|---|---:|---:|")
    print(f"| cumoe_layer_forward() | {forward_c:.1f} | |\n| cumoe_layer_forward(), saved | {keeping_c:.1f} | |")
    print(f"| cumoe_layer_backward() | {backward_c:.1f} | |")
    for name, us in rows:
        over = "" if "Linear" in name or "MoE" in name else f"{us - forward_c:.1f}"
        print(f"| {name} | {us:.1f} | {over} |")
    print(f"| Experts, for gradients | {with_graph:.1f} | {with_graph - keeping_c:.1f} |")
    print(f"| Experts, with all gradients | {both:.1f} | {both - keeping_c - backward_c:.1f} |")
    print(f"\nThe goal is {GOAL} us over the C interface for a forward call without gradients: "
          f"{'reached' if rows[0][1] - forward_c < GOAL else 'not reached'} by functional.experts, "
          f"{'reached' if rows[1][1] - forward_c < GOAL else 'not reached'} by the module.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
