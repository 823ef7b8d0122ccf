"""Histograms of the norms of chunks' updates in a step, by TTT layer, over all ranks: for metrics and checkpoints."""

from collections import deque

import torch
import torch.distributed as dist

from inplace_ttt.megatron.runtime import device
from inplace_ttt.ttt import histogram

NOTED = 32  # histograms of one run that a checkpoint holds, the last ones

Sparse = dict[str, int]  # bin -> count; bins without counts are absent


def watch_updates(modules: dict[int, torch.nn.Module], on: bool) -> None:
    """Make the TTT layers of this rank count the updates of the forwards that follow, or stop that."""
    for module in modules.values():
        module.counts_updates = on


def take_counts(modules: dict[int, torch.nn.Module], layers: list[int], groups) -> dict[str, Sparse]:
    """Return each TTT layer's histogram over all ranks, and begin anew. Every rank calls it.

    Args:
        modules: this rank's, by layer number.
        layers: all TTT layers' numbers.
        groups: Megatron's process groups.
    """
    counts = torch.zeros(len(layers), histogram.BINS, dtype=torch.int64, device=device())
    for layer, module in modules.items():
        if groups.tp.rank() == 0:  # tensor-parallel ranks all know the norms of whole updates
            counts[layers.index(layer)] = module.update_counts
        module.update_counts.zero_()
    dist.all_reduce(counts)
    return {
        str(layer): {str(number): count for number, count in enumerate(row) if count}
        for layer, row in zip(layers, counts.tolist(), strict=True)
    }


def quantiles(histograms: dict[str, Sparse]) -> dict[str, float]:
    """Return the records of metrics.jsonl that follow from histograms: layers without counts have none."""
    found = {}
    for layer, sparse in histograms.items():
        if sparse:
            counts = dense(sparse)
            for name, q in histogram.QUANTILES.items():
                # what lies above all bins is infinite, which JSON does not know
                found[f"update_norm_{name}/layer_{layer}"] = min(histogram.quantile(counts, q), 10.0**histogram.HIGHEST)
    return found


def dense(sparse: Sparse) -> list[int]:
    """Return the counts of all bins."""
    return [sparse.get(str(number), 0) for number in range(histogram.BINS)]


def log10_edges() -> list[float]:
    """Return the edges of all bins as powers of ten; the outer bins, which have no end, are as wide as the others."""
    inner = histogram.edges().log10().tolist()
    width = inner[1] - inner[0]
    return [inner[0] - width, *inner, inner[-1] + width]


class LastHistograms:
    """The last histograms of a run, as a checkpoint holds them."""

    def __init__(self):
        self.noted: deque[dict] = deque(maxlen=NOTED)

    def add(self, record: dict) -> None:
        """Note those of a record of metrics.jsonl, if it has any."""
        if isinstance(record.get("update_histogram"), dict):
            self.noted.append({"step": record["step"], "layers": record["update_histogram"]})

    def contents(self) -> dict | None:
        """Return what the checkpoint's file says, or None where nothing was noted."""
        if not self.noted:
            return None
        return {"bins": histogram.SCALE, "histograms": list(self.noted)}
