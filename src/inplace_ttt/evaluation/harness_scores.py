"""Make the tables of lm-evaluation-harness, from sample records."""

from inplace_ttt.evaluation.scores import Row, Scores
from inplace_ttt.evaluation.statistics import Interval, mean_interval


def about(settings: dict) -> str:
    """Return a short description of the questions for the table's title."""
    shots, limit = settings.get("num_fewshot"), settings.get("limit")
    return f"{'default' if shots is None else shots} shots, {'all' if limit is None else limit} questions"


def table(by_model: dict[str, list[dict]], about: str) -> Scores:
    """Return the scores in percent per task or group; all questions of a group have the same weight.

    Args:
        by_model: sample records by model label. Rows that a model lacks are left out.
        about: description for the title.
    """
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
        "percent, higher is better",
        1,
        rows,
        list(by_model),
        interval,
        difference,
    )
