#!/bin/sh
# toolkit.sh FOLDER: what the CUDA backend is built with, from PyPI: FOLDER/cuda becomes a CUDA toolkit of the pinned
# version (nvcc, headers, CUB, NVTX, the static runtime; about 300 MB). Nothing happens when it is there already. Needs
# python3 with pip, or with venv. Nothing outside FOLDER is written.
set -eu
folder=$1
# All pinned: left alone, they would be of several versions.
packages='nvidia-cuda-nvcc==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-nvtx==13.0.85'

if [ -x "$folder/cuda/bin/nvcc" ] && [ "$(cat "$folder/packages" 2>/dev/null)" = "$packages" ]; then exit; fi
command -v python3 >/dev/null || { echo 'toolkit.sh: python3 is missing' >&2; exit 1; }

mkdir -p "$folder"
new=$(mktemp -d "$folder/new.XXXXXX")
trap 'rm -rf "$new"' EXIT
python=python3
if ! python3 -m pip --version >/dev/null 2>&1; then
    python3 -m venv "$new/venv" || { echo 'toolkit.sh: python3 has neither pip nor venv' >&2; exit 1; }
    python=$new/venv/bin/python3
fi
# shellcheck disable=SC2086 # packages are words
PIP_ROOT_USER_ACTION=ignore "$python" -m pip install --quiet --disable-pip-version-check --no-input --no-deps --only-binary :all: \
    --target "$new/packages" $packages

cuda=$new/packages/nvidia/cu13
[ -e "$cuda/lib64" ] || ln -s lib "$cuda/lib64" # where nvcc looks
"$cuda/bin/nvcc" --version >/dev/null
rm -rf "$folder/cuda"
mv "$cuda" "$folder/cuda"
echo "$packages" >"$folder/packages"
