"""Processes, devices and process groups: what must stand before a model is built."""

import math
import os
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from inplace_ttt.config import Parallel, UserError
from inplace_ttt.environment import World
from inplace_ttt.megatron import cpu
from inplace_ttt.resilience.rendezvous import Rendezvous, join

# The watch ends a run that hangs after parallel.timeout_minutes and says why; collectives would not, so they end later
COLLECTIVE_TIMEOUT_FACTOR = 1.5

cpu.install()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402  (after the stand-ins for CUDA)
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402


def device() -> torch.device:
    """Return the device of this rank."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def start(
    parallel: Parallel, seed: int, world: World | None = None, rendezvous: Rendezvous | None = None
) -> ProcessGroupCollection:
    """Join the process group and form Megatron's groups. Every rank calls it, after the configuration was checked.

    ``world`` and ``rendezvous``: by default those of the environment.
    """
    world = world or World.from_environment()
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
        if rendezvous is None and world.size > 1:
            rendezvous = Rendezvous(world, parallel.timeout_minutes)
        later = timedelta(minutes=COLLECTIVE_TIMEOUT_FACTOR * parallel.timeout_minutes)
        join(world, rendezvous, "nccl" if on_gpu else "gloo", later)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        distributed_timeout_minutes=max(1, math.ceil(COLLECTIVE_TIMEOUT_FACTOR * parallel.timeout_minutes)),
        # what passes between context-parallel ranks goes before products that could also run later
        high_priority_stream_groups=["cp"] if on_gpu else None,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return ProcessGroupCollection.use_mpu_process_groups()


def raise_on_all_ranks(error: Exception | None) -> None:
    """Raise on every rank, as UserError, what went wrong on any, so that none waits for one that has stopped."""
    messages = [None if error is None else str(error)]
    if dist.is_initialized():
        messages *= dist.get_world_size()
        dist.all_gather_object(messages, messages[0])
    for found in messages:
        if found is not None:
            raise UserError(found)


def on_first_rank(action: Callable[[], None]) -> None:
    """Run an action on the first rank; raise its UserError on all."""
    error = None
    if dist.get_rank() == 0:
        try:
            action()
        except UserError as caught:
            error = caught
    raise_on_all_ranks(error)


def leave_groups() -> None:
    """Forget Megatron's groups; ``start`` may form others."""
    parallel_state.destroy_model_parallel()


def stop() -> None:
    """Leave all groups."""
    leave_groups()
    if dist.is_initialized():
        dist.destroy_process_group()
