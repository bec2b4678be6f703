#!/bin/sh
# Put two real English texts into a folder, as bible.txt and jargon.txt: the King James Bible (4.4 MB) and the Jargon
# File (1.6 MB), both out of Debian packages. Installed packages are used; missing ones are downloaded and unpacked
# beside the texts, which needs no root and installs nothing.
#
#   fetch_text.sh OUTDIR
set -eu
export LC_ALL=C

die()
{
    echo "fetch_text.sh: $*" >&2
    exit 1
}

[ $# -eq 1 ] || die "usage: fetch_text.sh OUTDIR"
mkdir -p "$1" || die "cannot make the folder $1"
out=$(cd "$1" && pwd)
packages=$out/packages

# The folder under which a file of a package is found: "" if it is installed, else where the package was unpacked.
root_of() # package file
{
    [ -e "$2" ] && return
    [ -e "$packages/$1$2" ] || unpack "$1" >&2
    echo "$packages/$1"
}

unpack() # package
{
    mkdir -p "$packages"
    if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
        die "$1 is not installed, and this is not Debian or Ubuntu; name a text of your own: make demo TEXT=path"
    fi
    # _apt cannot write to the folder of another user; the download is checked against the signed lists all the same.
    (cd "$packages" && rm -f "$1"_*.deb && apt-get -q -o APT::Sandbox::User=root download "$1") ||
        die "cannot download the package $1 (no network, or apt-get update was never run);" \
            "name a text of your own: make demo TEXT=path"
    dpkg-deb -x "$packages/$1"_*.deb "$packages/$1"
}

# A reader that was unpacked may lack a library that is not installed either: it gets that package's own.
read_bible() # verses
{
    LD_LIBRARY_PATH=${libraries-} "$reader" -p "$root/usr/lib" -f "$1" </dev/null
}
find_libraries()
{
    readline=$(dpkg-deb -f "$packages"/bible-kjv_*.deb Depends | grep -o 'libreadline[a-z0-9]*') || return 1
    [ -e "$packages/$readline" ] || unpack "$readline" >&2
    file=$(find "$packages/$readline" -name 'libreadline.so.*' | head -n 1)
    libraries=$(dirname "$file")
}

# The reader prints one verse a line, with its reference in front.
if [ ! -s "$out/bible.txt" ]; then
    root=$(root_of bible-kjv-text /usr/lib/bible.data)
    reader=$(root_of bible-kjv /usr/bin/bible)/usr/bin/bible
    read_bible Gen1:1 >/dev/null 2>&1 || find_libraries || die "the reader $reader does not run"
    read_bible Gen1:1-Rev22:21 >"$out/bible.part" || die "the reader $reader failed"
    mv "$out/bible.part" "$out/bible.txt"
fi

# Typographic marks become ASCII and rules are dropped: they would be most of the alphabet, and none of the text.
if [ ! -s "$out/jargon.txt" ]; then
    file=/usr/share/doc/jargon-text/jargon.txt.gz
    root=$(root_of jargon-text "$file")
    gzip -dc "$root$file" | iconv -c -f UTF-8 -t ASCII//TRANSLIT | sed '/[-=?_]\{20,\}/d; s/^ *//' |
        cat -s >"$out/jargon.part"
    [ -s "$out/jargon.part" ] || die "cannot unpack $root$file"
    mv "$out/jargon.part" "$out/jargon.txt"
fi

wc -c "$out/bible.txt" "$out/jargon.txt"
