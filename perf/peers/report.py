"""What has been measured, as JSON and as Markdown tables. report.py FILE prints those of a JSON file."""

import json
import os
import sys


def name_of(row):
    """As plan.Cell writes itself."""
    return f"{row['shape']}, {row['activation']}, {row['routing']} routing, {row['contestant']}"


def write_json(path, results):
    """Whole or not at all: a run that is cut off must not leave half a file."""
    if not path:
        return
    with open(path + ".new", "w", encoding="utf-8") as file:
        json.dump(results, file, indent=1)
        file.write("\n")
    os.replace(path + ".new", path)


def print_tables(results):
    device = results["device"]
    print(", ".join(str(fact) for fact in (device["name"], *(f"{k} {v}" for k, v in results["versions"].items()))))
    groups = {}
    for row in results["rows"]:
        stage = row["contestant"] == "stages"
        title = "single stages" if stage else f"{row['activation']}, {row['routing']} routing"
        groups.setdefault(f"{title}, {row['dtype']}", []).append(row)
    for title, rows in groups.items():
        print(f"\n### {title}\n")
        print_stages(rows) if title.startswith("single") else print_layers(rows)
    if results["not_measured"]:
        print("\nNot measured:\n")
        for cell, why in results["not_measured"].items():
            print(f"- {cell}: {why}")


def spread(row):
    return f"{row['ms']:.4g} ({row['ms_min']:.4g}..{row['ms_max']:.4g})"


def print_stages(rows):
    print("| shape | stage | ms | TFLOP/s | GB/s | error |")
    print("|---|---|---:|---:|---:|---:|")
    for row in rows:
        rate = f"{row['tflops']:.4g}" if row["tflops"] else ""
        name, gbps, error = row["part"], row["gbps"], row["error"]
        print(f"| {row['shape']} | {name} | {spread(row)} | {rate} | {gbps:.4g} | {error:.1g} |")


def print_layers(rows):
    print("| shape | contestant | forward ms | TFLOP/s | backward ms | TFLOP/s "
          "| both TFLOP/s | GB/s | GiB more | error |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    by_cell = {}
    for row in rows:
        by_cell.setdefault(name_of(row), {})[row["part"]] = row
    for parts in by_cell.values():
        forward, backward, both = (parts[name] for name in ("forward", "backward", "forward + backward"))
        memory = both.get("peak_extra_bytes")
        print(f"| {both['shape']} | {both['contestant']} | {spread(forward)} | {forward['tflops']:.4g} "
              f"| {spread(backward)} | {backward['tflops']:.4g} | {both['tflops']:.4g} | {both['gbps']:.4g} "
              f"| {'' if memory is None else f'{memory / 2**30:.3g}'} | {both['error']:.1g} |")


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as written:
        print_tables(json.load(written))
