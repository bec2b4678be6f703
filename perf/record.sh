#!/bin/sh
# Keeps the results of the last `make bench` and puts them into README.md; makes tables and pictures of results again.
# usage: perf/record.sh NAME            build/bench becomes perf/results/NAME
#        perf/record.sh --again FOLDER  joined.md and the pictures of a folder
set -eu
usage() { sed -n '3,4s/^# //p' "$0"; }
[ $# -ge 1 ] || set -- -
here=$(cd "$(dirname "$0")" && pwd)
for python in "${PYTHON:-python3}" python3; do # the first that can draw
    "$python" -c 'import matplotlib' 2>/dev/null && break
done

again() { # again FOLDER
    rm -f "$1/joined.md"
    "$python" "$here/plot.py" "$1" || [ $? -eq 77 ] # no matplotlib, no pictures
    "$python" "$here/join.py" "$1" >"$1/joined.md.new"
    mv "$1/joined.md.new" "$1/joined.md"
}

case $1,$# in
--help,*)
    usage
    exit
    ;;
--again,2)
    again "$2"
    exit
    ;;
-* | */* | *,[!1])
    usage >&2
    exit 2
    ;;
esac
from=$(dirname "$here")/build/bench to=$here/results/$1
[ -e "$from/layer.json" ] || { echo "record.sh: $from has no layer.json: run make bench first" >&2; exit 1; }
mkdir -p "$to"
for name in layer given types stages capacity peers; do
    rm -f "$to/$name.json" "$to/$name.svg"
    [ ! -e "$from/$name.json" ] || cp "$from/$name.json" "$to/"
done
rm -f "$to/roofline.svg"
cp "$from/run.txt" "$to/"
again "$to"
[ ! -e "$to/peers.json" ] || "$python" "$here/peers/report.py" "$to/peers.json" >"$to/peers.md"
"$here/../tests/checks/readme.sh" --write
du -sk "$to" | awk '{ print $2 ": " $1 " KiB" } $1 > 400 { print "record.sh: that is a lot for perf/results" }'
