#!/usr/bin/env bash
# One rank, by torchrun: what it prints goes to a file of its own, and the first rank's to the job's log as well.
set -euo pipefail
log=$INPLACE_TTT_LOGS/rank_$RANK.log
# The code of the checkout, also where the image has another; kernels are compiled to where anyone may write
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH}
TRITON_CACHE_DIR=${INPLACE_TTT_TRITON_CACHE:-${TMPDIR:-/tmp}/triton-$(id -u)}
# What another user has put under that name first could be kernels of theirs
if ! mkdir -m 700 "$TRITON_CACHE_DIR" 2>/dev/null && { [ -L "$TRITON_CACHE_DIR" ] || [ ! -O "$TRITON_CACHE_DIR" ]; }; then
  TRITON_CACHE_DIR=$(mktemp -d "${TMPDIR:-/tmp}/triton-XXXXXXXX")
fi
export TRITON_CACHE_DIR
if [ "$RANK" = 0 ]; then
  # a request to stop reaches every process of the job: what the rank still says must not fail for it
  exec "$INPLACE_TTT_PYTHON" "$@" > >(
    trap '' TERM INT USR1
    exec tee -a "$log"
  ) 2>&1
fi
exec "$INPLACE_TTT_PYTHON" "$@" >>"$log" 2>&1
