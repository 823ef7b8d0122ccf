"""Tables of lm-evaluation-harness, out of samples as results keep them."""

from inplace_ttt.evaluation.scores import Row, Scores
from inplace_ttt.evaluation.statistics import Interval, mean_interval


def about(settings: dict) -> str:
    """Return how the questions were asked, in some words."""
    shots, limit = settings.get("num_fewshot"), settings.get("limit")
    return f"{'the tasks own' if shots is None else shots} shots, {'all' if limit is None else limit} questions"


def table(by_model: dict[str, list[dict]], about: str) -> Scores:
    """Return the scores in per cent of samples, as results keep them; of a group all questions count alike."""
    found: dict[Row, dict[str, dict[str, float]]] = {}
    for label, samples in by_model.items():
        for sample in samples:
            row = (sample.get("group", sample["kind"]), sample["metric"])
            key = f"{sample['task']} {sample['sample']}"
            found.setdefault(row, {}).setdefault(label, {})[key] = 100 * sample["score"]
    rows = [row for row in found if len(found[row]) == len(by_model)]

    def interval(row: Row, label: str) -> Interval:
        return mean_interval([list(found[row][label].values())])

    def difference(row: Row, first: str, second: str) -> Interval | None:
        a, b = found[row][first], found[row][second]
        both = [key for key in a if key in b]
        return mean_interval([[b[key] - a[key] for key in both]]) if both else None

    return Scores.of(
        "lm-evaluation-harness",
        about,
        ("task", "metric"),
        "per cent, more is better",
        1,
        rows,
        list(by_model),
        interval,
        difference,
    )
