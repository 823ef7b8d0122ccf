#!/usr/bin/env bash
# One rank, by torchrun: what it prints goes to a file of its own, and the first rank's to the job's log as well.
set -euo pipefail
log=$INPLACE_TTT_LOGS/rank_$RANK.log
if [ "$RANK" = 0 ]; then
  exec "$INPLACE_TTT_PYTHON" "$@" > >(tee -a "$log") 2>&1
fi
exec "$INPLACE_TTT_PYTHON" "$@" >>"$log" 2>&1
