#!/bin/sh
# shellcheck disable=SC2016 # backticks are what the patterns look for
# In every page: relative links lead somewhere, anchors exist, and files named in backticks are there.
# links.sh [ROOT]
set -u
cd "${1:-$(dirname "$0")/../..}" || exit 2
list=$(mktemp)
trap 'rm -f "$list"' EXIT

tree() { find . \( -name .git -o -path ./build \) -prune -o "$@"; }

anchors() { # the anchors of a page's headings, as GitHub makes them
    sed -nE 's/^#+ +//p' "$1" | tr '[:upper:]' '[:lower:]' | sed -E 's/[^a-z0-9 _-]//g; s/ /-/g'
}

for page in $(tree -name '*.md' -print | sort); do
    folder=$(dirname "$page")
    prose=$(awk '/^[[:space:]]*```/ { code = !code; next } !code' "$page")
    printf '%s\n' "$prose" | sed -E 's/`[^`]*`//g' | grep -oE '\]\([^) ]+\)' | sed 's/^](//; s/)$//' |
        while read -r link; do
            file=${link%%#*}
            case $link in *://* | mailto:*) continue ;; esac
            target=$folder/$file
            [ -n "$file" ] || target=$page
            if [ ! -e "$target" ]; then
                echo "$page: link to $link, but there is no $target"
            elif [ "$link" != "$file" ]; then
                anchors "$target" | grep -qxF -e "${link#*#}" || echo "$page: link to $link, but no such heading"
            fi
        done
    # Names with a folder or a known ending; a bare file name may stand anywhere in the tree. What a build makes,
    # placeholders and patterns are not checked.
    printf '%s\n' "$prose" | grep -oE '`[^`]+`' | tr -d '`' |
        grep -E '^\.?[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_.-]*)*$' |
        grep -E '^[^/]+/|\.(c|h|cc|cu|cuh|sh|md|map|cmake|json|patch)$' | grep -vE '^build/' |
        while read -r name; do
            [ -e "$name" ] || [ -e "$folder/$name" ] || [ -e "include/$name" ] && continue
            case $name in */*) ;; *) [ -z "$(tree -name "$name" -print)" ] || continue ;; esac
            echo "$page: names $name, but there is no such file"
        done
done >"$list"
cat "$list"
[ ! -s "$list" ]
