"""Save and load sharded checkpoints: written asynchronously and atomically, readable at any parallel layout.

A checkpoint is a folder ``checkpoints/step_00000100`` in Megatron's ``torch_dist`` format with two additional files:
``run.json`` (step, samples seen, identity of the data) and ``manifest.json`` (size and checksum of every file). It is
written under a name that starts with a dot, with a file that marks it as ours, and renamed when all ranks are done. A
folder with another name, or whose files do not match its manifest, is not a checkpoint.
"""

import multiprocessing
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.managers import SyncManager
from pathlib import Path

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from inplace_ttt.config import UserError
from inplace_ttt.files import own_umask, read_json, write_json
from inplace_ttt.megatron import safe_load
from inplace_ttt.megatron.optimizer import keep_current_hyperparameters
from inplace_ttt.megatron.runtime import on_all_ranks
from inplace_ttt.resilience.checksums import PARTIAL_MARK, corruption, damage, flush, write_manifest, write_sums
from inplace_ttt.resilience.signals import block_stop_signals, end_with_parent

NAME = re.compile(r"step_(\d{8})")


@dataclass
class Progress:
    """Hold the content of a checkpoint's run.json."""

    step: int  # number of finished steps
    samples: int  # number of samples trained on
    packing: int = 1  # version of the sample order (data/packed.py)
    data: list[dict] | None = None  # identity of each data source (data/identity.py); None: not recorded


def folder_name(step: int) -> str:
    """Return the name of the checkpoint after ``step``."""
    return f"step_{step:08d}"


def remove_abandoned(folder: Path) -> list[Path]:
    """Remove the unfinished checkpoints in ``folder`` that this program wrote. Return the other folders with such a
    name: links, and folders without our mark."""
    foreign = []
    for path in folder.glob(".step_*"):
        if path.is_symlink() or not (path / PARTIAL_MARK).is_file():
            foreign.append(path)
        else:
            shutil.rmtree(path, ignore_errors=True)
    return foreign


def whole_checkpoints(folder: Path) -> tuple[list[Path], list[str]]:
    """Return the complete checkpoints, newest first, and a description of each incomplete one. Check file sizes, not
    checksums."""
    names = sorted((path for path in folder.glob("step_*") if NAME.fullmatch(path.name)), reverse=True)
    faults = {path: damage(path) or _progress_fault(path) for path in names}
    return [path for path in names if faults[path] is None], [fault for fault in faults.values() if fault]


def checkpoint_in(folder: Path) -> Path:
    """Return the last complete checkpoint of a run folder, or ``folder`` itself if it is not a run folder. Raises
    UserError if the run has no complete checkpoint."""
    if not (folder / "checkpoints").is_dir():
        return folder
    whole, faults = whole_checkpoints(folder / "checkpoints")
    if not whole:
        raise UserError(f"run '{folder}' has no complete checkpoint{': ' + faults[0] if faults else ''}")
    return whole[0]


def read_progress(folder: Path) -> Progress:
    """Return the content of a checkpoint's run.json. Raises UserError if the file is damaged.

    Runs that were started before packing had a version get version 1 and no data identity.
    """
    path = folder / "run.json"
    values = read_json(path)
    step, samples, packing, data = (values.get(key) for key in ("step", "samples", "packing", "data"))
    packing = 1 if packing is None else packing
    whole = all(type(value) is int and value >= 0 for value in (step, samples, packing))
    if not whole or not (data is None or (isinstance(data, list) and all(isinstance(one, dict) for one in data))):
        raise UserError(f"'{path}' is damaged (step, samples, packing or data is invalid): restore it")
    return Progress(step, samples, packing, data)


def _progress_fault(folder: Path) -> str | None:
    try:
        step = read_progress(folder).step
    except UserError as error:
        return str(error)
    return None if folder.name == folder_name(step) else f"'{folder}/run.json' has step {step}"


