"""Scores of an evaluation: a mean with its interval for each row and model, and the differences to the first model."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from inplace_ttt.evaluation.statistics import MIN_SAMPLES, Interval

Row = tuple[str, ...]  # such as ("4096", "niah_single_1")


@dataclass(frozen=True)
class Scores:
    """A table: of each row and model (by its label) an interval, of each further model the difference to the first."""

    title: str
    about: str  # what was measured: the documents, the template
    names: tuple[str, ...]  # of the parts of a row
    unit: str  # of the numbers, and which direction is better
    digits: int
    cells: dict[Row, dict[str, Interval]]
    differences: dict[Row, dict[str, Interval]]

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
            interval: of a row and a label.
            difference: of a row and two labels, the second less the first; None where there is none to be had.
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
        """Return the models."""
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
        """Print the table: 95% intervals in brackets, the number of samples beside. Where the models do not fit side by
        side, each has lines of its own."""
        wide = self._table(side_by_side=True)
        needed = console.measure(wide, options=console.options.update(max_width=10_000)).maximum
        if needed > console.width:
            wide = self._table(side_by_side=False)
        console.print(wide)
        notes = []
        every = [one for others in self.differences.values() for one in others.values()]
        if every:
            notes.append("difference: second model less the first" if len(self.labels) == 2 else
                         f"difference: less {self.labels[0]}")  # fmt: skip
        if any(one.excludes_zero(self.digits) for one in every):
            notes.append("* its interval leaves out zero")
        if any(not one.paired for one in every):
            notes.append("~ the models answered different samples: not paired")
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
    """Return 77.1 [74.0, 80.2], or the mean alone where there is no interval."""
    form = f"{'+' if sign else ''}.{digits}f"
    if interval.low is None or interval.high is None:
        return f"{interval.mean:{form}}"
    return f"{interval.mean:{form}} [{interval.low:{form}}, {interval.high:{form}}]"
