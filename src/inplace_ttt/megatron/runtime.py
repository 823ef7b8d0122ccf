"""Processes, devices and process groups: what must stand before a model is built."""

import math
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from inplace_ttt.config import Parallel
from inplace_ttt.megatron import cpu

# The watch ends a run that hangs after parallel.timeout_minutes and says why; collectives would not, so they end later
LATER = 1.5

cpu.install()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402  (after the stand-ins for CUDA)
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402


@dataclass(frozen=True)
class World:
    """This process among all: torchrun's environment, or alone."""

    rank: int
    size: int
    local_rank: int

    @classmethod
    def from_environment(cls) -> "World":
        return cls(
            *(int(os.environ.get(key, default)) for key, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        )


def device() -> torch.device:
    """Where this rank computes."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def start(parallel: Parallel, seed: int) -> ProcessGroupCollection:
    """Join the process group and form Megatron's groups. Every rank calls it, after the configuration was checked."""
    world = World.from_environment()
    if world.size == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        if parallel.tensor_model_parallel_size > 1:
            # Megatron overlaps tensor parallelism's communication with products by the order in which they are queued.
            # Where there is none, streams are better left alone: one waiting in the only queue holds up all others.
            os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        # long samples make tensors of many sizes: without it a tenth of the memory is held and cannot be used
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        torch.cuda.set_device(world.local_rank)
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            rank=world.rank,
            world_size=world.size,
            timeout=timedelta(minutes=LATER * parallel.timeout_minutes),
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        distributed_timeout_minutes=max(1, math.ceil(LATER * parallel.timeout_minutes)),
        # what passes between context-parallel ranks goes before products that could also run later
        high_priority_stream_groups=["cp"] if on_gpu else None,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return ProcessGroupCollection.use_mpu_process_groups()


def leave_groups() -> None:
    """Forget Megatron's groups; ``start`` may form others."""
    parallel_state.destroy_model_parallel()


def stop() -> None:
    """Leave all groups."""
    leave_groups()
    if dist.is_initialized():
        dist.destroy_process_group()
