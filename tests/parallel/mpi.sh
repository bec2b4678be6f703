#!/bin/sh
# mpi.sh MPIEXEC check PROGRAM N [ARGUMENT...]     cumoe-check on N processes; hashes as from threads
# mpi.sh MPIEXEC failure PROGRAM WAY               3 processes, of which the last fails: the others are told
# mpi.sh MPIEXEC run PROGRAM N [ARGUMENT...]       any program
set -eu
mpiexec=$1 action=$2 program=$3 word=$4
shift 4

# Open MPI: more ranks than processors, as root, in a container; a rank that dies does not end the others. Ranks share
# few processors, and each has one thread.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1
export OMPI_MCA_hwloc_base_binding_policy=none OMPI_MCA_btl_vader_single_copy_mechanism=none
export OMPI_MCA_orte_enable_recovery=1 OMP_NUM_THREADS=1
export ASAN_OPTIONS=detect_leaks=0 # MPI libraries leak

out=$(mktemp)
trap 'rm -f "$out" "$out.threads"' EXIT

case $action in
run) "$mpiexec" -n "$word" "$program" "$@" ;;
check)
    "$mpiexec" -n "$word" "$program" --ranks mpi "$@" >"$out" || { cat "$out"; exit 1; }
    "$program" --ranks "$word" --transport local "$@" >"$out.threads" || { cat "$out.threads"; exit 1; }
    diff "$out.threads" "$out"
    tail -n 1 "$out"
    ;;
failure)
    "$mpiexec" -n 3 "$program" "$word" >"$out" 2>&1 || true # the status is that of the dead
    cat "$out"
    for rank in 0 1; do
        grep -q "^rank $rank has come to its end" "$out" || { echo "rank $rank has not come to its end"; exit 1; }
    done
    ;;
esac
