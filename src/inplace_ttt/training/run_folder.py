"""Open the folder of a run: lock it, compare the run in it with the configuration, find the checkpoint to resume."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist
from omegaconf import MISSING

from inplace_ttt.config import SOURCE_LISTS, Config, OnResume, UserError, schema_keys
from inplace_ttt.data.packed import PACKING
from inplace_ttt.files import read_yaml, user_path, write_yaml
from inplace_ttt.hf.auxiliary_files import save_auxiliary_files
from inplace_ttt.megatron.checkpoint import read_progress, remove_abandoned, whole_checkpoints
from inplace_ttt.megatron.runtime import raise_on_all_ranks
from inplace_ttt.resilience.checksums import corruption
from inplace_ttt.resilience.lock import Lock

KEYS = schema_keys()


class RunFolder:
    """``run.dir``: config.yaml, metrics.jsonl, checkpoints/, loss.png, wandb/.

    Opening it writes nothing of a run; ``record`` does, when training begins.
    """

    def __init__(self, config: Config, identity: list[dict]):
        """Every rank opens it together. ``identity``: of the run's sources, see data/identity.py.

        Raises UserError, on all ranks, where another process writes to the folder, or the run in it is another one.
        """
        names = [str(user_path(config.run.dir))]
        dist.broadcast_object_list(names, src=0)  # ${now:...} may differ between ranks: the first one's counts
        self.path = Path(names[0])
        self.checkpoints, self.metrics = self.path / "checkpoints", self.path / "metrics.jsonl"
        self.corrupt: list[Path] = []  # checkpoints that look whole and are not
        self.notes: list[str] = []  # what the user should hear
        self._lock: Lock | None = None
        self._made: list[Path] = []  # folders that were not there before
        self.identity = identity
        try:
            candidates, faults, notes = self._first_rank(lambda: self._open(config))
            self.resume_from = self._newest_sound(candidates, faults)
            self.packing, more = self._first_rank(lambda: self._compare_progress(config))
        except BaseException:
            self.close()
            raise
        self.notes += notes + more

    def record(self, config: Config) -> None:
        """Write config.yaml and keep what an export takes along: the run begins, or goes on, with these values."""

        def write() -> None:
            write_yaml(self._config_file, asdict(config))
            save_auxiliary_files(config, self.path)

        self._first_rank(write)
        self._made = []

    def close(self) -> None:
        """Let other processes write to the folder; one that was made for a run that never began is removed."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None
        for folder in reversed(self._made):
            try:
                folder.rmdir()
            except OSError:  # something is in it
                break

    def _first_rank(self, action: Callable):
        """Return what ``action`` returns on the first rank, on all; raise its errors on all."""
        result, error = [None], None
        if dist.get_rank() == 0:
            try:
                result = [action()]
            except UserError as caught:
                error = caught
            except OSError as caught:
                where = "" if caught.filename is None else f"'{caught.filename}': "
                error = UserError(
                    f"run.dir='{self.path}' cannot be written ({where}{caught.strerror}): "
                    f"choose a folder that can, with room for checkpoints"
                )
        raise_on_all_ranks(error)
        dist.broadcast_object_list(result, src=0)
        return result[0]

    def _open(self, config: Config) -> tuple[list[Path], list[str], list[str]]:
        """Return the checkpoints that are whole at a glance, the newest first, what is wrong with others, and what the
        user should hear."""
        for folder in (self.path, *self.path.parents):
            if (folder / "manifest.json").is_file() and (folder / ".metadata").is_file():
                raise UserError(f"run.dir='{self.path}' lies in the checkpoint '{folder}': choose another folder")
        self._make(self.checkpoints)
        self._lock = Lock(self.path / ".lock", f"run.dir='{self.path}'")
        notes = [self._lock.warning] if self._lock.warning else []
        # abandoned checkpoints first: they may be what fills the disk
        for foreign in remove_abandoned(self.checkpoints):
            notes.append(f"left alone: '{foreign}', which no run of ours has begun to write")
        with tempfile.TemporaryFile(dir=self.path) as probe:
            probe.write(b"\0" * 65536)
            probe.flush()
        whole, faults = whole_checkpoints(self.checkpoints)
        # keys are compared before checkpoints are read to the last byte, which takes its time
        return whole, faults, notes + self._changes(config, bool(whole))

    def _make(self, folder: Path) -> None:
        missing = [one for one in (folder, *folder.parents) if not one.exists()]
        for one in reversed(missing):
            one.mkdir(exist_ok=True)
            self._made.append(one)
        if not folder.is_dir():
            raise UserError(f"run.dir='{self.path}' cannot be written ('{folder}' is no folder): choose another folder")

    def _newest_sound(self, candidates: list[Path], faults: list[str]) -> Path | None:
        """The first in which every byte is what was written; all ranks look together."""
        for folder in candidates:
            fault = corruption(folder)
            if fault is None:
                self.notes += [f"not resumed from: {fault}" for fault in faults]
                return folder
            self.corrupt.append(folder)
            faults = [*faults, fault]
        if faults:
            raise UserError(
                f"run.dir='{self.path}' holds no whole checkpoint ({faults[0]}): restore it, or "
                f"remove '{self.checkpoints}' to begin anew"
            )
        return None

    @property
    def _config_file(self) -> Path:
        return self.path / "config.yaml"

    def _changes(self, config: Config, resumes: bool) -> list[str]:
        """Return what is not as it was when the run began; raise UserError where that makes it another run.

        A key that the run did not know has its default; one that is no key any more is left out.
        """
        if not resumes or not self._config_file.is_file():
            return []
        before = read_yaml(self._config_file, "restore it, or remove it to go on with the keys given")
        known = _flat(before)
        was, here = _flat(asdict(Config())) | known, _flat(json.loads(json.dumps(asdict(config))))
        changes = []
        # the vocabulary last: it may follow from other keys, which are the ones to be named
        for key, value in sorted(here.items(), key=lambda item: item[0] == "model.vocab_size"):
            if was[key] == value or KEYS[key].on_resume is OnResume.LAYOUT:
                continue
            if key not in known and was[key] in (MISSING, None):
                continue  # a damaged file that does not say it
            if KEYS[key].on_resume is OnResume.REFUSED:
                if key in SOURCE_LISTS and _weights(was[key]) == _weights(value):
                    continue  # a source is its content, wherever it lies
                raise UserError(
                    f"{key}={value}, but the run in run.dir='{self.path}' was begun with {was[key]}: "
                    f"use that value to go on, or another run.dir (checkpoint.load takes its weights along)"
                )
            changes.append(f"changed since the run began: {key} was {was[key]}, is {value}")
        return changes

    def _compare_progress(self, config: Config) -> tuple[int, list[str]]:
        """Return the run's version of packing, and what the user should hear of its data."""
        if self.resume_from is None:
            return PACKING, []
        progress, place = read_progress(self.resume_from), f"run.dir='{self.path}'"
        if progress.packing > PACKING:
            raise UserError(f"{place} was begun by a later version of this program: go on with that one")
        if progress.step > config.train.steps:
            raise UserError(
                f"train.steps={config.train.steps}, but the run in {place} has gone to step {progress.step}: use "
                f"{progress.step} or more"
            )
        if progress.data is None:
            notes = ["the run's data are known by their content from now on"] if self.identity else []
            return progress.packing, notes
        named = [(key, one.path) for key in SOURCE_LISTS for one in getattr(config.data, key.removeprefix("data."))]
        for (key, path), was, here in zip(named, progress.data, self.identity, strict=False):
            if was != here:
                facts = ("tokenizer", "documents", "tokens", "digest")
                what = next(fact for fact in facts if was.get(fact) != here[fact])
                raise UserError(
                    f"{key}: '{path}' is not what the run in {place} was begun with ({what} {was.get(what)} then, "
                    f"{here[what]} now): name the data it was begun with, or use another run.dir"
                )
        return progress.packing, []


def _weights(sources) -> list:
    listed = sources if isinstance(sources, list) else []  # a damaged file may hold anything
    return [one.get("weight", 1.0) if isinstance(one, dict) else None for one in listed]


def _flat(tree, prefix: str = "") -> dict:
    """Return the values of a nested configuration by their keys' full names; leave out what is no key."""
    if prefix and not (isinstance(tree, dict) and any(key.startswith(f"{prefix}.") for key in KEYS)):
        return {prefix: tree} if prefix in KEYS else {}
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
