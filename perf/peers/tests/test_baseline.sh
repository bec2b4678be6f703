#!/bin/sh
# baseline.sh without a GPU: what a dry run says, that bad usage gets status 2, and, with stand-ins for nvidia-smi,
# probe and python3, which files a run leaves and with which status.
# shellcheck disable=SC2016,SC2317 # stand-ins expand their own variables; run is called through expect
set -u
command -v python3 >/dev/null || { echo 'skipped: there is no python3'; exit 77; }
baseline=$(cd "$(dirname "$0")/../.." && pwd)/baseline.sh
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
bad=0

expect() { # expect STATUS TEXT COMMAND...
    want=$1 text=$2
    shift 2
    status=0
    "$@" >"$work/said" 2>&1 || status=$?
    [ $status -eq "$want" ] && grep -qE -- "$text" "$work/said" && return
    echo "$*: status $status, not $want, or no '$text' in:"
    tail -n 20 "$work/said"
    bad=1
}
stand_in() { # stand_in NAME SCRIPT
    printf '#!/bin/sh\n%s\n' "$2" >"$work/bin/$1"
    chmod +x "$work/bin/$1"
}

mkdir "$work/bin"
expect 2 'must be a whole number' "$baseline" --limit soon
expect 2 'below 120 s' "$baseline" --limit 60
expect 2 'no such program' "$baseline" --probe "$work/none"
expect 2 'needs a value' "$baseline" --out
expect 2 "no shape 'big'" "$baseline" --shapes big
expect 0 'usage' "$baseline" --help
expect 0 '^2\. at most 150 s: .*--json baseline-probe.json' "$baseline" --dry-run
expect 0 '^ +qwen3-30b-a3b, swiglu, given routing, loop' "$baseline" --dry-run

stand_in nvidia-smi 'exit 9'
expect 77 'no GPU' env PATH="$work/bin:$PATH" "$baseline" --out "$work/out"

stand_in nvidia-smi 'case "$*" in *name*) echo "NVIDIA H200";; *-l*) exec sleep 60;; *) echo "some \"fact\"";; esac'
stand_in probe 'echo "{}" >"$2"; echo "| group |"'
stand_in python3 'case "$*" in
-c*) ;;
*--dry-run*) echo plan ;;
*) echo "| shape |"; for last; do :; done; echo "{}" >"$work/out/baseline-peers.json" ;; esac'
run() {
    env PATH="$work/bin:$PATH" work="$work" "$baseline" --probe "$work/bin/probe" --out "$work/out" --commit abc
}
expect 0 'left over; the results are in' run
for file in run.json clocks.csv probe.json probe.md probe.log peers.json peers.md peers.log; do
    [ -f "$work/out/baseline-$file" ] || { echo "a run leaves no baseline-$file"; bad=1; }
done
expect 0 '"commit": "abc"' cat "$work/out/baseline-run.json"
expect 0 '"device": "NVIDIA H200"' cat "$work/out/baseline-run.json"
expect 0 . python3 -m json.tool "$work/out/baseline-run.json"

stand_in probe 'echo "probe: out of memory" >&2; exit 1'
expect 1 '^\| shape' run # the peers are measured all the same
expect 1 'probe: out of memory' run
exit $bad
