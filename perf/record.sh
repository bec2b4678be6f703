#!/bin/sh
# Keeps results, and makes of them what README.md shows.
# usage: perf/record.sh NAME            build/bench, the last `make bench`, becomes perf/results/NAME; then all of it
#        perf/record.sh --all           tables and pictures of every folder of results, and README.md
#        perf/record.sh --again FOLDER  those of one folder
set -eu
usage() { sed -n '3,5s/^# //p' "$0"; }
here=$(cd "$(dirname "$0")" && pwd)
for python in "${PYTHON:-python3}" python3; do # the first that can draw
    "$python" -c 'import matplotlib' 2>/dev/null && break
done

again() { # again FOLDER
    rm -f "$1/joined.md"
    "$python" "$here/plot.py" "$1" || [ $? -eq 77 ] # no matplotlib, no pictures
    "$python" "$here/join.py" "$1" >"$1/joined.md.new"
    mv "$1/joined.md.new" "$1/joined.md"
    [ ! -e "$1/peers.json" ] || "$python" "$here/peers/report.py" "$1/peers.json" >"$1/peers.md"
}
all() {
    cd "$here/.."
    for file in perf/results/*/layer.json; do again "$(dirname "$file")"; done
    perf/verified.sh >perf/results/verified.md
    "$python" perf/join.py --gpus perf/results >perf/results/gpus.md
    tests/checks/readme.sh --write
}
keep() { # keep NAME
    from=$here/../build/bench to=$here/results/$1
    [ -e "$from/layer.json" ] || { echo "record.sh: build/bench has no layer.json: run make bench first" >&2; exit 1; }
    mkdir -p "$to"
    for name in layer given types stages capacity exchange peers roofline; do
        rm -f "$to/$name.json" "$to/$name.svg"
        [ ! -e "$from/$name.json" ] || cp "$from/$name.json" "$to/"
    done
    cp "$from/run.txt" "$to/"
    all
    du -sk "$to" | awk '{ print $2 ": " $1 " KiB" } $1 > 500 { print "record.sh: that is a lot for perf/results" }'
}

case ${1-},$# in
--help,1) usage ;;
--all,1) all ;;
--again,2) again "$2" ;;
-* | */* | ,* | *,[!1]*) usage >&2; exit 2 ;;
*) keep "$1" ;;
esac
