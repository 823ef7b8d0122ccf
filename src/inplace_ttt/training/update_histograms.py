"""Collect histograms of the update norms of all chunks in a step, per TTT layer and over all ranks."""

from collections import deque

import torch
import torch.distributed as dist

from inplace_ttt.megatron.runtime import device
from inplace_ttt.ttt import histogram

NOTED = 32  # number of last histograms that a checkpoint holds

Sparse = dict[str, int]  # bin -> count; bins without counts are absent


def watch_updates(modules: dict[int, torch.nn.Module], on: bool) -> None:
    """Switch the counting of update norms in the forwards of this rank's TTT layers on or off."""
    for module in modules.values():
        module.counts_updates = on


def take_counts(modules: dict[int, torch.nn.Module], layers: list[int], groups) -> dict[str, Sparse]:
    """Return the histogram of each TTT layer over all ranks, and reset the counts (collective).

    Args:
        modules: TTT layers of this rank by layer index.
        layers: indices of all TTT layers of the model.
        groups: Megatron's process groups.
    """
    counts = torch.zeros(len(layers), histogram.BINS, dtype=torch.int64, device=device())
    for layer, module in modules.items():
        if groups.tp.rank() == 0:  # all tensor-parallel ranks count the same norms, of full updates
            counts[layers.index(layer)] = module.update_counts
        module.update_counts.zero_()
    dist.all_reduce(counts)
    return {
        str(layer): {str(number): count for number, count in enumerate(row) if count}
        for layer, row in zip(layers, counts.tolist(), strict=True)
    }


def quantiles(histograms: dict[str, Sparse]) -> dict[str, float]:
    """Return the quantiles of histograms for metrics.jsonl. Layers without counts have none."""
    found = {}
    for layer, sparse in histograms.items():
        if sparse:
            counts = dense(sparse)
            for name, q in histogram.QUANTILES.items():
                # the quantile is infinite above the highest bin, and JSON has no infinity
                found[f"update_norm_{name}/layer_{layer}"] = min(histogram.quantile(counts, q), 10.0**histogram.HIGHEST)
    return found


def dense(sparse: Sparse) -> list[int]:
    """Return the counts of all bins as a list of length histogram.BINS."""
    return [sparse.get(str(number), 0) for number in range(histogram.BINS)]


def log10_edges() -> list[float]:
    """Return log10 of the edges of all bins. The two outer bins are unbounded; here they are as wide as the others."""
    inner = histogram.edges().log10().tolist()
    width = inner[1] - inner[0]
    return [inner[0] - width, *inner, inner[-1] + width]


class LastHistograms:
    """Collect the last NOTED histograms of a run for the checkpoint."""

    def __init__(self):
        self.noted: deque[dict] = deque(maxlen=NOTED)

    def add(self, record: dict) -> None:
        """Add the histograms of a record of metrics.jsonl, if it has any."""
        if isinstance(record.get("update_histogram"), dict):
            self.noted.append({"step": record["step"], "layers": record["update_histogram"]})

    def contents(self) -> dict | None:
        """Return the content of the checkpoint's file, or None if there are no histograms."""
        if not self.noted:
            return None
        return {"bins": histogram.SCALE, "histograms": list(self.noted)}
