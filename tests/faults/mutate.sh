#!/bin/bash
# Puts one fault of a list into a file of the library and demands that the test which the list names fails.
#   mutate.sh LIST NAME COMPILE LINK [ARGUMENT...]   COMPILE and LINK are words with ';' between them; ARGUMENTS of the
#                                                    program say which of its tests to run
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
list=$1 name=$2
IFS=';' read -ra compile <<<"$3"
IFS=';' read -ra link <<<"$4"
shift 4

read -r _ file test expression < <(grep -E "^$name +" "$list") || { echo "$name: no such fault in $list"; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unit=${file#*@} file=${file%@*} # a header's fault is compiled in the file behind the @
copy=$work/$file
mkdir -p "$(dirname "$copy")"
sed -E "$expression" "$root/$file" >"$copy"
if cmp -s "$root/$file" "$copy"; then
    echo "$name does not apply: $file has nothing that $expression changes"
    exit 1
fi
compile=("${compile[0]}" -I"$work" "${compile[@]:1}")

# A header of host/ without an @ is compiled wherever it is included.
units=("$unit")
case $unit in *.h)
    mapfile -t units < <(cd "$root" && for c in host/*.c host/*/*.c; do
        "${compile[@]}" -MM "$c" | grep -qF "$copy" && echo "$c"
    done)
    ;;
esac
for unit in "${units[@]}"; do
    [ "$unit" = "$file" ] && source=$copy || source=$root/$unit
    "${compile[@]}" -c "$source" -o "$work/$(basename "$unit").o"
done
"${link[0]}" "$work"/*.o "${link[@]:1}" -o "$work/program" # first, so that the library's own copy is not taken
if "$work/program" "$@" >"$work/log" 2>&1; then
    grep '^skipped' "$work/log" && exit 77
    echo "not noticed by $test: $name"
    diff "$root/$file" "$copy" || true
    exit 1
fi
echo "noticed: $(grep -m 1 -E '^\[(FAIL|CRASH)|:[0-9]+: ' "$work/log" || head -n 1 "$work/log")"
