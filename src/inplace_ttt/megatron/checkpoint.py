"""Sharded checkpoints: written beside training, whole or not there, readable at any parallel layout.

A checkpoint is a folder ``checkpoints/step_00000100`` in Megatron's ``torch_dist`` format with two files of ours:
``run.json`` (step, samples seen, what data they are of) and ``manifest.json`` (size and checksum of every file). It is
written under a name that starts with a dot, with a mark that says whose it is, and renamed when all ranks are done; a
folder without that name, or whose files are not those of its manifest, is not a checkpoint.
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
from inplace_ttt.megatron.runtime import raise_on_all_ranks
from inplace_ttt.resilience.checksums import PARTIAL_MARK, corruption, damage, flush, write_manifest, write_sums
from inplace_ttt.resilience.signals import block_stop_signals, end_with_parent

NAME = re.compile(r"step_(\d{8})")


@dataclass
class Progress:
    """Record where a run stands: run.json."""

    step: int
    samples: int
    packing: int = 1  # the version of the order of samples (data/packed.py)
    data: list[dict] | None = None  # what identifies each source (data/identity.py); None: nobody has looked


def folder_name(step: int) -> str:
    """Return the name of the checkpoint after ``step``."""
    return f"step_{step:08d}"


def remove_abandoned(folder: Path) -> list[Path]:
    """Remove unfinished checkpoints of our runs from ``folder``; return folders that look like one and are not ours:
    without our mark, or links."""
    foreign = []
    for path in folder.glob(".step_*"):
        if path.is_symlink() or not (path / PARTIAL_MARK).is_file():
            foreign.append(path)
        else:
            shutil.rmtree(path, ignore_errors=True)
    return foreign


def whole_checkpoints(folder: Path) -> tuple[list[Path], list[str]]:
    """Checkpoints that are whole at a glance, the newest first, and what is wrong with the others."""
    names = sorted((path for path in folder.glob("step_*") if NAME.fullmatch(path.name)), reverse=True)
    faults = {path: damage(path) or _progress_fault(path) for path in names}
    return [path for path in names if faults[path] is None], [fault for fault in faults.values() if fault]


def checkpoint_in(folder: Path) -> Path:
    """Return the folder itself, or the last whole checkpoint of a run folder. Raise UserError where it has none."""
    if not (folder / "checkpoints").is_dir():
        return folder
    whole, faults = whole_checkpoints(folder / "checkpoints")
    if not whole:
        raise UserError(f"run '{folder}' has no whole checkpoint{': ' + faults[0] if faults else ''}")
    return whole[0]


def read_progress(folder: Path) -> Progress:
    """Return what a checkpoint's run.json says. Raises UserError where it is damaged.

    Runs that were begun before packing had a version have version 1, and nothing that identifies their data.
    """
    path = folder / "run.json"
    values = read_json(path)
    step, samples, packing, data = (values.get(key) for key in ("step", "samples", "packing", "data"))
    packing = 1 if packing is None else packing
    whole = all(type(value) is int and value >= 0 for value in (step, samples, packing))
    if not whole or not (data is None or (isinstance(data, list) and all(isinstance(one, dict) for one in data))):
        raise UserError(f"'{path}' is damaged (it does not say which step it is of): restore it")
    return Progress(step, samples, packing, data)


def _progress_fault(folder: Path) -> str | None:
    try:
        step = read_progress(folder).step
    except UserError as error:
        return str(error)
    return None if folder.name == folder_name(step) else f"'{folder}/run.json' says step {step}"


class Checkpointer:
    """Saves and loads the state of a run."""

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
        """Keep a run's checkpoints.

        ``optimizer``: None where weights are only loaded. ``corrupt`` checkpoints look whole and are not: they do not
        count, and are overwritten."""
        self.folder, self.model, self.optimizer = folder, model, optimizer
        self.keep, self.async_save, self.corrupt = keep, async_save, set(corrupt)
        self.metadata = {
            "dp_cp_group": pg_collection.dp_cp,
            # optimizer state that any later layout can read
            "distrib_optim_sharding_type": "fully_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient": False,
        }
        self.strategy = FullyParallelSaveStrategyWrapper(TorchDistSaveShardedStrategy(), pg_collection.dp_cp)
        self.queue = AsyncCallsQueue(persistent=False)

    def save(self, progress: Progress, *, files: dict[str, dict] | None = None, wait: bool = False) -> None:
        """Write a checkpoint of this step; returns at once if saving is asynchronous and ``wait`` is not set.

        ``files``: what the first rank writes beside run.json, JSON by name.

        Whatever keeps any rank from writing is raised on all, here or by a later ``poll``.
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
        # a process of its own writes, also where we wait for it: what fails on one rank is then raised on all
        self.queue.schedule_async_request(request)
        if wait or not self.async_save:
            self.poll(blocking=True)

    def _open_partial(self, target: Path) -> Path | None:
        """Make a folder to write to, under a name that no earlier process still writes to; None if nothing is to do."""
        name = [None]
        if dist.get_rank() == 0 and (target in self.corrupt or not target.is_dir() or damage(target) is not None):
            self.folder.mkdir(parents=True, exist_ok=True)
            name = [tempfile.mkdtemp(prefix=f".{target.name}.", dir=self.folder)]
            Path(name[0], PARTIAL_MARK).touch()
            own_umask(Path(name[0]))  # other hosts' ranks write there, too
        dist.broadcast_object_list(name, src=0)
        return None if name[0] is None else Path(name[0])

    def poll(self, blocking: bool = False) -> None:
        """Give finished checkpoints their name. All ranks call it together."""
        if self.queue.get_num_unfinalized_calls():
            self.queue.maybe_finalize_async_calls(blocking=blocking)

    def close(self) -> None:
        """Finish what is being written."""
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
            shutil.rmtree(old, ignore_errors=True)  # the new one is there: whoever still reads this one may

    def _model_state(self) -> dict:
        """Return weights alone: Transformer Engine's extra state for fp8 is empty, and other layers do not have it."""
        state = self.model.sharded_state_dict(metadata=self.metadata)
        return {name: entry for name, entry in state.items() if "_extra_state" not in name}

    def _state(self, loading: bool) -> dict:
        model = self._model_state()
        optimizer = self.optimizer.sharded_state_dict(model, is_loading=loading, metadata=self.metadata)
        return {"model": model, "optimizer": optimizer}

    def resume(self, folder: Path) -> Progress:
        """Load the model and the optimizer's state; learning rates and the like stay those of this start.

        Raises UserError, on all ranks, where any cannot read its part.
        """
        error = None
        try:
            loaded = safe_load.load(self._state(loading=True), folder)
            progress = read_progress(folder)
        except UserError as caught:
            error = caught
        raise_on_all_ranks(error)
        self._load_model(loaded["model"])
        self.optimizer.load_state_dict(keep_current_hyperparameters(self.optimizer, loaded["optimizer"]))
        return progress

    def load_weights(self, folder: Path, name: str | None = None) -> tuple[list[str], list[str]]:
        """Start from the weights alone of a checkpoint, or of a run's last one. ``name``: how errors call it, instead
        of the key ``checkpoint.load``.

        Return the names of this rank's new parameters that it lacks, which stay as they are, and of all fast-weight
        tensors that it has, for which this model may have no place. Raises UserError, on all ranks, naming any other
        tensor that is missing or has another shape.
        """
        error, found = None, ([], [])
        try:
            found = self._load_weights(folder, name)
        except UserError as caught:
            error = caught
        raise_on_all_ranks(error)
        return found

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
                    raise UserError(f"{name} has no tensor '{entry.key}': is it of this model?")
                new.append(entry.key)
                del state["model"][key]
            elif not isinstance(entry, ShardedTensorFactory) and hasattr(entry, "global_shape"):
                there, here = tuple(stored[entry.key].size), tuple(entry.global_shape)
                if there != here:
                    raise UserError(f"{name}: '{entry.key}' is {there} there and {here} in this model")
        loaded = safe_load.load(state, folder)
        self._load_model(loaded["model"], allowed=tuple(new))
        if self.optimizer is not None:
            self.optimizer.reload_model_params()
        return new, sorted(key for key in stored if ".ttt_" in key)

    def _load_model(self, state: dict, allowed: tuple[str, ...] = ()) -> None:
        """Load weights; all but new parameters and Transformer Engine's extra state for fp8 must be there."""
        result = self.model.load_state_dict(state, strict=False)
        missing = [name for name in result.missing_keys if "_extra_state" not in name]
        unknown = [name for name in result.unexpected_keys if "_extra_state" not in name]
        if len(missing) > len(allowed) or unknown:
            raise RuntimeError(f"checkpoint and model differ: missing {missing}, unknown {unknown}")


def _write(write: Callable, folder: Path, rank: int, buckets: list, results) -> None:
    """Write a rank's part, by Megatron, then the checksums of its files; it runs in the writing process."""
    end_with_parent()
    write(rank, buckets, results)
    write_sums(folder, rank, [name for _, name, _ in buckets])


def _start_results_queue() -> None:
    """Start the queue by which writers report, in a process of its own as Megatron does, but one that a request to stop
    does not end while a checkpoint is written, and that does not outlive this rank."""
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        with block_stop_signals():
            manager.start(initializer=end_with_parent)
        filesystem_async._results_queue = manager.Queue()
