#!/usr/bin/env python3
"""Compares two runs, and a run with what it should reach.

OLD and NEW are files of cumoe-perf --json or peers.py --json, or folders of them. A row is slower if its median is
more than the threshold above that of OLD. Exit status: 0; 1 something is slower, or misses its target; 2 they
cannot be compared.
"""

import argparse
import json

import results


def threshold_of(text):
    try:
        number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        number = -1
    if not 0 <= number < 10:
        raise argparse.ArgumentTypeError(f"{text}: must be a share, 3% or 0.03")
    return number


def rows_of(run):
    """Ours alone, by what they are; a peer that got slower is no fault of ours."""
    return {(name, results.what(row)): row for name, data in run.items() for row in data["rows"]
            if row["contestant"] == "cumoe"}


def same_device(old, new):
    for name in old.keys() & new.keys():
        devices = [results.device_of(run[name]) for run in (old, new)]
        if devices[0] != devices[1]:
            raise results.Bad(f"{name or 'the files'}: the runs are from different devices, '{devices[0]}' and '{devices[1]}'")


def compare(old, new, threshold):
    """Prints what changed; the number of rows that are slower."""
    same_device(old, new)
    before, after = rows_of(old), rows_of(new)
    both = [key for key in after if key in before]
    if not both:
        raise results.Bad("the two runs have no row in common")
    changes = sorted((after[key]["ms"] / before[key]["ms"] - 1, *key[:1], results.name_of(after[key]), key) for key in both)
    changed = [change for change in changes if abs(change[0]) > threshold]
    print(f"{len(both)} rows in both runs; threshold {threshold:.1%}\n\n| row | old ms | new ms | |\n|---|---:|---:|---:|")
    for change, file, name, key in reversed(changed):
        print(f"| {file}{': ' if file else ''}{name} | {before[key]['ms']:.4g} | {after[key]['ms']:.4g} | "
              f"{'SLOWER' if change > 0 else 'faster'} by {abs(change):.1%} |")
    slower = sum(change[0] > 0 for change in changed)
    only = len(before.keys() ^ after.keys())
    print(f"\n{slower} slower, {len(changed) - slower} faster, {len(both) - len(changed)} as before"
          + (f"; {only} in one run alone" if only else ""))
    return slower


# ---- targets ----


def load_targets(path):
    try:
        with open(path, encoding="utf-8") as file:
            targets = json.load(file)["targets"]
        for target in targets:
            if not {"name", "where", "figure", "least"} <= target.keys():
                raise ValueError(f"{target}: a target has name, where, figure and least")
        return targets
    except OSError as error:
        raise results.Bad(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise results.Bad(f"{path}: is damaged: {error}") from error


def fits(value, wanted):
    """wanted: a value, a list of them, or {"least": number}."""
    if isinstance(wanted, dict):
        return value is not None and value >= wanted["least"]
    return value in wanted if isinstance(wanted, list) else value == wanted


def figures(run, target):
    """What a target is about: (T, figure) of every row that fits. Of a contestant of peers.py: its time over ours."""
    for data in run.values():
        facts = {"backend": data.get("backend") or ("cpu" if "threads" in data["device"] else "cuda")}
        rows = [row for row in data["rows"]
                if all(fits((facts | row).get(key), wanted) for key, wanted in target["where"].items())]
        ours = [row for row in rows if row["contestant"] == "cumoe"]
        for row in ours:
            value = row.get(target["figure"])
            theirs = {**row, "contestant": target["figure"].removeprefix("over ")}
            for other in rows:
                if target["figure"].startswith("over ") and results.what(other) == results.what(theirs):
                    value = other["ms"] / row["ms"]
            if value is not None:
                yield row["T"], value


def judge(run, targets):
    """Prints pass, miss or not measured for each target; the number of misses."""
    misses = 0
    print("| target | at least | reached | |\n|---|---:|---:|---|")
    for target in targets:
        found = sorted(figures(run, target), key=lambda pair: pair[1])
        if not found:
            print(f"| {target['name']} | {target['least']} | | not measured |")
            continue
        tokens, worst = found[0]
        passed = worst >= target["least"]
        misses += not passed
        where = f"{worst:.2f} at T = {tokens}" if len(found) > 1 else f"{worst:.2f}"
        print(f"| {target['name']} | {target['least']} | {where} | {'pass' if passed else 'miss'} |")
    return misses


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="OLD NEW; with --targets NEW alone will do")
    parser.add_argument("--threshold", type=threshold_of, default=0.03, help="3%% or 0.03 (the default)")
    parser.add_argument("--targets", metavar="FILE", help="perf/targets.json: what NEW should reach")
    args = parser.parse_args()
    if len(args.runs) > 2 or (len(args.runs) == 1 and not args.targets):
        parser.error("two runs are compared, OLD and NEW; one alone with --targets")
    runs = [results.load(path) for path in args.runs]
    bad = compare(*runs, args.threshold) if len(runs) == 2 else 0
    if args.targets:
        targets = load_targets(args.targets)
        if len(runs) == 2:
            print()
        bad += judge(runs[-1], targets)
    return 1 if bad else 0


if __name__ == "__main__":
    results.main(main)
