#!/bin/bash
# The README's promise, tried where nothing is installed yet: a bare Debian in a folder, a clone, make demo, make
# test, make install, and programs that use what was installed.
# shellcheck disable=SC2016 # commands for the inside are in single quotes
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: tests/fresh.sh [--keep] [--folder DIR] [--suite NAME] [--command CMD]

Makes a bare Debian with debootstrap, clones HEAD into it, and runs there, as root, what a new user would run. Needs
root, debootstrap, git and about 4 GB. Uses the mirror, proxy, resolver and certificates of this machine.

  --keep         leave the folder for a look (chroot DIR /bin/bash)
  --folder DIR   where to make it; must not exist   [a new folder in TMPDIR]
  --suite NAME   another release                    [that of this machine]
  --command CMD  run CMD in the clone instead of the whole course
TEXT
}
say() { printf '\n== %s (%dm%02ds)\n' "$*" $((SECONDS / 60)) $((SECONDS % 60)); }
die() { echo "fresh.sh: $*" >&2; exit 1; }

keep='' folder='' suite='' command=''
while [ $# -gt 0 ]; do
    case $1 in
    --keep) keep=1 ;;
    --folder | --suite | --command)
        [ $# -gt 1 ] || die "$1 needs a value (see --help)"
        declare "${1#--}=$2"
        shift
        ;;
    --help) usage; exit ;;
    *) die "$1: not an option (see --help)" ;;
    esac
    shift
done
[ "$(id -u)" = 0 ] || die 'must be root: debootstrap and chroot need it'
for tool in debootstrap git apt-get; do
    command -v $tool >/dev/null || die "$tool is missing (Debian: apt-get install debootstrap git)"
done
source=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)
[ -n "$suite" ] || suite=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
[ -z "$folder" ] || [ ! -e "$folder" ] || die "$folder is there already"
folder=${folder:-$(mktemp -d "${TMPDIR:-/tmp}/cumoe-fresh.XXXXXX")}

cleanup() {
    rc=$?
    ! mountpoint -q "$folder/proc" || umount "$folder/proc"
    if [ -n "$keep" ]; then
        echo "kept: $folder"
    else
        rm -rf --one-file-system "$folder"
    fi
    exit $rc
}
trap cleanup EXIT

# The mirror of the release as this machine's apt knows it; the security archive is another one.
targets() {
    apt-get indextargets --format '$(REPO_URI) $(CODENAME) $(COMPONENT)' 'Created-By: Packages' 'Origin: Debian'
}
mirror=$(targets | awk -v suite="$suite" '$2 == suite && $3 == "main" { print $1; exit }')
[ -n "$mirror" ] || die "apt on this machine knows no mirror of $suite (apt-get update?)"

say "debootstrap $suite from $mirror"
debootstrap --variant=minbase "$suite" "$folder" "$mirror" >"$folder.log" 2>&1 || {
    tail "$folder.log"
    die 'debootstrap failed'
}
rm -f "$folder.log"
chmod 755 "$folder" # mktemp keeps others out, and not only root works inside

# Clients inside are to reach the network as clients outside do.
targets | awk '{ print "deb " $1 " " $2 " " $3 }' | sort -u >"$folder/etc/apt/sources.list"
apt-config dump | grep -E '^Acquire::(https?|Retries|Check)\b' >"$folder/etc/apt/apt.conf.d/90outside" || true
for file in /etc/resolv.conf /etc/hosts /etc/pip.conf /etc/apt/auth.conf /etc/ssl/certs /usr/local/share/ca-certificates; do
    [ -e "$file" ] || continue
    mkdir -p "$folder$(dirname "$file")"
    cp -rL "$file" "$folder$(dirname "$file")/"
done
mountpoint -q "$folder/proc" || mount -t proc proc "$folder/proc" || echo 'note: no /proc inside'

settings=(HOME=/root LANG=C.UTF-8 TERM="${TERM:-dumb}")
settings+=(PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin)
while IFS= read -r setting; do
    settings+=("$setting")
done < <(env | grep -iE '^((https?|no|all)_proxy|[A-Z_]*(CERT|CA_?BUNDLE|CAINFO)[A-Z_]*)=' || true)
inside() { chroot "$folder" env -i "${settings[@]}" /bin/sh -ec "cd /root/cumoe; $1"; }

say 'clone'
git clone --quiet --no-hardlinks "$source" "$folder/root/cumoe"
git -C "$folder/root/cumoe" log -1 --format='%h %s'

say 'what the README asks for: git and make'
inside 'apt-get update && apt-get install -y --no-install-recommends git make' >"$folder/apt.log" 2>&1 || {
    tail "$folder/apt.log"
    die 'apt inside failed'
}

if [ -n "$command" ]; then
    inside "$command"
    exit
fi

say 'a user who may not install gets one line to type'
cp -r "$folder/root/cumoe" "$folder/tmp/cumoe" && chown -R 65534:65534 "$folder/tmp/cumoe"
if message=$(chroot --userspec=65534:65534 "$folder" env -i "${settings[@]}" make -C /tmp/cumoe demo 2>&1); then
    die 'make demo went through without a compiler'
fi
echo "$message" | grep 'sudo apt-get update && sudo apt-get install' || die "no line to type: $message"

for target in demo test install; do
    say "make $target"
    inside "make $target"
done

say 'programs that use the installed library'
inside 'cd tests/package/consumer
    cc consumer.c -o /tmp/c $(pkg-config --cflags --libs cumoe) && /tmp/c
    c++ consumer.cc -o /tmp/cc $(pkg-config --cflags --libs cumoe) && /tmp/cc
    for language in C:c CXX:cc; do for form in shared static; do
        out=/tmp/$form.$language
        cmake -S . -B $out -DLANGUAGE=${language%:*} -DSOURCE=consumer.${language#*:} -DFORM=$form >/dev/null
        cmake --build $out >/dev/null
        $out/consumer
    done; done'

say 'the installed library has the CUDA backend, and needs nothing of CUDA to start'
inside 'grep "CUDA backend  toolkit" build/logs/configure.log
    ! ldd /usr/local/lib/libcumoe.so | grep -iE "cuda|stdc\+\+"'

say 'nothing but build/ was written'
[ -z "$(inside 'git status --porcelain' | tee /dev/stderr)" ] || die 'something else was'
say 'passed'
