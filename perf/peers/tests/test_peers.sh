#!/bin/sh
# peers.py on the CPU: that every contestant is right, that bad usage gets a sentence and status 2, and that what is
# wrong, breaks or does not fit is noticed and does not end the run. Without torch usage alone is tested, status 77.
# usage: test_peers.sh [PYTHON]
# shellcheck disable=SC2086 # options are words
set -u
python=${1:-python3}
command -v "$python" >/dev/null || { echo 'skipped: there is no python3'; exit 77; }
cd "$(dirname "$0")/.." || exit 1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1 JAX_PLATFORMS=cpu CUDA_VISIBLE_DEVICES=''
bad=0

expect() { # expect STATUS TEXT COMMAND...    TEXT is a pattern that the output has
    want=$1 text=$2
    shift 2
    status=0
    "$@" >"$work/out" 2>&1 || status=$?
    [ $status -eq "$want" ] && grep -qE -- "$text" "$work/out" && return
    echo "$*: status $status, not $want, or no '$text' in:"
    tail -n 20 "$work/out"
    bad=1
}
hostile() { # hostile KIND STATUS TEXT
    rm -f "$work/rows.json"
    expect "$2" "$3" env HOSTILE="$1" "$python" tests/hostile.py --device cpu --threads 1 --seconds 0.01 \
        --shapes tiny-uneven --contestants loop,grouped_mm --activation relu --json "$work/rows.json"
    expect 0 '"contestant": "loop"' cat "$work/rows.json" # which came to no harm
}

expect 2 "no shape 'big'.* qwen3-30b-a3b.*tiny" "$python" peers.py --shapes big
expect 2 "no shape '8/8/8/8'" "$python" peers.py --shapes 8/8/8/8
expect 2 'has 3 experts, and there are 2' "$python" peers.py --shapes 8/8/8/2/3
expect 2 "no contestant 'sonic'.* loop, grouped_mm" "$python" peers.py --contestants loop,sonic
expect 2 'resume' "$python" peers.py --resume
expect 2 'above 0' "$python" peers.py --seconds 0
expect 0 'mixtral-8x7b +4096 +4096 +14336 +8 +2' "$python" peers.py --list
expect 0 'deepseek-v3, swiglu, given routing, scattermoe' "$python" peers.py --dry-run
expect 0 'missing: scattermoe' "$python" peers.py --dry-run --contestants scattermoe,loop

if "$python" -c 'import torch' 2>/dev/null; then
    small='--device cpu --threads 1 --seconds 0.01'
    expect 0 '^\| tiny-uneven \| loop ' "$python" peers.py $small --shapes tiny-uneven
    torch_alone=dense,loop,grouped_mm,stages # the others are slow to start
    expect 0 '^\| tiny \| grouped_mm ' "$python" peers.py $small --dtype bf16 --contestants $torch_alone
    expect 0 '^\| tiny \| grouped_mm ' "$python" peers.py $small --dtype f16 --contestants $torch_alone
    expect 0 '^\| 24/16/16/6/1 ' "$python" peers.py $small --shapes 24/16/16/6/1 --contestants loop,stages
    if "$python" -c 'import cumoe' 2>/dev/null; then
        for dtype in f32 bf16 f16; do
            expect 0 '^\| tiny-uneven \| cumoe ' "$python" peers.py $small --dtype $dtype --contestants cumoe
        done
        expect 0 'goal is 15 us' "$python" call_cost.py
    fi
    expect 1 '--json .*: .*No such file' "$python" peers.py $small --json "$work/none/rows.json"
    echo '{"rows": [' >"$work/damaged.json"
    expect 1 '--json .*damaged.json: ' "$python" peers.py $small --resume --json "$work/damaged.json"
    echo '{"rows": [], "not_measured": {}}' >"$work/old.json"
    expect 1 '--json .*old.json: has format None' "$python" peers.py $small --resume --json "$work/old.json"
    expect 0 'no time left' "$python" peers.py $small --contestants loop --budget 0.0001
    hostile off 1 'wrong: grouped_mm is off by 0.01'
    hostile gradient 1 'wrong: grouped_mm'
    hostile nan 1 'wrong: grouped_mm is off by inf'
    hostile gate 1 'wrong: gate'
    hostile memory 0 'out of memory: .*5 TiB'
    hostile broken 1 'failed: RuntimeError: no kernel for this'
    hostile lost 0 '^\| tiny-uneven \| grouped_mm '
    expect 0 '^\| tiny-uneven \| grouped_mm ' "$python" report.py "$work/rows.json"
else
    echo 'skipped but for usage: torch cannot be imported'
    [ $bad -eq 0 ] && exit 77
fi
exit $bad
