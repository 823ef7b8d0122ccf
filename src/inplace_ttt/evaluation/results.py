"""Store the results of an evaluation: one record per sample, written when it is measured, and the scores of all.

An output folder contains ``samples.jsonl`` (one JSON object per sample), ``results.json`` (command, settings and
scores) and figures. While an evaluation runs, ``asked.json`` contains its settings and each rank appends to
``samples.rank_N.jsonl``; rerunning the command resumes from these files. Samples in the folder that the last command
did not request are marked ``left_out``.
"""

import contextlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from inplace_ttt.config import UserError
from inplace_ttt.evaluation.kinds import KINDS
from inplace_ttt.files import read_json, read_json_lines, write_json, write_text

SAMPLES, RESULTS, ASKED = "samples.jsonl", "results.json", "asked.json"
# Settings that identify an evaluation; changes of other settings, such as more samples or lengths, extend it
FIXED = ("documents", "length", "block", "ranges", "seed", "template", "num_fewshot", "limit")
Key = tuple[str, str, str]  # (the model's digest, task, the sample's digest)


@dataclass(frozen=True)
class Column:
    """Describe one model in one fast-weight mode, as results and tables label it."""

    label: str
    path: str
    fast_weights: str  # on, off or clip=NUMBER; "none" for a model without fast weights
    digest: str  # digest of the model's files, the mode and the dtype


def key_of(record: dict) -> Key:
    """Return the key of a sample's record: the model's digest, the task and the sample's digest."""
    return record["model_digest"], record["task"], record["sample"]


class Results:
    """Hold the samples of one output folder, on one rank. Call ``open`` first, then ``close`` and ``finish``."""

    def __init__(self, folder: Path, rank: int, task: str | None = None):
        """Name the files; nothing is read or written yet.

        Args:
            task: the evaluation's task; records without the fields that its table needs are ignored. None: accept all.
        """
        self.folder, self.path, self.task = folder, folder / f"samples.rank_{rank}.jsonl", task
        self.known: dict[Key, dict] = {}
        self.used: set[Key] = set()
        self._file, self.made = None, False

    def claim(self, task: str, settings: dict, columns: list[Column]) -> None:
        """Create the folder and write the settings of this evaluation into it.

        Raises UserError if the folder contains something other than an evaluation, or a different evaluation, or
        cannot be created.
        """
        folder = self.folder
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--output {folder} is a file: use a folder")
        ours = any((folder / name).is_file() for name in (RESULTS, ASKED)) or any(folder.glob("samples*.jsonl"))
        if folder.is_dir() and not ours and any(folder.iterdir()):
            raise UserError(f"--output {folder} contains files that are not from an evaluation: use another folder")
        for name in (RESULTS, ASKED):
            if (folder / name).is_file():
                _check_same(folder, name, task, settings, columns)
        self.made = not folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.path.touch()
        except OSError as error:
            raise UserError(f"--output {folder} cannot be created ({error.strerror}): use another folder") from error
        write_json(folder / ASKED, dict(task=task, settings=settings, columns=[asdict(one) for one in columns]))

    def unclaim(self) -> None:
        """Remove the files and the folder that ``claim`` created, if no sample was measured."""
        if self.path.is_file() and not self.path.stat().st_size:
            self.path.unlink()
        if not any(self.folder.glob("samples*.jsonl")):
            (self.folder / ASKED).unlink(missing_ok=True)
        if self.made:
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def open(self) -> None:
        """Read the samples in the folder. All ranks must do this before any rank writes, so that all read the same."""
        for record in read_samples(self.folder, self.task):
            record.pop("left_out", None)
            self.known[key_of(record)] = record

    def use(self, key: Key) -> dict:
        """Return a known sample and mark it as used in the scores."""
        self.used.add(key)
        return self.known[key]

    def add(self, record: dict) -> None:
        """Append a sample to this rank's file and flush it, so that it survives the process."""
        if self._file is None:
            content = self.path.read_bytes() if self.path.is_file() else b""
            self._file = self.path.open("a")
            if content and not content.endswith(b"\n"):  # last line is incomplete
                self._file.write("\n")
        self.known[key_of(record)] = record
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close this rank's file of samples, before ``finish`` merges the files; ``add`` would open it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def finish(self, results: dict) -> None:
        """Merge the files of all ranks and write ``results``. Call it on one rank after all ranks have closed."""
        self.open()
        lines = sorted(self.known.values(), key=lambda one: (one["model"], one["task"], one.get("index", 0)))
        marked = [line | ({"left_out": True} if self.used and key_of(line) not in self.used else {}) for line in lines]
        write_text(self.folder / SAMPLES, "".join(json.dumps(line, allow_nan=False) + "\n" for line in marked))
        write_json(self.folder / RESULTS, results)
        (self.folder / ASKED).unlink(missing_ok=True)
        for path in self.folder.glob("samples.rank_*.jsonl"):
            path.unlink(missing_ok=True)


