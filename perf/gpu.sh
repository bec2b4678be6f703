#!/bin/sh
# Everything that a GPU can tell, in one command: what its instructions give, whether every result is right and has
# the same bits again, what compute-sanitizer finds, and the time of every stage beside dense products of the same run.
# usage: perf/gpu.sh [OPTION...]
#   --build DIR      only build: a folder of programs, to be carried where there is a GPU and no compiler
#   --bundle DIR     run the programs of such a folder; otherwise they are built in build/release
#   --out DIR        write there; otherwise to perf/results/GPU
#   --commit HASH    of these sources, where neither git nor the bundle tells
#   --limit SECONDS  for all together (540), building aside
#   --dry-run        say every command with its time limit; run on the CPU, with tiny layers, what can run there
# Exit status: 0; 1 a part failed, what the others gave is there; 2 bad usage; 77 no GPU.
# shellcheck disable=SC2016 # backquotes are Markdown's
set -eu
usage() { sed -n '/^# usage/,/^# Exit/s/^# //p' "$0"; }
wrong() { echo "gpu.sh: $1" >&2; exit 2; }

dry='' build='' bundle='' out='' commit='' limit=540 command="$0 $*"
while [ $# -gt 0 ]; do
    case $1 in
    --help) usage; exit 0 ;;
    --dry-run) dry=yes ;;
    --build | --bundle | --out | --commit | --limit)
        [ $# -ge 2 ] || wrong "$1 needs a value"
        case $1 in
        --build) build=$2 ;; --bundle) bundle=$2 ;; --out) out=$2 ;; --commit) commit=$2 ;; --limit) limit=$2 ;;
        esac
        shift
        ;;
    *) wrong "$1: no such option; see --help" ;;
    esac
    shift
done
case $limit in '' | *[!0-9]*) wrong "--limit $limit: must be a whole number of seconds" ;; esac
[ "$limit" -ge 60 ] || wrong "--limit $limit: below 60 s nothing of use is measured"
[ -z "$bundle" ] || [ -d "$bundle" ] || wrong "--bundle $bundle: there is no such folder"

here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")
has() { command -v "$1" >/dev/null; }
git_commit() { git -C "$here" describe --always --abbrev=40 --dirty 2>/dev/null || echo unknown; }
programs='cumoe-perf cumoe-check check_sim'

# ---- building ----

make_programs() { # make_programs FOLDER
    cmake -S "$root" -B "$1" -DCMAKE_BUILD_TYPE=Release -DCUMOE_EXAMPLES=OFF >"$1.log" 2>&1 ||
        { tail -n 20 "$1.log"; return 1; }
    for program in $programs; do # a program that cannot be built is a part that is left out
        cmake --build "$1" -j "$(nproc)" --target "$program" >>"$1.log" 2>&1 || echo "gpu.sh: $program: not built, see $1.log"
    done
}

find_program() { # find_program NAME: where it is below $bundle, or nothing
    for folder in '' /perf /tests/check /tests/sim; do
        [ ! -x "$bundle$folder/$1" ] || { echo "$bundle$folder/$1"; return; }
    done
}

copy_libraries() { # those that a machine without a toolkit may lack
    ldd "$@" 2>/dev/null | sed -n 's/.*=> \(\/[^ ]*\) .*/\1/p' | sort -u |
        grep -vE '/(libc|libm|libgomp|libstdc\+\+|libgcc_s|libdl|libpthread|librt|ld-linux[^/]*)\.so[.0-9]*$' |
        while read -r library; do
            mkdir -p "$build/lib"
            cp "$library" "$build/lib/"
        done
}

