"""Open the folder of a run: lock it, compare its run with the configuration, and find the checkpoint to resume."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist
from omegaconf import MISSING

from inplace_ttt.config import SOURCE_LISTS, TTT, Config, OnResume, UserError, schema_keys, ttt_layers
from inplace_ttt.data.packed import PACKING
from inplace_ttt.files import read_yaml, user_path, write_yaml
from inplace_ttt.hf.auxiliary_files import save_auxiliary_files
from inplace_ttt.megatron.checkpoint import read_progress, remove_abandoned, whole_checkpoints
from inplace_ttt.megatron.runtime import on_first_rank
from inplace_ttt.resilience.checksums import corruption
from inplace_ttt.resilience.lock import Lock

KEYS = schema_keys()


class RunFolder:
    """Manage ``run.dir``: config.yaml, metrics.jsonl, checkpoints/, loss.png, wandb/.

    Opening the folder writes no files of the run; ``record`` does when training begins.
    """

    def __init__(self, config: Config, identity: list[dict]):
        """Lock and check the folder (collective).

        ``identity``: identities of the configuration's data sources (data/identity.py).

        Raises UserError, on all ranks, if another process uses the folder, it holds a different run, it has no sound
        checkpoint to resume, or it cannot be written.
        """
        names = [str(user_path(config.run.dir))]
        dist.broadcast_object_list(names, src=0)  # ${now:...} may differ between ranks: use that of rank 0
        self.path = Path(names[0])
        self.checkpoints, self.metrics = self.path / "checkpoints", self.path / "metrics.jsonl"
        self.corrupt: list[Path] = []  # complete checkpoints with wrong checksums
        self.notes: list[str] = []  # messages for the user
        self._lock: Lock | None = None
        self._made: list[Path] = []  # folders that this object has created
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
        """Write config.yaml and the auxiliary files of an export. Call this when the run starts or resumes."""

        def write() -> None:
            write_yaml(self._config_file, asdict(config))
            save_auxiliary_files(config, self.path)

        self._first_rank(write)
        self._made = []

    def close(self) -> None:
        """Release the lock, and remove folders that were created for a run that did not start."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None
        for folder in reversed(self._made):
            try:
                folder.rmdir()
            except OSError:  # not empty
                break

    def _first_rank(self, action: Callable):
        """Run ``action`` on rank 0 and return its result on all ranks; raise its errors on all ranks as UserError."""
        result = [None]

        def run() -> None:
            try:
                result[0] = action()
            except OSError as error:
                where = "" if error.filename is None else f"'{error.filename}': "
                raise UserError(
                    f"run.dir='{self.path}' cannot be written ({where}{error.strerror}): "
                    f"choose a writable folder with space for checkpoints"
                ) from error

        on_first_rank(run)
        dist.broadcast_object_list(result, src=0)
        return result[0]

    def _open(self, config: Config) -> tuple[list[Path], list[str], list[str]]:
        """Return the complete checkpoints (newest first, checksums not verified), descriptions of the incomplete ones,
        and messages for the user."""
        for folder in (self.path, *self.path.parents):
            if (folder / "manifest.json").is_file() and (folder / ".metadata").is_file():
                raise UserError(f"run.dir='{self.path}' is inside the checkpoint '{folder}': choose another folder")
        self._make(self.checkpoints)
        self._lock = Lock(self.path / ".lock", f"run.dir='{self.path}'")
        notes = [self._lock.warning] if self._lock.warning else []
        # remove abandoned checkpoints first: they may fill the disk
        for foreign in remove_abandoned(self.checkpoints):
            notes.append(
                f"ignored: '{foreign}' looks like an unfinished checkpoint but was not written by this program"
            )
        with tempfile.TemporaryFile(dir=self.path) as probe:
            probe.write(b"\0" * 65536)
            probe.flush()
        whole, faults = whole_checkpoints(self.checkpoints)
        # compare keys before the checksums of checkpoints are verified, which takes long
        return whole, faults, notes + self._changes(config, bool(whole))

    def _make(self, folder: Path) -> None:
        missing = [one for one in (folder, *folder.parents) if not one.exists()]
        for one in reversed(missing):
            one.mkdir(exist_ok=True)
            self._made.append(one)
        if not folder.is_dir():
            raise UserError(
                f"run.dir='{self.path}' cannot be written ('{folder}' is not a folder): choose another folder"
            )

    def _newest_sound(self, candidates: list[Path], faults: list[str]) -> Path | None:
        """Return the first checkpoint whose checksums are right, or None if there is no checkpoint (collective).

        Raises UserError if there are checkpoints, but none is sound.
        """
        for folder in candidates:
            fault = corruption(folder)
            if fault is None:
                self.notes += [f"not resumed from: {fault}" for fault in faults]
                return folder
            self.corrupt.append(folder)
            faults = [*faults, fault]
        if faults:
            raise UserError(
                f"run.dir='{self.path}' has no complete checkpoint ({faults[0]}): restore one, or "
                f"remove '{self.checkpoints}' to start from step 0"
            )
        return None

    @property
    def _config_file(self) -> Path:
        return self.path / "config.yaml"

    def _changes(self, config: Config, resumes: bool) -> list[str]:
        """Return messages on keys that changed since the last start. Raises UserError if a change is not allowed.

        Keys that the run's config.yaml lacks count as their defaults; removed keys in it are ignored.
        """
        if not resumes or not self._config_file.is_file():
            return []
        before = read_yaml(self._config_file, "restore it, or remove it to resume with the given keys")
        known = _flat(before)
        was, here = _flat(asdict(Config())) | known, _flat(json.loads(json.dumps(asdict(config))))
        changes = []
        if config.ttt.enabled and _layers(before) == ttt_layers(config.ttt, config.model.num_layers):
            here["ttt.layers"] = was["ttt.layers"]  # the same layers in other words
        # the vocabulary last: it may depend on other keys, and the message should name those
        for key, value in sorted(here.items(), key=lambda item: item[0] == "model.vocab_size"):
            if was[key] == value or KEYS[key].on_resume is OnResume.LAYOUT:
                continue
            if key not in known and was[key] in (MISSING, None):
                continue  # config.yaml is damaged and lacks the key
            if KEYS[key].on_resume is OnResume.REFUSED:
                if key in SOURCE_LISTS and _weights(was[key]) == _weights(value):
                    continue  # sources are compared by content (_compare_progress), not by path
                raise UserError(
                    f"{key}={value}, but the run in run.dir='{self.path}' was started with {was[key]}: use that value "
                    f"to resume, or use a new run.dir (checkpoint.load=... initialises it from this run's weights)"
                )
            changes.append(f"changed since the last start: {key} was {was[key]}, is {value}")
        return changes

    def _compare_progress(self, config: Config) -> tuple[int, list[str]]:
        """Return the run's packing version and messages for the user. Raises UserError if the data have changed, or the
        checkpoint is from a later version of this program or beyond train.steps."""
        if self.resume_from is None:
            return PACKING, []
        progress, place = read_progress(self.resume_from), f"run.dir='{self.path}'"
        if progress.packing > PACKING:
            raise UserError(f"{place} was started by a later version of this program: use that version to resume")
        if progress.step > config.train.steps:
            raise UserError(
                f"train.steps={config.train.steps}, but the run in {place} is at step {progress.step}: use "
                f"{progress.step} or more"
            )
        if progress.data is None:
            notes = ["the identity of the run's data is recorded from now on"] if self.identity else []
            return progress.packing, notes
        named = [(key, one.path) for key in SOURCE_LISTS for one in getattr(config.data, key.removeprefix("data."))]
        for (key, path), was, here in zip(named, progress.data, self.identity, strict=False):
            if was != here:
                facts = ("tokenizer", "documents", "tokens", "digest")
                what = next(fact for fact in facts if was.get(fact) != here[fact])
                raise UserError(
                    f"{key}: '{path}' is not the data that the run in {place} was started with ({what} was "
                    f"{was.get(what)}, is {here[what]}): use the original data, or use another run.dir"
                )
        return progress.packing, []


def _weights(sources) -> list:
    listed = sources if isinstance(sources, list) else []  # a damaged file may hold anything
    return [one.get("weight", 1.0) if isinstance(one, dict) else None for one in listed]


def _layers(before: dict) -> list[int] | None:
    """Return the TTT layers of a run's config.yaml; None if it does not say them."""
    try:
        return ttt_layers(TTT(layers=before["ttt"]["layers"]), before["model"]["num_layers"])
    except (KeyError, TypeError, UserError):
        return None


def _flat(tree, prefix: str = "") -> dict:
    """Return the values of a nested configuration by full key name, without unknown keys."""
    if prefix and not (isinstance(tree, dict) and any(key.startswith(f"{prefix}.") for key in KEYS)):
        return {prefix: tree} if prefix in KEYS else {}
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
