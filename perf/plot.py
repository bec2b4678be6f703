#!/usr/bin/env python3
"""Pictures (SVG) of the results in FOLDER, beside them: layer.svg, time of the layer against T for each contestant;
capacity.svg, time per token against E; stages.svg, where the time of a layer goes; roofline.svg, its stages against
what the device gives; peers.svg, rates of other libraries. Needs matplotlib: pip install matplotlib, or Debian's
python3-matplotlib.
"""

import argparse
import hashlib
import pathlib

import results

# One colour for a contestant, whatever the picture; cumoe stands out.
COLOURS = {"cumoe": "#c1272d", "dense": "#888888", "loop": "#6baed6", "grouped_mm": "#3182bd",
           "transformers-eager": "#a1d99b", "transformers-grouped_mm": "#31a354", "scattermoe": "#9e7bb5",
           "ragged_dot": "#e6ab02"}
SOURCES = {"layer": ("layer", "peers"), "capacity": ("capacity",), "stages": ("stages",), "roofline": ("stages",),
           "peers": ("peers",)}  # picture: the file it is drawn from, and others that may be there
MARK = "drawn from "


def mark_of(folder, picture):
    """What a picture says of its files, so that it can be told without drawing whether they are the same."""
    digest = hashlib.sha256()
    for path in (folder / f"{name}.json" for name in SOURCES[picture]):
        digest.update(path.read_bytes() if path.exists() else b"")
    return MARK + digest.hexdigest()[:16]


def stale_pictures(folder):
    folder = pathlib.Path(folder)
    for picture, sources in SOURCES.items():
        path = folder / f"{picture}.svg"
        drawable = (folder / f"{sources[0]}.json").exists()
        if path.exists() and not (drawable and mark_of(folder, picture) in path.read_text(encoding="utf-8")):
            yield path


def unit_of(rates):
    return ("TFLOP/s", 1) if max(rates) >= 1 else ("GFLOP/s", 1000)


def of_ours(data, part=None):
    return [row for row in data["rows"] if row["contestant"] == "cumoe" and part in (None, row["part"])]


# ---- layer ----


def draw_layer(pyplot, run):
    """Time of a token, so that a flat line is a rate that does not change. Dashed: the peers, with a given routing."""
    rows = run["layer"]["rows"]
    peers = [row for row in run.get("peers", {"rows": []})["rows"] if row["routing"] == "given" and row["contestant"] != "stages"]
    kinds = list(dict.fromkeys((row["activation"], part) for row in rows for part in ("forward", "forward + backward")))
    figure, axes = pyplot.subplots(1, len(kinds), figsize=(3.2 * len(kinds), 3.4), squeeze=False, sharey=True)
    sizes = [rows[0][letter] for letter in "HIEK"]
    for axis, (activation, part) in zip(axes.flat, kinds):
        for style, group, where in (("-", rows, ""), ("--", peers, ", PyTorch")):
            lines = {}
            for row in group:
                if (row["activation"], row["part"]) == (activation, part) and [row[letter] for letter in "HIEK"] == sizes:
                    lines.setdefault(row["contestant"], []).append((row["T"], 1e3 * row["ms"] / row["T"]))
            for contestant, points in sorted(lines.items()):
                axis.loglog(*zip(*sorted(points)), style, marker="o", markersize=3, color=COLOURS.get(contestant, "#bbbbbb"),
                            label=contestant + where)
        axis.set_title(f"{activation}, {part}")
        axis.set_xlabel("T, tokens in a call")
    axes.flat[0].set_ylabel("us / token")
    axes.flat[-1].legend(frameon=False, fontsize=7)
    return figure


# ---- capacity ----


def draw_capacity(pyplot, run):
    rows = sorted(of_ours(run["capacity"], "forward"), key=lambda row: row["E"])
    figure, axis = pyplot.subplots(figsize=(5.5, 3.4))
    experts = [row["E"] for row in rows]
    axis.loglog(experts, [1e6 * row["ms"] / row["T"] for row in rows], marker="o", color=COLOURS["cumoe"],
                label="cumoe, forward in training")
    floors = [(row["E"], 1e6 * row["floor_ms"] / row["T"]) for row in rows if row.get("floor_ms")]
    if floors:
        axis.loglog(*zip(*floors), linestyle="--", color=COLOURS["dense"], label="floor: bytes or operations")
    axis.set_xlabel("E, experts; as many operations for each token")
    axis.set_ylabel("ns / token")
    axis.set_ylim(bottom=0.5 * min(time for _, time in floors) if floors else None)
    axis.legend(frameon=False)
    return figure


# ---- stages ----


def is_stage(row):
    return row["part"] not in ("inference", "forward", "backward", "forward + backward", "optimizer")


def subjects_of(data):
    """{name: rows of one layer}"""
    found = {}
    for row in of_ours(data):
        found.setdefault(f"{row['shape']}, {row['dtype']}, T = {row['T']}", []).append(row)
    return found


