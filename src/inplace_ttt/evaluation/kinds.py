"""List the kinds of evaluation: what the samples of each contain, and how they become tables and figures.

A new evaluation needs a row in ``KINDS`` here, a class that measures (``Task`` in ``task.py``) with a row in ``TASKS``
of ``evaluate.py``, and options in ``arguments.py``.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from inplace_ttt.evaluation import answering_scores, harness_scores, pictures, reading_scores
from inplace_ttt.evaluation.ruler import TASKS as RULER_TASKS
from inplace_ttt.evaluation.scores import Scores

END = "end"  # sample ID of the record that marks a harness task as complete


def _nothing(scores: Scores, folder: Path) -> list[Path]:
    """Draw no figures."""
    return []


@dataclass(frozen=True)
class Kind:
    """Describe one kind of evaluation."""

    fields: dict[str, type]  # keys that a sample must have, besides those of all samples, and their types
    is_valid: Callable[[dict], bool]  # whether the values of a sample that has all fields are possible
    table: Callable[[dict[str, list[dict]], dict], Scores]  # table of the samples by model label, and the settings
    rows: Callable[[dict], set[str]]  # names of the table rows that a sample belongs to
    draw: Callable[[Scores, Path], list[Path]] = _nothing  # draw figures into a folder, return their files
    has_end: bool = False  # a sample with the ID ``END`` and no fields marks a model's samples as complete

    def is_whole(self, sample: dict) -> bool:
        """Return True if a sample has valid values for all fields that the table needs. The file is not trusted."""
        if self.has_end and sample["sample"] == END:
            return True
        for key, kind in self.fields.items():
            value = sample.get(key)
            if not (isinstance(value, str) if kind is str else _is_number(value)):
                return False
            if kind is int and not (type(value) is int and value >= 0):
                return False
        return self.is_valid(sample)


def _is_number(value) -> bool:
    return type(value) in (int, float) and abs(value) <= 1e12


def _has_ranges(sample: dict) -> bool:
    """Return True if ``ranges`` has the form that ``PositionRanges.records`` returns."""
    ranges = sample.get("ranges")
    if not isinstance(ranges, list):
        return False
    for one in ranges:
        if not isinstance(one, dict) or not all(_is_number(one.get(key)) for key in ("from", "to", "tokens", "loss")):
            return False
        if any(type(one[key]) is not int for key in ("from", "to")) or one["tokens"] <= 0:
            return False
    return True


def _is_needle(sample: dict) -> bool:
    named = re.fullmatch(r"needle_[a-z]+_\d{1,3}(\.\d{1,6})?", sample["kind"]) is not None
    return named and 0 <= sample["score"] <= 1


def _length(sample: dict) -> set[str]:
    return {f"{sample['kind']} at {sample['length']}"}


KINDS = {
    "position": Kind(
        fields=dict(context=int),
        is_valid=_has_ranges,
        table=lambda samples, settings: reading_scores.table("position", samples, str(settings.get("documents"))),
        rows=lambda sample: {f"{one['from']}-{one['to']}" for one in sample["ranges"]},
        draw=lambda scores, folder: [pictures.draw_positions(scores, folder / "position.png")],
    ),
    "final-block": Kind(
        fields=dict(context=int),
        is_valid=_has_ranges,
        table=lambda samples, settings: reading_scores.table("final-block", samples, str(settings.get("documents"))),
        rows=lambda sample: {f"context {sample['context']}"},
        draw=lambda scores, folder: [pictures.draw_contexts(scores, folder / "final-block.png")],
    ),
    "ruler": Kind(
        fields=dict(length=int, kind=str, score=float),
        is_valid=lambda sample: sample["kind"] in RULER_TASKS and 0 <= sample["score"] <= 1,
        table=lambda samples, settings: answering_scores.table("ruler", samples, answering_scores.about(settings)),
        rows=_length,
        draw=lambda scores, folder: [
            pictures.draw_lengths(scores, folder / "ruler.png"),
            pictures.draw_tasks(scores, folder / "ruler_tasks.png"),
        ],
    ),
    "needle": Kind(
        fields=dict(length=int, kind=str, score=float),
        is_valid=_is_needle,
        table=lambda samples, settings: answering_scores.table("needle", samples, answering_scores.about(settings)),
        rows=_length,
        draw=lambda scores, folder: [pictures.draw_depths(scores, folder / "needle.png")],
    ),
    "harness": Kind(
        fields=dict(metric=str, kind=str, score=float),
        is_valid=lambda sample: True,
        table=lambda samples, settings: harness_scores.table(samples, harness_scores.about(settings)),
        rows=lambda sample: {f"{sample['kind']} ({sample['metric']})"},
        has_end=True,
    ),
}
