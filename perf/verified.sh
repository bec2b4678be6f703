#!/bin/sh
# On which GPUs this was run, as a table: one line for each folder of results that has the files of gpu.sh.
# usage: perf/verified.sh [RESULTS]      perf/verified.sh >perf/results/verified.md after a new folder
set -eu
results=${1:-$(dirname "$0")/results}
echo '| GPU | cases against the reference | failed | instructions confirmed | commit, date |'
echo '|---|--:|--:|---|---|'
none=yes
for folder in "$results"/*/; do
    [ -e "$folder/check.json" ] || continue
    none=no
    cell() { sed -n "s/^| $1 | \(.*\) |\$/\1/p" "$folder/report.md" | head -n 1; } # of the report's table of facts
    cases=$(sed -n 's/^  {"part": .*"cases": \([0-9]*\),.*/\1/p' "$folder/check.json" | awk '{ n += $1 } END { print n + 0 }')
    failed=$(sed -n 's/^ "failures": \([0-9]*\),.*/\1/p' "$folder/check.json")
    instructions=no
    [ ! -s "$folder/instructions.txt" ] || instructions=yes
    gpu=$(sed -n '1s/^# //p' "$folder/report.md")
    echo "| $gpu | $cases | $failed | $instructions | $(cell commit | cut -c 1-12), $(cell date | cut -c 1-10) |"
done
[ $none = no ] || echo '| none yet: simulator only | 0 | 0 | no | |'
