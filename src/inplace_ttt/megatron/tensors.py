"""Read and write a sharded checkpoint tensor by tensor, with memory for one tensor only."""

import contextlib
import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from inplace_ttt.megatron.safe_load import COMMON_STATE, OPTIMIZER, Reader, read_metadata, readable


@contextlib.contextmanager
def _alone():
    """Silence torch's warning that torch.distributed is not initialised."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


@dataclass(frozen=True)
class PlannedTensor:
    """Describe a tensor that is computed only when it is written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Return the size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(folder: Path, entries: dict[str, PlannedTensor], done: Callable[[int], None]) -> None:
    """Write a checkpoint that Megatron can load at any parallel layout. Each tensor is computed, written and freed.

    ``done`` is called with the number of bytes of each tensor.
    """
    state = {name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for name, entry in entries.items()}
    state[COMMON_STATE] = [{}]
    # one file per tensor: torch keeps all tensors of one file in memory
    writer = FileSystemWriter(folder, single_file_per_rank=False, thread_count=1)
    with _alone():
        dcp.save(state, storage_writer=writer, planner=_MakeWhenWritten(entries, done), no_dist=True)
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')


class _MakeWhenWritten(DefaultSavePlanner):
    def __init__(self, entries: dict[str, PlannedTensor], done: Callable[[int], None]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.entries, self.done = entries, done

    def resolve_data(self, write_item):
        """Compute the tensor of a write item, report its bytes to ``done``, and return it.

        Objects that are not planned, such as the common state, are left to torch's planner. Raises RuntimeError if the
        shape or dtype differs from the plan.
        """
        name = write_item.index.fqn
        if name not in self.entries:
            return super().resolve_data(write_item)
        entry = self.entries[name]
        tensor = entry.make()
        if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
            raise RuntimeError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, planned {entry.shape} {entry.dtype}")
        self.done(tensor.nbytes)
        return tensor.contiguous()


class TensorReader:
    """Read the weights of a checkpoint folder, one at a time. Raises UserError if the folder cannot be read."""

    def __init__(self, folder: Path):
        self.folder = folder

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and dtype of each weight by name, without optimizer states."""
        found = read_metadata(self.folder).state_dict_metadata
        return {
            name: (tuple(entry.size), entry.properties.dtype)
            for name, entry in found.items()
            if hasattr(entry, "size") and not name.startswith(OPTIMIZER)
        }

    def nbytes(self, name: str) -> int:
        """Return the size of a weight in bytes."""
        shape, dtype = self.shapes[name]
        return math.prod(shape) * dtype.itemsize

    def read(self, name: str) -> Tensor:
        """Return a weight as a CPU tensor. Raises UserError if it cannot be read."""
        shape, dtype = self.shapes[name]
        state = {name: torch.empty(shape, dtype=dtype)}
        with _alone(), readable(self.folder):
            dcp.load(state, storage_reader=Reader(self.folder), no_dist=True)
        return state[name]
