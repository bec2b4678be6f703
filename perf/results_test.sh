#!/bin/sh
# What is made of results: that committed tables, pictures and README's lines about GPUs are of the figures beside them;
# that compare.py, join.py and plot.py say what changed, what is stale, and what is wrong with a file. And that README.md
# explains every field, and the peers' shapes are ours.
# usage: results_test.sh PROGRAM [PYTHON]    PYTHON: one with matplotlib, if there is any
set -u
program=$1 python=${2:-python3}
here=$(cd "$(dirname "$0")" && pwd)
command -v python3 >/dev/null || { echo 'skipped: there is no python3'; exit 77; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONDONTWRITEBYTECODE=1
bad=0

expect() { # expect STATUS TEXT COMMAND...    TEXT is a pattern that the output has
    want=$1 text=$2
    shift 2
    status=0
    "$@" >"$work/said" 2>&1 || status=$?
    [ $status -eq "$want" ] && { [ -z "$text" ] || grep -qE -- "$text" "$work/said"; } && return
    echo "$*: status $status, not $want, or no '$text' in:"
    tail -n 20 "$work/said"
    bad=1
}
edit() { # edit FROM TO SCRIPT    a file changed by sed
    sed -E "$3" "$1" >"$2"
    ! cmp -s "$1" "$2" || { echo "$3 changes nothing"; bad=1; }
}

# What is committed.
for folder in "$here"/results/*/; do
    [ ! -e "$folder/layer.json" ] || expect 0 '' "$here/join.py" --check "${folder%/}"
    [ ! -e "$folder/peers.json" ] || python3 "$here/peers/report.py" "$folder/peers.json" | diff - "$folder/peers.md" || bad=1
done
(cd "$here/.." && perf/join.py --gpus perf/results) | diff - "$here/results/gpus.md" || bad=1

# A run, the same again, and others.
run=$work/run
mkdir "$run"
small='--hidden 16 --intermediate 8 --experts 4 --top-k 2 --backend cpu --seconds 0'
# shellcheck disable=SC2086 # options are words
{
    "$program" layer $small --tokens 3,5 --json "$run/layer.json" >"$work/said" || bad=1
    "$program" layer $small --tokens 3,5 --gate external --json "$run/given.json" >"$work/said" || bad=1
    "$program" stages $small --json "$run/stages.json" >"$work/said" || bad=1
    "$program" capacity --hidden 4 --intermediate 2 --experts 4,8 --tokens 9 --backend cpu --seconds 1 \
        --json "$run/capacity.json" >"$work/said" || bad=1
    "$program" exchange $small --tokens 9 --ranks 1,2 --json "$run/exchange.json" >"$work/said" || bad=1
}
peer='{"T": 3, "H": 16, "I": 8, "E": 4, "K": 2, "dtype": "f32", "activation": "relu", "routing": "given", "part": "forward"'
cat >"$run/peers.json" <<END
{"format": 2, "program": "peers", "device": {"name": "AMD", "threads": 2}, "versions": {"torch": "2"}, "rows": [
 $peer, "contestant": "cumoe", "ms": 2}, $peer, "contestant": "grouped_mm", "ms": 3}]}
END
expect 0 '^\| f32 \| relu \| 3 \| forward \|.*\| 1\.50 \|$' "$here/join.py" "$run"
expect 0 '^\| 8 \| noisy-topk \| ' "$here/join.py" "$run"
expect 0 '^\| 2 \| 9 \| forward \+ backward \|' "$here/join.py" "$run"
expect 1 'joined.md: is not of the results' "$here/join.py" --check "$run"
"$here/join.py" "$run" >"$run/joined.md"
expect 0 '' "$here/join.py" --check "$run"
expect 0 '0 slower, 0 faster' "$here/compare.py" "$run" "$run"
slow=$work/slow.json
edit "$run/layer.json" "$slow" 's/("contestant": "cumoe", "part": "backward".*"ms": )([0-9.e-]+)/\1 9\2/'
expect 1 'T = 5.*backward.*SLOWER' "$here/compare.py" "$run/layer.json" "$slow"
expect 1 '2 slower, 0 faster, 6 as before' "$here/compare.py" "$run/layer.json" "$slow"
expect 0 '0 slower, 2 faster' "$here/compare.py" "$slow" "$run/layer.json" --threshold 5%
expect 2 'must be a share' "$here/compare.py" "$run" "$run" --threshold much
expect 2 'OLD and NEW' "$here/compare.py" "$run"

cat >"$work/targets.json" <<'END'
{"targets": [{"name": "low", "where": {"backend": "cpu", "part": "forward", "T": {"least": 4}}, "figure": "tflops", "least": 0},
 {"name": "high", "where": {"part": "forward"}, "figure": "tflops", "least": 1e9},
 {"name": "gpu", "where": {"backend": "cuda"}, "figure": "tflops", "least": 1},
 {"name": "peer", "where": {"routing": "given"}, "figure": "over grouped_mm", "least": 1.5}]}
END
expect 1 '^\| low \| 0 \| .* \| pass \|' "$here/compare.py" --targets "$work/targets.json" "$run"
expect 1 '^\| high \| .* \| miss \|' "$here/compare.py" --targets "$work/targets.json" "$run"
expect 1 '^\| gpu \| 1 \| \| not measured \|' "$here/compare.py" --targets "$work/targets.json" "$run"
expect 1 '^\| peer \| 1.5 \| 1.50 \| pass \|' "$here/compare.py" --targets "$work/targets.json" "$run"
expect 0 'not measured' "$here/compare.py" --targets "$here/targets.json" "$run"
echo '{"targets": [{"name": "x"}]}' >"$work/targets.json"
expect 2 'targets.json: is damaged' "$here/compare.py" --targets "$work/targets.json" "$run"

# Files that cannot be used: a sentence and status 2.
head -c 300 "$run/layer.json" >"$work/half.json"
expect 2 'half.json: is damaged' "$here/compare.py" "$run/layer.json" "$work/half.json"
edit "$run/layer.json" "$work/old.json" 's/"format": 2/"format": 1/'
expect 2 'old.json: has format 1, and this reads format 2' "$here/compare.py" "$work/old.json" "$run/layer.json"
echo '[1, 2]' >"$work/other.json"
expect 2 'other.json: is not a file that' "$here/compare.py" "$work/other.json" "$run/layer.json"
mkdir "$work/gpu" "$work/empty"
edit "$run/layer.json" "$work/gpu/layer.json" 's/"device": "CPU[^"]*"/"device": "NVIDIA H200"/'
expect 2 'from different devices' "$here/compare.py" "$run" "$work/gpu"
expect 2 'none of layer.json' "$here/join.py" "$work/empty"
expect 2 'No such file' "$here/join.py" "$work/none"
expect 2 'no row in common' "$here/compare.py" "$run/layer.json" "$run/stages.json"
if "$python" -c 'import matplotlib' 2>/dev/null; then
    expect 0 '' "$python" "$here/plot.py" "$run"
    for picture in layer capacity stages roofline; do
        [ $picture = roofline ] || [ -s "$run/$picture.svg" ] || { echo "plot.py makes no $picture.svg"; bad=1; }
    done
    "$here/join.py" "$run" >"$run/joined.md"
    expect 0 '' "$here/join.py" --check "$run"
    cp "$slow" "$run/layer.json"
    expect 1 'layer.svg: is not of the results' "$here/join.py" --check "$run"
elif [ -x "$(command -v "$python")" ]; then
    expect 77 'pip install matplotlib' "$python" "$here/plot.py" "$run"
fi

# README.md names every field; the peers' shapes are those of cumoe-perf.
for command in combine 'exchange --ranks 2'; do
    # shellcheck disable=SC2086 # words
    "$program" $command --hidden 8 --intermediate 8 --experts 4 --tokens 2 --backend cpu --seconds 0 --csv - | grep -v '^#' |
        head -n 1 | tr ',' '\n'
done >"$work/fields"
while read -r field; do
    grep -q "\`$field\`" "$here/README.md" || { echo "README.md does not explain the field $field"; bad=1; }
done <"$work/fields"
"$program" --list >"$work/shapes"
python3 "$here/peers/peers.py" --list | sed '1d; /^$/,$d; /^tiny/d' >"$work/peers"
while read -r name _ H I E K; do
    grep -q "^| $name | $H | $I | $E | $K |" "$work/shapes" || { echo "peers.py has $name $H/$I/$E/$K; cumoe-perf has not"; bad=1; }
done <"$work/peers"
exit $bad
