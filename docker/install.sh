#!/usr/bin/env bash
# Install the package and its dependencies from folders of wheels: install.sh PACKAGES APEX. Suitable packages of the
# image stay. torch and the packages built for it must stay; otherwise the installation fails.
set -euo pipefail
packages=$1 apex=$2
kept=$(mktemp)
PIP_CONSTRAINT='' python3 -m pip list --format=freeze |
  grep -iE '^(torch|triton|pytorch-triton|nvidia|cuda|transformer.engine|apex|flash.attn|numpy)[^=]*==' >"$kept" || true
PIP_CONSTRAINT=$kept python3 -m pip install --no-cache-dir --no-index --find-links "$packages" inplace-ttt
if compgen -G "$apex/*.whl" >/dev/null; then
  python3 -m pip install --no-cache-dir --no-index --no-deps "$apex"/*.whl
fi
PIP_CONSTRAINT='' python3 -m pip list --format=freeze >"$kept.after"
if lost=$(grep -vxFf "$kept.after" "$kept"); then
  echo "install: $lost of the base image was replaced: use a base image with versions that pyproject.toml allows" >&2
  exit 1
fi
rm -f "$kept" "$kept.after"
