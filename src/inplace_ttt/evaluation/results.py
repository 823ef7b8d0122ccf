"""Results of an evaluation: one line for each sample, written as it comes, and what they say together.

A folder holds ``samples.jsonl`` (one JSON object a sample), ``results.json`` (what was asked, and the scores) and
pictures. While an evaluation runs ``asked.json`` says what was asked, and each rank appends to
``samples.rank_N.jsonl``; a second start of the same command finds there what is done. Samples of the folder that the
last command did not ask for are marked ``left_out``.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from inplace_ttt.config import UserError
from inplace_ttt.evaluation.ruler import TASKS
from inplace_ttt.files import read_json, read_json_lines, write_json, write_text

SAMPLES, RESULTS, ASKED = "samples.jsonl", "results.json", "asked.json"
# Settings whose other values make another evaluation; others, such as more samples or lengths, extend one
FIXED = ("documents", "length", "block", "ranges", "seed", "template", "num_fewshot", "limit")
Key = tuple[str, str, str]  # (the model's digest, task, the sample's digest)


@dataclass(frozen=True)
class Column:
    """A model in one of its modes, as results and tables name it."""

    label: str
    path: str
    fast_weights: str  # on, off, clip=NUMBER; "none" where the model has none
    digest: str  # of the model's files, the mode and the dtype


def key_of(record: dict) -> Key:
    return record["model_digest"], record["task"], record["sample"]


class Results:
    """The samples of one folder, for one rank. ``open`` first; ``close`` and ``finish`` end it."""

    def __init__(self, folder: Path, rank: int, task: str | None = None):
        """``task``: of the evaluation; records that lack what its table needs are no samples. None: any."""
        self.folder, self.path, self.task = folder, folder / f"samples.rank_{rank}.jsonl", task
        self.known: dict[Key, dict] = {}
        self.used: set[Key] = set()
        self._file, self.made = None, False

    def claim(self, task: str, settings: dict, columns: list[Column]) -> None:
        """Make the folder, and mark it as ours. Raise UserError where it holds something that is no evaluation, or
        the results of another one, which these would replace."""
        folder = self.folder
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--output {folder} is a file: name a folder")
        ours = any((folder / name).is_file() for name in (RESULTS, ASKED)) or any(folder.glob("samples*.jsonl"))
        if folder.is_dir() and not ours and any(folder.iterdir()):
            raise UserError(f"--output {folder} holds something else than an evaluation: name another folder")
        for name in (RESULTS, ASKED):
            if (folder / name).is_file():
                _check_same(folder, name, task, settings, columns)
        self.made = not folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.path.touch()
        except OSError as error:
            raise UserError(f"--output {folder} cannot be made ({error.strerror}): name another folder") from error
        write_json(folder / ASKED, dict(task=task, settings=settings, columns=[asdict(one) for one in columns]))

    def unclaim(self) -> None:
        """Take back what ``claim`` has made, where nothing was measured."""
        if self.path.is_file() and not self.path.stat().st_size:
            self.path.unlink()
        if not any(self.folder.glob("samples*.jsonl")):
            (self.folder / ASKED).unlink(missing_ok=True)
        if self.made:
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def open(self) -> None:
        """Read what is done. Every rank reads the same, before any writes."""
        for record in read_samples(self.folder, self.task):
            record.pop("left_out", None)
            self.known[key_of(record)] = record

    def use(self, key: Key) -> dict:
        """Return a sample that is known, as one that the evaluation's scores are of."""
        self.used.add(key)
        return self.known[key]

    def add(self, record: dict) -> None:
        """Keep a sample: it survives the process from here on."""
        if self._file is None:
            content = self.path.read_bytes() if self.path.is_file() else b""
            self._file = self.path.open("a")
            if content and not content.endswith(b"\n"):  # a line that was cut off
                self._file.write("\n")
        self.known[key_of(record)] = record
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def finish(self, results: dict) -> None:
        """Join the ranks' files, and write what the samples say together. On one rank, when all have closed."""
        self.open()
        lines = sorted(self.known.values(), key=lambda one: (one["model"], one["task"], one.get("index", 0)))
        marked = [line | ({"left_out": True} if self.used and key_of(line) not in self.used else {}) for line in lines]
        write_text(self.folder / SAMPLES, "".join(json.dumps(line, allow_nan=False) + "\n" for line in marked))
        write_json(self.folder / RESULTS, results)
        (self.folder / ASKED).unlink(missing_ok=True)
        for path in self.folder.glob("samples.rank_*.jsonl"):
            path.unlink(missing_ok=True)