def draw_stages(pyplot, run):
    """A bar for each layer: the stages one behind the other, as shares of their sum."""
    subjects = subjects_of(run["stages"])
    figure, axis = pyplot.subplots(figsize=(7.5, 1.3 + 0.4 * len(subjects)))
    parts = list(dict.fromkeys(row["part"] for rows in subjects.values() for row in rows if is_stage(row)))
    colour = dict(zip(parts, pyplot.get_cmap("tab10").colors))
    for name, rows in subjects.items():
        stages = {row["part"]: row["ms"] for row in rows if is_stage(row)}
        left, total = 0, sum(stages.values())
        for part, ms in stages.items():
            axis.barh(name, ms / total, left=left, color=colour[part], label=part)
            if ms / total > 0.06:
                axis.text(left + ms / total / 2, name, f"{ms / total:.0%}", ha="center", va="center", fontsize=7)
            left += ms / total
    handles = dict(zip(axis.get_legend_handles_labels()[1], axis.get_legend_handles_labels()[0]))
    axis.legend(handles.values(), handles, ncols=5, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), fontsize=7)
    axis.set_xlabel("share of the stages' time")
    axis.invert_yaxis()
    return figure


def draw_roofline(pyplot, run):
    """Work per byte against rate: under the lines of the measured peaks, a point for each stage."""
    peaks, rows = run["stages"]["peaks"], [row for row in of_ours(run["stages"]) if is_stage(row) and row["flop"]]
    if not rows or not peaks.get("gbps"):
        return None
    unit, factor = unit_of([row["tflops"] for row in rows])
    figure, axis = pyplot.subplots(figsize=(6.5, 4.2))
    intensities = [row["flop"] / row["bytes"] for row in rows]
    low, high = 0.5 * min(intensities), 2 * max(intensities)
    for dtype, peak in peaks.items():
        if dtype == "gbps":
            continue
        ridge = 1e3 * peak / peaks["gbps"]
        axis.loglog([low, ridge, max(high, 2 * ridge)], [peak * low / ridge * factor, peak * factor, peak * factor],
                    color=COLOURS["dense"], linewidth=1)
        axis.text(ridge, peak * factor, f" {dtype} {peak * factor:.3g}", va="bottom", fontsize=7)
    markers = dict(zip(subjects_of(run["stages"]), "osD^v<>*ph"))
    for name, marker in markers.items():
        for row in rows:
            if f"{row['shape']}, {row['dtype']}, T = {row['T']}" == name:
                at = row["flop"] / row["bytes"], row["tflops"] * factor
                axis.loglog(*at, marker=marker, color=COLOURS["cumoe"], markersize=4, linestyle="none")
                axis.annotate(row["part"], at, xytext=(4, -8), textcoords="offset points", fontsize=6)
    axis.set_xlabel(f"FLOP / byte; the slope is {peaks['gbps']:.3g} GB/s")
    axis.set_ylabel(unit)
    axis.set_title("; ".join(markers))
    return figure


# ---- peers ----


def bars(data, activation, routing):
    """{shape: {contestant: TFLOP/s}} in the order measured."""
    found = {}
    for row in data["rows"]:
        if (row["activation"], row["routing"], row["part"]) == (activation, routing, "forward + backward"):
            found.setdefault(row["shape"], {})[row["contestant"]] = row["tflops"]
    return found


def draw_peers(pyplot, run):
    data = run["peers"]
    kinds = dict.fromkeys((row["activation"], row["routing"]) for row in data["rows"])
    panels = {f"{activation}, {routing} routing": bars(data, activation, routing) for activation, routing in kinds}
    panels = {title: panel for title, panel in panels.items() if panel}
    if not panels:
        return None
    columns = min(2, len(panels))
    tallest = max(sum(len(group) + 1 for group in panel.values()) for panel in panels.values())
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(5.5 * columns, (0.7 + 0.19 * tallest) * rows), squeeze=False)
    unit, factor = unit_of([rate for panel in panels.values() for group in panel.values() for rate in group.values()])
    for axis in axes.flat[len(panels):]:
        axis.set_visible(False)
    for axis, (title, panel) in zip(axes.flat, panels.items()):
        at, ticks = 0, []
        for shape, group in panel.items():
            ticks.append((at + (len(group) - 1) / 2, shape))
            for contestant, tflops in group.items():
                rate = tflops * factor
                axis.barh(at, rate, color=COLOURS.get(contestant, "#bbbbbb"))
                axis.text(rate, at, f" {contestant} {rate:.4g}", va="center", fontsize=7)
                at += 1
            at += 1
        axis.set_yticks([place for place, _ in ticks], [shape for _, shape in ticks])
        axis.invert_yaxis()
        axis.margins(x=0.35)
        axis.set_title(title)
        axis.set_xlabel(f"{unit}, forward and backward")
    return figure


# ---- all of them ----

DRAW = {"layer": draw_layer, "capacity": draw_capacity, "stages": draw_stages, "roofline": draw_roofline,
        "peers": draw_peers}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="with layer.json, peers.json and the others")
    args = parser.parse_args()
    run = results.load(args.folder)
    try:
        import matplotlib
    except ImportError as error:
        print(f"no pictures: {error}; pip install matplotlib, or apt-get install python3-matplotlib")
        return 77
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "cumoe", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False,
                                "axes.spines.right": False})
    from matplotlib import pyplot

    for picture, draw in DRAW.items():
        figure = draw(pyplot, run) if SOURCES[picture][0] in run else None
        if figure:
            figure.suptitle(results.device_of(run[SOURCES[picture][0]]), fontsize=8)
            for axis in figure.axes:
                axis.minorticks_off()  # a third of the file
            figure.tight_layout()
            figure.savefig(args.folder / f"{picture}.svg", metadata={"Date": None, "Description": mark_of(args.folder, picture)})
            pyplot.close(figure)
    return 0


if __name__ == "__main__":
    results.main(main)
