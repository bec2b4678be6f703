#!/bin/bash
# Are the tests worth anything? Each fault of faults.txt is put into a copy of the library; a test must fail.
#
#   run.sh WORK setup [CMAKE]   copy the sources to WORK, build them, and see that the tests pass there
#   run.sh WORK NAME            one fault: apply, build, run the tests, demand a failure, take it back
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source=$(cd "$here/../.." && pwd)
work=$1 action=$2

compile() { cmake --build "$work/build" -j "$(nproc)" >"$work/build.log" 2>&1; }
tests() { # all suites, first those that notice most in the shortest time; a suite ends at its first failure
    export CRITERION_FAIL_FAST=1 OMP_WAIT_POLICY=passive
    quick='^layer\.(pairwise|rounding)$'
    for which in "-R $quick" "-E $quick"; do
        # shellcheck disable=SC2086 # an option and its value
        ctest --test-dir "$work/build" -L '^(unit|stage|layer)$' $which --no-tests=error --stop-on-failure \
            --output-on-failure >"$work/test.log" 2>&1 || return 1
    done
}

if [ "$action" = setup ]; then
    rm -rf "$work"
    mkdir -p "$work/tree"
    (cd "$source" && cp -r CMakeLists.txt LICENSE cmake include host tests "$work/tree")
    cmake -S "$work/tree" -B "$work/build" -DCMAKE_BUILD_TYPE=Release -DCMAKE_C_FLAGS_RELEASE=-O2 \
        -DCUMOE_CUDA=off -DCUMOE_EXAMPLES=OFF -DCUMOE_PERF=OFF -DCUMOE_STRICT=ON
    compile || { cat "$work/build.log"; exit 1; }
    tests || { cat "$work/test.log"; echo 'the tests fail without any fault'; exit 1; }
    exit
fi

read -r _ file expression < <(grep -E "^$action +" "$here/faults.txt") ||
    { echo "$action: no such fault in faults.txt"; exit 1; }
restore() { cp "$source/$file" "$work/tree/$file"; } # the new time makes the next build compile it again
trap restore EXIT

sed -E "$expression" "$source/$file" >"$work/tree/$file"
if cmp -s "$source/$file" "$work/tree/$file"; then
    echo "$action does not apply: $file has nothing that $expression changes"
    exit 1
fi
compile || { tail -n 30 "$work/build.log"; echo "$action does not compile"; exit 1; }
if tests; then
    echo "no test notices: $action"
    diff "$source/$file" "$work/tree/$file" || true
    exit 1
fi
echo "noticed by:"
grep -oE '^\[(FAIL|CRASH)[^]]*\] [a-z_0-9]+::[a-z_0-9]+' "$work/test.log" | sort -u | head -n 5 ||
    grep -E 'Failed|Timeout|Exception' "$work/test.log" | tail -n 3 || true
