"""RULER's metric: which reference answers appear in what the model wrote, whatever the case of letters."""

from collections.abc import Sequence


def score(written: str, answers: Sequence[str], any_answer: bool) -> float:
    """Return the share of answers that appear, from 0 to 1; with ``any_answer`` 1 if one does."""
    found = [answer.lower() in written.lower() for answer in answers]
    return float(any(found)) if any_answer else sum(found) / len(found)
