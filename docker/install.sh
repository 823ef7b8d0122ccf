#!/usr/bin/env bash
# Install our package with what it needs from folders of wheels: install.sh PACKAGES APEX. What the image already has
# and suits stays; torch and what belongs to it must.
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
  echo "install: the image's own $lost was replaced: the base image does not suit pyproject.toml" >&2
  exit 1
fi
rm -f "$kept" "$kept.after"
