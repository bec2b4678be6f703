#!/bin/sh
# cumoe-perf-stages on the CPU with tiny layers: its results are right (it compares and counts itself), its JSON is
# JSON, and a bad option is one line and status 2.
# usage: stages_test.sh PROGRAM
set -u
program=$1
bad=0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

measures() { # measures ROWS OPTION...
    rows=$1
    shift
    if ! "$program" --backend cpu --gbs 10 --seconds 0 --json "$work/json" "$@" >"$work/said" 2>&1; then
        echo "$*: status $?, and it says:"
        tail -n 30 "$work/said"
        bad=1
    fi
    if command -v python3 >/dev/null && ! python3 -m json.tool "$work/json" >/dev/null; then
        echo "$*: writes no JSON"
        bad=1
    fi
    found=$(grep -c '"part": ' "$work/json")
    [ "$found" -eq "$rows" ] || { echo "$*: $found rows, not $rows"; bad=1; }
}

refuses() { # refuses TEXT OPTION...
    text=$1
    shift
    sentence=$("$program" "$@" 2>&1 >/dev/null)
    status=$?
    case $status,$sentence in
    2,*"$text"*) [ "$(printf '%s\n' "$sentence" | wc -l)" -eq 1 ] && return ;;
    esac
    echo "cumoe-perf-stages $*: status $status, and it says: $sentence"
    bad=1
}

# All 13 parts; with an external gate there is no gate_backward.
measures 78 --sizes 33,45,5,2 --tokens 1,67 --dtype bf16,f16,f32
measures 13 --sizes 33,45,5,2 --tokens 67 --skew zipf --tflops 0.1
measures 13 --sizes 33,45,5,2 --tokens 67 --skew one --gate softmax --tflops f32=0.1,bf16=0.2
measures 12 --sizes 8,1,3,3 --tokens 5 --skew zipf --gate external
measures 13 --sizes 24,16,9,4 --bias --tokens 2 --dtype bf16
measures 13 --shape paper-4 --tokens 3
for gate in hierarchical balanced softmax-topk sigmoid-topk; do
    measures 13 --sizes 24,16,12,4 --tokens 67 --gate $gate
done
measures 0 --sizes 8,8,4,2 --tokens 2 --dtype tf32
grep -q 'config.compute = CUMOE_COMPUTE_TF32' "$work/json" || { echo 'does not say why there is no TF32'; bad=1; }
measures 0 --sizes 65536,65536,4096,2 --tokens 2
grep -q 'needs about [0-9.]* GB of memory' "$work/json" || { echo 'does not say that memory is short'; bad=1; }
"$program" --list | grep -q '^| olmoe | 2048 | 1024 | 64 | 8 | swiglu | no |' || { echo '--list has no olmoe'; bad=1; }
"$program" --help | grep -q -- '--tflops' || { echo '--help does not say --tflops'; bad=1; }

refuses '--shape gpt-2: no such shape' --shape gpt-2
refuses '--sizes 1,2,3: must be four' --sizes 1,2,3
refuses '--tokens x: must be' --tokens 4,x
refuses '--dtype f64: must be' --dtype f64
refuses '--tflops f8: must be' --tflops f8=3
refuses '--tflops 0: must be' --tflops bf16=0
refuses '--gbs -3: must be' --gbs -3
refuses '--gate best: must be one of noisy-topk, softmax, external, hierarchical' --gate best
refuses '--json /: ' --sizes 8,8,4,2 --tokens 1 --json /
exit $bad
