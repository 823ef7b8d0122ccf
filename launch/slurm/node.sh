#!/usr/bin/env bash
# Run torchrun on this node (started by srun); its processes run a script of launch/ with the given arguments.
set -euo pipefail
trap '' USR1 # the signal is for the ranks, which save and exit; it would kill torchrun
# Static rendezvous: ranks are in the order of the nodes, and the first node has the store. The c10d rendezvous drops
# nodes whose clocks differ by more than a few seconds.
command=("$INPLACE_TTT_PYTHON" -m torch.distributed.run --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$PROCESSES"
  --node-rank="$SLURM_NODEID" --rdzv-backend=static --master-addr="$HEAD_ADDRESS" --master-port="$HEAD_PORT"
  --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" --max-restarts=0
  --no-python bash launch/slurm/rank.sh "$@")
if [ -n "$INPLACE_TTT_CONTAINER" ] && [ "$INPLACE_TTT_CONTAINER_RUNTIME" = apptainer ]; then
  command=(apptainer exec --nv --bind "$INPLACE_TTT_MOUNTS" --pwd "$PWD" "$INPLACE_TTT_CONTAINER" "${command[@]}")
fi
exec "${command[@]}"
