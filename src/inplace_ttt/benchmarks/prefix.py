"""What passing chunk states between context-parallel ranks costs: the layer over n ranks against the same arithmetic
on one, with nothing to wait for. Every rank holds the same number of tokens in both."""

import statistics
from functools import partial

import torch
import torch.distributed as dist

from inplace_ttt.benchmarks.layer import Layer, Shape
from inplace_ttt.benchmarks.timing import milliseconds
from inplace_ttt.ttt import fast_weight_linear


def measure(
    shape: Shape, chunk_sizes: list[int], keep: bool, comm_dtype: torch.dtype | None, rounds: int
) -> list[dict]:
    """A record for each chunk size; ``shape.tokens`` is the length on each rank. Every rank calls it.

    Alone, each of a rank's two slices is a document of its own, so that nothing crosses their edges.
    """
    layer = Layer(shape)
    slices = torch.tensor([0, shape.tokens // 2, shape.tokens], dtype=torch.int32)
    ours = partial(fast_weight_linear, keep_chunk_weights=keep)
    operations = {
        "over ranks": partial(ours, cp_group=dist.group.WORLD, comm_dtype=comm_dtype),
        "alone": partial(ours, cu_seqlens=slices),
    }
    records = []
    for chunk_size in chunk_sizes:
        runs = {
            name: partial(layer.forward_backward, partial(layer.fast, operation, chunk_size))
            for name, operation in operations.items()
        }
        times = {name: _slowest(found) for name, found in milliseconds(runs, rounds, dist.barrier).items()}
        exposed = [a - b for a, b in zip(times["over ranks"], times["alone"], strict=True)]
        records.append(
            dict(
                ranks=dist.get_world_size(),
                chunk_size=chunk_size,
                kept=keep,
                ms=statistics.median(times["over ranks"]),
                alone_ms=statistics.median(times["alone"]),
                exposed_ms=statistics.median(exposed),
                exposed_share=statistics.median(e / t for e, t in zip(exposed, times["over ranks"], strict=True)),
            )
        )
    return records


def _slowest(times: list[float]) -> list[float]:
    """Of each round, the time of the rank that took longest."""
    slowest = torch.tensor(times, device="cuda")
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.tolist()
