#!/usr/bin/env bash
# On each node, by srun: torchrun for this node's processes, which run a script of launch/ with its arguments.
set -euo pipefail
trap '' USR1 # it is for the ranks, who save and leave; torchrun would die of it
# Ranks follow the nodes' order, and nodes meet at the first one's port. torchrun's other way of meeting, c10d, gives
# nodes up whose clocks differ by more than some seconds.
command=("$INPLACE_TTT_PYTHON" -m torch.distributed.run --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$PROCESSES"
  --node-rank="$SLURM_NODEID" --rdzv-backend=static --master-addr="$HEAD_ADDRESS" --master-port="$HEAD_PORT"
  --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" --max-restarts=0
  --no-python bash launch/slurm/rank.sh "$@")
if [ -n "$INPLACE_TTT_CONTAINER" ] && [ "$INPLACE_TTT_CONTAINER_RUNTIME" = apptainer ]; then
  command=(apptainer exec --nv --bind "$INPLACE_TTT_MOUNTS" --pwd "$PWD" "$INPLACE_TTT_CONTAINER" "${command[@]}")
fi
exec "${command[@]}"
