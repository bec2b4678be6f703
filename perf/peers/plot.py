#!/usr/bin/env python3
"""A picture of what peers.py --json has measured: useful operations a second, forward and backward together."""

import argparse
import json
import sys

# One colour for a contestant, whatever the picture; cumoe stands out.
COLOURS = {"dense": "#bbbbbb", "cumoe": "#c1272d", "loop": "#6baed6", "grouped_mm": "#3182bd",
           "transformers-eager": "#a1d99b", "transformers-grouped_mm": "#31a354", "scattermoe": "#9e7bb5",
           "ragged_dot": "#e6ab02"}


def bars(results, activation, routing):
    """{shape: {contestant: TFLOP/s}} in the order measured."""
    found = {}
    for row in results["rows"]:
        if (row["activation"], row["routing"], row["pass"]) == (activation, routing, "forward + backward"):
            found.setdefault(row["shape"], {})[row["contestant"]] = row["tflops"]
    return found


def draw(results, panels, path):
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "cumoe", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    tallest = max(sum(len(group) + 1 for group in panel.values()) for panel in panels.values())
    figure, axes = pyplot.subplots(rows, columns, figsize=(5.5 * columns, (0.7 + 0.19 * tallest) * rows), squeeze=False)
    most = max(tflops for panel in panels.values() for group in panel.values() for tflops in group.values())
    unit, factor = ("TFLOP/s", 1) if most >= 1 else ("GFLOP/s", 1000)
    for axis in axes.flat[len(panels):]:
        axis.set_visible(False)
    for axis, (title, panel) in zip(axes.flat, panels.items()):
        at, ticks = 0, []
        for shape, group in panel.items():
            ticks.append((at + (len(group) - 1) / 2, shape))
            for contestant, tflops in group.items():
                rate = tflops * factor
                axis.barh(at, rate, color=COLOURS.get(contestant, "#888888"))
                axis.text(rate, at, f" {contestant} {rate:.4g}", va="center", fontsize=7)
                at += 1
            at += 1
        axis.set_yticks([place for place, _ in ticks], [shape for _, shape in ticks])
        axis.invert_yaxis()
        axis.margins(x=0.35)
        axis.set_title(title)
        axis.set_xlabel(f"{unit}, forward and backward")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(results["device"]["name"])
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", help="of peers.py --json")
    parser.add_argument("picture", help="an SVG file to write")
    args = parser.parse_args()
    with open(args.json, encoding="utf-8") as file:
        results = json.load(file)
    kinds = dict.fromkeys((row["activation"], row["routing"]) for row in results["rows"])
    panels = {f"{activation}, {routing} routing": bars(results, activation, routing) for activation, routing in kinds}
    panels = {title: panel for title, panel in panels.items() if panel}
    if not panels:
        parser.error(f"{args.json} has no layer that was measured forward and backward")
    try:
        draw(results, panels, args.picture)
    except ImportError as error:
        print(f"skipped: matplotlib is missing ({error})")
        return 77
    return 0


if __name__ == "__main__":
    sys.exit(main())
