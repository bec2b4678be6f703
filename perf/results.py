"""Files of results, as cumoe-perf --json and peers/peers.py --json write them. join.py, compare.py and plot.py read
them through this."""

import json
import pathlib
import sys

FORMAT = 2
PROGRAMS = ("cumoe-perf", "peers")
NAMES = ("layer", "given", "types", "stages", "capacity", "exchange", "peers")  # of the files that perf/bench.sh leaves in a folder
WHAT = ("shape", "T", "H", "I", "E", "K", "dtype", "activation", "gate", "routing", "skew", "cache", "launch",
        "transport", "ranks", "exchange_capacity", "exchange_chunks", "contestant", "part")  # together these name a row; some files lack some


class Bad(Exception):
    """A file or folder that cannot be used, as a sentence."""


def check(path, data):
    if not isinstance(data, dict) or "format" not in data or data.get("program") not in PROGRAMS:
        raise Bad(f"{path}: is not a file that cumoe-perf --json or peers.py --json has written")
    if data["format"] != FORMAT:
        raise Bad(f"{path}: has format {data['format']}, and this reads format {FORMAT}: measure again, or take the "
                  "scripts of that version")
    rows = data.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and {"T", "part", "ms"} <= row.keys() for row in rows):
        raise Bad(f"{path}: is damaged: rows without T, part or ms")
    return data


def load_file(path):
    try:
        with open(path, encoding="utf-8") as file:
            return check(path, json.load(file))
    except OSError as error:
        raise Bad(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise Bad(f"{path}: is damaged, or no JSON: {error}") from error


def load(path):
    """The results of a run by name, {"layer": ...}: of a folder those of NAMES that are there. A file has
    no name here, so that two of them have the same."""
    path = pathlib.Path(path)
    if not path.is_dir():
        return {"": load_file(path)}
    found = {name: load_file(path / f"{name}.json") for name in NAMES if (path / f"{name}.json").exists()}
    if not found:
        raise Bad(f"{path}: has none of {', '.join(name + '.json' for name in NAMES)}")
    return found


def device_of(data):
    """What figures depend on: those of two devices are not compared."""
    device = data["device"]
    if isinstance(device, dict):  # of peers
        return device["name"]
    return f"{device}, {data['processor']}" if data.get("backend") == "cpu" else device


def routing_of(row):
    """Whether experts were given or chosen by a gate, in the word of peers.py."""
    return row.get("routing") or ("given" if row["gate"] == "external" else "own")


def what(row):
    return tuple(row.get(key) for key in WHAT)


def name_of(row):
    return ", ".join(f"{key} = {value}" if isinstance(value, int) else str(value)
                     for key, value in zip(WHAT, what(row)) if value is not None)


def main(function):
    """Runs a program whose sentences about bad input go to stderr, with status 2."""
    try:
        sys.exit(function())
    except Bad as error:
        sys.exit(print(f"{pathlib.Path(sys.argv[0]).name}: {error}", file=sys.stderr) or 2)
    except BrokenPipeError:
        sys.exit(1)
