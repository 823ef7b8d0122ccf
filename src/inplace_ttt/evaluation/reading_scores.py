"""Make the tables of loss by position and loss on the final block, from sample records."""

from inplace_ttt.evaluation.scores import Row, Scores
from inplace_ttt.evaluation.statistics import Interval, ratio_interval


def table(task: str, by_model: dict[str, list[dict]], source: str) -> Scores:
    """Return a table of losses in nats per token: one row per position range or context length, one column per model.

    A cell is the mean over all tokens of the row with its 95% interval, from a bootstrap over samples. The differences
    to the first model use the samples that both models have.

    Args:
        task: ``position`` or ``final-block``.
        by_model: sample records by model label, in the same order for all models. Rows that a model lacks are left out.
        source: description of the documents for the title.
    """
    name, rows = ("position", {}) if task == "position" else ("context", {})
    for label, samples in by_model.items():
        for sample in samples:
            for one in sample["ranges"]:
                row = (f"{one['from']}-{one['to']}" if task == "position" else str(sample["context"]),)
                rows.setdefault(row, {}).setdefault(label, {})[sample["sample"]] = (one["loss"], one["tokens"])
    # each context length of a final block is a separate sample, even of the same document

    def interval(row: Row, label: str) -> Interval:
        found = rows[row][label].values()
        return ratio_interval([loss * tokens for loss, tokens in found], [tokens for _, tokens in found])

    def difference(row: Row, first: str, second: str) -> Interval | None:
        a, b = rows[row][first], rows[row][second]
        both = [key for key in a if key in b]
        if not both:
            return None
        return ratio_interval([(b[key][0] - a[key][0]) * a[key][1] for key in both], [a[key][1] for key in both])

    title = "Loss by position" if task == "position" else "Loss on the final block"
    unit = "nats per token, lower is better"
    complete = sorted(
        (row for row in rows if len(rows[row]) == len(by_model)), key=lambda row: int(row[0].partition("-")[0])
    )
    return Scores.of(title, source, (name,), unit, 4, complete, list(by_model), interval, difference)