if [ -n "$build" ]; then
    mkdir -p "$build" "$root/build"
    make_programs "$root/build/gpu"
    bundle=$root/build/gpu
    for program in $programs; do
        file=$(find_program "$program")
        [ -z "$file" ] || [ "$program" = check_sim ] || { cp "$file" "$build/" && strip "$build/$program"; }
    done
    file=$(find_program check_sim)
    [ -z "$file" ] || "$file" --instructions >"$build/simulator.txt" 2>/dev/null || true
    "$here/baseline.sh" --build "$build/probe" || echo 'gpu.sh: probe: not built'
    [ ! -e "$build/probe" ] || strip "$build/probe"
    copy_libraries "$build"/*
    cp "$0" "$build/gpu.sh"
    echo "${commit:-$(git_commit)}" >"$build/commit"
    nvcc --version 2>/dev/null | sed -n 's/.*release [^,]*, //p' >"$build/toolkit" || true
    size=$(du -sm "$build" | cut -f 1)
    echo "$build: $size MiB: $(cd "$build" && echo *)"
    [ "$size" -le 64 ] || { echo "gpu.sh: $size MiB, but 64 is what can be carried" >&2; exit 1; }
    [ -x "$build/cumoe-perf" ] && [ -x "$build/cumoe-check" ]
    exit
fi

# ---- the machine ----

gpu='' ask=''
if has nvidia-smi && gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader -i 0 2>/dev/null); then
    ask=yes
elif [ -z "$dry" ]; then
    echo 'gpu.sh: no GPU: nvidia-smi is missing or finds none'
    exit 77
else
    gpu='no GPU'
fi
query() { [ -z "$ask" ] || nvidia-smi --query-gpu="$1" --format=csv,noheader -i 0; }
if [ -z "$bundle" ]; then
    bundle=$root/build/release
    [ -n "$dry" ] || make_programs "$bundle"
    [ -x "$bundle/probe" ] || [ -n "$dry" ] || "$here/baseline.sh" --build "$bundle/probe" || true
fi
bundle=$(cd "$bundle" 2>/dev/null && pwd) || wrong "build/release is not there; --bundle DIR says where programs are"
[ -z "$commit" ] && commit=$(cat "$bundle/commit" 2>/dev/null || git_commit)
toolkit=$(cat "$bundle/toolkit" 2>/dev/null || nvcc --version 2>/dev/null | sed -n 's/.*release [^,]*, //p' || true)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
[ -n "$out" ] || { [ -n "$dry" ] && out=$work/out; } || out=$here/results/$(echo "$gpu" | tr 'A-Z ' 'a-z-')
mkdir -p "$out"
rm -f "$out/check.json" "$out/stages.json" "$out/layer.json" "$out/capacity.json" "$out/exchange.json" "$out/nccl.json" \
    "$out/instructions.txt" "$out/report.md"
wheel() { # wheel FOLDER: of NVIDIA's Python packages, where its libraries are
    python3 -c 'import glob, sys, sysconfig
print(*glob.glob(sysconfig.get_path("purelib") + "/nvidia/" + sys.argv[1] + "/lib")[:1])' "$1" 2>/dev/null || true
}
cublas=$(wheel 'cu[0-9]*') nccl=$(wheel nccl)
LD_LIBRARY_PATH=$bundle/lib${cublas:+:$cublas}${nccl:+:$nccl}${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export LD_LIBRARY_PATH

# ---- parts ----

short=small, # cases of cumoe-check that are few
start=$(date +%s)
left() { echo $((limit - $(date +%s) + start)); }
status=0
: >"$work/parts"
: >"$work/failures"

note() { # note NAME OUTCOME SECONDS COMMAND: a row of the report
    printf '| %s | %s | %s | `%s` |\n' "$1" "$2" "$3" "$4" >>"$work/parts"
    echo "   $1: $2"
}
left_out() { # left_out NAME WHY
    note "$1" "left out: $2" 0 ''
    [ -n "$dry" ] || status=1
}
failed() { # failed NAME OUTCOME: with the end of its log
    { printf '\n### %s: %s\n\n```\n' "$1" "$2" && tail -n 25 "$work/$1.log" | cut -c 1-200 && echo '```'; } >>"$work/failures"
    tail -n 10 "$work/$1.log"
    status=1
}
# part NAME SECONDS FILE PROGRAM OPTION...   its output to FILE, its messages to the log. A dry run only says so, and
# runs what stands in $instead, unless that is empty.
part() {
    name=$1 seconds=$2 file=$3
    shift 3
    said=$(echo "$*" | sed "s|$out/||g; s|$work/||g; s|$bundle/||g; s|$here/||g")
    echo "== $name, at most $seconds s: $said"
    if [ -n "$dry" ]; then
        # shellcheck disable=SC2086 # words
        set -- $instead
        [ $# -gt 0 ] || { note "$name" 'not run: needs a GPU' 0 "$said"; return 1; }
        echo "   here instead: $(echo "$*" | sed "s|$work/||g")"
    fi
    program=$(find_program "$1")
    [ -n "$program" ] || program=$(command -v "$1") || { left_out "$name" "there is no program $1"; return 1; }
    shift
    [ "$(left)" -ge "$seconds" ] || seconds=$(left)
    [ "$seconds" -gt 4 ] || { left_out "$name" 'no time left'; return 1; }
    began=$(date +%s) code=0
    timeout -k 5 "$seconds" "$program" "$@" >"$file" 2>"$work/$name.log" || code=$?
    took=$(($(date +%s) - began))
    case $code in
    0) note "$name" ok $took "$said"; return 0 ;;
    77) left_out "$name" 'the program finds no GPU it can use' ;;
    124) outcome='out of time' ;;
    *) outcome="exit status $code" ;;
    esac
    if [ $code -ne 77 ]; then note "$name" "FAILED: $outcome" $took "$said"; fi
    tail -n 25 "$file" >>"$work/$name.log"
    failed "$name" "${outcome-left out}"
    return 1
}

# What each instruction gave. simulator.txt is what the simulator says; where the two differ, exit status 1.
touch "$work/empty"
simulator=$bundle/simulator.txt
[ -e "$simulator" ] || simulator=$work/empty
instead='check_sim --instructions'
part instructions 60 "$work/instructions.txt" cumoe-check --instructions "$simulator" || true
if [ -s "$work/instructions.txt" ]; then
    echo "# $gpu, driver $(query driver_version), toolkit $toolkit, commit $commit" >"$out/instructions.txt"
    cat "$work/instructions.txt" >>"$out/instructions.txt"
fi

# Every case against the reference. Of thousands of lines, check.json keeps a count for each part and all failures.
condense() { # condense FILE
    awk '/^\{"case".*\}$/ {
        part = $0; sub(/^\{"case": "/, "", part); sub(/:.*/, "", part)
        error = $0; sub(/.*"error": /, "", error); sub(/[,}].*/, "", error)
        if (!(part in cases)) order[++parts] = part
        cases[part]++
        if (error + 0 > worst[part] + 0) worst[part] = error
        if ($0 !~ /"ok": true/) { failed[part]++; if (failures++ < 40) lines = lines (lines ? ",\n  " : "\n  ") substr($0, 1, 1500) }
    }
    /^\{"device"/ { device = substr($0, 2, length($0) - 2) ",\n " }
    END {
        printf "{%s\"parts\": [", device
        for (i = 1; i <= parts; i++) {
            p = order[i]
            printf "%s\n  {\"part\": \"%s\", \"cases\": %d, \"failed\": %d, \"error\": %.4g}", (i > 1 ? "," : ""), p, cases[p], failed[p], worst[p]
        }
        printf "],\n \"failures\": %d, \"failed\": [%s]}\n", failures, lines
    }' "$1"
}
instead="cumoe-check --backend cpu --filter $short --json --hash"
part check 150 "$work/check.lines" cumoe-check --backend cuda --json --hash || true
[ ! -s "$work/check.lines" ] || condense "$work/check.lines" >"$out/check.json" || status=1

