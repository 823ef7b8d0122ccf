"""Compare two evaluations: the same tables, with differences over the samples that both have."""

from pathlib import Path

from inplace_ttt.config import UserError
from inplace_ttt.evaluation.kinds import END, KINDS
from inplace_ttt.evaluation.results import FIXED, Column, read_results, read_samples
from inplace_ttt.evaluation.scores import Scores


def compare(first: str, second: str) -> tuple[str, Scores, list[str]]:
    """Return the task, the table of two evaluations, and notes on how they differ.

    Args:
        first, second: a folder of results, or FOLDER:MODEL if it contains several models.

    Raises UserError if a folder has no results, or the evaluations have no common rows.
    """
    (task, a, of_a, settings), (other, b, of_b, others) = _open(first), _open(second)
    if task != other:
        raise UserError(
            f"'{first}' has results of {task} and '{second}' of {other}: name two evaluations of the same task"
        )
    labels = (a.label, b.label) if a.label != b.label else _told_apart(first, second, a.label)
    if labels[0] == labels[1]:
        raise UserError(f"'{first}' is named twice: name two evaluations")
    by_model = dict(zip(labels, (of_a, of_b), strict=True))
    notes = [
        f"{key}: {labels[0]} {_told(settings.get(key))}, {labels[1]} {_told(others.get(key))}"
        for key in FIXED
        if settings.get(key) != others.get(key)
    ]
    scores = KINDS[task].table(by_model, settings)
    alone = [{row for one in samples for row in KINDS[task].rows(one)} for samples in by_model.values()]
    if not scores.cells:
        raise UserError(
            f"'{first}' and '{second}' have no common rows: the first has {_some(alone[0])}, the second has "
            f"{_some(alone[1])}"
        )
    for label, own, rest in zip(labels, alone, reversed(alone), strict=True):
        if own - rest:
            notes.append(f"only {label} has {_some(own - rest)}")
    return task, scores, notes


def _some(names: set[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")


def _told_apart(first: str, second: str, label: str) -> tuple[str, str]:
    """Return different labels for two models of one name: with the shortest folder paths that differ."""
    parts = [Path(name.removesuffix(f":{label}")).parts for name in (first, second)]
    count = 1
    while parts[0][-count:] == parts[1][-count:] and count < max(map(len, parts)):
        count += 1
    names = ["/".join(one[-count:]) for one in parts]
    return f"{label} ({names[0]})", f"{label} ({names[1]})"


def _told(value) -> str:
    return "has none" if value is None else str(value)[:80]


def record(task: str, scores: Scores) -> dict:
    """Return a comparison as a dictionary for JSON."""
    return dict(task=task, scores=scores.records())


def _open(name: str) -> tuple[str, Column, list[dict], dict]:
    """Return (task, model, its samples, settings) of FOLDER or FOLDER:MODEL. Raises UserError if it has no samples."""
    folder, label = Path(name).expanduser(), None
    if not folder.is_dir() and ":" in name:
        before, _, label = name.partition(":")
        folder = Path(before).expanduser()
    results = read_results(folder)
    task, columns = results["task"], results["columns"]
    if task not in KINDS:
        raise UserError(f"'{folder}' has results of the unknown task {task}: use {', '.join(KINDS)}")
    chosen = [column for column in columns if label in (None, column.label)]
    if len(chosen) != 1:
        named = ", ".join(f"{folder}:{column.label}" for column in columns)
        remedy = f"use one of {named}" if named else "the folder has no models; run launch/evaluate.py again"
        raise UserError(f"'{name}' does not name one model: {remedy}")
    samples = [
        one
        for one in read_samples(folder, task)
        if one["model_digest"] == chosen[0].digest and one["sample"] != END and not one.get("left_out")
    ]
    if not samples:
        raise UserError(f"'{folder}' has no samples of '{chosen[0].label}': run launch/evaluate.py again")
    settings = results.get("settings")
    return task, chosen[0], samples, settings if isinstance(settings, dict) else {}
