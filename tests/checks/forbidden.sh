#!/bin/sh
# A library does not end, print or keep state behind its caller's back.     forbidden.sh ROOT LIBRARY_A...
#
# In host/, cuda/ and mpi/: no exit, abort or printing, no assert, no mutable global variable but thread-local ones.
set -eu
root=$1
shift
bad=0

complain() { # complain RULE LINES
    [ -n "$2" ] || return 0
    printf 'rule broken: %s\n%s\n' "$1" "$2"
    bad=1
}

calls='_?exit|_Exit|quick_exit|abort|v?f?printf|__v?f?printf_chk|puts|putchar|putc|fput[cs]|fwrite|perror|fopen'
calls="$calls|__assert_fail|rand|srand|random|srandom|setenv|putenv|setlocale|signal|sigaction|system|fork"
# CUB has an exit() for exceptions, which nothing throws.
complain 'the library never calls these' \
    "$(nm -A --undefined-only "$@" | sed 's/.*\///' | grep -E " U ($calls)(@.*)?\$" |
        grep -v 'sort\.cu\.o: *U exit$' || true)"

# assert() leaves no trace in a release build, so the sources are asked.
cd "$root"
complain 'no assert in the library: bad input gets a status' \
    "$(grep -rnE '\bassert[[:space:]]*\(|<assert\.h>' host cuda mpi 2>/dev/null | grep -vE 'static_assert' || true)"

# Class d, b or C outside .data.rel.ro is writable; type TLS is one per thread. What nvcc itself puts beside kernels is
# its own business.
complain 'no mutable global variable in the library' \
    "$(nm -A -f sysv "$@" | awk -F'|' '
        { class = $3; type = $4; section = $7; gsub(/ /, "", class); gsub(/ /, "", type); gsub(/ /, "", section) }
        $1 ~ /\.cu\.o:.*__(fatDeviceText|cudaFatCubinHandle|device_stub_|nv_)/ { next }
        class ~ /^[dDbBgGsSC]$/ && type != "TLS" && section !~ /^\.data\.rel\.ro/ {
            sub(/.*\//, "", $1); gsub(/ +$/, "", $1); print $1 " (" section ")" }')"
exit $bad
