#!/bin/sh
# Runs nvcc, which must say -Xptxas -v, and fails on what must not pass unnoticed: spilled registers, and the
# remarks with which ptxas gives up what a kernel is built on (C7508 setmaxnreg ignored; C7511, C7514 wgmma
# serialized; C7517 a wait put in).     ptxas.sh COMMAND...
set -u
log=$(mktemp)
trap 'rm -f "$log"' EXIT
"$@" >"$log" 2>&1
status=$?
grep -vE '^ptxas info|bytes stack frame, 0 bytes spill stores|^$' "$log"
if awk '/Compiling entry function/ { kernel = $0 }
        /[1-9][0-9]* bytes spill/ { print kernel; print; bad = 1 }
        /C75(08|11|14|17)/ { print; bad = 1 }
        END { exit !bad }' "$log"; then
    echo "ptxas.sh: refused, see above" >&2
    exit 1
fi
exit $status
