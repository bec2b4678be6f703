#!/bin/sh
# Runs nvcc, which must say -Xptxas -v, and fails on what must not pass unnoticed: spilled registers, stack frames (an
# array that could not be kept in registers; a kernel that needs one is named in $framed), and the remarks with which
# ptxas gives up what a kernel is built on (C7508 setmaxnreg ignored; C7511, C7514 wgmma serialized; C7517 a wait put
# in).     ptxas.sh COMMAND...
set -u
framed='^$' # a pattern of mangled names
log=$(mktemp)
trap 'rm -f "$log"' EXIT
"$@" >"$log" 2>&1
status=$?
grep -vE '^ptxas info|bytes stack frame, 0 bytes spill stores|^$' "$log"
if awk -v framed="$framed" '
        /Compiling entry function/ { kernel = $0 }
        /Function properties for/ { name = $NF }
        /[1-9][0-9]* bytes spill/ { print kernel; print; bad = 1 }
        /^ *[1-9][0-9]* bytes stack frame/ && name !~ framed { print kernel; print; bad = 1 }
        /C75(08|11|14|17)/ { print; bad = 1 }
        END { exit !bad }' "$log"; then
    echo "ptxas.sh: refused, see above" >&2
    exit 1
fi
exit $status