def _check_same(folder: Path, name: str, task: str, settings: dict, columns: list[Column]) -> None:
    """Raise UserError if the file ``name`` in the folder describes a different evaluation."""
    before = _read_asked(folder / name, f"remove '{folder / name}' and rerun the command")
    there = before["settings"] if isinstance(before.get("settings"), dict) else {}
    named = [(one.path, one.fast_weights) for one in columns]
    gone = [one.label for one in before["columns"] if (one.path, one.fast_weights) not in named]
    why = f"contains results of the task {before['task']}" if before["task"] != task else None
    if gone:
        why = why or f"has results of {', '.join(gone)}, which this command does not name"
    for key in FIXED:
        if key in settings and there.get(key) != settings[key]:
            why = why or f"was made with {key}={there.get(key)}, not {settings[key]}"
    if why:
        raise UserError(f"--output {folder} {why}: use another folder, or remove this one")


def read_samples(folder: Path, task: str | None = None) -> Iterable[dict]:
    """Yield the samples of a folder.

    Lines that are incomplete, damaged, or without the fields that the task's table needs are skipped. Raises UserError
    if a file is a symbolic link.
    """
    names = [SAMPLES, *sorted(path.name for path in folder.glob("samples.rank_*.jsonl"))]
    for name in names:
        path = folder / name
        if path.is_symlink():
            raise UserError(f"'{path}' is a symbolic link: replace it with the file itself")
        for record in read_json_lines(path)[0]:
            named = all(isinstance(record.get(key), str) for key in ("model", "model_digest", "task", "sample"))
            if named and type(record.get("index", 0)) is int and (task is None or KINDS[task].is_whole(record)):
                yield record


def read_results(folder: Path) -> dict:
    """Return the content of results.json. Raises UserError if it does not exist or is not from an evaluation."""
    if not (folder / RESULTS).is_file():
        started = any(folder.glob("samples.rank_*.jsonl"))
        why = "its evaluation is not finished" if started else f"it has no {RESULTS}"
        raise UserError(f"'{folder}' contains no results ({why}): name an output folder of launch/evaluate.py")
    return _read_asked(folder / RESULTS, "run launch/evaluate.py again")


def _read_asked(path: Path, remedy: str) -> dict:
    """Return the content of asked.json or results.json. Raises UserError, ending with ``remedy``, if it is damaged."""
    results = read_json(path, remedy)
    columns = results.get("columns")
    whole = isinstance(results.get("task"), str) and isinstance(columns, list)
    if not whole or not all(isinstance(one, dict) and set(one) == {*Column.__annotations__} for one in columns):
        raise UserError(f"'{path}' is damaged (it does not list the models): {remedy}")
    return results | {"columns": [Column(**{key: str(value) for key, value in one.items()}) for one in columns]}


def label_columns(asked: list[tuple[Path, str]]) -> list[str]:
    """Return a label for each (model path, mode).

    The label is the folder name, with as many parent folders as make it unique, and the mode if it is not the default.
    """
    paths = list(dict.fromkeys(path.resolve() for path, _ in asked))
    names = {}
    for path in paths:
        count = 1
        while count < len(path.parts) and any(
            other != path and other.parts[-count:] == path.parts[-count:] for other in paths
        ):
            count += 1
        names[path] = os.sep.join(path.parts[-count:])
    labels = []
    for path, mode in asked:
        name = names[path.resolve()]
        labels.append(name if mode in ("on", "none") else f"{name} ({'fast weights off' if mode == 'off' else mode})")
    return labels
