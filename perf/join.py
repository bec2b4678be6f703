#!/usr/bin/env python3
"""Puts what cumoe-perf and peers.py have measured in one run, on the same shapes, into one table.

FOLDER is what perf/bench.sh has written: make bench leaves build/bench. README.md explains the columns.
"""

import argparse
import pathlib
import sys

import results

PARTS = ("forward", "forward + backward")
PICTURES = {"layer": "Time of the layer against the number of tokens", "capacity": "Time per token against experts",
            "stages": "Where the time of a layer goes", "roofline": "Stages against what the machine gives"}


def ratio(row, name):
    """Ours over a yardstick of the same rounds."""
    if row.get(name) is None:
        return "-"
    return f"{row[name]:.2f} ({row[name + '_min']:.2f}..{row[name + '_max']:.2f})"


def sizes_of(row):
    return (row["T"], row["H"], row["I"], row["E"], row["K"], row["dtype"], row["activation"])


def beside_peers(run):
    """{sizes and part: {contestant: its time over that of cumoe}} of the peers, all with the same routing."""
    found = {}
    for row in run.get("peers", {"rows": []})["rows"]:
        if row["contestant"] != "stages" and results.routing_of(row) == "given":
            found.setdefault((*sizes_of(row), row["part"]), {})[row["contestant"]] = row["ms"]
    for row in run.get("given", {"rows": []})["rows"]:  # where cumoe is not installed for PyTorch
        if row["contestant"] == "cumoe":
            found.setdefault((*sizes_of(row), row["part"]), {}).setdefault("cumoe", row["ms"])
    return {key: {name: ms / times["cumoe"] for name, ms in times.items() if name not in ("cumoe", "dense")}
            for key, times in found.items() if "cumoe" in times}


def layer_rows(run):
    return [row for name in ("layer", "types") for row in run.get(name, {"rows": []})["rows"]
            if row["contestant"] == "cumoe" and row["part"] in PARTS]


def unit_of(rows):
    return ("TFLOP/s", 1) if max((row["tflops"] for row in rows), default=1) >= 1 else ("GFLOP/s", 1000)


def layer_table(run):
    rows, peers = layer_rows(run), beside_peers(run)
    names = list(dict.fromkeys(name for times in peers.values() for name in times))
    titles = {"loop": "loop in PyTorch"}
    unit, factor = unit_of(rows)
    yield (f"| type | experts | T | pass | {unit} | of floor | of dense | of loop | "
           + "".join(f"of {titles.get(name, name)} | " for name in names)).rstrip()
    yield "|---|---|---:|---|---:|---:|---:|---:|" + "---:|" * len(names)
    seen = set()
    for row in rows:
        if results.what(row) in seen:
            continue
        seen.add(results.what(row))
        beside = peers.get((*sizes_of(row), row["part"]), {})
        floor = f"{row['of_floor']:.2f}" if row.get("of_floor") else "-"
        cells = [row["dtype"], row["activation"], row["T"], row["part"], f"{row['tflops'] * factor:.4g}", floor,
                 ratio(row, "of_dense"), ratio(row, "of_loop")]
        cells += [f"{beside[name]:.2f}" if name in beside else "-" for name in names]
        yield "| " + " | ".join(map(str, cells)) + " |"


def capacity_table(run):
    yield "| E | gate | ns / token | floor | of floor | of dense |"
    yield "|---:|---|---:|---:|---:|---:|"
    for row in run["capacity"]["rows"]:
        if row["contestant"] == "cumoe" and row["part"] == "forward":
            time, floor = (1e6 * row.get(key, 0) / row["T"] for key in ("ms", "floor_ms"))
            yield f"| {row['E']} | {row['gate']} | {time:.4g} | {floor:.4g} | {floor / time:.2f} | {ratio(row, 'of_dense')} |"
    for about, why in run["capacity"]["not_measured"].items():
        yield f"\nNot measured: {about}: {why}"