class Checkpointer:
    """Save and load the state of a run."""

    def __init__(
        self,
        folder: Path,
        model,
        optimizer,
        pg_collection,
        *,
        keep: int,
        async_save: bool,
        corrupt: Iterable[Path] = (),
    ):
        """Open the checkpoint folder of a run.

        Args:
            optimizer: None: only load weights.
            keep: number of the newest checkpoints that are not deleted.
            async_save: write in a background process while training continues.
            corrupt: checkpoints with wrong checksums; they are not counted, and are overwritten.
        """
        self.folder, self.model, self.optimizer = folder, model, optimizer
        self.keep, self.async_save, self.corrupt = keep, async_save, set(corrupt)
        self.metadata = {
            "dp_cp_group": pg_collection.dp_cp,
            # a later run can load the optimizer state at any parallel layout
            "distrib_optim_sharding_type": "fully_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient": False,
        }
        self.strategy = FullyParallelSaveStrategyWrapper(TorchDistSaveShardedStrategy(), pg_collection.dp_cp)
        self.queue = AsyncCallsQueue(persistent=False)

    def save(self, progress: Progress, *, files: dict[str, dict] | None = None, wait: bool = False) -> None:
        """Write a checkpoint of this step. Return immediately if saving is asynchronous and ``wait`` is False.

        ``files``: additional JSON files of the checkpoint by name, written by rank 0.

        An error on any rank is raised on all ranks, here or by a later ``poll``.
        """
        self.poll(blocking=True)  # one at a time
        target = self.folder / folder_name(progress.step)
        folder = self._open_partial(target)
        if folder is None:
            return
        _start_results_queue()
        request = dist_checkpointing.save(
            self._state(loading=False),
            str(folder),
            self.strategy,
            async_sharded_save=True,
            async_strategy="mcore",
            content_metadata={key: value for key, value in self.metadata.items() if key != "dp_cp_group"},
        )
        if request.async_fn is not None:
            request = request._replace(async_fn=partial(_write, request.async_fn, folder))
        request.add_finalize_fn(lambda: self._finish(folder, target, progress, files or {}))
        # also use the writer process if we wait for it: then an error on one rank is raised on all ranks
        self.queue.schedule_async_request(request)
        if wait or not self.async_save:
            self.poll(blocking=True)

    def _open_partial(self, target: Path) -> Path | None:
        """Create a folder with a new name, which no earlier process can still write to. Return None if ``target`` is
        already complete."""
        name = [None]
        if dist.get_rank() == 0 and (target in self.corrupt or not target.is_dir() or damage(target) is not None):
            self.folder.mkdir(parents=True, exist_ok=True)
            name = [tempfile.mkdtemp(prefix=f".{target.name}.", dir=self.folder)]
            Path(name[0], PARTIAL_MARK).touch()
            own_umask(Path(name[0]))  # ranks on other hosts write to it, too
        dist.broadcast_object_list(name, src=0)
        return None if name[0] is None else Path(name[0])

    def poll(self, blocking: bool = False) -> None:
        """Rename finished checkpoints to their final name. All ranks must call it together (collective)."""
        if self.queue.get_num_unfinalized_calls():
            self.queue.maybe_finalize_async_calls(blocking=blocking)

    def close(self) -> None:
        """Wait for the checkpoint that is being written, and end the writer."""
        self.poll(blocking=True)
        self.queue.close()

    def _finish(self, folder: Path, target: Path, progress: Progress, files: dict[str, dict]) -> None:
        errors = [None]
        if dist.get_rank() == 0:
            try:
                self._give_name(folder, target, progress, files)
            except OSError as error:
                errors = [f"{type(error).__name__}: {error}"]
        dist.broadcast_object_list(errors, src=0)
        if errors[0] is not None:
            raise RuntimeError(errors[0])

    def _give_name(self, folder: Path, target: Path, progress: Progress, files: dict[str, dict]) -> None:
        for name, content in files.items():
            write_json(folder / name, content)
        write_json(folder / "run.json", asdict(progress))
        write_manifest(folder)
        (folder / PARTIAL_MARK).unlink()
        if target.exists():
            shutil.rmtree(target)
        os.replace(folder, target)
        flush(self.folder)
        self.corrupt.discard(target)
        whole = [path for path in whole_checkpoints(self.folder)[0] if path not in self.corrupt]
        for old in whole[self.keep :]:
            shutil.rmtree(old, ignore_errors=True)  # another process may still read it

    def _model_state(self) -> dict:
        """Return only the weights. Transformer Engine's extra state for fp8 is empty, and other layers have none."""
        state = self.model.sharded_state_dict(metadata=self.metadata)
        return {name: entry for name, entry in state.items() if "_extra_state" not in name}

    def _state(self, loading: bool) -> dict:
        model = self._model_state()
        optimizer = self.optimizer.sharded_state_dict(model, is_loading=loading, metadata=self.metadata)
        return {"model": model, "optimizer": optimizer}

    def resume(self, folder: Path) -> Progress:
        """Load the model and the optimizer state. Hyperparameters such as the learning rate stay those of this start.

        Raises UserError, on all ranks, if any rank cannot read its shards.
        """
        loaded, progress = on_all_ranks(
            lambda: (safe_load.load(self._state(loading=True), folder), read_progress(folder))
        )
        self._load_model(loaded["model"])
        self.optimizer.load_state_dict(keep_current_hyperparameters(self.optimizer, loaded["optimizer"]))
        return progress

    def load_weights(self, folder: Path, name: str | None = None) -> tuple[list[str], list[str]]:
        """Load only the weights of a checkpoint, or of the last checkpoint of a run folder.

        Args:
            folder: the checkpoint or run folder.
            name: how error messages name it; default: ``checkpoint.load='...'``.

        Returns:
            The names of this rank's fast-weight parameters that the checkpoint lacks (they keep their values), and the
            names of all fast-weight tensors in the checkpoint (this model may lack some of them).

        Raises UserError, on all ranks, if any other tensor is missing or has another shape; the message names it.
        """
        return on_all_ranks(lambda: self._load_weights(folder, name))

    def _load_weights(self, folder: Path, name: str | None) -> tuple[list[str], list[str]]:
        folder = checkpoint_in(folder)
        name = name or f"checkpoint.load='{folder}'"
        fault = corruption(folder)
        if fault:
            raise UserError(f"{name} cannot be used: {fault}")
        state = {"model": self._model_state()}
        stored = {
            key.removeprefix("model."): entry
            for key, entry in safe_load.read_metadata(folder).state_dict_metadata.items()
            if hasattr(entry, "size") and not key.startswith("optimizer.")
        }
        new = []
        for key, entry in list(state["model"].items()):
            if entry.key not in stored:
                if ".ttt_" not in entry.key:
                    raise UserError(f"{name} lacks tensor '{entry.key}': use a checkpoint of this model")
                new.append(entry.key)
                del state["model"][key]
            elif not isinstance(entry, ShardedTensorFactory) and hasattr(entry, "global_shape"):
                there, here = tuple(stored[entry.key].size), tuple(entry.global_shape)
                if there != here:
                    raise UserError(
                        f"{name}: '{entry.key}' has shape {there} in the checkpoint and {here} in the model: use a "
                        f"checkpoint of this model"
                    )
        loaded = safe_load.load(state, folder)
        self._load_model(loaded["model"], allowed=tuple(new))
        if self.optimizer is not None:
            self.optimizer.reload_model_params()
        return new, sorted(key for key in stored if ".ttt_" in key)

    def _load_model(self, state: dict, allowed: tuple[str, ...] = ()) -> None:
        """Load weights. Only ``allowed`` parameters and Transformer Engine's extra state for fp8 may be missing."""
        result = self.model.load_state_dict(state, strict=False)
        missing = [name for name in result.missing_keys if "_extra_state" not in name]
        unknown = [name for name in result.unexpected_keys if "_extra_state" not in name]
        if len(missing) > len(allowed) or unknown:
            raise RuntimeError(f"checkpoint and model differ: missing {missing}, unknown {unknown}")


def _write(write: Callable, folder: Path, rank: int, buckets: list, results) -> None:
    """Write a rank's shards with Megatron's writer, then the checksums of its files. Runs in the writer process."""
    end_with_parent()
    write(rank, buckets, results)
    write_sums(folder, rank, [name for _, name, _ in buckets])


def _start_results_queue() -> None:
    """Start the queue that collects the writers' results, in a separate process as in Megatron. Unlike Megatron's, this
    process ignores stop signals while a checkpoint is written, and it ends with this rank."""
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        with block_stop_signals():
            manager.start(initializer=end_with_parent)
        filesystem_async._results_queue = manager.Queue()