# Time, beside dense products of the same run: every stage, the layer for any number of tokens, any number of experts.
measure() { # measure NAME SECONDS INSTEAD OPTION...    INSTEAD: options of a dry run
    name=$1 seconds=$2
    instead="cumoe-perf $3 --backend cpu --seconds 0 --json $out/$name.json"
    shift 3
    part "$name" "$seconds" "$work/$name.md" cumoe-perf "$@" --backend cuda --commit "$commit" --json "$out/$name.json" || true
}
tiny='--hidden 33 --intermediate 45 --experts 5 --top-k 2'
measure stages 150 "stages $tiny --tokens 1,67 --dtype bf16,f32" stages \
    --shape paper-256,olmoe,qwen3-30b-a3b --gate noisy-topk --tokens 64,4096 --dtype bf16,f32 --seconds 40
measure layer 90 "layer $tiny --tokens 1,67" layer \
    --shape olmoe --activation relu,swiglu --tokens 1,16,256,4096,32768 --dtype bf16 --seconds 30
measure capacity 60 "capacity --hidden 8 --intermediate 2 --tokens 5" capacity --tokens 8192 --dtype bf16 --seconds 20

# Ranks: threads that share the GPU, and one over NCCL, where it is installed. The next one with several GPUs has
# mpirun -n N cumoe-perf exchange --ranks mpi, and torchrun --no-python --nproc-per-node N cumoe-perf exchange --ranks nccl.
measure exchange 60 "exchange $tiny --tokens 67 --ranks 1,2" exchange \
    --shape olmoe --tokens 64,4096 --dtype bf16 --ranks 1,2,4 --seconds 20
