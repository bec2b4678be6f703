#!/bin/bash
# Puts one fault of mutants.txt into a kernel and demands that the program that tests it fails.
#   mutate.sh NAME CXX CUDA_HEADERS FLAGS OBJECT...      FLAGS of kernels, separated by ';'; the rest of the program
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
name=$1 cxx=$2 headers=$3
IFS=';' read -ra flags <<<"$4"
shift 4

read -r _ file _ expression < <(grep -E "^$name +" "$here/mutants.txt") ||
    { echo "$name: no such fault in mutants.txt"; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unit=${file#*@} file=${file%@*} # a header's fault is compiled in the file behind the @
copy=$work/$file
mkdir -p "$(dirname "$copy")"
sed -E "$expression" "$root/$file" >"$copy"
[ "$unit" = "$file" ] && unit=$copy || unit=$root/$unit
if cmp -s "$root/$file" "$copy"; then
    echo "$name does not apply: $file has nothing that $expression changes"
    exit 1
fi
"$cxx" -std=c++17 -DCUMOE_SIM "${flags[@]}" -I"$work" -I"$here/stand_in" -I"$root" -I"$root/include" -isystem "$headers" \
    -x c++ -c "$unit" -o "$work/kernel.o"
"$cxx" "$work/kernel.o" "$@" -ldl -o "$work/program"
if "$work/program" >"$work/log" 2>&1; then
    echo "no test notices: $name"
    diff "$root/$file" "$copy" || true
    exit 1
fi
echo "noticed: $(head -n 1 "$work/log")"
