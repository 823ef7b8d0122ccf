"""Compare two evaluations: the same tables, with the differences of samples that both have."""

import re
from pathlib import Path

from inplace_ttt.config import UserError
from inplace_ttt.evaluation import answering_scores, harness_scores, reading_scores
from inplace_ttt.evaluation.results import Column, read_results, read_samples
from inplace_ttt.evaluation.ruler import TASKS
from inplace_ttt.evaluation.scores import Scores

DIGITS = {"position": 4, "final-block": 4}
NUMBERS = {  # keys that a sample of each task has, and their kinds
    "position": dict(context=int),
    "final-block": dict(context=int),
    "ruler": dict(length=int, kind=str, score=float),
    "needle": dict(length=int, kind=str, score=float),
    "harness": dict(metric=str, kind=str, score=float),
}


def compare(first: str, second: str) -> tuple[str, Scores]:
    """Return the task and the table of two evaluations.

    Args:
        first, second: a folder of results, or FOLDER:MODEL where it holds those of several models.

    Raises UserError where they cannot be compared.
    """
    (task, a, of_a, source), (other, b, of_b, _) = _open(first), _open(second)
    if task != other:
        raise UserError(f"'{first}' is of {task} and '{second}' of {other}: name two evaluations of one task")
    labels = (a.label, b.label) if a.label != b.label else (f"{first}: {a.label}", f"{second}: {b.label}")
    by_model = dict(zip(labels, (of_a, of_b), strict=True))
    if len(by_model) < 2:
        raise UserError(f"'{first}' is named twice: name two evaluations")
    if task == "harness":
        scores = harness_scores.table(by_model)
    elif task in ("ruler", "needle"):
        scores = answering_scores.table(task, by_model)
    else:
        scores = reading_scores.table(task, by_model, source)
    if not scores.cells:
        raise UserError(f"'{first}' and '{second}' have nothing in common: neither a task nor a length, or a position")
    return task, scores


def record(task: str, scores: Scores) -> dict:
    """Return a comparison as JSON."""
    return dict(task=task, scores=scores.records())


def _open(name: str) -> tuple[str, Column, list[dict], str]:
    """Return (task, model, its samples, where they are from) of FOLDER or FOLDER:MODEL."""
    folder, label = Path(name).expanduser(), None
    if not folder.is_dir() and ":" in name:
        before, _, label = name.partition(":")
        folder = Path(before).expanduser()
    results = read_results(folder)
    task, columns = results["task"], results["columns"]
    if task not in NUMBERS:
        raise UserError(f"'{folder}' is of the task {task}, which is not known: use {', '.join(NUMBERS)}")
    chosen = [column for column in columns if label in (None, column.label)]
    if len(chosen) != 1:
        named = ", ".join(f"{folder}:{column.label}" for column in columns)
        raise UserError(f"'{name}' does not name one model: use one of {named}")
    samples = [one for one in read_samples(folder) if one["model_digest"] == chosen[0].digest and _is_whole(one, task)]
    if not samples:
        raise UserError(f"'{folder}' holds no samples of '{chosen[0].label}': run launch/evaluate.py again")
    settings = results.get("settings")
    source = settings.get("documents") if isinstance(settings, dict) else None
    return task, chosen[0], samples, str(source)


def _is_whole(sample: dict, task: str) -> bool:
    """Tell whether a sample has what the task's table needs: a folder may be a stranger's."""
    for key, kind in NUMBERS[task].items():
        value = sample.get(key)
        if not (_is_number(value) if kind is not str else isinstance(value, str)):
            return False
        if kind is int and not (type(value) is int and value >= 0):
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
