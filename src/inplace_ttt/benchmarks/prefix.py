"""What passing chunk states between context-parallel ranks costs: the layer over n ranks against the same arithmetic
with nothing to wait for. Every rank holds the same number of tokens in both."""

import statistics
from functools import cache, partial
from unittest.mock import patch

import torch
import torch.distributed as dist

from inplace_ttt.benchmarks.layer import Layer, Shape
from inplace_ttt.benchmarks.timing import milliseconds
from inplace_ttt.ttt import fast_weight_linear
from inplace_ttt.ttt.walk import Walk

AHEAD = 40_000_000  # clock cycles, about 20 ms


def measure(shape: Shape, chunk_sizes: list[int], options: dict, rounds: int) -> list[dict]:
    """A record for each chunk size; ``shape`` is the whole sequence's, ``options`` are fast_weight_linear's.

    Every rank calls it.
    """
    ranks = dist.get_world_size()
    bounds = torch.tensor(shape.bounds, dtype=torch.int32)
    layer = Layer(shape, ranks=ranks, rank=dist.get_rank())
    ours = partial(fast_weight_linear, cp_group=dist.group.WORLD, cu_seqlens=bounds, **options)
    records = []
    for chunk_size in chunk_sizes:
        run = partial(layer.forward_backward, partial(layer.fast_over_ranks, ours, chunk_size))
        runs = {"over ranks": run, "alone": partial(_alone, run)}
        times = {name: _slowest(found) for name, found in milliseconds(runs, rounds, _together).items()}
        exposed = [a - b for a, b in zip(times["over ranks"], times["alone"], strict=True)]
        records.append(
            dict(
                ranks=ranks,
                chunk_size=chunk_size,
                prefix=options["prefix"],
                kept=options["keep_chunk_weights"],
                ms=statistics.median(times["over ranks"]),
                alone_ms=statistics.median(times["alone"]),
                exposed_ms=statistics.median(exposed),
                exposed_share=statistics.median(e / t for e, t in zip(exposed, times["over ranks"], strict=True)),
            )
        )
    return records


class _Sums:
    """In the place of the ring: what would come is there, what goes on goes nowhere, and rows need no blocks."""

    def __init__(self, walk: Walk):
        d, f = walk.a.shape[2], walk.z.shape[2]
        self.blocks, self.came = [slice(0, d)], {}
        self.sums = _zeros(2, d, f)

    def get(self, stop: int, batch: int, block: int):
        return self.sums[0]

    def going(self, stop: int, batch: int, block: int):
        return self.sums[1]

    def __getattr__(self, name: str):
        return lambda *_: None  # nothing to open, put or finish


@cache
def _zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, device="cuda")


def _alone(run) -> None:
    with patch.object(Walk, "_sums", lambda walk: _Sums(walk)):
        run()


def _together() -> None:
    """Ranks start at one time, their hosts some milliseconds ahead, as they are in training: what a host takes to
    launch a layer is not what passing states costs."""
    torch.cuda._sleep(AHEAD)
    dist.all_reduce(torch.zeros(1, device="cuda"))


def _slowest(times: list[float]) -> list[float]:
    """Of each round, the time of the rank that took longest."""
    slowest = torch.tensor(times, device="cuda")
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.tolist()
