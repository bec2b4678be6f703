#!/bin/sh
# Every public header compiles alone, as C17 and as C++17, pedantic, warnings being errors.
# headers.sh [ROOT [CC [CXX [FLAG...]]]]      cumoe/mpi.h where there are FLAGs, which say where <mpi.h> is
set -u
root=${1:-$(dirname "$0")/../..} cc=${2:-cc} cxx=${3:-c++}
[ $# -le 3 ] && flags= || { shift 3 && flags=$*; }
bad=0

compiles() { # compiles COMMAND...
    # Twice: the guard works too. The typedef: C has no empty program.
    # shellcheck disable=SC2086 # flags are words
    if ! message=$(printf '#include <%s>\n' "$header" "$header" | sed '$a typedef int not_empty;' |
        "$@" -I"$root/include" -Wall -Wextra -Wpedantic -Werror -fsyntax-only $flags - 2>&1); then
        printf '%s: %s\n%s\n' "$header" "$1" "$message"
        bad=1
    fi
}

[ -d "$root/include/cumoe" ] || { echo "$root/include/cumoe: no such folder"; exit 2; }
for path in "$root"/include/cumoe/*.h; do
    header=cumoe/$(basename "$path")
    [ -n "$flags" ] || [ $header != cumoe/mpi.h ] || continue
    compiles "$cc" -std=c17 -x c -Wstrict-prototypes
    compiles "$cxx" -std=c++17 -x c++
done
exit $bad
