#!/bin/sh
# Runs the CPU benchmark in every type and keeps the results with what a reader needs to judge them: commit, machine,
# commands.
# usage: perf/record.sh NAME     writes perf/results/NAME/{cpu_layer,cpu_bf16,cpu_f16}.{md,json} and run.txt
set -eu
[ $# -eq 1 ] || { sed -n '2,4s/^# //p' "$0" >&2; exit 2; }
cd "$(dirname "$0")/.."
program=build/release/perf/cumoe-perf-cpu
[ -x $program ] || { echo "$program is not there: run make bench first" >&2; exit 1; }
out=perf/results/$1
mkdir -p "$out"
run() { # run FILE OPTION...
    file=$out/$1
    shift
    echo "command  $program $* --json $file.json" >>"$out/run.txt"
    $program "$@" --json "$file.json" >"$file.md"
    cat "$file.md"
}
: >"$out/run.txt"
run cpu_layer --dtype f32
run cpu_bf16 --dtype bf16
run cpu_f16 --dtype f16
{
    echo "commit   $(git rev-parse HEAD)$(git diff --quiet HEAD -- host include perf ':!perf/results' || echo ', changed')"
    echo "date     $(date -u +%F)"
    lscpu | sed -nE 's/^(Model name|CPU\(s\)|L2 cache|L3 cache): +/\1: /p'
    ${CC:-cc} --version | head -n 1
} >>"$out/run.txt"
