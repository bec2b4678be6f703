#!/bin/sh
# Measures what one GPU gives and what other libraries make of it: the probe, then the peers. Keeps what they print
# and write with what a reader needs to judge it: command, commit, device, driver, clocks, versions.
# usage: perf/baseline.sh [OPTION...] [OPTION OF peers.py...]
#   --dry-run        say what would run, for how long, and what is missing here
#   --build FILE     only build the probe, for all GPUs, to be carried where no nvcc is
#   --probe FILE     run this program; otherwise nvcc builds one for the GPU at hand
#   --out DIR        write there; otherwise to perf/results/GPU
#   --commit HASH    of these sources, where git does not tell
#   --limit SECONDS  for all together (520)
# Exit status: 0; 1 a part failed, what the others gave is there; 2 bad usage; 77 no GPU.
set -eu
usage() { sed -n '/^# usage/,/^# Exit/s/^# //p' "$0"; }
wrong() { echo "baseline.sh: $1" >&2; exit 2; }

dry='' build='' probe='' out='' commit='' limit=520 command="$0 $*"
while [ $# -gt 0 ]; do
    case $1 in
    --help) usage; exit 0 ;;
    --dry-run) dry=yes ;;
    --build | --probe | --out | --commit | --limit)
        [ $# -ge 2 ] || wrong "$1 needs a value"
        case $1 in
        --build) build=$2 ;; --probe) probe=$2 ;; --out) out=$2 ;; --commit) commit=$2 ;; --limit) limit=$2 ;;
        esac
        shift
        ;;
    *) break ;; # the rest is for peers.py
    esac
    shift
done
case $limit in '' | *[!0-9]*) wrong "--limit $limit: must be a whole number of seconds" ;; esac
[ "$limit" -ge 120 ] || wrong "--limit $limit: below 120 s nothing of use is measured"
[ -z "$probe" ] || [ -x "$probe" ] || wrong "--probe $probe: there is no such program"

here=$(cd "$(dirname "$0")" && pwd)
start=$(date +%s)
build_limit=100 probe_limit=150
has() { command -v "$1" >/dev/null; }
left() { echo $((limit - $(date +%s) + start)); }
more_than() { [ "$2" -gt "$1" ] && echo "$2" || echo "$1"; }

# PyTorch's cuBLAS, so that all measure the same one; the toolkit's where there is no such folder.
cublas=$(python3 -c 'import glob, sysconfig
print(*glob.glob(sysconfig.get_path("purelib") + "/nvidia/cu[0-9]*")[:1])' 2>/dev/null || true)
build() { # build PROGRAM ARCHITECTURES...
    mkdir -p "$(dirname "$1")"
    program=$1
    shift
    timeout $build_limit nvcc -std=c++17 -O2 --threads 2 "$@" -Xcompiler -Wall,-Wextra \
        -Xcompiler -static-libstdc++,-static-libgcc ${cublas:+-Xcompiler "-idirafter,$cublas/include"} \
        -o "$program" "$here"/probe/*.cu
}

if [ -n "$build" ]; then
    has nvcc || { echo 'baseline.sh: nvcc is missing' >&2; exit 1; }
    build "$build" -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90a,code=sm_90a \
        -gencode=arch=compute_100,code=sm_100 -gencode=arch=compute_120,code=sm_120
    exit 0
fi
plan=$(python3 "$here/peers/peers.py" --device cuda --dry-run --budget $((limit - 60)) "$@") || exit 2
if [ -n "$dry" ]; then
    if [ -z "$probe" ]; then echo "1. at most $build_limit s: nvcc builds perf/probe into build/probe/probe"; fi
    echo "2. at most $probe_limit s: ${probe:-build/probe/probe} --json baseline-probe.json"
    sed -n 's/^    {"\([a-z0-9]*\)", "\([^"]*\)", probe_.*/   \1: \2/p' "$here/probe/probe.cu"
    echo "3. what is left of $limit s: perf/peers/peers.py --json baseline-peers.json $*"
    echo "$plan" | sed 's/^/   /'
    for tool in nvidia-smi python3 timeout; do has $tool || echo "missing: $tool"; done
    if [ -z "$probe" ]; then has nvcc || echo 'missing: nvcc, and no --probe'; fi
    exit 0
fi

if ! has nvidia-smi || ! gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader -i 0 2>/dev/null); then
    echo 'baseline.sh: no GPU: nvidia-smi is missing or finds none'
    exit 77
fi
: "${out:=$here/results/$(echo "$gpu" | tr 'A-Z ' 'a-z-')}"
mkdir -p "$out"
rm -f "$out"/baseline-*
status=0

part() { # part NAME SECONDS COMMAND...    its table to baseline-NAME.md, its messages to both
    name=$1 seconds=$2
    shift 2
    echo "== $name, at most $seconds s: $*"
    code=0
    timeout -k 5 "$seconds" "$@" >"$out/baseline-$name.md" 2>"$out/baseline-$name.log" || code=$?
    cat "$out/baseline-$name.md"
    [ $code -eq 0 ] && return
    tail -n 20 "$out/baseline-$name.log"
    echo "== $name: exit status $code$([ $code -ne 124 ] || echo ', out of time')"
    status=1
}

nvidia-smi --query-gpu=timestamp,clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active \
    --format=csv -i 0 -l 2 >"$out/baseline-clocks.csv" 2>/dev/null &
clocks=$!
trap 'kill $clocks 2>/dev/null || true' EXIT
fact() { printf ' "%s": "%s"%s\n' "$1" "$(printf %s "$2" | tr -d '"\\\n')" "${3-,}"; } # fact NAME VALUE [COMMA]
{
    echo '{'
    fact command "$command"
    fact commit "${commit:-$(git -C "$here" describe --always --abbrev=40 --dirty 2>/dev/null || echo unknown)}"
    fact date "$(date -u '+%F %T UTC')"
    fact device "$gpu"
    for name in driver_version clocks.max.sm clocks.max.mem power.limit; do
        fact $name "$(nvidia-smi --query-gpu=$name --format=csv,noheader -i 0)"
    done
    fact nvcc "$(nvcc --version 2>/dev/null | sed -n 's/.*release [^,]*, //p')" ''
    echo '}'
} >"$out/baseline-run.json"

if [ -z "$probe" ]; then
    probe=$here/../build/probe/probe
    echo "== build, at most $build_limit s: perf/probe"
    if ! has nvcc; then
        echo 'baseline.sh: nvcc is missing; build the probe elsewhere and give it as --probe FILE' >&2
        status=1 probe=
    elif ! build "$probe" -arch=native; then
        status=1 probe=
    fi
fi
[ -z "$probe" ] || part probe $probe_limit \
    env LD_LIBRARY_PATH="${cublas:+$cublas/lib:}${LD_LIBRARY_PATH:-}" "$probe" --json "$out/baseline-probe.json"
seconds=$(more_than 60 "$(left)") rows=$out/baseline-peers.json
part peers "$seconds" python3 "$here/peers/peers.py" --device cuda --json "$rows" \
    --budget "$(more_than 30 $((seconds - 60)))" "$@"
if [ -f "$rows" ] && ! [ -s "$out/baseline-peers.md" ]; then # cut off before its tables
    python3 "$here/peers/report.py" "$rows" | tee "$out/baseline-peers.md"
fi
echo "== $(left) s of $limit s left over; the results are in $out"
exit $status
