"""Log the scalars and histograms of a run to TensorBoard."""

from collections.abc import Callable
from pathlib import Path

from inplace_ttt.config import Config, UserError, one_line
from inplace_ttt.resilience.signals import block_stop_signals
from inplace_ttt.training.records import succeeds
from inplace_ttt.training.scalars import scalars_of

FOLDER = "tensorboard"  # subfolder of a run folder


class TensorBoard:
    """Write event files to ``RUN/tensorboard``, with the same names as in W&B. Each start writes a new file."""

    def __init__(self, config: Config, folder: Path, first_step: int):
        """Open a new event file. TensorBoard hides earlier events after ``first_step``.

        Raises UserError if log.tensorboard is true and the package is not installed.
        """
        self.writer = None
        if not config.log.tensorboard:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                f"log.tensorboard=true: the package tensorboard cannot be imported ({one_line(error)}): install it, or "
                f"use log.tensorboard=false"
            ) from error
        with block_stop_signals():
            self._carefully(lambda: self._open(SummaryWriter, folder / FOLDER, first_step))

    def _open(self, kind: type, folder: Path, first_step: int) -> None:
        self.writer = kind(str(folder), purge_step=first_step + 1)

    def write(self, record: dict) -> None:
        """Add a record of metrics.jsonl."""
        if self.writer is not None:
            self._carefully(lambda: self._write(record))

    def _write(self, record: dict) -> None:
        step = record["step"]
        for name, value in scalars_of(record).items():
            self.writer.add_scalar(name, value, step)
        for layer, sparse in record.get("update_histogram", {}).items():
            self._add_histogram(f"update_norm_log10/layer_{layer}", sparse, step)
        self.writer.flush()

    def _add_histogram(self, name: str, sparse: dict[str, int], step: int) -> None:
        from inplace_ttt.training.update_histograms import dense, log10_edges

        limits, counts = log10_edges()[1:], dense(sparse)  # upper edges of the bins
        kept = [number for number, count in enumerate(counts) if count]
        if not kept:
            return
        self.writer.add_histogram_raw(
            name,
            min=limits[kept[0]],
            max=limits[kept[-1]],
            num=sum(counts),
            sum=sum(counts[number] * limits[number] for number in kept),
            sum_squares=sum(counts[number] * limits[number] ** 2 for number in kept),
            bucket_limits=limits,
            bucket_counts=counts,
            global_step=step,
        )

    def close(self) -> None:
        """Close the event file."""
        if self.writer is not None:
            self._carefully(self.writer.close)

    def _carefully(self, action: Callable[[], None]) -> None:
        """Run an action; if it fails, for example on a full disk, continue without TensorBoard."""
        if not succeeds("TensorBoard", action):
            self.writer = None