def _check_same(folder: Path, name: str, task: str, settings: dict, columns: list[Column]) -> None:
    """Raise UserError where a folder's file says that it has results that are none of this evaluation's."""
    before = _read_asked(folder / name, f"remove '{folder / name}', and the samples are read again")
    there = before["settings"] if isinstance(before.get("settings"), dict) else {}
    named = [(one.path, one.fast_weights) for one in columns]
    gone = [one.label for one in before["columns"] if (one.path, one.fast_weights) not in named]
    why = f"is of the task {before['task']}" if before["task"] != task else None
    if gone:
        why = why or f"has results of {', '.join(gone)}, which this command does not name"
    for key in FIXED:
        if key in settings and there.get(key) != settings[key]:
            why = why or f"was made with {key}={there.get(key)}, and not {settings[key]}"
    if why:
        raise UserError(f"--output {folder} {why}: name another folder, or remove this one")


def read_samples(folder: Path, task: str | None = None) -> Iterable[dict]:
    """Yield the samples of a folder; lines that are none, cut off or damaged, or lack what a task's table needs, are
    left out."""
    names = [SAMPLES, *sorted(path.name for path in folder.glob("samples.rank_*.jsonl"))]
    for name in names:
        path = folder / name
        if path.is_symlink():
            raise UserError(f"'{path}' is a link: put the file itself there")
        for record in read_json_lines(path)[0]:
            named = all(isinstance(record.get(key), str) for key in ("model", "model_digest", "task", "sample"))
            if named and type(record.get("index", 0)) is int and (task is None or is_whole(record, task)):
                yield record


NUMBERS = {  # keys that a sample of each task has, and their kinds
    "position": dict(context=int),
    "final-block": dict(context=int),
    "ruler": dict(length=int, kind=str, score=float),
    "needle": dict(length=int, kind=str, score=float),
    "harness": dict(metric=str, kind=str, score=float),
}
END = "end"  # the sample of harness that says that a task's questions are all there


def is_whole(sample: dict, task: str) -> bool:
    """Tell whether a sample has what the task's table needs: a folder may be a stranger's."""
    if task == "harness" and sample["sample"] == END:
        return True
    for key, kind in NUMBERS[task].items():
        value = sample.get(key)
        if not (_is_number(value) if kind is not str else isinstance(value, str)):
            return False
        if kind is int and not (type(value) is int and value >= 0):
            return False
    if task in ("ruler", "needle") and not 0 <= sample["score"] <= 1:
        return False
    if task == "ruler":
        return sample["kind"] in TASKS
    if task == "needle":
        return re.fullmatch(r"needle_[a-z]+_\d{1,3}(\.\d{1,6})?", sample["kind"]) is not None
    return task == "harness" or _are_ranges(sample.get("ranges"))


def _are_ranges(ranges) -> bool:
    """Tell whether something is what ``PositionRanges.records`` returns."""
    if not isinstance(ranges, list):
        return False
    for one in ranges:
        if not isinstance(one, dict) or not all(_is_number(one.get(key)) for key in ("from", "to", "tokens", "loss")):
            return False
        if any(type(one[key]) is not int for key in ("from", "to")) or one["tokens"] <= 0:
            return False
    return True


def _is_number(value) -> bool:
    return type(value) in (int, float) and abs(value) <= 1e12


def read_results(folder: Path) -> dict:
    """Return results.json. Raise UserError where there is none, or it is of something else."""
    if not (folder / RESULTS).is_file():
        started = any(folder.glob("samples.rank_*.jsonl"))
        why = "its evaluation has not ended" if started else f"it has no {RESULTS}"
        raise UserError(f"'{folder}' holds no results ({why}): name a folder that launch/evaluate.py has written")
    return _read_asked(folder / RESULTS, "run launch/evaluate.py again")


def _read_asked(path: Path, remedy: str) -> dict:
    """Return what a file says of an evaluation. Raise UserError, ending in ``remedy``, where it is damaged."""
    results = read_json(path, remedy)
    columns = results.get("columns")
    whole = isinstance(results.get("task"), str) and isinstance(columns, list)
    if not whole or not all(isinstance(one, dict) and set(one) == {*Column.__annotations__} for one in columns):
        raise UserError(f"'{path}' is damaged (it does not say the models): {remedy}")
    return results | {"columns": [Column(**{key: str(value) for key, value in one.items()}) for one in columns]}


def label_columns(asked: list[tuple[Path, str]]) -> list[str]:
    """Return a label for each (model's path, mode): the folder's name, as much of the path as tells them apart, and
    the mode where it is none that goes without saying."""
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
