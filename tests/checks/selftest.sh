#!/bin/sh
# shellcheck disable=SC2016 # the toy files and their makers hold $ and backticks
# A check that cannot fail is worth nothing: each is shown a small tree that is right, and then the same tree with
# one thing broken, which it must name.    selftest.sh CHECK
set -eu
checks=$(cd "$(dirname "$0")" && pwd)
check=$1
toy=$(mktemp -d)
trap 'rm -rf "$toy"' EXIT
failed=0

fresh() { # the small tree that is right
    rm -rf "${toy:?}"/* "$toy/.clang-format"
    mkdir -p "$toy/include/cumoe" "$toy/host/cpu" "$toy/examples" "$toy/tests/support" "$toy/tests/unit" "$toy/cuda"
    echo 'BasedOnStyle: LLVM' >"$toy/.clang-format"
    cat >"$toy/include/cumoe/cumoe.h" <<'H'
#ifndef CUMOE_H
#define CUMOE_H
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif
__attribute__((visibility("default"))) int cumoe_one(int32_t a);
static inline int cumoe_two(void) { return cumoe_one(2); }
#ifdef __cplusplus
}
#endif
#endif
H
    cat >"$toy/host/one.c" <<'C'
#include <cumoe/cumoe.h>
static const int table[2] = {1, 2};
static _Thread_local int last;
int cumoe_one(int32_t a) { return last = table[a & 1]; }
C
    echo '#include "host/backend.h"' >"$toy/host/cpu/gate.c"
    echo '#include "host/philox.h"' >"$toy/tests/support/noise.c"
    echo '#include <cumoe/cumoe.h>' >"$toy/examples/forward.c"
    cat >"$toy/README.md" <<'MD'
# Title

See [one](host/one.c), [here](#title), `host/one.c`, `cumoe/cumoe.h`.

<!-- begin examples/forward.c include to END -->
```c
#include <cumoe/cumoe.h>
```
<!-- end -->
MD
}

build() {
    (cd "$toy" && cc -fPIC -fvisibility=hidden -Iinclude -c host/one.c -o one.o && cc -shared one.o -o libtoy.so &&
        ar rcs libtoy.a one.o)
}

run() {
    case $check in
    symbols) build && "$checks/symbols.sh" "$toy" "$toy/libtoy.so" ;;
    forbidden) build && "$checks/forbidden.sh" "$toy" "$toy/libtoy.a" ;;
    *) "$checks/$check.sh" "$toy" ;;
    esac
}

broken() { # broken WORDS COMMAND...   after COMMAND the check fails and names WORDS
    words=$1
    shift
    fresh
    (cd "$toy" && "$@")
    if out=$(run 2>&1); then
        echo "not noticed: $*"
        failed=1
    elif ! printf '%s' "$out" | grep -qF -e "$words"; then
        printf 'noticed, but "%s" is not named: %s\n%s\n' "$words" "$*" "$out"
        failed=1
    else
        echo "noticed: $*"
    fi
}

# shellcheck disable=SC2317 # called by broken
append() { printf '%s\n' "$2" >>"$1"; }

fresh
if out=$(run 2>&1); then
    echo 'the right tree passes'
else
    rc=$?
    [ $rc != 77 ] || { printf '%s\n' "$out"; exit 77; }
    printf 'the right tree fails:\n%s\n' "$out"
    failed=1
fi

case $check in
includes)
    broken 'cumoe.h:13:stdlib.h' append include/cumoe/cumoe.h '#include <stdlib.h>'
    broken 'one.c:5:cuda_runtime.h' append host/one.c '#include <cuda_runtime.h>'
    broken 'one.c:5:../cuda/launch.h' append host/one.c '#include "../cuda/launch.h"'
    broken 'gate.c:2:host/config.h' append host/cpu/gate.c '#include "host/config.h"'
    broken 'gate.cu:1:host/layer.h' append cuda/gate.cu '#include "host/layer.h"'
    broken 'gate.cu:1' append cuda/gate.cu 'cudaMalloc(&p, 1);'
    broken 'gate.cu:1' append cuda/gate.cu 'int a = __popc(1);'
    broken 'one.c:1:cuda/permute.cuh' append tests/unit/one.c '#include "cuda/permute.cuh"'
    broken 'forward.c:2:../host/philox.h' append examples/forward.c '#include "../host/philox.h"'
    broken 'noise.c:2:host/layout.h' append tests/support/noise.c '#include "host/layout.h"'
    broken 'reference.c:1:cumoe/layer.h' append tests/support/reference.c '#include <cumoe/layer.h>'
    broken 'one.c:5:mpi.h' append host/one.c '#include <mpi.h>'
    broken 'cumoe.h:13:mpi.h' append include/cumoe/cumoe.h '#include <mpi.h>'
    broken 'comm.c:1:host/comm.h' sh -c 'mkdir -p mpi && echo "#include \"host/comm.h\"" >mpi/comm.c'
    broken 'one.c:5:torch/torch.h' append host/one.c '#include <torch/torch.h>'
    broken 'one file wraps' sh -c 'for f in a b; do echo "#include <nccl.h>" >cuda/$f.cu; done'
    ;;
headers)
    broken 'cumoe/alone.h' append include/cumoe/alone.h 'typedef size_t cumoe_size_t;'
    broken 'c++' append include/cumoe/cumoe.h 'typedef struct cumoe_new { int new; } cumoe_new_t;'
    broken 'cumoe/gnu.h' append include/cumoe/gnu.h 'typedef __extension__ int a; typedef int b[0];'
    broken 'cumoe/twice.h' append include/cumoe/twice.h 'struct cumoe_twice { int a; };'
    ;;
symbols)
    broken 'not exported: cumoe_three' append include/cumoe/cumoe.h 'int cumoe_three(void);'
    broken 'no header: stray' append host/one.c '__attribute__((visibility("default"))) int stray; '
    broken 'no header: cumoe__leak' append host/one.c '__attribute__((visibility("default"))) int cumoe__leak;'
    ;;
forbidden)
    for call in 'exit(1)' 'abort()' 'printf("%d", last)' 'puts("x")'; do
        broken "${call%%(*}" append host/one.c "#include <stdio.h>
#include <stdlib.h>
void f(void); void f(void) { $call; }"
    done
    broken 'one.c:5' append host/one.c '#define rule(x) assert(x)'
    broken 'calls' append host/one.c 'int calls = 1; '
    broken 'calls' append host/one.c 'static int calls; int f(void); int f(void) { return calls++; }'
    ;;
links)
    broken 'host/two.c' append README.md 'See [two](host/two.c).'
    broken '#nowhere' append README.md 'See [there](#nowhere).'
    broken 'three.c' append README.md 'See `three.c`.'
    broken 'host/three.c' append README.md 'See `host/three.c`.'
    ;;
readme)
    broken '+int main' append examples/forward.c 'int main(void) { return 0; }'
    broken '-by hand' sed -i 's/^#include/by hand\n#include/' README.md
    broken 'cannot read' rm examples/forward.c
    ;;
format)
    broken 'one.c' append host/one.c 'int  f( void ) ;'
    ;;
*)
    echo "selftest.sh: no such check: $check"
    exit 2
    ;;
esac
exit $failed
