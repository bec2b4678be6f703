#!/bin/sh
# Runs the CPU benchmark and keeps the result with what a reader needs to judge it: commit, machine, command.
# usage: perf/record.sh NAME     writes perf/results/NAME/{cpu_layer.md,cpu_layer.json,run.txt}
set -eu
[ $# -eq 1 ] || { sed -n '2,3s/^# //p' "$0" >&2; exit 2; }
cd "$(dirname "$0")/.."
program=build/release/perf/cumoe-perf-cpu
[ -x $program ] || { echo "$program is not there: run make bench first" >&2; exit 1; }
out=perf/results/$1
mkdir -p "$out"
$program --json "$out/cpu_layer.json" >"$out/cpu_layer.md"
{
    echo "command  $program --json $out/cpu_layer.json"
    echo "commit   $(git rev-parse HEAD)$(git diff --quiet HEAD -- host include perf ':!perf/results' || echo ', changed')"
    echo "date     $(date -u +%F)"
    lscpu | sed -nE 's/^(Model name|CPU\(s\)|L2 cache|L3 cache): +/\1: /p'
    ${CC:-cc} --version | head -n 1
} >"$out/run.txt"
cat "$out/cpu_layer.md"
