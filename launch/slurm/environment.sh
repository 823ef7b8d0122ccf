# shellcheck shell=bash disable=SC2034
# Everything about the machine that a run on Slurm depends on, in one place. Sourced by train.sbatch on the first node;
# srun hands exported variables to all. Set a variable before submitting to have it otherwise.

# --- what runs
# The interpreter: the checkout's own environment, else what is on the PATH
if [ -z "${INPLACE_TTT_PYTHON:-}" ]; then
  INPLACE_TTT_PYTHON=python3
  if [ -x .venv/bin/python ]; then INPLACE_TTT_PYTHON=$PWD/.venv/bin/python; fi
fi
export INPLACE_TTT_PYTHON

# A container: an image, and who runs it. pyxis (enroot) takes it in srun's options, apptainer is called on each node.
# INPLACE_TTT_MOUNTS is written as they write it, such as /data:/data; the checkout and the run's folder are always
# mounted in their own places. The first node reads the configuration without a container, by INPLACE_TTT_HOST_PYTHON,
# an interpreter that has the packages of pyproject.toml (a GPU is not needed): set-up by launch/setup.sh makes one.
HOST_PYTHON=${INPLACE_TTT_HOST_PYTHON:-$INPLACE_TTT_PYTHON}
export INPLACE_TTT_CONTAINER=${INPLACE_TTT_CONTAINER:-} INPLACE_TTT_CONTAINER_RUNTIME=${INPLACE_TTT_CONTAINER_RUNTIME:-pyxis}
if [ -n "$INPLACE_TTT_CONTAINER" ]; then
  export INPLACE_TTT_PYTHON=${INPLACE_TTT_CONTAINER_PYTHON:-python3}
fi

# $1: the run's folder. What srun is told of the container: SRUN_CONTAINER.
container() {
  SRUN_CONTAINER=()
  export INPLACE_TTT_MOUNTS="$PWD:$PWD,$1:$1${INPLACE_TTT_MOUNTS:+,$INPLACE_TTT_MOUNTS}"
  if [ -n "$INPLACE_TTT_CONTAINER" ] && [ "$INPLACE_TTT_CONTAINER_RUNTIME" = pyxis ]; then
    SRUN_CONTAINER=("--container-image=$INPLACE_TTT_CONTAINER" "--container-mounts=$INPLACE_TTT_MOUNTS"
      "--container-workdir=$PWD")
  fi
}

# --- processes
# One torchrun a node, which starts a process for each of the node's GPUs. It sees all of them, and each process takes
# that of its local rank: NCCL and the mapped memory of the ring need to see their neighbours' GPUs, so tasks are not
# bound to one GPU each (no --gpus-per-task, no --gpu-bind).
export PROCESSES=${INPLACE_TTT_PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}
# Cores are shared evenly: torchrun would give each process one thread
cores=${SLURM_CPUS_ON_NODE:-$PROCESSES}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / PROCESSES > 0 ? cores / PROCESSES : 1))}
# Before training, have all nodes look at themselves and each other (launch/preflight.py): 1, or 0 to save its half minute
export INPLACE_TTT_PREFLIGHT=${INPLACE_TTT_PREFLIGHT:-1}
# Starts in a row that may end where the last checkpoint already was, before the job is no longer requeued
export INPLACE_TTT_IDLE_RESTARTS=${INPLACE_TTT_IDLE_RESTARTS:-3}
# Seconds in which Slurm finds that a node is down (SlurmdTimeout of its configuration, 300 where nothing is said)
export INPLACE_TTT_NODE_DOWN_SECONDS=${INPLACE_TTT_NODE_DOWN_SECONDS:-600}

# --- network
# NCCL finds InfiniBand by itself. Where it takes the wrong interface for its first contact (timeouts at the start), name
# the one that nodes reach each other by: NCCL_SOCKET_IFNAME=eth0, GLOO_SOCKET_IFNAME=eth0. Where it takes a wrong
# adapter for the data (slow all-reduce): NCCL_IB_HCA=mlx5_0,mlx5_1,... NCCL_DEBUG=INFO says what it took.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# An error on one rank ends the others' waiting too, instead of leaving it to the timeout of each
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