def exchange_table(run):
    yield "| ranks | T of each | pass | ms | exchange | experts | rest | MB sent by a rank | busbw, GB/s | of link |"
    yield "|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|"
    for row in run["exchange"]["rows"]:
        if row["part"] not in PARTS:
            continue
        shares = " | ".join(f"{row[key] / row['ms']:.1%}" for key in ("exchange_ms", "experts_ms", "rest_ms"))
        sent = 1e-6 * (row["dispatch_to_others"] + row["return_to_others"])
        busbw = f"{row['busbw']:.3g}" if row["busbw"] > 0 else "-"
        of_link = f"{row['of_link']:.2f}" if row.get("of_link") else "-"
        yield f"| {row['ranks']} | {row['T']} | {row['part']} | {row['ms']:.4g} | {shares} | {sent:.4g} | {busbw} | {of_link} |"


def facts(run):
    first = next(iter(run.values()))
    row = first["rows"][0]
    yield f"{results.device_of(first)}; cumoe {first['cumoe']}, {first['commit'][:12]}, {first['date'][:10]}; {first['blas']}"
    yield ""
    yield f"H = {row['H']}, I = {row['I']}, E = {row['E']}, K = {row['K']}, {row['gate']} gate, in training"
    if "peers" in run:
        versions = ", ".join(f"{name} {version}" for name, version in run["peers"]["versions"].items())
        yield f"\nBeside, with a given routing: {versions}"


def lines(folder):
    run = results.load(folder)
    if not layer_rows(run):
        raise results.Bad(f"{folder}: has no layer that was measured")
    yield from facts(run)
    yield ""
    yield from layer_table(run)
    if "capacity" in run:
        row = run["capacity"]["rows"][0]
        yield f"\nMore experts, as many operations: H = {row['H']}, I = {row['I']}, K = {row['K']}, T = {row['T']}\n"
        yield from capacity_table(run)
    if "exchange" in run and run["exchange"]["rows"]:
        row = run["exchange"]["rows"][0]
        ranks = "threads of one process" if row["transport"] == "local" else f"over {row['transport']}"
        yield f"\nRanks, {ranks}: H = {row['H']}, I = {row['I']}, E = {row['E']}, K = {row['K']}, {row['dtype']}, {row['activation']}\n"
        yield from exchange_table(run)
    for name, title in PICTURES.items():
        if (pathlib.Path(folder) / f"{name}.svg").exists():
            yield f"\n![{title}]({name}.svg)"


def gpus(folder):
    """A line for each folder with results of a GPU."""
    found = False
    for path in sorted(pathlib.Path(folder).glob("*/layer.json")):
        run = {"layer": results.load_file(path)}
        if run["layer"]["backend"] != "cuda":
            continue
        rows = [row for row in layer_rows(run) if row.get("of_dense")]
        best = {part: max((row for row in rows if row["part"] == part), key=lambda row: row["T"]) for part in PARTS if rows}
        reached = ", ".join(f"{part} {row['of_dense']:.2f} of dense" for part, row in best.items())
        yield f"- {results.device_of(run['layer'])}: {reached or 'without dense products beside it'}: `{path.with_name('joined.md')}`"
        found = True
    if not found:
        yield "On a GPU: not measured yet. `perf/gpu.sh` and `make bench` do it; what is expected stands in perf/notes.md."


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="with layer.json, peers.json and the others")
    parser.add_argument("--check", action="store_true", help="say whether joined.md and the pictures are of these files")
    parser.add_argument("--gpus", action="store_true", help="FOLDER is perf/results: what is known of GPUs, for README.md")
    args = parser.parse_args()
    if args.gpus:
        print(*gpus(args.folder), sep="\n")
        return 0
    text = "\n".join(lines(args.folder)) + "\n"
    if not args.check:
        sys.stdout.write(text)
        return 0
    from plot import stale_pictures

    path = pathlib.Path(args.folder) / "joined.md"
    stale = [] if path.exists() and path.read_text(encoding="utf-8") == text else [path]
    stale += stale_pictures(args.folder)
    for file in stale:
        print(f"{file}: is not of the results beside it: perf/record.sh --all")
    return 1 if stale else 0


if __name__ == "__main__":
    results.main(main)
