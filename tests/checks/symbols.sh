#!/bin/sh
# The shared library exports exactly the functions that the headers declare.    symbols.sh ROOT LIBRARY [CC]
set -eu
root=$1 library=$2 cc=${3:-cc}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

nm -D --defined-only "$library" | awk '{ sub(/@.*/, "", $NF); print $NF }' | sort -u >"$work/exported"

# Names before "(" in what the preprocessor leaves of our headers, without those that are defined there; "(*" begins
# the name of a pointer.
echo '#include <cumoe/cumoe.h>' | "$cc" -E -P -I"$root/include" -x c - | tr '\n' ' ' >"$work/text"
grep -oE '\bcumoe_[a-z0-9_]+ *\([^*]' "$work/text" | sed 's/ *(.*//' | sort -u >"$work/named"
grep -oE 'static inline [^(;{]*\bcumoe_[a-z0-9_]+ *\(' "$work/text" | grep -oE 'cumoe_[a-z0-9_]+ *\($' |
    tr -d ' (' | sort -u >"$work/inline" || true
comm -23 "$work/named" "$work/inline" >"$work/declared"

bad=0
if [ ! -s "$work/declared" ]; then echo "no function is declared in $root/include"; bad=1; fi
for name in $(comm -13 "$work/declared" "$work/exported"); do
    echo "exported, but declared in no header: $name"
    bad=1
done
for name in $(comm -23 "$work/declared" "$work/exported"); do
    echo "declared in a header, but not exported: $name"
    bad=1
done
exit $bad
