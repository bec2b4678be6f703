"""Runs the plan: checks each contestant, takes its time, and keeps the results as they come."""

import importlib.metadata
import json
import os
import platform
import shlex
import sys
import time

import torch

import report
from contestants import START
from layer import DTYPES, TOLERANCE, Problem, Statement, gate_error
from measure import Clock, keep_freed_memory, peak_memory, samples
from stages import stages_of

PACKAGES = ("torch", "triton", "transformers", "jax", "scattermoe", "nvidia-cublas", "nvidia-cudnn-cu13")
NO_TIME = "no time left"
FORMAT = 2  # as in perf/results.py


def processor():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions():
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found


def device_facts(device):
    if device == "cpu":
        return {"name": processor(), "threads": torch.get_num_threads()}
    p = torch.cuda.get_device_properties(0)
    return {"name": p.name, "compute_capability": f"{p.major}.{p.minor}", "cuda": torch.version.cuda,
            "multiprocessors": p.multi_processor_count, "l2_bytes": p.L2_cache_size, "memory_bytes": p.total_memory}


def start_results(args, device):
    if args.resume and os.path.exists(args.json):
        with open(args.json, encoding="utf-8") as file:
            results = json.load(file)
        if results.get("format") != FORMAT:
            raise ValueError(f"has format {results.get('format')}, and this goes on with format {FORMAT}")
        kept = {name: why for name, why in results["not_measured"].items() if not why.startswith(NO_TIME)}
        return {**results, "not_measured": kept}
    return {"format": FORMAT, "program": "peers", "command": shlex.join(sys.argv), "date": time.strftime("%F %T UTC", time.gmtime()),
            "device": device_facts(device), "versions": versions(), "seconds_used": 0.0,
            "rows": [], "not_measured": {}}


class Wrong(Exception):
    """A result is."""


class Runner:
    """Measures cell after cell. One problem is kept for the cells that follow on the same shape and activation."""

    def __init__(self, args, device):
        self.device, self.seconds = device, args.seconds
        self.dtype_name = args.dtype or ("bf16" if device == "cuda" else "f32")
        self.key = self.problem = self.statement = None

    def prepare(self, cell):
        key = (cell.shape, cell.activation)
        if key != self.key:
            self.key = self.problem = self.statement = None  # free its memory before the next one takes some
            self.problem = Problem(*key, DTYPES[self.dtype_name], self.device)
            self.key = key
        return self.problem

    def measure(self, cell):
        """The rows of a cell."""
        p = self.prepare(cell)
        return self.stage_rows(cell, p) if cell.entry.contestant == "stages" else self.layer_rows(cell, p)

    def row(self, cell, which, error, times, flops, moved):
        s = cell.shape
        median = sorted(times)[len(times) // 2]
        return {"shape": s.name, "T": s.T, "H": s.H, "I": s.I, "E": s.E, "K": s.K, "dtype": self.dtype_name,
                "activation": cell.activation, "routing": cell.routing, "contestant": cell.entry.contestant,
                "part": which, "error": error, "samples": len(times),
                "ms": 1e3 * median, "ms_min": 1e3 * min(times), "ms_max": 1e3 * max(times),
                "tflops": flops / median / 1e12, "gbps": moved / median / 1e9}

    def stage_rows(self, cell, p):
        clock, rows = Clock(self.device), []
        for stage in stages_of(p):
            error = stage.error(stage.run())
            self.demand(error, stage.name)
            (times,) = samples(clock, [stage.run], self.seconds / 4)
            rows.append(self.row(cell, stage.name, error, times, stage.flops, stage.bytes))
        return rows

    def layer_rows(self, cell, p):
        run = START[cell.entry.contestant](p, cell.routing == "own")

        def both():
            run.forward()
            run.backward()

        both()
        error = self.error_of(cell, p, run.results(), run.routing)
        self.demand(error, cell.entry.contestant)
        clock = Clock(self.device, getattr(run, "wait", None))
        memory = peak_memory(both, self.device) if clock.events else None
        forward, backward = samples(clock, [run.forward, run.backward], self.seconds)
        work = p.work()
        work["forward + backward"] = tuple(map(sum, zip(*work.values())))
        both_times = [sum(pair) for pair in zip(forward, backward)]
        times = {"forward": forward, "backward": backward, "forward + backward": both_times}
        rows = [self.row(cell, which, error, times[which], *work[which]) for which in times]
        rows[-1]["peak_extra_bytes"] = memory
        return rows

    def error_of(self, cell, p, results, routing):
        if cell.entry.contestant == "dense":
            del results["dweight"]
            return Statement(p, *p.dense_routing()).error(results)
        if cell.routing == "given":
            self.statement = self.statement or Statement(p, p.index, p.weight)
            return self.statement.error(results)
        index, weight = routing
        self.demand(gate_error(p, index, weight.detach()), "gate")
        named = {name: results[name] for name in ("y", "dw_up", "dw_down")}  # the others pass through the gate
        return Statement(p, index, weight).error(named)

    def demand(self, error, what):
        limit = TOLERANCE[DTYPES[self.dtype_name]]
        if what == "gate":
            limit *= 4  # not relative to logits, which are up to 4
        if not error <= limit:
            raise Wrong(f"{what} is off by {error:.2g}, {limit:.2g} are allowed")


def measure_cell(runner, cell, results):
    try:
        results["rows"] += runner.measure(cell)
    except Wrong as error:
        results["not_measured"][str(cell)] = f"wrong: {error}"
    except Exception as error:  # whatever a contestant raises, the others shall be measured
        text = " ".join(str(error).split())[:200]
        no_room = isinstance(error, torch.OutOfMemoryError) or "RESOURCE_EXHAUSTED" in text
        kind = "out of memory" if no_room else "failed"
        results["not_measured"][str(cell)] = f"{kind}: {type(error).__name__}: {text}"


def run(args, cells, device):
    if device == "cpu":
        keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        results = start_results(args, device)
        report.write_json(args.json, results)
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"peers.py: --json {args.json}: {error}")
    runner, begin, before = Runner(args, device), time.monotonic(), results["seconds_used"]
    done = set(results["not_measured"]) | {report.name_of(row) for row in results["rows"]}
    for entry in args.contestants:
        if entry.absent(device):
            results["not_measured"][entry.contestant] = entry.absent(device)
    for cell in cells:
        if str(cell) in done or cell.entry.contestant in results["not_measured"]:
            continue
        if results["seconds_used"] > args.budget:
            results["not_measured"][str(cell)] = f"{NO_TIME} of {args.budget:g} s"
            continue
        print(f"{results['seconds_used']:6.1f} s  {cell}", file=sys.stderr, flush=True)
        measure_cell(runner, cell, results)
        results["seconds_used"] = before + time.monotonic() - begin
        report.write_json(args.json, results)
        if lost_device(device):
            if not args.json:
                sys.exit("the device is lost after an error; with --json the run would start again behind it")
            again = [] if args.resume else ["--resume"]
            os.execv(sys.executable, [sys.executable, *sys.argv, *again])
    report.write_json(args.json, results)
    report.print_tables(results)
    bad = [why for why in results["not_measured"].values() if why.startswith(("wrong", "failed"))]
    return 1 if bad else 0


def lost_device(device):
    """After an illegal access every later call of the process fails."""
    if device == "cuda":
        try:
            torch.cuda.empty_cache()  # leaves room for frameworks with memory of their own, too
            torch.cuda.synchronize()
        except RuntimeError:
            return True
    return False
