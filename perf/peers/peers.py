#!/usr/bin/env python3
"""Measures the MoE layer of other libraries: torch, transformers, JAX, ScatterMoE.

README.md beside it explains the columns.

Each contestant is checked against the layer in float64 before its time is taken. What is missing, does not fit or
finds no time left is named, and the run goes on. Exit status: 0; 1 a result was wrong or a contestant failed; 2 bad
usage; 77 nothing can run here.
"""

import argparse
import sys

from plan import ACTIVATIONS, ENTRIES, IN_FULL, ON_CPU, ROUTINGS, SHAPES, Shape, plan


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ", ".join(shape.name for shape in SHAPES + ON_CPU)
    names = [entry.contestant for entry in ENTRIES]
    parser.add_argument("--shapes", metavar="NAME,...", help=f"in full: {known}; or sizes T/H/I/E/K")
    parser.add_argument("--contestants", metavar="NAME,...", help=", ".join(names))
    parser.add_argument("--activation", choices=ACTIVATIONS, help="this one alone")
    parser.add_argument("--routing", choices=ROUTINGS, help="this one alone")
    parser.add_argument("--dtype", choices=("bf16", "f16", "f32"), help="bf16; on a CPU f32")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="cuda where there is one")
    parser.add_argument("--threads", type=int, help="of a CPU")
    parser.add_argument("--seconds", type=float, default=1.0, help="for the samples of one row (%(default)g)")
    parser.add_argument("--budget", type=float, default=360.0, help="seconds for all (%(default)g)")
    parser.add_argument("--json", metavar="FILE", help="write the rows there, anew after each contestant")
    parser.add_argument("--resume", action="store_true", help="keep what FILE has and go on behind it")
    parser.add_argument("--dry-run", action="store_true", help="say what would run, and what cannot")
    parser.add_argument("--list", action="store_true", help="the shapes and the contestants")
    args = parser.parse_args()

    def shape_of(name):
        sizes = name.split("/")
        if len(sizes) == 5 and all(size.isdecimal() and int(size) > 0 for size in sizes):
            shape = Shape(name, *map(int, sizes))
            if shape.K <= shape.E:
                return shape
            parser.error(f"shape '{name}': each token has {shape.K} experts, and there are {shape.E}")
        found = [shape for shape in SHAPES + ON_CPU if shape.name == name]
        return found[0] if found else parser.error(f"there is no shape '{name}'; there are {known}; or T/H/I/E/K")

    args.shapes = args.shapes and [shape_of(name) for name in args.shapes.split(",")]
    chosen = args.contestants.split(",") if args.contestants else names
    for name in chosen:
        if name not in names:
            parser.error(f"there is no contestant '{name}'; there are {', '.join(names)}")
    args.contestants = [entry for entry in ENTRIES if entry.contestant in chosen]
    if args.resume and not args.json:
        parser.error("--resume goes on with the file that --json names")
    if not (args.seconds > 0 and args.budget > 0 and (args.threads is None or args.threads > 0)):
        parser.error("--seconds, --budget and --threads must be above 0")
    return args


def cells_of(args, device):
    shapes = args.shapes or (SHAPES if device == "cuda" else ON_CPU)
    in_full = len(shapes) if args.shapes or device == "cpu" else IN_FULL
    activations = (args.activation,) if args.activation else ACTIVATIONS
    routings = (args.routing,) if args.routing else ROUTINGS
    return plan(shapes, in_full, args.contestants, activations, routings)


def print_list():
    print("shape                  T      H      I      E    K")
    for s in SHAPES + ON_CPU:
        print(f"{s.name:20}{s.T:6}{s.H:7}{s.I:7}{s.E:7}{s.K:5}")
    print("\ncontestants")
    for entry in ENTRIES:
        print(f"  {entry.contestant:24}{entry.absent(entry.device) or 'here'}")


def print_plan(args):
    device = args.device or "cuda"
    print(f"on {device}, {args.budget:g} s in all, {args.seconds:g} s of samples each; what finds no time is named")
    for cell in cells_of(args, device):
        print(f"  {cell}")
    for absent in filter(None, (entry.absent(device) for entry in args.contestants)):
        print(f"missing: {absent}")


def main():
    args = parse_arguments()
    if args.list or args.dry_run:
        return print_list() if args.list else print_plan(args)
    try:
        import torch
    except ImportError as error:
        print(f"skipped: torch cannot be imported: {error}")
        return 77
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        print("skipped: torch sees no CUDA device")
        return 77
    from runner import run  # what it imports needs torch

    return run(args, cells_of(args, device), device)


if __name__ == "__main__":
    sys.exit(main())
