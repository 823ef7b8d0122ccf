"""Run a function on several gloo ranks, each a process forked from a server that has imported everything once."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "inplace_ttt.data.build",
        "inplace_ttt.evaluation.evaluate",
        "inplace_ttt.megatron.initialize",
        "inplace_ttt.megatron.optimizer",
        "inplace_ttt.training.compose",
        "inplace_ttt.training.loop",
        "matplotlib.pyplot",
    ]
)


def run_ranks(size: int, function: Callable, *args, backend: str = "gloo", timeout: float = 300):
    """``function(*args)`` on ``size`` ranks with a default process group; the list of what they return."""
    # CUDA does not survive a fork, and the server has looked whether it is there
    context = multiprocessing.get_context("spawn") if backend == "nccl" else _context
    with tempfile.TemporaryDirectory() as folder:
        queue = context.Queue()
        processes = [
            context.Process(target=_rank, args=(rank, size, f"{folder}/store", backend, queue, function, args))
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        results, failure = {}, None
        try:
            for _ in range(size):
                rank, result, failure = queue.get(timeout=timeout)
                if failure:
                    break
                results[rank] = result
        finally:
            for process in processes:
                if failure:
                    process.kill()
                process.join(timeout=10)
                process.kill()
        if failure:
            raise AssertionError(f"rank {rank} of {size} failed:\n{failure}")
        return [results[rank] for rank in range(size)]


def _rank(rank: int, size: int, store: str, backend: str, queue, function: Callable, args: tuple) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    result = "nothing: the function did not return"
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    try:
        if backend == "nccl":
            torch.cuda.set_device(rank)
        dist.init_process_group(
            backend, init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
        )
        result = function(*args)
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
        queue.put((rank, result, None))
    except BaseException:
        queue.put((rank, None, f"{traceback.format_exc()}\nIt returned {result}"))
