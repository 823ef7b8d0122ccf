"""Score answers by RULER's metric: case-insensitive search for the reference answers in the model's output."""

from collections.abc import Sequence


def score(written: str, answers: Sequence[str], any_answer: bool) -> float:
    """Return the fraction of answers that appear in ``written``; with ``any_answer``, 1 if any appears, else 0."""
    found = [answer.lower() in written.lower() for answer in answers]
    return float(any(found)) if any_answer else sum(found) / len(found)
