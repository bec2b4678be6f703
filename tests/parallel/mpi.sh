#!/bin/sh
# mpi.sh MPIEXEC check THREADS PROCESSES N [OPTION...]   cumoe-check on N processes: hashes as from N threads
# mpi.sh MPIEXEC kill PROGRAM R                          cumoe-check --kill R of 3 processes: the others are told
# mpi.sh MPIEXEC failure PROGRAM WAY                     mpi_failures, of whose 3 processes the last fails
set -eu
mpiexec=$1 action=$2 program=$3 word=$4
shift 4

# Open MPI: more ranks than processors, as root, in a container. Ranks share few processors, and each has one thread.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1
export OMPI_MCA_hwloc_base_binding_policy=none OMPI_MCA_btl_vader_single_copy_mechanism=none
export OMP_NUM_THREADS=1
export ASAN_OPTIONS=detect_leaks=0 # MPI libraries leak

out=$(mktemp)
trap 'rm -f "$out" "$out.threads"' EXIT

demand() { # demand LINE...     each begins a line of the output
    for line; do
        grep -q "^$line" "$out" || { echo "there is no line: $line"; exit 1; }
    done
}

# A rank that dies does not end the others; and mpiexec gives 0, whatever they give.
[ "$action" = check ] || export OMPI_MCA_orte_enable_recovery=1

case $action in
check)
    ranks=$1
    shift
    "$mpiexec" -n "$ranks" "$word" --ranks mpi "$@" >"$out" || { cat "$out"; exit 1; }
    "$program" --ranks "$ranks" --transport local "$@" >"$out.threads" || { cat "$out.threads"; exit 1; }
    diff "$out.threads" "$out"
    tail -n 1 "$out"
    ;;
kill)
    "$mpiexec" -n 3 "$program" --ranks mpi --kill "$word" --timeout 2 >"$out" 2>&1 || true
    cat "$out"
    demand 'rank 0 is told after 2' 'rank 2 is told after 2' 'ok ' '1 cases, 0 failed'
    ;;
failure)
    "$mpiexec" -n 3 "$program" "$word" >"$out" 2>&1 || true
    cat "$out"
    demand 'rank 0 has come to its end' 'rank 1 has come to its end'
    ;;
esac
