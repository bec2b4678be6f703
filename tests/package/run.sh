#!/bin/sh
# run.sh BUILD WORK install CMAKE                        install into a prefix below WORK, then move the prefix
# run.sh BUILD WORK cmake|pkg-config CMAKE c|cc FORM     build and run a consumer against it, FORM shared or static;
#                                                        mpi, mpi_static: one that is a group of MPI processes, alone
set -eu
build=$1 work=$2 action=$3 cmake=$4 language=${5:-} form=${6:-}
here=$(cd "$(dirname "$0")" && pwd)
prefix="$work/moved here"

if [ "$action" = install ]; then
    rm -rf "$work"
    "$cmake" --install "$build" --prefix "$work/first"
    mv "$work/first" "$prefix"
    exit
fi

case $form in mpi*)
    source="$here/consumer/consumer_mpi.$language" package=cumoe_mpi
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    ;;
*) source="$here/consumer/consumer.$language" package=cumoe ;;
esac
out="$work/$action.$language.$form"
mkdir -p "$out"

if [ "$action" = cmake ]; then
    case $language in c) name=C ;; *) name=CXX ;; esac
    "$cmake" -S "$here/consumer" -B "$out" -DCMAKE_PREFIX_PATH="$prefix" \
        -DLANGUAGE="$name" -DSOURCE="$source" -DFORM="$form"
    "$cmake" --build "$out"
else
    case $language in c) compiler="${CC:-cc} -std=c17" ;; *) compiler="${CXX:-c++} -std=c++17" ;; esac
    file=$(find "$prefix" -name cumoe.pc)
    PKG_CONFIG_PATH=$(dirname "$file")
    LD_LIBRARY_PATH=$(dirname "$PKG_CONFIG_PATH") # CMake writes it into the program; by hand it must be told
    export PKG_CONFIG_PATH LD_LIBRARY_PATH
    case $form in static) static=--static ;; *) static= ;; esac
    # shellcheck disable=SC2086 # options are words; eval, as pkg-config quotes spaces in them
    eval $compiler -Wall -Wextra -Wpedantic -Werror '"$source"' -o '"$out/consumer"' \
        "$(pkg-config $static --cflags --libs $package)" ${static:+-static}
fi

linked=$(ldd "$out/consumer" 2>/dev/null | grep -c 'libcumoe\.so' || true)
case $form in
shared | mpi) [ "$linked" = 1 ] || { echo 'libcumoe.so was not linked'; exit 1; } ;;
*) [ "$linked" = 0 ] || { echo 'libcumoe.so was linked, not libcumoe.a'; exit 1; } ;;
esac
"$out/consumer"
