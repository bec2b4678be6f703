#!/bin/sh
# README.md holds nothing that could be generated: a block between
#   <!-- begin FILE -->             and  <!-- end -->   is FILE, with links to its pictures made relative to README.md
#   <!-- begin FILE FROM to TO -->  and  <!-- end -->   is FILE from the line with FROM up to the line before TO;
#                                                       C and Python as a code block
# usage: readme.sh [--write] [ROOT]     check that the blocks are up to date, or bring them up to date
set -eu
write=no
[ "${1-}" = --write ] && { write=yes; shift; }
root=${1-$(dirname "$0")/../..}
cd "$root"
new=$(mktemp)
trap 'rm -f "$new"' EXIT
awk '
function fail(text) { print "readme.sh: " text > "/dev/stderr"; failed = 1; exit 1 }
function copy(file, from, to,   line, inside, found, folder) {
    folder = file; sub(/[^\/]*$/, "", folder)
    inside = from == ""
    while ((status = (getline line < file)) > 0) {
        found = 1
        if (from != "" && index(line, from)) inside = 1
        if (to != "" && index(line, to)) break
        if (match(line, /\]\([A-Za-z0-9_]+\.svg\)/))
            line = substr(line, 1, RSTART + 1) folder substr(line, RSTART + 2)
        if (inside) print line
    }
    if (status < 0 || !found) fail("cannot read " file)
    close(file)
}
/^<!-- begin / {
    print
    range = $0; sub(/^<!-- begin [^ ]+ /, "", range); sub(/ ?-->$/, "", range)
    if (range != "") {
        split(range, ends, " to ")
        code = $3 ~ /\.c$/ ? "c" : $3 ~ /\.py$/ ? "python" : ""
        if (code != "") print "```" code
        copy($3, ends[1], ends[2])
        if (code != "") print "```"
    } else copy($3, "", "")
    skipping = 1; next
}
/^<!-- end -->/ { skipping = 0 }
!skipping { print }
END { if (!failed && skipping) fail("a block has no end") }
' README.md > "$new"
if [ "$write" = yes ]; then
    cp "$new" README.md
elif ! diff -u README.md "$new"; then
    echo "README.md is not up to date: tests/checks/readme.sh --write"
    exit 1
fi
