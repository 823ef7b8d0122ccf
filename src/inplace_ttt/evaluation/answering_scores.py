"""Make the tables of RULER and needle in a haystack, from sample records."""

from inplace_ttt.evaluation.ruler import TASKS
from inplace_ttt.evaluation.scores import Row, Scores
from inplace_ttt.evaluation.statistics import Interval, difference_interval, mean_interval, unpaired_interval

MEAN = "mean"


def about(settings: dict) -> str:
    """Return a short description of the samples for the table's title."""
    return f"{settings.get('template')} template, seed {settings.get('seed')}"


def table(task: str, by_model: dict[str, list[dict]], about: str) -> Scores:
    """Return the scores (0 to 100) per length and task (or depth), and the mean per length.

    Args:
        task: ``ruler`` or ``needle``.
        by_model: sample records by model label. Rows that a model lacks are left out.
        about: description for the title.
    """
    found: dict[Row, dict[str, dict[str, float]]] = {}
    for label, samples in by_model.items():
        for sample in samples:
            kind = sample["kind"] if task == "ruler" else sample["kind"].rsplit("_", 1)[1]
            row = str(sample["length"]), kind
            found.setdefault(row, {}).setdefault(label, {})[sample["sample"]] = 100 * sample["score"]
    rows = sorted((row for row in found if len(found[row]) == len(by_model)), key=_place)

    def groups(row: Row) -> list[Row]:
        return [one for one in rows if one[0] == row[0]] if row[1] == MEAN else [row]

    def interval(row: Row, label: str) -> Interval:
        return mean_interval([list(found[one][label].values()) for one in groups(row)])

    def difference(row: Row, first: str, second: str) -> Interval | None:
        a, b = ([found[one][label] for one in groups(row)] for label in (first, second))
        both = [[key for key in x if key in y] for x, y in zip(a, b, strict=True)]
        if all(both):
            return difference_interval([[x[key] for key in keys] for x, keys in zip(a, both, strict=True)],
                                       [[y[key] for key in keys] for y, keys in zip(b, both, strict=True)])  # fmt: skip
        return unpaired_interval([list(x.values()) for x in a], [list(y.values()) for y in b])

    lengths = list(dict.fromkeys(row[0] for row in rows))
    each = [row for length in lengths for row in [*(r for r in rows if r[0] == length), (length, MEAN)]]
    title, names = ("RULER", ("length", "task")) if task == "ruler" else ("A needle in a haystack", ("length", "depth"))
    unit = "score out of 100, higher is better"
    return Scores.of(title, about, names, unit, 1, each, list(by_model), interval, difference)


def _place(row: Row) -> tuple[int, float]:
    """Return the sort key of a row: the length, then the order of RULER's tasks, or the depth."""
    length, kind = row
    return int(length), float(TASKS.index(kind)) if kind in TASKS else float(kind)
