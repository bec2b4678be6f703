#!/bin/sh
# toolkit.sh FOLDER: what the CUDA backend is built with, from PyPI: FOLDER/cuda becomes a CUDA toolkit of the versions
# in toolkit.txt (nvcc, headers, CUB, NVTX, the static runtime; about 300 MB). Nothing happens when it is there already.
# Needs python3 with pip, or with venv. Nothing outside FOLDER is written.
set -eu
folder=$1
wheels=$(dirname "$0")/toolkit.txt

mkdir -p "$folder"
exec 9>"$folder/lock" # presets share the folder, and may be configured at the same time
! command -v flock >/dev/null || flock 9
if [ -x "$folder/cuda/bin/nvcc" ] && cmp -s "$wheels" "$folder/wheels"; then exit; fi
command -v python3 >/dev/null || { echo 'toolkit.sh: python3 is missing' >&2; exit 1; }

new=$(mktemp -d "$folder/new.XXXXXX")
trap 'rm -rf "$new"' EXIT
python=python3
if ! python3 -m pip --version >/dev/null 2>&1; then
    python3 -m venv "$new/venv" || { echo 'toolkit.sh: python3 has neither pip nor venv' >&2; exit 1; }
    python=$new/venv/bin/python3
fi
PIP_ROOT_USER_ACTION=ignore "$python" -m pip install --quiet --disable-pip-version-check --no-input --no-deps \
    --only-binary :all: --require-hashes --target "$new/packages" -r "$wheels"

cuda=$new/packages/nvidia/cu13
[ -e "$cuda/lib64" ] || ln -s lib "$cuda/lib64" # where nvcc looks
"$cuda/bin/nvcc" --version >/dev/null
rm -rf "$folder/cuda" "$folder/wheels"
mv "$cuda" "$folder/cuda"
cp "$wheels" "$folder/wheels"
