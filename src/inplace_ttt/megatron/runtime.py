"""Set up devices and process groups before a model is built."""

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

# Timeout of collectives over parallel.timeout_minutes, after which the watchdog ends a run that hangs and says why. A
# collective gives no reason, so its timeout is longer.
COLLECTIVE_TIMEOUT_FACTOR = 1.5

cpu.install()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402  (after cpu.install)
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402


def device() -> torch.device:
    """Return the device of this rank."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def start(
    parallel: Parallel, seed: int, world: World | None = None, rendezvous: Rendezvous | None = None
) -> ProcessGroupCollection:
    """Join the process group and form Megatron's groups. Collective; the configuration must have been validated.

    ``world`` and ``rendezvous``: default: from the environment variables of torchrun.
    """
    world = world or World.from_environment()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        if parallel.tensor_model_parallel_size > 1:
            # Megatron relies on the launch order to overlap tensor-parallel communication with GEMMs. Do not set this
            # without tensor parallelism: in a single hardware queue, one waiting stream blocks all others.
            os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        # long samples allocate tensors of many sizes: without this, fragmentation takes a tenth of the memory
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
        # transfers between context-parallel ranks are on the critical path, unlike many GEMMs
        high_priority_stream_groups=["cp"] if on_gpu else None,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return ProcessGroupCollection.use_mpu_process_groups()


def raise_on_all_ranks(error: Exception | None) -> None:
    """Raise UserError on all ranks if any rank passes an error, so that no rank waits for one that has stopped.

    Collective. The message is that of the lowest rank with an error.
    """
    messages = [None if error is None else str(error)]
    if dist.is_initialized():
        messages *= dist.get_world_size()
        dist.all_gather_object(messages, messages[0])
    for found in messages:
        if found is not None:
            raise UserError(found)


def on_all_ranks[Result](action: Callable[[], Result]) -> Result:
    """Return the result of an action on each rank; raise a rank's UserError on all ranks (collective)."""
    result = error = None
    try:
        result = action()
    except UserError as caught:
        error = caught
    raise_on_all_ranks(error)
    return result


def on_first_rank(action: Callable[[], None]) -> None:
    """Run an action on rank 0 and raise its UserError on all ranks (collective)."""
    on_all_ranks(lambda: action() if dist.get_rank() == 0 else None)


def leave_groups() -> None:
    """Destroy Megatron's groups. ``start`` can then form new ones."""
    parallel_state.destroy_model_parallel()


def stop() -> None:
    """Destroy Megatron's groups and the process group."""
    leave_groups()
    if dist.is_initialized():
        dist.destroy_process_group()
