#!/usr/bin/env bash
# Run one rank (started by torchrun). Its output goes to its own log file, and that of rank 0 also to the job's log.
set -euo pipefail
log=$INPLACE_TTT_LOGS/rank_$RANK.log
# Use the code of the checkout, also if the image has another version. Triton's cache is in a writable folder.
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH}
TRITON_CACHE_DIR=${INPLACE_TTT_TRITON_CACHE:-${TMPDIR:-/tmp}/triton-$(id -u)}
# A folder of that name that another user owns could contain their kernels
if ! mkdir -m 700 "$TRITON_CACHE_DIR" 2>/dev/null && { [ -L "$TRITON_CACHE_DIR" ] || [ ! -O "$TRITON_CACHE_DIR" ]; }; then
  TRITON_CACHE_DIR=$(mktemp -d "${TMPDIR:-/tmp}/triton-XXXXXXXX")
fi
export TRITON_CACHE_DIR
if [ "$RANK" = 0 ]; then
  # a stop signal reaches every process of the job; tee must continue, so that the rank can still print
  exec "$INPLACE_TTT_PYTHON" "$@" > >(
    trap '' TERM INT USR1
    exec tee -a "$log"
  ) 2>&1
fi
exec "$INPLACE_TTT_PYTHON" "$@" >>"$log" 2>&1
