# shellcheck shell=bash disable=SC2034
# All machine-dependent settings of a run on Slurm. train.sbatch sources this file on the first node, and srun passes
# exported variables to all nodes. Set a variable before submitting to change its value.

# --- interpreter and container
# Interpreter: the checkout's virtual environment, otherwise python3 on the PATH
if [ -z "${INPLACE_TTT_PYTHON:-}" ]; then
  INPLACE_TTT_PYTHON=python3
  if [ -x .venv/bin/python ]; then INPLACE_TTT_PYTHON=$PWD/.venv/bin/python; fi
fi
export INPLACE_TTT_PYTHON

# Container image and runtime. pyxis (enroot) gets the image through srun's options; apptainer is called on each node.
# INPLACE_TTT_MOUNTS has their syntax, such as /data:/data. The checkout and the run folder are always mounted at the
# same paths. The first node reads the configuration without a container, with INPLACE_TTT_HOST_PYTHON: an interpreter
# with the packages of pyproject.toml, which needs no GPU. launch/setup.sh creates one.
HOST_PYTHON=${INPLACE_TTT_HOST_PYTHON:-$INPLACE_TTT_PYTHON}
export INPLACE_TTT_CONTAINER=${INPLACE_TTT_CONTAINER:-} INPLACE_TTT_CONTAINER_RUNTIME=${INPLACE_TTT_CONTAINER_RUNTIME:-pyxis}
if [ -n "$INPLACE_TTT_CONTAINER" ]; then
  export INPLACE_TTT_PYTHON=${INPLACE_TTT_CONTAINER_PYTHON:-python3}
fi

# Set SRUN_CONTAINER to srun's options for the container. $1: the run folder.
container() {
  SRUN_CONTAINER=()
  export INPLACE_TTT_MOUNTS="$PWD:$PWD,$1:$1${INPLACE_TTT_MOUNTS:+,$INPLACE_TTT_MOUNTS}"
  if [ -n "$INPLACE_TTT_CONTAINER" ] && [ "$INPLACE_TTT_CONTAINER_RUNTIME" = pyxis ]; then
    SRUN_CONTAINER=("--container-image=$INPLACE_TTT_CONTAINER" "--container-mounts=$INPLACE_TTT_MOUNTS"
      "--container-workdir=$PWD")
  fi
}

# --- processes
# One torchrun per node, which starts one process per GPU. Every process sees all GPUs of the node and uses the one of
# its local rank. Do not bind tasks to single GPUs (no --gpus-per-task, no --gpu-bind): NCCL and symmetric memory need
# access to the neighbours' GPUs.
export PROCESSES=${INPLACE_TTT_PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}
# Divide the cores evenly; torchrun's default is one thread per process
cores=${SLURM_CPUS_ON_NODE:-$PROCESSES}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / PROCESSES > 0 ? cores / PROCESSES : 1))}
# 1: check all nodes and their links before training (launch/preflight.py, half a minute); 0: skip the check
export INPLACE_TTT_PREFLIGHT=${INPLACE_TTT_PREFLIGHT:-1}
# Number of consecutive starts without a new checkpoint after which the job is no longer requeued
export INPLACE_TTT_IDLE_RESTARTS=${INPLACE_TTT_IDLE_RESTARTS:-3}
# Seconds until Slurm detects that a node is down (SlurmdTimeout in Slurm's configuration; Slurm's default is 300)
export INPLACE_TTT_NODE_DOWN_SECONDS=${INPLACE_TTT_NODE_DOWN_SECONDS:-600}

# --- network
# NCCL detects InfiniBand. If it selects the wrong interface for its bootstrap (timeouts at the start), name the one that
# connects the nodes: NCCL_SOCKET_IFNAME=eth0, GLOO_SOCKET_IFNAME=eth0. If it selects the wrong adapter for the data (slow
# all-reduce), set NCCL_IB_HCA=mlx5_0,mlx5_1,... NCCL_DEBUG=INFO prints the selection.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# An error on one rank also aborts the collectives of the others, which would otherwise wait until their timeout
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
