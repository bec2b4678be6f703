#!/bin/sh
# gpu.sh without a GPU: a dry run with the programs of a build folder, bad usage, and, with stand-ins for a GPU's
# programs, which files a run leaves, what it says of a part that fails, and with which status.
# usage: gpu_test.sh BUILD_FOLDER
# shellcheck disable=SC2016,SC2317 # stand-ins expand their own variables; run is called through expect
set -u
build=$1
script=$(cd "$(dirname "$0")" && pwd)/gpu.sh
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
bad=0

command -v python3 >/dev/null || { echo 'skipped: there is no python3'; exit 77; }

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
there() { # there FILE TEXT
    grep -qE -- "$2" "$work/out/$1" || { echo "no '$2' in $1:"; head -n 40 "$work/out/$1"; bad=1; }
}
stand_in() { # stand_in FOLDER/NAME SCRIPT
    printf '#!/bin/sh\n%s\n' "$2" >"$work/$1"
    chmod +x "$work/$1"
}

expect 0 'usage' "$script" --help
expect 2 'no such option' "$script" --fast
expect 2 'needs a value' "$script" --out
expect 2 'must be a whole number' "$script" --limit soon
expect 2 'no such folder' "$script" --bundle "$work/none"

# What is built here, on the CPU.
expect 0 '^== memcheck, at most 60 s' "$script" --dry-run --bundle "$build" --out "$work/out"
there report.md '^\| stages \| ok \|'
there report.md '\| forward \+ backward \|'
[ ! -x "$build/tests/check/cumoe-check" ] || there report.md '^\| check \| ok \|'
[ ! -x "$build/tests/check/check_sim" ] || there instructions.txt '^[a-z0-9_]+ [0-9a-f]{16}$'
for file in stages layer capacity exchange nccl check; do
    [ ! -e "$work/out/$file.json" ] || expect 0 . python3 -m json.tool "$work/out/$file.json"
done

# A GPU of paper.
mkdir "$work/bin" "$work/bundle"
stand_in bin/nvidia-smi 'exit 9'
expect 77 'no GPU' env PATH="$work/bin:$PATH" "$script" --bundle "$work/bundle"
stand_in bin/nvidia-smi 'case "$*" in *name*) echo "NVIDIA H200";; *) echo "some fact";; esac'
stand_in bin/compute-sanitizer 'case "$*" in *initcheck*) echo "leak found"; exit 9;; esac; echo "ERROR SUMMARY: 0"'
stand_in bundle/cumoe-check '[ "$1" != --instructions ] || { echo "mma 0123456789abcdef"; exit 0; }
echo "{\"case\": \"forward: small, f32\", \"ok\": true, \"error\": 0.5, \"hash\": \"12\"}"
echo "{\"case\": \"up: odd, f32\", \"ok\": true, \"error\": 0.25}"'
stand_in bundle/cumoe-perf 'echo "$*"; for last; do :; done; echo "{}" >"$last"'
echo abc >"$work/bundle/commit"
run() {
    env PATH="$work/bin:$PATH" paper="$work" "$script" --bundle "$work/bundle" --out "$work/out" --limit 150
}
expect 1 'the results|left over' run # initcheck fails, and nothing else
there report.md '^# NVIDIA H200'
there report.md '^\| commit \| abc \|'
there report.md '^\| initcheck \| FAILED: exit status 9 \|'
there report.md '^leak found'
there report.md '^\| nccl \| (ok|left out: there is no NCCL here) \|'
there report.md 'capacity --tokens 8192 .*--commit abc'
for part in instructions check stages layer capacity exchange repeat memcheck racecheck; do
    there report.md "^\| $part \| ok \|"
done
there instructions.txt '^# NVIDIA H200, driver some fact, toolkit .*, commit abc'
there instructions.txt '^mma 0123456789abcdef'
there check.json '"part": "forward", "cases": 1, "failed": 0, "error": 0.5'
there report.md '^\| up \| 1 \| 0 \| 0.25 \|'
expect 0 . python3 -m json.tool "$work/out/check.json"
there stages.json '{}'

stand_in bin/compute-sanitizer 'echo "========= Error: device not supported"; exit 1'
expect 0 . run
there report.md 'left out: it does not work here: ========= Error: device not supported'
stand_in bundle/cumoe-check 'case "$*" in *ward:*) status=0 ;; *) status=1 ;; esac
echo "{\"case\": \"forward: small, f32\", \"ok\": false, \"error\": 9.5, \"hash\": \"$$\", \"text\": \"y[3] is off\"}"
exit $status'
stand_in bundle/cumoe-perf 'exit 77'
expect 1 . run
there report.md '^\| forward \| 1 \| 1 \| 9.5 \|'
there report.md '^\| repeat \| FAILED: other bits than the first run'
there report.md '^\| check \| FAILED: exit status 1 \|'
there report.md '^\| stages \| left out: the program finds no GPU'
there check.json 'y\[3\] is off'
expect 0 . python3 -m json.tool "$work/out/check.json"
rm "$work/bundle/cumoe-perf"
expect 1 'there is no program cumoe-perf' run
exit $bad
