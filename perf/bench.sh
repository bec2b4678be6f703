#!/bin/sh
# The suite for the machine at hand, within 5 minutes on a CPU: the layer beside dense products, a loop over experts and
# what PyTorch makes of it; bf16 and fp16; the stages; time against the number of experts; ranks. `make bench` calls it.
# usage: perf/bench.sh BUILD OUT
#   BUILD  has cumoe-perf; OUT gets a table, a JSON file of each part, joined.md, and pictures where matplotlib is there
# PYTHON names the Python that has PyTorch; otherwise build/torch/bin/python or python3. Threads: OMP_NUM_THREADS.
# Exit status: 0; 1 a part failed, the others are there; 2 bad usage.
set -eu
usage() { sed -n '/^# usage/,/^# Exit/s/^# //p' "$0"; }
[ "${1-}" != --help ] || { usage; exit; }
[ $# -eq 2 ] || { usage >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")
program=$1/perf/cumoe-perf torch=$1/torch/site out=$2
[ -x "$program" ] || { echo "bench.sh: $program is not there: make bench builds it" >&2; exit 2; }
mkdir -p "$out"
rm -f "$out"/*.json "$out"/*.md "$out"/*.svg
threads=${OMP_NUM_THREADS:-$(nproc)}
commit=$(git -C "$here" describe --always --abbrev=40 --dirty 2>/dev/null || echo unknown)
status=0
echo "commands, of commit $commit:" >"$out/run.txt"

part() { # part NAME OPTION...    to NAME.json, its table to stdout
    name=$1
    shift
    printf '\n## %s\n\n' "$name"
    echo "$program $*" >>"$out/run.txt"
    "$program" "$@" --threads "$threads" --commit "$commit" --json "$out/$name.json" || status=1
}

if [ "$("$program" layer --seconds 0 --tokens 1 --pass forward --json - 2>/dev/null | grep -c '"backend": "cuda"')" -gt 0 ]; then
    models=paper-256,olmoe,qwen3-30b-a3b
    part layer layer --shape olmoe --tokens 1,16,256,4096,32768 --activation relu,swiglu --dtype bf16 --seconds 60
    part given layer --shape olmoe --tokens 1,16,256,4096,32768 --activation swiglu --gate external --dtype bf16 --seconds 20
    part stages stages --shape $models --tokens 64,4096 --dtype bf16,f32 --seconds 60
    part types layer --shape olmoe --tokens 4096 --activation swiglu --dtype f16,tf32,f32 --seconds 20
    part capacity capacity --dtype bf16 --tokens 32768 --seconds 40
    part exchange exchange --shape olmoe --tokens 4096 --dtype bf16 --ranks 1,2,4 --seconds 30
    shapes=4096/2048/1024/64/8,32768/2048/1024/64/8 device=cuda
else
    layer='--shape paper-32 --tokens 1,16,256,4096'
    # shellcheck disable=SC2086 # options are words
    part layer layer $layer --activation relu,swiglu --seconds 50
    # shellcheck disable=SC2086
    part given layer $layer --activation swiglu --gate external --seconds 20
    part types layer --shape paper-32 --activation swiglu --dtype bf16,f16 --seconds 15
    part stages stages --shape paper-32 --seconds 12
    part capacity capacity --hidden 64 --intermediate 128 --tokens 4096 --seconds 15
    part exchange exchange --shape paper-32 --tokens 64,1024 --ranks 1,2 --seconds 15
    shapes=1/512/1024/32/4,16/512/1024/32/4,256/512/1024/32/4,4096/512/1024/32/4 device=cpu
fi

for python in "${PYTHON:-}" "$root/build/torch/bin/python" python3; do
    [ -n "$python" ] && "$python" -c 'import torch' 2>/dev/null && break
done
if "$python" -c 'import torch' 2>/dev/null; then
    [ ! -d "$torch" ] || export PYTHONPATH="$torch${PYTHONPATH:+:$PYTHONPATH}"
    printf '\n## peers\n\n'
    echo "$here/peers/peers.py --device $device --shapes $shapes" >>"$out/run.txt"
    "$python" "$here/peers/peers.py" --device "$device" --threads "$threads" --shapes "$shapes" --activation swiglu \
        --routing given --contestants dense,loop,grouped_mm,scattermoe,cumoe --seconds 0.5 --budget 50 \
        --json "$out/peers.json" 2>/dev/null || status=1
else
    echo 'PyTorch is not beside it: there is none in PYTHON, build/torch (make test) or python3'
fi
{
    date -u '+date     %F'
    lscpu 2>/dev/null | sed -nE 's/^(Model name|CPU\(s\)|L2 cache|L3 cache): +/\1: /p'
} >>"$out/run.txt"
"$here/record.sh" --again "$out" || status=1
printf '\n## all of it\n\n'
cat "$out/joined.md"
exit $status
