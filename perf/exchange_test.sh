#!/bin/sh
# cumoe-perf exchange with tiny layers, on threads and on processes of mpirun: its results are right (it compares with
# the layer without ranks itself), bytes are those that sizes make, and what is wrong gets a sentence.
# usage: exchange_test.sh PROGRAM [MPIEXEC]
set -u
program=$1 mpiexec=${2:-}
command -v python3 >/dev/null || { echo 'skipped: there is no python3'; exit 77; }
bad=0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# Open MPI: more ranks than processors, as root, in a container.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1
export OMPI_MCA_hwloc_base_binding_policy=none OMPI_MCA_btl_vader_single_copy_mechanism=none OMP_NUM_THREADS=1

complain() {
    echo "$*"
    tail -n 30 "$work/said"
    bad=1
}

# The figures of a row that follow from others.
cat >"$work/check.py" <<'END'
import json, sys
data = json.load(open(sys.argv[1]))
assert len(data["rows"]) == int(sys.argv[2]), f"{len(data['rows'])} rows"
assert not data["not_measured"], data["not_measured"]
for row in data["rows"]:
    W, T, K, n = row["ranks"], row["T"], row["K"], row["exchange_chunks"] or 1
    C = -(-row["exchange_capacity"] // n) * n
    token = row["H"] * (4 if row["dtype"] == "f32" else 2) * (2 if row["part"] == "forward + backward" else 1)
    assert row["same_bits"] == 1 and row["rows"] + row["dropped"] == W * T * K, row
    assert row["rows"] / W <= row["most_rows"] <= row["rows"], row
    assert abs(row["exchange_ms"] + row["experts_ms"] + row["rest_ms"] - row["ms"]) < 1e-3 * row["ms"], row
    assert abs(row["busbw"] - row["algbw"] * (W - 1) / W) < 1e-3 * row["algbw"], row
    assert abs(row["algbw"] - row["exchange_bytes"] / row["exchange_ms"] / 1e6) < 1e-3 * row["algbw"], row
    if C:
        for way in "dispatch", "return":
            assert row[way + "_to_itself"] == C * token and row[way + "_to_others"] == (W - 1) * C * token, row
        assert row["exchange_bytes"] == 2 * W * C * token, row
    else:
        assert row["dropped"] == 0, row
        assert W * row["exchange_bytes"] >= token * (W * T + row["rows"]), row # of all, each token at least once
        assert row["dispatch_to_itself"] <= T * token and row["return_to_itself"] <= T * K * token, row
    if W == 1 and not C:
        assert row["dispatch_to_others"] == row["return_to_others"] == 0, row
        assert row["dispatch_to_itself"] == T * token and row["return_to_itself"] == T * K * token, row
    if row["skew"] == "one" and W > 1 and not C: # all rows to rank 0
        assert row["most_rows"] == row["rows"] and row["dispatch_to_others"] == T * token, row
END

measures() { # measures ROWS OPTION...
    rows=$1
    shift
    "$program" exchange "$@" --backend cpu --seconds 0 --json "$work/json" --csv "$work/csv" >"$work/said" 2>&1 ||
        complain "$*: status $?, and it says:"
    python3 "$work/check.py" "$work/json" "$rows" >>"$work/said" 2>&1 || complain "$*: wrong figures:"
    [ "$(grep -c ',cumoe,' "$work/csv")" -eq "$rows" ] || complain "$*: the CSV file has other rows"
}

says() { # says STATUS TEXT OPTION...
    want=$1 text=$2
    shift 2
    status=0
    "$program" "$@" >"$work/said" 2>&1 || status=$?
    if [ $status -ne "$want" ] || ! grep -qF -- "$text" "$work/said"; then complain "$*: status $status, or no '$text' in:"; fi
}

small='--hidden 24 --intermediate 16 --experts 9 --top-k 2 --tokens 31'
# shellcheck disable=SC2086 # options are words
{
    measures 54 $small --ranks 1,2,4 --skew uniform,zipf,one --exchange-capacity 0,9
    measures 24 $small --ranks 1,3 --skew uniform,zipf --exchange-capacity 0,10 --exchange-chunks 0,2,3 --pass forward
    measures 24 $small --ranks 2,3 --dtype bf16 --gate softmax,external,hierarchical,sigmoid-topk
    measures 6 $small --ranks 3 --bias --activation swiglu --dtype f16,f32
    measures 1 $small --ranks 2 --pass forward
    measures 1 $small --ranks 2 --pass backward
    "$program" exchange $small --ranks 2 --seconds 1 --csv "$work/csv" >"$work/said" 2>&1 || complain 'with time'
    grep -q ', 2 ranks, capacity exact, chosen chunks$' "$work/said" || complain 'with time: no heading'
    grep -qE '\| forward \+ backward .*\| [0-9.]+ \| 0 \| same bits \|$' "$work/said" || complain 'with time: no share of the link'
    "$program" exchange $small --ranks 1 --seconds 0 --link 2.5 --json - >"$work/said" 2>&1 || complain '--link'
    grep -q '"link": 2.5, "of_link": ' "$work/said" || complain '--link: is not in the file'

    says 2 '--ranks tcp: must be mpi, nccl, or numbers of threads, 1..1024' exchange --ranks tcp
    says 2 '--ranks 2,1025: must be mpi' exchange --ranks 2,1025
    says 2 '--ranks 2,: must be mpi' exchange --ranks 2,
    says 2 '--ranks 10: there are no more than 9 experts to share' exchange $small --ranks 2,10
    says 2 '--ranks 4: there are no more than 3 groups of experts' exchange $small --gate hierarchical --ranks 4
    says 2 '--exchange-capacity 2147483647: times 2 ranks' exchange $small --ranks 2 --exchange-capacity 2147483647
    says 2 '--exchange-chunks 4: one of 3 ranks has 3 experts' exchange $small --ranks 3 --exchange-chunks 4
    says 2 '--exchange-chunks: is for the command' stages --exchange-chunks 2
    says 2 '--link fast: must be GB/s' exchange --link fast
    says 2 '--link 0: must be GB/s' exchange --link 0
    says 2 '--cache cold: ' exchange --cache cold
    says 2 '--launch graph: ' exchange --launch graph
    says 2 '--ranks: is for the command exchange alone' layer --ranks 2
    says 2 '--exchange-capacity: is for the command' stages --exchange-capacity 4
    says 1 'GB of memory for 2 ranks, and ' exchange --hidden 65536 --intermediate 65536 --experts 4096 --tokens 2 --seconds 0 --ranks 2
    says 1 'CUMOE_GATE_BALANCED' exchange $small --gate balanced --ranks 2 --seconds 0
    says 1 'cumoe_ep_create: handle is' exchange $small --backend cpu --ranks nccl --seconds 0

    if [ -n "$mpiexec" ]; then
        for ranks in 1 3; do
            "$mpiexec" -n $ranks "$program" exchange $small --ranks mpi --backend cpu --exchange-capacity 0,5 --seconds 0 \
                --json "$work/json" >"$work/said" 2>&1 || complain "mpi $ranks: status $?, and it says:"
            python3 "$work/check.py" "$work/json" 6 >>"$work/said" 2>&1 || complain "mpi $ranks: wrong figures:"
        done
        "$mpiexec" -n 3 "$program" exchange $small --experts 2 --ranks mpi >"$work/said" 2>&1 &&
            complain 'mpi: more ranks than experts are accepted'
        grep -q 'no more than 2 experts to share' "$work/said" || complain 'mpi: no sentence about experts'
    fi
}
exit $bad