has_nccl() { [ -n "$nccl" ] || ldconfig -p 2>/dev/null | grep -q 'libnccl\.so\.2'; }
if [ -z "$dry" ] && ! has_nccl; then
    note nccl 'left out: there is no NCCL here' 0 ''
else
    measure nccl 60 "exchange $tiny --tokens 67" exchange --shape olmoe --tokens 64,4096 --dtype bf16 --ranks nccl \
        --exchange-capacity 0,32768 --exchange-chunks 1,2,4 --seconds 15
fi

# The same bits again: hashes of all that a layer gives, forward and backward.
instead="cumoe-check --backend cpu --filter $short --filter ward: --json --hash"
if [ -s "$work/check.lines" ] &&
    part repeat 100 "$work/repeat.lines" cumoe-check --backend cuda --filter ward: --json --hash; then
    grep '"hash"' "$work/repeat.lines" >"$work/again" || true
    grep '"hash"' "$work/check.lines" >"$work/once" || true
    if ! cmp -s "$work/once" "$work/again"; then
        diff "$work/once" "$work/again" >"$work/repeat.log" || true
        note repeat 'FAILED: other bits than the first run' 0 ''
        failed repeat 'other bits than the first run'
    fi
fi

# compute-sanitizer, where it is there and works.
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)
instead=''
if [ -z "$dry" ] && [ -z "$sanitizer" ]; then
    note sanitizer 'left out: there is no compute-sanitizer here' 0 ''
elif [ -z "$dry" ] && ! timeout 60 "$sanitizer" "$(find_program cumoe-check)" --instructions >"$work/tried" 2>&1 &&
    ! grep -q 'ERROR SUMMARY' "$work/tried"; then # some machines do not let it at the device
    note sanitizer "left out: it does not work here: $(grep -m 1 '=' "$work/tried" | tr -d '|\`' | cut -c 1-150)" 0 ''
else
    for tool in memcheck racecheck initcheck; do
        checked=$(find_program cumoe-check)
        part $tool 60 "$work/$tool.txt" "${sanitizer:-compute-sanitizer}" --tool $tool --error-exitcode 9 \
            "${checked:-cumoe-check}" --backend cuda --filter "$short" --filter ward: || true
    done
fi

# What other libraries make of it, if that much time is left.
instead=''
if [ -x "$here/baseline.sh" ] && { [ -n "$dry" ] || [ "$(left)" -ge 200 ]; }; then
    probe=$(find_program probe)
    rest=$(($(left) - 20))
    part baseline "$rest" "$work/baseline.md" "$here/baseline.sh" --limit $((rest - 10)) \
        ${probe:+--probe "$probe"} --commit "$commit" --out "$out" || true
fi

# ---- the report ----

fact() { [ -z "$2" ] || printf '| %s | %s |\n' "$1" "$2"; }
{
    echo "# $gpu"
    echo
    [ -z "$dry" ] || printf 'A dry run: nothing here was measured on a GPU.\n\n'
    printf '| | |\n|---|---|\n'
    fact command "\`$command\`"
    fact commit "$commit"
    fact date "$(date -u '+%F %T UTC')"
    fact driver "$(query driver_version)"
    fact toolkit "$toolkit"
    fact 'clocks, at most' "$(query clocks.max.sm,clocks.max.mem)"
    fact 'power limit' "$(query power.limit)"
    printf '\n| part | outcome | seconds | command |\n|---|---|---:|---|\n'
    cat "$work/parts"
    [ ! -s "$work/failures" ] || { printf '\n## What failed\n' && cat "$work/failures"; }
    for table in stages layer capacity exchange nccl; do
        [ -s "$work/$table.md" ] || continue
        printf '\n## %s\n\n' $table
        cat "$work/$table.md"
    done
    [ ! -s "$out/check.json" ] || { printf '\n## check\n\n| part | cases | failed | worst error, of what is allowed |\n|---|---:|---:|---:|\n' &&
        sed -n 's/^  {"part": "\(.*\)", "cases": \(.*\), "failed": \(.*\), "error": \([^}]*\)}.*/| \1 | \2 | \3 | \4 |/p' "$out/check.json"; }
} >"$out/report.md"
size=$(cat "$out"/report.md "$out"/*.json "$out"/instructions.txt 2>/dev/null | wc -c)
echo "== $(left) s of $limit s left over; $out has $((size / 1024)) KiB"
[ "$size" -le 409600 ] || echo 'gpu.sh: more than 400 KiB: too much for perf/results'
exit $status
