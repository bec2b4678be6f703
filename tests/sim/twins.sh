#!/bin/sh
# Every function of cuda/ptx.cuh has a twin in the simulator, no twin is left over, and instructions.cu tries each.
set -u
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

functions() { # functions FILE
    sed -nE 's/^__(host__ __)?device__ [^(]*[ *]([a-z][a-z0-9_]*)\(.*/\2/p' "$1" | grep -v '^sim_' | sort -u
}

functions "$here/../../cuda/ptx.cuh" >"$work/real"
functions "$here/stand_in/cuda/ptx.cuh" >"$work/twins"
bad=0
if [ ! -s "$work/real" ]; then echo 'found no function in cuda/ptx.cuh'; bad=1; fi
if ! diff "$work/real" "$work/twins" >"$work/difference"; then
    echo 'only in cuda/ptx.cuh (<) or in the stand-in (>):'
    cat "$work/difference"
    bad=1
fi
grep -v '^shared_array$' "$work/real" >"$work/instructions" # SharedArena calls it
while read -r name; do
    grep -qE "\b$name(<[A-Za-z0-9_]*>)?\(" "$here/instructions.cu" && continue
    echo "instructions.cu does not try $name"
    bad=1
done <"$work/instructions"
exit $bad
