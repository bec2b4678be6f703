#!/bin/sh
# cumoe-cost on the command line: what it prints, and that a bad option is one line and status 2.
# usage: cost_test.sh PROGRAM
set -u
program=$1
bad=0

prints() { # prints TEXT OPTION...
    text=$1
    shift
    "$program" "$@" | grep -qF -- "$text" || { echo "cumoe-cost $*: does not print: $text"; bad=1; }
}

refuses() { # refuses TEXT OPTION...
    text=$1
    shift
    sentence=$("$program" "$@" 2>&1 >/dev/null)
    status=$?
    case $status,$sentence in
    2,*"$text"*) [ "$(printf '%s\n' "$sentence" | wc -l)" -eq 1 ] && return ;;
    esac
    echo "cumoe-cost $*: status $status, and it says: $sentence"
    bad=1
}

prints '| parameters | 269 M | 268697600 |' --experts 256
prints '| work forward | 5.77 TFLOP | 5772436045824 |' --shape mixtral-8x7b --tokens 4096 --gate external --timesteps 2
prints '"ops_per_timestep": 704643072' --shape mixtral-8x7b --gate external --top-k 4 --json -
prints '| gpt-oss-120b | 2880 | 2880 | 128 | 4 | swiglu-clamped | softmax-topk | yes |' --list
prints '--top-k-groups' --help

refuses '--expert: no such option; near it: experts' --expert 4
refuses '--shape mixtral: there is none of that name; near it: mixtral-8x7b' --shape mixtral
refuses '--nonsense: no such option' --nonsense
refuses 'experts: no such option' experts
refuses '--experts: needs a value' --experts
refuses '--experts 0: must be a whole number, 1..131072' --experts 0
refuses '--hidden 12x: must be a whole number' --hidden 12x
refuses '--gate best: must be one of noisy-topk, softmax' --gate best
refuses '--shape gpt-2: there is none of that name; near it: ' --shape gpt-2
refuses 'config.top_k = 9, but must be 1..8' --experts 8 --top-k 9
refuses 'num_groups' --gate hierarchical
refuses 'must be below 2^31' --tokens 2000000000
refuses '--json /: ' --json /
exit $bad
