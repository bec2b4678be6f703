#!/bin/sh
# cumoe-perf on the CPU with tiny layers: its results are right (it compares and counts itself), its files can be read
# and have the same figures, and what is wrong gets a sentence and a status that is not 0.
# usage: perf_test.sh PROGRAM WRONG_BLAS
set -u
program=$1 wrong=$2
bad=0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

complain() {
    echo "$*"
    tail -n 30 "$work/said"
    bad=1
}

measures() { # measures ROWS COMMAND OPTION...: so many of cumoe itself
    rows=$1
    shift
    "$program" "$@" --backend cpu --seconds 0 --json "$work/json" --csv "$work/csv" >"$work/said" 2>&1 ||
        complain "$*: status $?, and it says:"
    if command -v python3 >/dev/null && ! python3 -m json.tool "$work/json" >/dev/null; then
        complain "$*: writes no JSON"
    fi
    found=$(grep -c '"contestant": "cumoe"' "$work/json")
    [ "$found" -eq "$rows" ] || complain "$*: $found rows, not $rows"
    [ "$(grep -c ',cumoe,' "$work/csv")" -eq "$rows" ] || complain "$*: the CSV file has other rows"
}

says() { # says STATUS TEXT COMMAND OPTION...
    want=$1 text=$2
    shift 2
    status=0
    "$program" "$@" >"$work/said" 2>&1 || status=$?
    if [ $status -ne "$want" ] || ! grep -qF -- "$text" "$work/said"; then complain "$*: status $status, or no '$text' in:"; fi
}

refuses() { # refuses TEXT COMMAND OPTION...
    says 2 "$@"
    [ "$(wc -l <"$work/said")" -eq 1 ] || complain "$*: more than a line:"
}

small='--hidden 33 --intermediate 45 --experts 5 --top-k 2'
# shellcheck disable=SC2086 # options are words
{
    # All 14 parts; with an external gate there is no gate_backward.
    measures 84 stages $small --tokens 1,67 --dtype bf16,f16,f32 --activation swiglu
    measures 28 stages $small --tokens 67 --skew zipf,one
    measures 14 stages $small --tokens 67 --gate softmax --cache cold
    measures 13 stages --hidden 8 --intermediate 1 --experts 3 --top-k 3 --tokens 5 --skew zipf --gate external
    measures 14 stages --hidden 24 --intermediate 16 --experts 9 --bias --tokens 2 --dtype bf16
    measures 36 layer $small --tokens 9 --activation relu,swiglu,gelu,gelu-tanh,silu,relu2,geglu,geglu-tanh,swiglu-clamped
    measures 28 layer --hidden 24 --intermediate 16 --experts 12 --tokens 67 \
        --gate noisy-topk,softmax,external,hierarchical,balanced,softmax-topk,sigmoid-topk
    measures 3 layer --shape paper-4 --tokens 3 --pass forward --threads 1 --pass backward \
        --gate noisy-topk --dtype f32 --experts 4,5,6
    measures 9 capacity --hidden 8 --intermediate 2 --tokens 16
    for stage in gate permute up down; do measures 2 $stage $small --tokens 3; done
    for part in combine optimizer; do measures 1 $part $small --tokens 3; done
    measures 1 up $small --tokens 3 --pass forward

    # Time is taken as well, everybody in turns.
    "$program" layer $small --tokens 8 --seconds 1 --threads 1 --csv - >"$work/csv" 2>"$work/said" || complain 'with time'
    grep -q '^own,8,.*,cumoe,forward + backward,' "$work/csv" || complain 'with time: a row is missing'
    grep -q '^# commit: unknown' "$work/csv" || complain 'with time: a fact is missing'

    says 1 'CUMOE_COMPUTE_TF32' layer $small --tokens 2 --dtype tf32 --seconds 0
    says 1 'GB of memory, and ' layer --hidden 65536 --intermediate 65536 --experts 4096 --tokens 2 --seconds 0
    says 1 'there are no graphs' layer $small --tokens 2 --launch graph --seconds 0 --backend cpu
    CUDA_VISIBLE_DEVICES='' says 77 'CUDA' layer --backend cuda
    says 0 'no dense products to compare with' layer $small --tokens 2 --seconds 0 --blas "$work/none.so"
    says 1 'wrong: the loop over experts and the layer differ by' layer $small --tokens 3 --seconds 0 --blas "$wrong"
    says 1 'wrong: a dense product of up is not' up $small --tokens 3 --seconds 0 --blas "$wrong"
    OPENBLAS_CORETYPE=Nehalem says 1 '; Nehalem' up $small --tokens 3 --seconds 0 --blas "$wrong"
    if grep -qw avx512bw /proc/cpuinfo; then core=SkylakeX; elif grep -qw avx2 /proc/cpuinfo; then core=Haswell; else core=Prescott; fi
    (unset OPENBLAS_CORETYPE; says 1 "; $core" up $small --tokens 3 --seconds 0 --blas "$wrong"; exit $bad) || bad=1
    says 0 '| olmoe | 2048 | 1024 | 64 | 8 | swiglu | softmax-topk | no |' --list
    says 0 ': down, down_backward' --list
    says 0 '--activation' --help
    says 0 '--activation' layer --help

    refuses 'COMMAND: is missing'
    refuses 'COMMAND layers: must be one of layer, stages' layers
    refuses '--shape mixtrl: there is none of that name; near it: mixtral-8x7b, mixtral-8x22b' layer --shape olmoe,mixtrl
    refuses '--token: no such option; near it: tokens' layer --token 4
    refuses '--tokens x: must be a whole number' layer --tokens 4,x
    refuses '--dtype f64: must be one of bf16, f16' layer --dtype f64
    refuses '--gate best: must be one of noisy-topk, softmax, external, hierarchical' layer --gate best
    refuses '--pass forward: leaves nothing' optimizer --pass forward
    refuses '--activation identity: experts of one matrix' layer --activation identity
    refuses 'config.top_k = 4, but must be 1..3' layer --experts 8,3
    refuses '--json /: ' layer --json /
    refuses '--csv -: only one' layer --json - --csv -
}
exit $bad
