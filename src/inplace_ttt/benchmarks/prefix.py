"""Measure the exchange of carries between context-parallel ranks.

It compares the layer over n ranks with the same arithmetic without an exchange, at equal tokens per rank."""

import statistics
from functools import cache, partial

import torch
import torch.distributed as dist
from torch import Tensor

from inplace_ttt.benchmarks.layer import Layer, Shape
from inplace_ttt.benchmarks.timing import milliseconds
from inplace_ttt.ttt import fast_weight_linear
from inplace_ttt.ttt.scan import Exchange

AHEAD = 40_000_000  # clock cycles, about 20 ms


def measure(shape: Shape, chunk_sizes: list[int], options: dict, rounds: int) -> list[dict]:
    """Return one record per chunk size. All ranks must call it.

    ``shape`` describes the whole sequence; ``options`` are passed to ``fast_weight_linear``.
    """
    ranks = dist.get_world_size()
    bounds = torch.tensor(shape.bounds, dtype=torch.int32)
    layer = Layer(shape, ranks=ranks, rank=dist.get_rank())
    ours = partial(fast_weight_linear, cp_group=dist.group.WORLD, cu_seqlens=bounds, **options)
    records = []
    for chunk_size in chunk_sizes:
        alone = partial(ours, prefix=NoExchange(None, torch.float32))
        runs = {
            name: partial(layer.forward_backward, partial(layer.fast, operation, chunk_size))
            for name, operation in (("over ranks", ours), ("alone", alone))
        }
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


class NoExchange(Exchange):
    """Provide every stage with a carry of zeros at once, and send nothing. There is one row block."""

    def carries(self, stages, shape, like, initial) -> "_ConstantCarries":
        """Return carries of zeros for a ``shape`` (b, d, f); the other arguments are ignored."""
        return _ConstantCarries(*shape)


class _ConstantCarries:
    """Provide carries of zeros (see ``Carries``)."""

    def __init__(self, b: int, d: int, f: int):
        self.blocks, self.incoming, self.outgoing = [slice(0, d)], {}, {}
        self.states = _zeros(2, b, d, f)

    def incoming_block(self, stage: int, batch: int, block: int) -> Tensor:
        """Return the zeros (d, f) of a batch row, without waiting."""
        return self.states[0, batch]

    def outgoing_block(self, stage: int, batch: int, block: int) -> Tensor:
        """Return a buffer (d, f) for the outgoing carry, which is not read."""
        return self.states[1, batch]

    def open(self, stage: int) -> None:
        """Set the incoming carry of a stage to zeros (b, d, f)."""
        self.incoming[stage] = self.states[0]  # for the backward

    def send(self, stage: int, batch: int, block: int) -> None:
        """Do nothing: the outgoing carry is not used."""

    def flush(self) -> None:
        """Do nothing: there are no sends to wait for."""

    def finish(self) -> None:
        """Do nothing: there are no sends to wait for."""


@cache
def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, device="cuda")


def _together() -> None:
    """Start all ranks at the same time, with hosts some milliseconds ahead of their devices, as in training.

    Otherwise the launch time of the layer would count as time of the exchange.
    """
    torch.cuda._sleep(AHEAD)
    dist.all_reduce(torch.zeros(1, device="cuda"))


def _slowest(times: list[float]) -> list[float]:
    """Return the time of the slowest rank in each round."""
    slowest = torch.tensor(times, device="cuda")
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.tolist()
