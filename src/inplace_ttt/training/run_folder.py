"""The folder of a run: what makes it this run, and what a restart may change."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist
import yaml

from inplace_ttt.config import Config, UserError, read_config_file
from inplace_ttt.megatron.checkpoint import whole_checkpoints
from inplace_ttt.megatron.manifest import corruption

# Another value of one of these is another run: a checkpoint would be continued into something it is not.
IDENTITY = (
    "model",
    "ttt.enabled",
    "ttt.layers",
    "ttt.chunk_size",
    "ttt.eta",
    "ttt.target",
    "ttt.conv_kernel",
    "ttt.project",
    "data.kind",
    "data.sources",
    "data.seq_length",
    "data.reset_at_documents",
    "data.validation_fraction",
    "data.recall_pairs",
    "data.recall_alphabet",
    "train.seed",
    "train.global_batch_size",
)
# These say how a run is carried out, not what it computes.
FREE = (
    "parallel",
    "checkpoint",
    "log",
    "run",
    "data.num_workers",
    "train.micro_batch_size",
    "train.recompute",
    "train.recompute_core_attn",
    "train.recompute_modules",
    "model.transformer_impl",
    "ttt.prefix",
    "ttt.keep_chunk_weights",
)


def agree(error: Exception | None) -> None:
    """Raise on every rank what went wrong on any, so that none waits for one that has stopped."""
    message = None if error is None else str(error)
    messages = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    for found in messages:
        if found is not None:
            raise UserError(found)


class RunFolder:
    """``run.dir``: config.yaml, metrics.jsonl, checkpoints/, loss.png, wandb/."""

    def __init__(self, config: Config):
        names = [config.run.dir]
        dist.broadcast_object_list(names, src=0)  # ${now:...} may differ between ranks: the first one's counts
        self.path = Path(names[0])
        self.checkpoints, self.metrics = self.path / "checkpoints", self.path / "metrics.jsonl"
        self.corrupt: list[Path] = []  # checkpoints that look whole and are not
        candidates, self.faults, self.changes = self._first_rank(lambda: self._open(config))
        self.resume_from = self._newest_sound(candidates)
        self._first_rank(lambda: self._record(config))

    @property
    def notes(self) -> list[str]:
        """What the user should hear: checkpoints that were passed over, and keys that changed since the run began."""
        return [f"not resumed from: {fault}" for fault in self.faults] + self.changes

    def _first_rank(self, action: Callable):
        """What ``action`` returns on the first rank, and its errors, on all."""
        result, error = [None], None
        if dist.get_rank() == 0:
            try:
                result = [action()]
            except UserError as caught:
                error = caught
            except OSError as caught:
                error = UserError(
                    f"run.dir='{self.path}' cannot be written ({caught.strerror}): "
                    f"choose a folder that can, with room for checkpoints"
                )
        agree(error)
        dist.broadcast_object_list(result, src=0)
        return result[0]

    def _open(self, config: Config) -> tuple[list[Path], list[str], list[str]]:
        """The checkpoints that are whole at a glance, the newest first, what is wrong with others, and what changed."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        for abandoned in self.checkpoints.glob(".step_*"):  # it may be what fills the disk
            shutil.rmtree(abandoned, ignore_errors=True)
        probe = self.path / ".writable"
        probe.write_bytes(b"\0" * 65536)
        probe.unlink()
        whole, faults = whole_checkpoints(self.checkpoints)
        # keys are compared before checkpoints are read to the last byte, which takes its time
        return whole, faults, self._changes(config) if whole else []

    def _newest_sound(self, candidates: list[Path]) -> Path | None:
        """The first in which every byte is what was written; all ranks look together."""
        for folder in candidates:
            fault = corruption(folder)
            if fault is None:
                return folder
            self.corrupt.append(folder)
            self.faults.append(fault)
        if self.faults:
            raise UserError(
                f"run.dir='{self.path}' holds no whole checkpoint ({self.faults[0]}): restore it, or "
                f"remove '{self.checkpoints}' to begin anew"
            )
        return None

    def _record(self, config: Config) -> None:
        partial = self._config_file.with_suffix(".partial")
        partial.write_text(yaml.safe_dump(asdict(config), sort_keys=False))
        os.replace(partial, self._config_file)

    @property
    def _config_file(self) -> Path:
        return self.path / "config.yaml"

    def _changes(self, config: Config) -> list[str]:
        """What is not as it was when the run began; raises UserError where that makes it another run."""
        if not self._config_file.is_file():
            return []
        try:
            before = read_config_file(self._config_file)
        except UserError as error:
            raise UserError(f"{error}; or remove it, to go on with the keys given") from error
        was, here, changes = _flat(before), _flat(json.loads(json.dumps(asdict(config)))), []
        for key in sorted(set(was) | set(here)):
            if was.get(key) == here.get(key) or _within(key, FREE):
                continue
            if _within(key, IDENTITY):
                raise UserError(
                    f"{key}={here.get(key)}, but the run in run.dir='{self.path}' was begun with {was.get(key)}: "
                    f"use that value to go on, or another run.dir (checkpoint.load takes its weights along)"
                )
            changes.append(f"changed since the run began: {key} was {was.get(key)}, is {here.get(key)}")
        return changes


def _within(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _flat(tree, prefix: str = "") -> dict:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}.{key}" if prefix else key))
    return flat
