"""Make a table of scores: a mean with its interval for each row and model, and the differences to the first model."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from inplace_ttt.evaluation.statistics import MIN_SAMPLES, Interval

Row = tuple[str, ...]  # such as ("4096", "niah_single_1")


@dataclass(frozen=True)
class Scores:
    """Hold a table of scores: an interval per row and model label, and the difference of each model to the first."""

    title: str
    about: str  # data of the measurement, such as documents or template
    names: tuple[str, ...]  # column names of the parts of a row
    unit: str  # unit of the scores, and which direction is better
    digits: int  # decimal places
    cells: dict[Row, dict[str, Interval]]  # by row and model label
    differences: dict[Row, dict[str, Interval]]  # model minus first model, by row and label of the other models

    @classmethod
    def of(
        cls,
        title: str,
        about: str,
        names: tuple[str, ...],
        unit: str,
        digits: int,
        rows: Sequence[Row],
        labels: Sequence[str],
        interval: Callable[[Row, str], Interval],
        difference: Callable[[Row, str, str], Interval | None],
    ) -> "Scores":
        """Compute all cells.

        Args:
            interval: returns the interval of a row and a label.
            difference: returns the interval of second minus first model for a row and two labels; None if they have no
                common samples.
        """
        cells = {row: {label: interval(row, label) for label in labels} for row in rows}
        others: dict[Row, dict[str, Interval]] = {row: {} for row in rows}
        for row in rows:
            for label in labels[1:]:
                found = difference(row, labels[0], label)
                if found is not None:
                    others[row][label] = found
        return cls(title, about, names, unit, digits, cells, others)

    @property
    def labels(self) -> list[str]:
        """Return the labels of the models."""
        return list(next(iter(self.cells.values()), {}))

    def records(self) -> list[dict]:
        """Return the cells for results.json."""
        found = []
        for row, cells in self.cells.items():
            for label, interval in cells.items():
                record = {
                    name: int(part) if part.isdigit() else part for name, part in zip(self.names, row, strict=True)
                }
                record |= {"model": label, "mean": interval.mean, "low": interval.low, "high": interval.high}
                record["samples"] = interval.samples
                other = self.differences[row].get(label)
                if other is not None:
                    record["difference_to_first"] = asdict(other) | {"excludes_zero": other.excludes_zero(self.digits)}
                found.append(record)
        return found

    def show(self, console: Console) -> None:
        """Print the table, with 95% intervals in brackets.

        If the models do not fit in the console's width side by side, each model gets its own lines.
        """
        wide = self._table(side_by_side=True)
        needed = console.measure(wide, options=console.options.update(max_width=10_000)).maximum
        if needed > console.width:
            wide = self._table(side_by_side=False)
        console.print(wide)
        notes = []
        every = [one for others in self.differences.values() for one in others.values()]
        if every:
            notes.append("difference: second model minus first" if len(self.labels) == 2 else
                         f"difference: model minus {self.labels[0]}")  # fmt: skip
        if any(one.excludes_zero(self.digits) for one in every):
            notes.append("* interval excludes zero")
        if any(not one.paired for one in every):
            notes.append("~ not paired: the models answered different samples")
        if any(one.low is None for cells in self.cells.values() for one in cells.values()):
            notes.append(f"no intervals below {MIN_SAMPLES} samples")
        if notes:
            console.print("; ".join(notes), highlight=False, markup=False)

    def _table(self, side_by_side: bool) -> Table:
        heading = escape(f"{self.title}: {self.about} ({self.unit}, 95% intervals)")
        table = Table(title=heading, title_justify="left")
        compared = len(self.labels) > 1
        for name in self.names:
            table.add_column(name, justify="right", no_wrap=True)
        if not side_by_side:
            table.add_column("model", overflow="fold")
        table.add_column("samples", justify="right", no_wrap=True)
        for label in self.labels if side_by_side else ["mean"]:
            table.add_column(escape(label), justify="right", overflow="fold")
        if side_by_side:
            for label in self.labels[1:]:
                table.add_column(
                    "difference" if len(self.labels) == 2 else escape(f"{label}, difference"), justify="right"
                )
        elif compared:
            table.add_column("difference", justify="right")
        for row, cells in self.cells.items():
            if side_by_side:
                counts = sorted({interval.samples for interval in cells.values()})
                words = [*row, "/".join(map(str, counts)), *(shown(cells[label], self.digits) for label in self.labels)]
                table.add_row(*words, *(self._difference(row, label) for label in self.labels[1:]))
                continue
            for number, label in enumerate(self.labels):
                words = [*(row if number == 0 else [""] * len(row)), escape(label), str(cells[label].samples)]
                words.append(shown(cells[label], self.digits))
                table.add_row(*words, *([self._difference(row, label)] if compared else []),
                              end_section=number == len(self.labels) - 1)  # fmt: skip
        return table

    def _difference(self, row: Row, label: str) -> str:
        other = self.differences[row].get(label)
        if other is None:
            return ""
        mark = " *" if other.excludes_zero(self.digits) else ""
        return shown(other, self.digits, sign=True) + mark + ("" if other.paired else " ~")


def shown(interval: Interval, digits: int, sign: bool = False) -> str:
    """Return an interval as text, such as 77.1 [74.0, 80.2]; only the mean if it has no bounds."""
    form = f"{'+' if sign else ''}.{digits}f"
    if interval.low is None or interval.high is None:
        return f"{interval.mean:{form}}"
    return f"{interval.mean:{form}} [{interval.low:{form}}, {interval.high:{form}}]"
