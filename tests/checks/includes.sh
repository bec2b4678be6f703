#!/bin/sh
# Who may include whom: the arrows of CONTRIBUTING.md.     includes.sh [ROOT]
set -u
cd "${1:-$(dirname "$0")/../..}" || exit 2
bad=0

# Every include of the files below FOLDERS, as FILE:LINE:NAME.
includes() {
    for folder; do
        [ ! -e "$folder" ] || grep -rHnE --include='*.[ch]' --include='*.cu' --include='*.cuh' --include='*.cc' \
            '^[[:space:]]*#[[:space:]]*include' "$folder"
    done | sed -E 's/^([^:]+:[0-9]+:).*include[[:space:]]*[<"]([^>"]*)[>"].*/\1\2/'
}

complain() { # complain RULE LINES
    [ -z "$2" ] && return
    printf 'rule broken: %s\n%s\n' "$1" "$2"
    bad=1
}

never() { # never PATTERN RULE FOLDER...
    pattern=$1 rule=$2
    shift 2
    complain "$rule" "$(includes "$@" | grep -E "^[^:]+:[0-9]+:($pattern)")"
}

only() { # only PATTERN RULE FOLDER...
    pattern=$1 rule=$2
    shift 2
    complain "$rule" "$(includes "$@" | grep -vE "^[^:]+:[0-9]+:($pattern)\$")"
}

cuda='cuda|cublas|cub/|nvtx|.*\.cuh$|(\.\./)*cuda/|(\.\./)+cuda/'
torch='torch/|ATen/|c10/|Python\.h'
outside='(.*/)?(host|cuda)/'

complain 'include/ uses <stddef.h>, <stdint.h> and its own headers; cumoe/mpi.h alone <mpi.h>' \
    "$(includes include | grep -vE '^([^:]+:[0-9]+:(stddef\.h|stdint\.h|cumoe/[a-z_]+\.h)|include/cumoe/mpi\.h:[0-9]+:mpi\.h)$')"
never "$cuda|nccl|$torch|(.*/)?mpi\.h|(.*/)?(tests|perf|examples|mpi)/" \
    'host/ knows no CUDA, NCCL, Torch, MPI, tests or programs' host
only '[a-z_]+\.h|cumoe/[a-z_]+\.h' 'mpi/ uses the public API alone' mpi
seam='host/(activation|activation_real|arena|backend|elementary|error|gate_levels|kinds|philox|tile|weights_layout)\.h'
only "[a-z_]+\.h|cumoe/[a-z_]+\.h|$seam|host/cpu/[a-z0-9_]+\.h" "a backend knows stages, not layers: $seam" host/cpu
complain "a backend knows stages, not layers: $seam" \
    "$(includes cuda | grep -E ':(.*/)?host/' | grep -vE ":($seam|host/comm\.h)\$")"
never '.*portable/' 'hopper kernels do not include portable ones' cuda/gemm/hopper
never '.*(hopper|ptx)/' 'portable kernels do not include hopper ones' cuda/gemm/portable
never "$outside|$torch|nccl" 'examples/ uses the public API alone' examples
never "$outside|$torch" 'perf/ uses the public API alone' perf
never "$outside" 'torch/ uses the public API alone' torch
never "$torch" 'Torch stays in torch/' include host cuda tests perf examples
never "$outside" 'of the tests, unit/ alone looks into host/' tests/stage tests/layer tests/package
complain 'of host/, tests/support sees the noise alone' \
    "$(includes tests/support | grep -E "^[^:]+:[0-9]+:$outside" | grep -v ':host/philox\.h$')"
never 'cumoe/(cumoe|handle|layer|weights|optimizer|stages|status)\.h' \
    'the reference shares nothing with the library but types and config' \
    tests/support/reference*

never 'cuda/|tests/sim/' 'kernels are run by tests/sim alone' tests/unit tests/stage tests/layer tests/support tests/package
instructions='<<<|\basm\b|__(shared|constant|managed)__|__(shfl|ballot|any|all|match|reduce|activemask|syncwarp|syncthreads'
instructions="$instructions|threadfence|popc|clz|ffs|ldg|ldcs|ldcg|stcs|stcg|stwt|float_as|uint_as|int_as|expf|logf"
instructions="$instructions|fdividef|cvta)[a-z_]*\b|\batomic[A-Z]"
[ ! -d cuda ] || complain 'instructions stand in cuda/ptx.cuh' \
    "$(grep -rnE --include='*.cu' --include='*.cuh' "$instructions" cuda | grep -v '^cuda/ptx\.cuh:')"

wrappers=$(includes host cuda tests perf examples torch | grep -E ':nccl[a-z_]*\.h$' | cut -d: -f1 | sort -u)
[ "$(printf '%s\n' "$wrappers" | wc -l)" -le 1 ] || complain 'one file wraps nccl.h' "$wrappers"

device_calls='\bcuda(Malloc|Free|HostAlloc|DeviceSynchronize|StreamSynchronize|EventSynchronize|GetLastError)'
[ ! -d cuda ] || complain 'allocation and synchronisation in cuda/ stand in the one device file' \
    "$(grep -rHnE "$device_calls" cuda | grep -vE '^cuda/device\.')"
exit $bad
